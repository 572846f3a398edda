"""Signs of reward hacking, in synthetic runs and in runs that are healthy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_jax.run.hacking import HackingCallback, signs_of_hacking

STEPS = 60


def synthetic(seed: int = 0, **slopes: tuple[float, float]) -> list[dict[str, float]]:
    """A run whose metrics go from one value to another along a line, with noise of 0.03 (of lengths: 3 tokens)."""
    rng = np.random.default_rng(seed)
    steps = []
    for number in range(STEPS):
        share = number / (STEPS - 1)
        step = {name: (1 - share) * start + share * end for name, (start, end) in slopes.items()}
        noisy = {name: value + rng.normal(0, 3 if "length" in name else 0.03) for name, value in step.items()}
        spreads = {f"{name.removesuffix('/mean')}/std": 0.4 for name in slopes if name.startswith("rewards/")}
        steps.append(noisy | spreads)
    return steps


def evaluated(*accuracies: float, problems: int = 500) -> list[dict[str, Any]]:
    return [{"step": 20 * number, "accuracy": value, "problems": problems} for number, value in enumerate(accuracies)]


RISING = {"reward/mean": (0.3, 0.7), "completions/mean_length": (100, 110)}
FALLING = {"rewards/right/mean": (0.5, 0.3), "rewards/format/mean": (0.1, 0.9)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("slopes", "evaluations", "kinds"),
    [
        (RISING, evaluated(0.3, 0.5, 0.7), set()),
        (RISING, evaluated(0.3, 0.5, 0.48), set()),  # within chance
        (RISING, evaluated(0.3, 0.5, 0.35), {"accuracy"}),
        (RISING, evaluated(0.3, 0.5, 0.35, problems=20), set()),
        ({"reward/mean": (0.3, 0.3)}, evaluated(0.3, 0.5, 0.35), set()),  # nothing was gained
        (RISING | {"rewards/right/mean": (0.1, 0.5), "rewards/format/mean": (0.5, 0.9)}, [], set()),
        (RISING | FALLING, [], {"component"}),
        (RISING | FALLING | {"rewards/right/mean": (0.5, 0.45)}, [], set()),  # a little of the spread of 0.4
        (RISING | {"completions/mean_length": (100, 300)}, evaluated(0.5, 0.5), {"length"}),
        (RISING | {"completions/mean_length": (100, 300)}, evaluated(0.3, 0.7), set()),  # longer, and better
        (RISING | FALLING | {"completions/mean_length": (100, 300)}, evaluated(0.6, 0.3), {"accuracy", "component", "length"}),
    ],
)
def test_signs_of_synthetic_runs(slopes: dict[str, Any], evaluations: list[Any], kinds: set[str], seed: int) -> None:
    assert set(signs_of_hacking(synthetic(seed, **slopes), evaluations)) == kinds


def test_the_first_steps_say_nothing_and_missing_numbers_are_no_change() -> None:
    steps = synthetic(**RISING, **FALLING)
    assert signs_of_hacking(steps[:19], evaluated(0.6, 0.1)) == {}
    without = [{**step, "rewards/right/mean": math.nan} for step in steps]
    assert signs_of_hacking(without, []) == {}


def test_each_kind_is_said_once_with_its_numbers_also_after_a_resume() -> None:
    steps, said = synthetic(**RISING), list[str]()
    display: Any = SimpleNamespace(warning=said.append)
    before = {one["step"]: one for one in evaluated(0.3, 0.5)}
    callback = HackingCallback(display)
    folder = SimpleNamespace(history=lambda: steps[:30], evaluations=lambda: before)
    callback.on_train_begin(SimpleNamespace(folder=folder))  # pyright: ignore[reportArgumentType]
    for number in range(30, STEPS):
        callback.on_step_end(SimpleNamespace(steps_done=number + 1), steps[number], None)  # pyright: ignore[reportArgumentType]
    assert said == []
    for step in (60, 61):
        metrics = {"accuracy": 0.35, "problems": 500}
        callback.on_evaluate(SimpleNamespace(steps_done=step), metrics)  # pyright: ignore[reportArgumentType]
    (line,) = said
    first, last = (np.mean([step["reward/mean"] for step in part]) for part in (steps[:10], steps[-10:]))
    assert line.startswith(
        f"step 60: this may be reward hacking: the reward rose from {first:.3g} to {last:.3g}, and held-out accuracy fell from "
        "50.0% (step 20) to 35.0% (step 60, 500 problems). "
    )
