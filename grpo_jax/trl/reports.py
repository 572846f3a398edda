"""What TRL's scripts write next to the model: metrics as JSON and on the terminal, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.policy import Policy
from grpo_jax.run.records import plain
from grpo_jax.runtime.safe_text import safe_text
from grpo_jax.weights.model_card import CARD, RunFacts, card_text


def metrics_text(split: str, metrics: Mapping[str, Any]) -> str:
    """Metrics as a block of lines, sorted by name, under their split."""
    shown = {name: f"{value:.4f}" if isinstance(value, float) else safe_text(str(value)) for name, value in metrics.items()}
    width, longest = max(map(len, shown), default=0), max(map(len, shown.values()), default=0)
    lines = [f"  {name:<{width}} = {shown[name]:>{longest}}" for name in sorted(shown)]
    return "\n".join([f"***** {split} metrics *****", *lines])


def write_metrics(folder: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> None:
    """Writes metrics to SPLIT_results.json, and with `combined` adds them to all_results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{split}_results.json": dict(metrics)}
    every = folder / "all_results.json"
    if combined:
        before = json.loads(every.read_text("utf-8")) if every.is_file() else {}
        files[every] = {**before, **metrics}
    for path, values in files.items():
        path.write_text(json.dumps(plain(values), indent=4, sort_keys=True) + "\n", encoding="utf-8")


def write_model_card(folder: Path, policy: Policy, facts: RunFacts | None, repo: str) -> None:
    """Writes README.md for what `save_model` has written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "merged" if policy.adapters is None else "adapter"
    text = card_text(policy.name, policy.lora, kind, facts, repo)
    (folder / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
