"""A reference that changes: the mean of weights against NumPy, which reference an update sees, and settings that cannot be."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling
from tiny_runs import additions, arrays, config_of, letters, records, tiny_model

import grpo_jax as gx
from grpo_jax.config import ConfigError, config_from_dict
from grpo_jax.fit.abstract import Placement, abstract_policy
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.phases import RunShapes
from grpo_jax.learner.reference import moved_reference
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.weights.hf import read_folder_spec


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_the_reference_becomes_a_mean_of_itself_and_the_policy(mix: float) -> None:
    rng = np.random.default_rng(0)
    old, new = ({"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for _ in range(2))
    given = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (old, new)]
    moved = moved_reference(given[0], given[1], mix)
    for name, array in moved.items():
        np.testing.assert_allclose(array, mix * new[name] + (1 - mix) * old[name], rtol=1e-6)
        assert array is not given[1][name]  # an update takes the memory of both


@pytest.mark.parametrize(
    ("every", "rank"), [pytest.param(1, 4, id="adapters"), pytest.param(2, 0, id="every weight", marks=pytest.mark.slow)]
)
def test_a_reset_reference_is_the_policy_in_the_next_step(every: int, rank: int, tmp_path: Path) -> None:
    """The KL divergence of a step is to the reference before its update: 0 after each reset, above 0 in between."""
    train = {"steps": 3, "reference_every": every}
    config = config_of(tmp_path, objective={"beta": 0.1}, train=train, lora={"rank": rank} if rank else {"rank": 0, "alpha": 16.0})
    with quick_compiling(), gx.Trainer(config, dataset=additions(), reward_funcs=letters) as trainer:
        trainer.train()
        state = trainer.state
    divergences = [step["kl_divergence"] for step in records(tmp_path / "metrics.jsonl")]
    assert [abs(kl) < 1e-9 for kl in divergences] == ([True, True, True] if every == 1 else [True, False, True])
    same = [np.array_equal(x, y) for x, y in zip(arrays(state.reference).values(), arrays(state.trainable).values(), strict=True)]
    assert all(same) == (every == 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"reference_every": 0}}, "train.reference_every is 0: use a number of steps"),
        ({"train": {"reference_every": 2, "reference_mix": 0.0}}, "train.reference_mix is 0.0: use a share above 0"),
        ({"train": {"reference_mix": 0.5}}, "train.reference_mix is 0.5: leave it out, or also set train.reference_every"),
        (
            {"train": {"reference_every": 2}, "objective": {"beta": 0.0}},
            "train.reference_every is 2: leave it out, or use objective.beta",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(settings)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_plan_counts_the_copy_that_changes(rank: int, tmp_path: Path) -> None:
    """A float32 copy of what is trained, next to the weights that training started from."""

    def resident(**train: int) -> tuple[dict[str, int], int]:
        lora = {"rank": rank, "alpha": 8.0} if rank else {"rank": 0, "alpha": 16.0}
        config = config_of(tmp_path, objective={"beta": 0.1}, lora=lora, train=train)
        placement, spec = Placement(None, jax.devices()[0]), read_folder_spec(tiny_model())
        policy = abstract_policy(config, tiny_model(), spec, placement)
        learner, _ = grpo_learner(config, policy, 64)
        run = RunShapes.of(config, policy, placement, learner, (), no_announcement)
        return run.resident, sum(leaf.size for leaf in jax.tree.leaves(run.state.trainable))

    (fixed, _), (moving, trained) = resident(), resident(reference_every=2)
    assert moving == fixed | {"reference": fixed["reference"] + 4 * trained}
