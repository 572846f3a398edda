"""What `plan` counts of reward models: bytes by hand, the largest batch, and a plan with one against a plan without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_runs
from plain_oracles import quick_compiling

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.abstract import Placement, device_bytes
from grpo_jax.fit.reward_memory import reward_shapes
from grpo_jax.models.spec import ModelError
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.tools.plan import make_plan

D, F, KV, V, LAYERS = 32, 48, 16, 261, 2
PARAMETERS = V * D + D + LAYERS * (2 * D * D + 2 * D * KV + 3 * D * F + 2 * D)
"""By hand, of the tiny model's config.json: embedding and last norm; per layer q and o, k and v, the feed-forward, two norms."""


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A folder with nothing but config.json: a plan reads no weights."""
    shape = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(tiny_runs.CONFIG | shape))
    return tmp_path


def settings(folder: Path, entries: list[Any]) -> Config:
    train = {"prompts_per_step": 2, "micro_batch_tokens": 32}
    return tiny_runs.config_of(folder / "run", rewards={"functions": entries}, train=train)


def test_weights_and_the_largest_batch_are_those_of_the_settings(judge: Path) -> None:
    placement = Placement(None, jax.devices()[0])
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        entry = {"name": "reward_model", "path": str(judge), "dtype": dtype}
        (shapes,) = reward_shapes(settings(judge, [entry, "number_match"]), placement, no_announcement)
        assert device_bytes(shapes.variables) == size * PARAMETERS + 4 * D  # the score is float32
        assert [x.shape for x in shapes.batch] == [(8, 64), (8,), (8,)]  # 2 prompts times 4; 8 + 8 tokens, 64 at least
    assert reward_shapes(settings(judge, ["number_match"]), placement, no_announcement) == ()


def test_what_is_no_reward_model_is_named(judge: Path) -> None:
    placement = Placement(None, jax.devices()[0])
    with pytest.raises(ConfigError, match=r"rewards\.functions\[0\]: reward_model has no argument paht; did you mean path"):
        reward_shapes(settings(judge, [{"name": "reward_model", "paht": "x"}]), placement, no_announcement)
    with pytest.raises(ModelError, match=r"architectures is none: a reward model is a \.\.\.ForSequenceClassification"):
        reward_shapes(settings(judge, [{"name": "reward_model", "path": str(tiny_runs.tiny_model())}]), placement, no_announcement)


@pytest.mark.slow
def test_a_plan_has_the_reward_model_in_every_phase(judge: Path) -> None:
    with quick_compiling():
        entry = {"name": "reward_model", "path": str(judge)}
        found, without = (make_plan(settings(judge, entries), "cpu").verdict for entries in ([entry], ["number_match"]))
    weights = 4 * PARAMETERS + 4 * D
    for use in (found.update, found.rollout.use):
        assert use.components["reward_models"] == weights
    assert found.update.peak_bytes == without.update.peak_bytes + weights
    assert found.rollout.use.peak_bytes >= without.rollout.use.peak_bytes + weights
    assert without.update.components["reward_models"] == 0
