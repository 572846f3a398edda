"""Episodes of several turns against a replay by the plain model without a cache, whatever slots, segments and delays there are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from episodes import Script, ScriptedTurns, replayed
from plain_oracles import quick_compiling
from rollouts import Task, assert_same

from grpo_jax.config import RolloutConfig
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.rollout import shapes as shapes_module
from grpo_jax.rollout.future_calls import rollout_calls
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import pad_rows
from grpo_jax.types import Rollout

C = 40
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=C, temperature=0.7)
FEW_STOPS = (2, 5, 20, 40, 60)
SCRIPT = Script(rows=9)
SAMPLERS: dict[Any, Sampler] = {}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past blocks of few tokens, and extensions so small that longer answers take several calls."""
    monkeypatch.setattr(shapes_module, "FIRST_PAST_BLOCK", 8)
    monkeypatch.setattr(shapes_module, "EXTENSION_SIZES", ((3, 3), (2, 6)))


def task_of(family: str, **settings: Any) -> Task:
    return Task(family, SETTINGS, stops=FEW_STOPS).but(**settings)


def sampler_of(task: Task, stacked: bool) -> Sampler:
    key = (task.family, task.stops, task.decode_text, stacked)
    if key not in SAMPLERS:
        model = task.policy.model.clone(unroll=not stacked)
        SAMPLERS[key] = Sampler.build(model, task.stops, decode_text=task.decode_text)
    return SAMPLERS[key]


def episodes(task: Task, turns: ScriptedTurns, *, stacked: bool = False) -> Rollout:
    return sampler_of(task, stacked).sample(
        task.policy.variables, task.prompts, task.settings, seed=task.seed, step=task.step, limits=task.limits, turns=turns
    )


def assert_equals_replay(task: Task, script: Script, got: Rollout, tolerance_nats: float = 1e-4) -> None:
    expected = replayed(task, script)
    assert got.sampled is not None
    assert expected.sampled is not None
    assert_same(task, got, expected, tolerance_nats)
    for ours, theirs, ids, other in zip(got.sampled, expected.sampled, got.completion_ids, expected.completion_ids, strict=True):
        if ids == other:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "stacked", "settings", "delay"),
    [
        ("gemma2", True, {"slots": 4, "segment": 3}, 4),
        ("gemma2", True, {"slots": 4, "segment": 3, "dispatch_ahead": True}, 4),
        pytest.param("gemma2", False, {"slots": 2, "segment": 8, "dispatch_ahead": True}, 0, marks=pytest.mark.slow),
        pytest.param("gemma2", False, {"slots": 2, "segment": 8}, 9, marks=pytest.mark.slow),
        pytest.param("qwen3", False, {"segment": 7}, 2, marks=pytest.mark.slow),
        pytest.param("llama3_scaled", True, {"segment": 8}, 0, marks=pytest.mark.slow),
        pytest.param("qwen2", True, {"slots": 4, "segment": 3, "kv_dtype": "int4"}, 4, marks=pytest.mark.slow),
        pytest.param("qwen2", False, {"slots": 4, "segment": 8, "kv_dtype": "int8"}, 4, marks=pytest.mark.slow),
        pytest.param("gemma2", True, {"slots": 5, "segment": 3, "refill": False}, 4, marks=pytest.mark.slow),
        pytest.param("gemma2", True, {"slots": 5, "segment": 3, "min_completion_length": 11}, 4, marks=pytest.mark.slow),
    ],
)
def test_tokens_masks_and_log_probabilities_equal_a_replay_without_a_cache(
    family: str, stacked: bool, settings: dict[str, Any], delay: int
) -> None:
    """Sliding windows have 5 to 7 tokens, past blocks 8 and more; with fewer slots than rows, episodes leave them and come back.

    With seed 1 no int8 value, and no scale of one, is so close to half a step that float32 rounds it the other way.
    """
    task = dataclasses.replace(task_of(family, **settings), seed=1)
    turns = ScriptedTurns(SCRIPT, delay)
    got = episodes(task, turns, stacked=stacked)
    assert_equals_replay(task, SCRIPT, got)
    assert_told_what_was_sampled(turns, got)
    assert {len(own) for own in turns.told.values()} >= {1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stacked"),
    [("gpt_oss", True), ("gpt_oss", False), ("smollm3", True), ("gemma4", True), ("gemma4", False)],
)
def test_families_that_the_replay_does_not_know_equal_the_trainers_forward_pass(family: str, stacked: bool) -> None:
    """Attention sinks, and layers without rope; the trainer's forward pass, which has no cache, is compared with transformers."""
    task = task_of(family, slots=4, segment=3)
    got = episodes(task, ScriptedTurns(SCRIPT, 4), stacked=stacked)
    assert got.sampled is not None
    assert any(not own.all() for own in got.sampled)
    policy, prompts = task.policy, [np.array(ids, np.int32) for ids in task.prompts]
    table = pad_rows(got.completion_ids, C)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    arrays = map(jnp.asarray, (pad_rows(task.prompts, int(lengths.max())), lengths, table))
    expected = np.asarray(completion_logprobs(policy.model, policy.variables, *arrays, task.settings.temperature)[0])
    for row, (logps, own) in enumerate(zip(got.logprobs, got.sampled, strict=True)):
        np.testing.assert_allclose(logps[own], expected[row, : len(own)][own], atol=1e-4)


def assert_told_what_was_sampled(turns: ScriptedTurns, got: Rollout) -> None:
    """The turns that were passed on are those of the row; the one at the limit is not passed on."""
    assert got.sampled is not None
    for row, (ids, mine) in enumerate(zip(got.completion_ids, got.sampled, strict=True)):
        told = [token for turn, _ in turns.told.get(row, []) for token in turn]
        own = [token for token, sampled in zip(ids, mine, strict=True) if sampled]
        assert told == own[: len(told)]
        assert len(ids) == C or told == own


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_when_answers_come_changes_nothing(seed: int) -> None:
    """The same slots with other delays: other slots and segments for the same turns."""
    task = task_of("gemma2", slots=4, segment=3)
    first = episodes(task, ScriptedTurns(SCRIPT, 4), stacked=True)
    again = episodes(task, ScriptedTurns(SCRIPT, 12, seed=seed), stacked=True)
    assert_equals_replay(task, SCRIPT, again)
    for row in range(9):
        if first.completion_ids[row] == again.completion_ids[row]:
            np.testing.assert_allclose(first.logprobs[row], again.logprobs[row], rtol=0, atol=1e-5)


def test_tokens_before_the_first_turn_and_limits_of_rows() -> None:
    """Up to six tokens are read first; some rows have no room for them, or for a turn or an answer."""
    script = Script(rows=9, first=6, turn_tokens=None, answer=9)
    task = dataclasses.replace(task_of("gemma2", slots=4, segment=3), limits=(1, 24, 2, 40, 10, 4, 24, 17, 3))
    turns = ScriptedTurns(script, 3)
    got = episodes(task, turns, stacked=True)
    assert_equals_replay(task, script, got)
    assert got.completion_ids[2] == got.completion_ids[5] == []  # 2 and 5 tokens for limits of 2 and 4
    assert got.finish_reasons[2] == got.finish_reasons[5] == "length"
    assert got.sampled is not None
    assert [len(own) for own in got.sampled] == [len(ids) for ids in got.completion_ids] == [len(own) for own in got.logprobs]
    assert not any(own[: len(script.first_ids(row))].any() for row, own in enumerate(got.sampled))
    assert all(own[-1] for own in got.sampled if len(own)), "an answer without a turn behind it is left out"


def test_a_stop_string_is_looked_for_in_the_turn_alone() -> None:
    """The answer ends with the string's first letter, so that it would be complete with the turn's first one."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(97 + token % 3) for token in ids)

    script = Script(rows=9, turn_tokens=None)
    task = dataclasses.replace(task_of("qwen2", slots=4, segment=3, stop=("abc", "cc")), decode_text=decode)
    turns = ScriptedTurns(script, 3)
    got = episodes(task, turns)
    assert_equals_replay(task, script, got)
    ends = [decode(ids)[-3:] for own in turns.told.values() for ids, reason in own if reason == "stop"]
    assert any(end == "abc" or end.endswith("cc") for end in ends)
    across = [decode(own[max(0, at - 2) : at + 2]) for own in got.completion_ids for at in range(len(own))]
    assert sum("cc" in text for text in across) > sum(end.endswith("cc") for end in ends)


@dataclass
class Counted:
    """A compiled function; records the tokens that it computes."""

    program: Any
    tokens: list[int] = field(default_factory=list)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        self.tokens.append(int(np.sum(np.asarray(arguments[-1].counts))))
        return self.program(*arguments, **static)


@pytest.mark.parametrize("turns", [2, 6])
def test_every_token_is_computed_once(turns: int) -> None:
    """Every token from outside, and the last one of each answered turn; decoding computes the others. None is computed again."""
    task = dataclasses.replace(task_of("qwen2", slots=4, segment=3), stops=())
    sampler = sampler_of(task, True)
    counted = Counted(sampler.programs.extend_past)
    script = Script(rows=9, turns=(turns,), answer=2, turn_tokens=3)
    programs = dataclasses.replace(sampler.programs, extend_past=counted)  # type: ignore[arg-type] - a stand-in
    got = dataclasses.replace(sampler, programs=programs).sample(
        task.policy.variables, task.prompts, task.settings, seed=0, turns=ScriptedTurns(script, 3)
    )
    assert got.sampled is not None
    assert [int(own.sum()) for own in got.sampled] == [3 * turns] * 9
    # The last token of an answer is decoding's, as the last one of the turn is not.
    assert sum(counted.tokens) == sum(int((~own).sum()) for own in got.sampled)


def test_wrong_turns_are_refused() -> None:
    task = task_of("qwen2", slots=4, segment=3)
    with pytest.raises(ValueError, match="first_ids has 8 lists for 9 episodes"):
        episodes(task, ScriptedTurns(Script(rows=8)))
    with pytest.raises(ValueError, match="max_turn_tokens is 0"):
        episodes(task, ScriptedTurns(dataclasses.replace(SCRIPT, turn_tokens=0)))

    @dataclass(frozen=True)
    class Foreign(Script):
        def answer_ids(self, row: int, turn: int, ids: Sequence[int]) -> list[int]:
            return [10_000]

    with pytest.raises(ValueError, match="contain id 10000; the model's ids are 0 to"):
        episodes(task, ScriptedTurns(Foreign(rows=9)))
    sampler = sampler_of(task, False)
    shapes = sampler.shapes_for(task.settings, 3, (16,), None)
    with pytest.raises(ValueError, match="shapes are not for episodes"):
        sampler.sample(task.policy.variables, task.prompts, task.settings, seed=0, shapes=shapes, turns=ScriptedTurns(SCRIPT))


@pytest.mark.parametrize(
    ("stacked", "slots", "kv_dtype", "skips"),
    [
        pytest.param(False, None, "auto", True, marks=pytest.mark.slow),
        pytest.param(True, 4, "int8", False, marks=pytest.mark.slow),
        (True, 2, "auto", True),
    ],
)
def test_episodes_run_what_is_compiled_ahead_and_nothing_else(
    stacked: bool, slots: int | None, kv_dtype: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most three programs more than without episodes."""
    if not skips:
        monkeypatch.setattr(shapes_module, "platform", lambda: "gpu")
    task = task_of("qwen2", slots=slots, segment=4, kv_dtype=kv_dtype)
    sampler = Sampler.build(task.policy.model.clone(unroll=not stacked), task.stops)
    shapes = sampler.decide_shapes(task.policy.variables, task.settings, 3, (16,), episodes=True)
    calls = rollout_calls(sampler, task.policy.variables, task.settings, shapes)
    refilled = dataclasses.replace(task.settings, slots=slots or 8)
    without = sampler.decide_shapes(task.policy.variables, refilled, 3, (16,))
    assert len(calls) <= 3 + len(rollout_calls(sampler, task.policy.variables, refilled, without))
    for call in calls:
        call.program.compile_ahead(*call.arguments, **call.static)

    @contextlib.contextmanager
    def refuse(name: str) -> Iterator[None]:
        yield pytest.fail(f"compiles: {name}")

    sampler.announcing(refuse)
    for seed, delay in ((0, 0), (1, 6)):
        turns = ScriptedTurns(dataclasses.replace(SCRIPT, answer=15), delay, seed)
        got = sampler.sample(task.policy.variables, task.prompts, task.settings, seed=seed, shapes=shapes, turns=turns)
        assert got.sampled is not None
        assert any(not own.all() for own in got.sampled)
    assert sum(program.compilations for program in sampler.programs) == len(calls)
