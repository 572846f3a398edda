"""Summarizes a run: first and last means of its metrics, versions and devices."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax import __version__
from grpo_jax.run.records import plain

AVERAGED_STEPS = 10
"""The first and last values of a metric are means over this many steps."""


def summarize(history: Sequence[Mapping[str, Any]], results: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the content of summary.json.

    Args:
        history: metrics of each step.
        results: of the run, in the order in which they are written.
        extras: more values that JSON can hold.

    Returns:
        The results; `skipped_steps`, those without an update because loss or gradient was not finite;
        `zero_gradient_steps`, those without one because nothing could be learnt; `reward_first`, `reward_last`,
        `kl_divergence_last`, `loss_first` and `loss_last` where there is such a metric; the extras, versions and devices.
    """
    import jax

    first, last = history[:AVERAGED_STEPS], history[-AVERAGED_STEPS:]
    means = {
        "reward_first": _mean(first, "reward/mean"),
        "reward_last": _mean(last, "reward/mean"),
        "kl_divergence_last": _mean(last, "kl_divergence"),
        "loss_first": _mean(first, "loss"),
        "loss_last": _mean(last, "loss"),
    }
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return plain(
        {
            **results,
            "skipped_steps": sum(bool(record.get("update/skipped")) for record in history),
            "zero_gradient_steps": sum(bool(record.get("update/zero_gradient")) for record in history),
            **{name: value for name, value in means.items() if value is not None},
            **extras,
            "versions": versions | {"grpo_jax": __version__},
            "devices": [device.device_kind for device in jax.devices()],
        }
    )


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Averages the finite values of a metric; None where there are none."""
    values = [record[name] for record in records if name in record and math.isfinite(record[name])]
    return sum(values) / len(values) if values else None
