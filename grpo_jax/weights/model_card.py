"""The model card of an export, README.md: base, data, rewards, settings, curves, results, and how to load it.

Paths of this machine are not shown: of a folder its name stands there alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo_jax import __version__
from grpo_jax.config import Config, LoraConfig, config_to_dict
from grpo_jax.runtime.digests import add_digests
from grpo_jax.runtime.files import replacing
from grpo_jax.weights.usage import Kind, usage_lines

CARD, CURVES = "README.md", "curves.png"
HERE = "."
"""The export, in lines of its own card where it was not uploaded."""

RESULTS = {
    "accuracy_before": "held-out accuracy before",
    "accuracy_after": "held-out accuracy after",
    "held_out_problems": "held-out problems",
    "reward_first": "mean reward, first 10 steps",
    "reward_last": "mean reward, last 10 steps",
    "kl_divergence_last": "KL to the reference, last 10 steps (nats per token)",
    "loss_last": "loss, last 10 steps",
    "steps": "steps",
    "seconds": "seconds of training",
}
"""Value of summary.json → what the card calls it."""

KEPT_APART = ("model", "data", "rewards", "mesh", "distributed")
"""Sections that the card does not list with the settings: they stand elsewhere, or concern this machine."""
LOCAL = ("run_dir", "compilation_cache")


@dataclass(frozen=True)
class RunFacts:
    """What a card says of a run.

    Attributes:
        config: its settings.
        summary: of summary.json; {} where the run has not ended.
        curves: its picture, where there is one.
        tags: for the hub, in addition to those that every card has.
    """

    config: Config
    summary: dict[str, Any] = field(default_factory=dict)
    curves: Path | None = None
    tags: tuple[str, ...] = ()

    @staticmethod
    def of(run_dir: str | Path) -> RunFacts:
        """Reads them from a run folder."""
        folder = Path(run_dir)
        config, summary, curves = Config.from_yaml(folder / "config.yaml"), folder / "summary.json", folder / CURVES
        return RunFacts(
            config, json.loads(summary.read_text("utf-8")) if summary.is_file() else {}, curves if curves.is_file() else None
        )


def write_card(
    folder: Path, base: str, lora: LoraConfig | None, kind: Kind, facts: RunFacts | None = None, repo: str | None = None
) -> None:
    """Writes README.md into an export, and the run's curves next to it, and adds them to its digests.

    Args:
        base: path or hub id of the model that training started from.
        lora: of its adapters; None where every weight was trained.
        facts: of its run; None writes a card without them.
        repo: hub id that the export gets; None is not uploaded.
    """
    if facts is not None and facts.curves is not None:
        shutil.copyfile(facts.curves, folder / CURVES)
    with replacing(folder / CARD) as unfinished:
        unfinished.write_text(card_text(base, lora, kind, facts, repo), encoding="utf-8", errors="backslashreplace")
    add_digests(folder, [name for name in (CARD, CURVES) if (folder / name).is_file()])


def card_text(model: str, lora: LoraConfig | None, kind: Kind, facts: RunFacts | None, repo: str | None) -> str:
    """The whole card."""
    base, own = public(model), repo or HERE
    name = (repo or f"{Path(base).name}-grpo").rsplit("/", 1)[-1]
    adapted = f"{'DoRA' if lora.use_dora else 'LoRA'}, rank {lora.rank}, alpha {lora.alpha:g}" if lora else "every weight trained"
    what = {"adapter": "PEFT adapter", "merged": "whole model", "gguf": "GGUF file", "gguf-lora": "GGUF LoRA"}[kind]
    method = "Trained" if facts is None else "Trained with GRPO (https://arxiv.org/abs/2402.03300)"
    text = front_matter(model, kind, facts)
    text += f"# {name}\n\n{method} by grpo_jax {__version__} from `{base}`: {adapted}. {what}.\n"
    if facts is not None:
        text += run_text(facts)
    return text + loading_text(kind, own, base, name, lora)


def front_matter(base: str, kind: Kind, facts: RunFacts | None) -> str:
    """What the hub reads: YAML between two lines."""
    values: dict[str, Any] = {"library_name": {"adapter": "peft", "merged": "transformers"}.get(kind, "gguf")}
    values |= {"pipeline_tag": "text-generation"} if kind != "gguf-lora" else {}
    values |= {"base_model": base} if is_hub_id(base) else {}
    data = None if facts is None else facts.config.data.path
    values |= {"datasets": [data]} if data is not None and is_hub_id(data) else {}
    tags = ["grpo", "grpo_jax", *(["lora"] if kind in ("adapter", "gguf-lora") else []), *(facts.tags if facts else ())]
    values["tags"] = list(dict.fromkeys(tags))
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n"


def run_text(facts: RunFacts) -> str:
    """Data, rewards, results, curves and settings of a run."""
    config, lines = facts.config, list[str]()
    data = "rows given in Python" if config.data.path is None else f"`{public(config.data.path)}`, split `{config.data.split}`"
    lines += ["", "## Data and rewards", "", f"- prompts: {data}"]
    weights = config.rewards.weights or [1.0] * len(config.rewards.functions)
    for function, weight in zip(config.rewards.functions, weights, strict=False):
        lines.append(f"- reward: `{reward_name(function)}`, weight {weight:g}")
    if not config.rewards.functions:
        lines.append("- reward: functions given in Python")
    found = {said: facts.summary[key] for key, said in RESULTS.items() if facts.summary.get(key) is not None}
    if found:
        lines += ["", "## Results", "", "| | |", "|---|---|", *(f"| {said} | {spelled(value)} |" for said, value in found.items())]
    if facts.curves is not None:
        lines += ["", f"![curves of the run]({CURVES})"]
    return "\n".join([*lines, "", "## Settings", "", "```yaml", changed_settings(config).rstrip(), "```", ""])


def loading_text(kind: Kind, own: str, base: str, name: str, lora: LoraConfig | None) -> str:
    """How to load and serve the export."""
    serve, *_ = usage_lines(kind, own, name=name, base=base, lora=lora)
    code = {
        "adapter": [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{own}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{own}")',
        ],
        "merged": [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{own}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{own}")',
        ],
    }.get(kind)
    parts = ["", "## Loading", ""]
    if code is not None:
        title = "PEFT and transformers" if kind == "adapter" else "transformers"
        parts += [f"With {title}:", "", "```python", *code, "```", "", "With vLLM:", ""]
    return "\n".join([*parts, "```sh", serve, "```", ""])


def changed_settings(config: Config) -> str:
    """YAML of the settings that differ from the defaults, without those of `KEPT_APART` and `LOCAL`."""
    default, now = config_to_dict(Config()), config_to_dict(config)
    changed = {
        section: {name: value for name, value in values.items() if value != default[section].get(name) and name not in LOCAL}
        for section, values in now.items()
        if section not in KEPT_APART
    }
    changed["lora"] = {name: value for name, value in asdict(config.lora).items() if name != "adapter"}
    return yaml.safe_dump({section: values for section, values in changed.items() if values}, sort_keys=False)


def is_hub_id(path: str) -> bool:
    """Whether a path names a repository of the hub and no folder here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def public(path: str) -> str:
    """A hub id as it is, and of a path on this machine the last part."""
    return path if is_hub_id(path) else Path(path).name


def reward_name(function: str | dict[str, Any]) -> str:
    """The name of a reward function, without the folder of its file."""
    name = str(function["name"]) if isinstance(function, dict) else function
    return name.rsplit("/", 1)[-1]


def spelled(value: Any) -> str:
    """A number for the table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
