"""Runs with several updates a step: what is counted and reported, and that the presets' clipping acts. Settings that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import B, G, config_of, expected_advantages, records, run

from grpo_jax.config import ConfigError, config_from_dict


@pytest.mark.slow
def test_a_run_with_two_updates_a_step_clips_and_reports_the_whole_step(tmp_path: Path) -> None:
    done = run(config_of(tmp_path, objective={"preset": "gspo"}, train={"prompts_per_step": 2 * B, "updates_per_rollout": 2}))
    steps = records(tmp_path / "metrics.jsonl")
    assert len(steps) == 2
    for number, step in enumerate(steps, start=1):
        rows = done.completions[number]
        rewards = np.array([row["rewards"]["letters"] for row in rows])
        assert len(rows) == 2 * B * G
        assert step["reward/mean"] == pytest.approx(rewards.mean(), abs=1e-6)
        assert step["reward/std"] == pytest.approx(rewards.std(ddof=1), abs=1e-6)
        np.testing.assert_allclose([row["advantage"] for row in rows], expected_advantages(rewards), atol=1e-4)
        assert step["clip_ratio/region"] > 0.05  # with one update a step the ratio is 1, and nothing is clipped
        assert step["update/skipped"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"updates_per_rollout": 3}}, r"train.updates_per_rollout is 3: use a divisor of train.prompts_per_step \(8\)"),
        ({"train": {"updates_per_rollout": 0}}, "train.updates_per_rollout is 0"),
        ({"train": {"updates_per_rollout": 2, "micro_batch_prompts": 8}}, r"a divisor of .* / train.updates_per_rollout \(4\)"),
        (
            {"train": {"updates_per_rollout": 2}, "objective": {"kl_in_reward": True}},
            "train.updates_per_rollout is 2: use 1 with objective.kl_in_reward",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(settings)
