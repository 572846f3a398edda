"""How each tracker is started and called. A tracker's package is imported when a run asks for it.

The environment variables of each tracker choose the server and, without `train.project`, the project. A run that resumes in the
same folder continues its run there. Texts of a model are sent as plain values of a table, with control characters spelled out,
never as markup.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, config_to_dict
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.run.records import plain
from grpo_jax.runtime.safe_text import safe_text

PROJECT = "grpo_jax"
"""The project where the tracker's environment variable names none."""

MOST_ROWS = 256
"""A table has at most the first so many completions of a step."""

MLFLOW_PARAMS, MLFLOW_CHARACTERS = 100, 500
"""Parameters of one request to MLflow, and characters of one value: its limits."""


TABLE_FILE = "completions.json"
"""The artifact of MLflow that tables are appended to, each row with its step."""


@dataclass(frozen=True)
class Table:
    """Completions of a step.

    Attributes:
        columns: names.
        rows: a value for each column: text, a number or None.
    """

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Tracker:
    """One run of a tracker.

    Attributes:
        name: as `train.track` has it.
        log: (step, values by name): numbers, texts and lists.
        finish: ends the run.
        log_table: (step, completions); None where the tracker has no tables of texts.
    """

    name: str
    log: Callable[[int, Mapping[str, Any]], Any]
    finish: Callable[[], Any]
    log_table: Callable[[int, Table], Any] | None = None


def completion_table(completions: StepCompletions) -> Table:
    """The completions of a step as a table."""
    names = list(completions.rewards)
    rows = [
        [
            safe_text(_prompt_text(completions.prompts[row * len(completions.prompts) // len(completions.texts)])),
            safe_text(completions.texts[row]),
            *(plain(completions.rewards[name][row]) for name in names),
            plain(completions.advantages[row]),
            str(completions.finish_reasons[row]),
        ]
        for row in range(min(len(completions.texts), MOST_ROWS))
    ]
    return Table(["prompt", "completion", *(f"rewards/{name}" for name in names), "advantage", "finish_reason"], rows)


def start_wandb(config: Config, folder: Path) -> Tracker:
    """Starts a run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and others are its own."""
    import wandb  # pyright: ignore[reportMissingImports] - an extra

    options: dict[str, Any] = {} if config.train.project is None else {"project": config.train.project}
    options |= {"id": identity(folder), "name": config.train.run_name or folder.name, "dir": str(folder)}
    run = wandb.init(config=config_to_dict(config), resume="allow", **options)

    def log_table(step: int, table: Table) -> None:
        run.log({"completions": wandb.Table(columns=table.columns, data=table.rows)}, step=step)

    return Tracker("wandb", lambda step, values: run.log(dict(values), step=step), run.finish, log_table)


def start_trackio(config: Config, folder: Path) -> Tracker:
    """Starts a run of trackio, in the project TRACKIO_PROJECT; its name tells folders apart, since trackio resumes by name.

    A `train.run_name` that another folder has too continues that folder's run.
    """
    import trackio  # pyright: ignore[reportMissingImports] - an extra

    project = config.train.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
    name = config.train.run_name or identity(folder)
    run = trackio.init(project=project, name=name, config=flat_settings(config), resume="allow", embed=False)

    def log_table(step: int, table: Table) -> None:
        run.log({"completions": trackio.Table(columns=table.columns, data=table.rows)}, step=step)

    return Tracker("trackio", lambda step, values: run.log(numbers(values), step=step), run.finish, log_table)


def start_mlflow(config: Config, folder: Path) -> Tracker:
    """Starts a run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME at MLFLOW_TRACKING_URI."""
    import mlflow  # pyright: ignore[reportMissingImports] - an extra
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports] - an extra

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # which every table would draw
    client = mlflow.MlflowClient()
    name = config.train.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(name)
    tag = hashlib.sha256(identity(folder).encode()).hexdigest()
    found = client.search_runs([number], filter_string=f"tags.grpo_jax_folder = '{tag}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(number, run_name=config.train.run_name or folder.name, tags={"grpo_jax_folder": tag}).info.run_id
        # A parameter cannot be changed later, so that they are those of the first start.
        params = [Param(key, str(value)[:MLFLOW_CHARACTERS]) for key, value in flat_settings(config).items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            client.log_batch(run_id, params=params[start : start + MLFLOW_PARAMS])

    def log(step: int, values: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. :/]", "_", key), value, now, step) for key, value in numbers(values).items()]
        client.log_batch(run_id, metrics=metrics)

    def log_table(step: int, table: Table) -> None:
        columns = {name: [row[index] for row in table.rows] for index, name in enumerate(table.columns)}
        client.log_table(run_id, {"step": [step] * len(table.rows), **columns}, TABLE_FILE)

    return Tracker("mlflow", log, lambda: client.set_terminated(run_id), log_table)


TRACKERS: dict[str, tuple[Callable[[Config, Path], Tracker], str, str]] = {
    "wandb": (start_wandb, "track", "run wandb login, or set WANDB_MODE=offline"),
    "trackio": (start_trackio, "trackio", "see TRACKIO_DIR, TRACKIO_SPACE_ID"),
    "mlflow": (start_mlflow, "mlflow", "see MLFLOW_TRACKING_URI"),
}
"""How each tracker starts, the extra that installs it, and what to do where it does not start."""


def identity(folder: Path) -> str:
    """The same text for the same folder: a resumed run continues the same run of the tracker."""
    return str(folder.resolve()).strip("/").replace("/", "-")[-120:]


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its full name."""
    sections = config_to_dict(config)
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _prompt_text(prompt: Any) -> str:
    """A prompt as plain text; messages are separated by blank lines and begin with their role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
