"""Compares runs: one page with the curves of all, their results, and the settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show
from grpo_jax.run.report.content import evaluations, head, settings_of
from grpo_jax.run.report.page import COMPARE_SCRIPTS, page
from grpo_jax.run.report.reading import RunReader
from grpo_jax.run.report.sampling import curves
from grpo_jax.runtime.files import replacing

PLACES = ("train.run_dir",)
"""Settings that differ in any two runs."""

MISSING = "not a setting"


def compare(run_dirs: Sequence[str], out: str) -> list[str]:
    """Writes the page of several runs.

    Args:
        run_dirs: their folders, at least two.
        out: path of the page.

    Returns:
        What to print: each setting that differs, and where the page is.

    Raises:
        RunFolderError: a folder holds no run.
        ConfigError: there is only one run.
    """
    if len(run_dirs) < 2:
        raise ConfigError(f"only one run is given ({run_dirs[0]}): give two or more; grpo-jax report shows one")
    readers = [RunReader.open(run_dir) for run_dir in run_dirs]
    for reader in readers:
        reader.refresh()
    settings = [settings_of(reader) for reader in readers]
    runs = [
        {"head": head(reader, own), "curves": curves(reader.metrics), "evaluations": evaluations(reader)}
        for reader, own in zip(readers, settings, strict=True)
    ]
    differing = differing_settings(settings)
    path = Path(out).expanduser()
    made = page(f"{len(runs)} runs · grpo-jax", COMPARE_SCRIPTS, {"runs": runs, "differing": differing})
    with replacing(path) as unfinished:
        unfinished.write_text(made, encoding="utf-8")
    lines = [f"{entry['name']}: {' | '.join(show(value) for value in entry['values'])}" for entry in differing]
    return [*(lines or ["the settings are the same"]), f"wrote {path}"]


def differing_settings(settings: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, apart from the run folder.

    Args:
        settings: of each run, as `settings_of` returns them.

    Returns:
        `name` and `values`, one a run; `MISSING` where a run, of another version, has no such setting.
    """
    values = [{entry["name"]: entry["value"] for entry in own} for own in settings]
    names = dict.fromkeys(name for own in values for name in own if name not in PLACES)
    rows = [{"name": name, "values": [own.get(name, MISSING) for own in values]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]
