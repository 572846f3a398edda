"""An error that ends a run: the state of the last finished step is saved if it is intact, and the error names the step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import additions, assert_same_arrays, config_of, letters

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.rewards import RewardError

ROWS = additions()


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


def failing(at: int) -> Any:
    """The reward of `letters`, of which all calls from that number on raise."""
    calls = itertools.count(1)

    @functools.wraps(letters)
    def wrapper(completions: list[str]) -> list[float]:
        if next(calls) >= at:
            raise RuntimeError("the judge fell over")
        return letters(completions)

    return wrapper


def train(folder: Path, reward: Any = letters, **given: Any) -> gx.TrainResult:
    return gx.train(config_of(folder, train={"steps": 4}), dataset=ROWS, reward_funcs=reward, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> gx.TrainResult:
    return train(tmp_path_factory.mktemp("whole"))


def test_a_reward_that_fails_for_good_ends_the_run_after_a_saved_step(tmp_path: Path, whole: gx.TrainResult) -> None:
    with pytest.raises(RewardError) as caught:
        train(tmp_path, failing(3))
    assert caught.value.__notes__ == ["in step 3", "the state after step 2 is saved; --resume (resume=True) goes on from it"]
    resumed = train(tmp_path, resume=True)
    assert_same_arrays(resumed.policy.variables, whole.policy.variables)
    assert [record["step"] for record in resumed.history] == [1, 2, 3, 4]


class Raises(gx.Callback):
    def __init__(self, at: int, before: Any = lambda trainer: None) -> None:
        self.at, self.before = at, before

    def on_step_end(self, trainer: gx.Trainer, metrics: dict[str, Any], completions: Any) -> None:
        if trainer.steps_done == self.at:
            self.before(trainer)
            raise KeyError("a callback of the user's")


def test_a_callback_that_raises_loses_no_step(tmp_path: Path, whole: gx.TrainResult) -> None:
    with pytest.raises(KeyError) as caught:
        train(tmp_path, callbacks=[Raises(3)])
    assert caught.value.__notes__ == ["the state after step 3 is saved; --resume (resume=True) goes on from it"]
    assert_same_arrays(train(tmp_path, resume=True).policy.variables, whole.policy.variables)


def spoil(trainer: gx.Trainer) -> None:
    spoiled = jax.tree.map(lambda x: x + jnp.float32("nan"), trainer.state.trainable)
    trainer.state = dataclasses.replace(trainer.state, trainable=spoiled)


def delete(trainer: gx.Trainer) -> None:
    jax.tree.leaves(trainer.state)[0].delete()


@pytest.mark.parametrize(
    ("before", "why"), [(spoil, "it contains NaN or infinity"), (delete, "the update that failed has overwritten it")]
)
def test_a_state_that_is_not_intact_is_not_saved(tmp_path: Path, before: Any, why: str) -> None:
    config = config_of(tmp_path, train={"steps": 4, "save_every": 2})
    with pytest.raises(KeyError) as caught:
        gx.train(config, dataset=ROWS, reward_funcs=letters, callbacks=[Raises(3, before)])
    said = f"the state after step 3 could not be saved: {why}; --resume (resume=True) goes on from the newest checkpoint"
    assert caught.value.__notes__ == [said]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_an_error_in_the_first_step_says_that_nothing_was_saved(tmp_path: Path) -> None:
    with pytest.raises(RewardError) as caught:
        train(tmp_path, failing(1))
    assert caught.value.__notes__ == ["in step 1", "no step was finished, so nothing was saved"]
    assert train(tmp_path).summary["steps"] == 4


def test_the_command_shows_the_notes_of_an_error() -> None:
    error = RewardError("too many failed\nrow 3: no")
    error.add_note("in step 2")
    error.add_note("the state after step 1 is saved")
    expected = "error: too many failed\n       row 3: no\n       in step 2\n       the state after step 1 is saved"
    assert cli.error_block(error) == expected
