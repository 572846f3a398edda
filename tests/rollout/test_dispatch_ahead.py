"""Segments that are dispatched before the tokens of the one before are on the host: when, and that no token depends on it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling
from rollouts import SAMPLERS, Task, assert_same, engine, plain
from scripted_segments import STOP_ID, Event, scripted

from grpo_jax.config import RolloutConfig
from grpo_jax.rollout import dispatch_ahead, shapes
from grpo_jax.rollout.decode import Continued, SlotState, with_continued
from grpo_jax.rollout.loop import RolloutLoop
from grpo_jax.rollout.segments import Segment
from grpo_jax.rollout.stop_strings import PartialCompletion
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.types import Rollout


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What the loop does, in order: ("prefill", prompts), ("dispatch", segment), ("fetch", segment), ("ended", prompt)."""
    seen, real = list[Event](), RolloutLoop.fetch

    def fetch(self: RolloutLoop, segment: Segment) -> Any:
        seen.append(("fetch", sum(name == "fetch" for name, _ in seen)))
        return real(self, segment)

    monkeypatch.setattr(RolloutLoop, "fetch", fetch)
    return seen


def rows(*lengths: int) -> list[list[int]]:
    """Completions of these lengths, the last token a stop token; tokens tell row and position."""
    return [[100 * row + at + 10 for at in range(length - 1)] + [STOP_ID] for row, length in enumerate(lengths, 1)]


def play(script: Sequence[Sequence[int]], events: list[Event], longest: int = 40, **settings: Any) -> Rollout:
    """One completion for each prompt, in segments of four tokens."""
    ends: list[PartialCompletion] = []

    def ended(completions: dict[int, list[PartialCompletion]]) -> None:
        for number, own in completions.items():
            assert [one.ids for one in own] == [list(script[number])]
            events.append(("ended", number))
            ends.extend(own)

    given = RolloutConfig(num_generations=1, max_completion_length=longest, segment=4, **settings)
    got = scripted(script, 1, None, events).sample({}, [[7]] * len(script), given, seed=0, on_ended=ended)
    assert got.completion_ids == [list(own) for own in script]
    assert len(ends) == len(script)
    assert all(own.ended for own in ends)
    return got


def order(events: list[Event]) -> str:
    """Dispatches and fetches: "d0 d1 f0"."""
    return " ".join(name[0] + str(number) for name, number in events if name in ("dispatch", "fetch"))


def test_the_next_segment_is_dispatched_before_the_last_ones_tokens_are_fetched(events: list[Event]) -> None:
    play(rows(3, 13, 6), events, dispatch_ahead=False)
    assert order(events) == "d0 f0 d1 f1 d2 f2"
    events.clear()
    play(rows(3, 13, 6), events, dispatch_ahead=True)
    assert order(events) == "d0 d1 f0 d2 f1 d3 f2 f3"  # that the longest ends in segment 2 is known after segment 3 has begun
    # A group is told when its tokens have come and a further segment is on its way.
    assert events.index(("dispatch", 2)) < events.index(("ended", 0)) < events.index(("fetch", 1))
    events.clear()
    play(rows(3, 13, 6), events, longest=13, dispatch_ahead=True)
    assert order(events) == "d0 d1 f0 d2 f1 f2"  # no segment could follow segment 2, whatever its tokens


def test_auto_dispatches_ahead_on_accelerators_where_nothing_waits(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = rows(3, 13, 6, 9)
    play(lengths, events)
    assert order(events) == "d0 f0 d1 f1 d2 f2"
    monkeypatch.setattr(dispatch_ahead, "platform", lambda: "tpu")
    events.clear()
    play(lengths, events)
    assert order(events) == "d0 d1 f0 d2 f1 d3 f2 f3"
    # Two slots: rows 2 and 3 wait until rows 0 and 2 have ended, after segments 0 and 2.
    events.clear()
    play(lengths, events, slots=2)
    assert order(events) == "d0 f0 d1 f1 d2 f2 d3 d4 f3 d5 f4 f5"
    events.clear()
    play(lengths, events, slots=2, dispatch_ahead=True)
    assert order(events) == "d0 d1 f0 d2 f1 d3 f2 d4 f3 d5 f4 d6 f5 f6"


def test_idle_tokens_are_those_that_slots_decode_without_a_completion(events: list[Event]) -> None:
    """A segment decodes four tokens of every slot; a completion's first token comes from its prompt."""
    alone = play(rows(3, 13, 6), events, dispatch_ahead=False)
    assert alone.idle_tokens == 3 * 12 - (2 + 12 + 5)
    ahead = play(rows(3, 13, 6), events, dispatch_ahead=True)
    assert ahead.idle_tokens == alone.idle_tokens  # nobody decodes in segment 3
    refilled = play(rows(3, 13, 6, 9), events, slots=2, dispatch_ahead=False)
    # Slot 0 has rows 0, 2 and 3, in segments 0, 1 to 2 and 3 to 4; slot 1 has row 1, in segments 0 to 2.
    assert refilled.idle_tokens == 2 * (5 * 4) - (2 + 12 + 5 + 8)
    later = play(rows(3, 13, 6, 9), events, slots=2, dispatch_ahead=True)
    # Slot 0 waits in segment 1 and has row 2 in segments 2 and 3, of which 3 ends with its first token, as row 1 has ended. Slot 1
    # has row 3 in segments 4 and 5.
    assert later.idle_tokens == 2 * (3 * 4 + 1 + 2 * 4) - (2 + 12 + 5 + 8)


@pytest.mark.parametrize("seed", range(4))
def test_everything_is_decoded_once_whatever_the_lengths(seed: int, events: list[Event]) -> None:
    """`scripted` checks what each segment is given: completions, last tokens, bases and limits."""
    rng = np.random.default_rng(seed)
    for ahead in (True, False):
        script = [own[: int(rng.integers(8, 30))] for own in rows(*rng.integers(1, 24, 9))]
        for slots in (1, 2, 5, None):
            longest = max(map(len, script))
            cut = [[*own, *[STOP_ID] * (longest - len(own))] for own in script]
            cut = [own[: own.index(STOP_ID) + 1] if STOP_ID in own else own for own in cut]
            play(cut, events, longest, slots=slots, dispatch_ahead=ahead)


def test_prompts_that_come_together_are_prefilled_in_one_call(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven prompt slots for four slots. Prompts 7 to 9 begin together in segment 2, and 10 and 11 in segment 3."""
    lengths = rows(2, 2, 2, 14, 2, 2, 2, 9, 2, 2, 2, 2)
    play(lengths, events, slots=4)
    assert [count for name, count in events if name == "prefill"] == [7, *[1] * 5]
    monkeypatch.setattr(shapes, "platform", lambda: "tpu")
    monkeypatch.setattr(shapes, "LATE_TOKENS", 3 * 8)
    events.clear()
    play(lengths, events, slots=4)
    prefills = [(at, count) for at, (name, count) in enumerate(events) if name == "prefill"]
    assert [count for _, count in prefills] == [7, 3, 3]
    between = [name for name, _ in events[prefills[1][0] : prefills[2][0]]]
    assert "dispatch" in between


def same(one: Rollout, other: Rollout) -> None:
    """Asserts that two rollouts have the same tokens and log-probabilities, bit for bit."""
    assert one.completion_ids == other.completion_ids
    assert one.finish_reasons == other.finish_reasons
    assert one.near_ties == other.near_ties
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "stacked", "settings"),
    [
        ("qwen2", True, {}),
        ("qwen2", True, {"slots": 4}),
        pytest.param("qwen2", False, {"stop": ["ab", "fh", "hd", "ea"]}, marks=pytest.mark.slow),
        pytest.param("qwen2", True, {"slots": 4, "kv_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", True, {"slots": 4}, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_same_and_nothing_more_is_compiled(family: str, stacked: bool, settings: dict[str, Any]) -> None:
    """All completions at once are the same bit for bit: each stays in its slot. Refilled slots are others."""
    task = Task(family, RolloutConfig(num_generations=3, max_completion_length=20, temperature=0.7, segment=4))
    task = task.but(dispatch_ahead=False, **settings)
    if "stop" in settings:
        task = dataclasses.replace(task, stops=(2, 5, 60), decode_text=letters)
    expected = engine(task, stacked=stacked)
    assert_same(task, expected, plain(task))
    sampler = SAMPLERS[task.family, task.stops, task.decode_text, stacked]

    @contextlib.contextmanager
    def refuse(name: str) -> Iterator[None]:
        yield pytest.fail(f"compiles: {name}")

    sampler.announcing(refuse)
    got = engine(task.but(dispatch_ahead=True), stacked=stacked)
    sampler.announcing(no_announcement)
    assert min(map(len, got.completion_ids)) < 10 < max(map(len, got.completion_ids))
    if "slots" in settings:
        assert_same(task, got, expected, 1e-5)
        assert got.idle_tokens > expected.idle_tokens
        return
    same(got, expected)


def test_slots_that_continue_have_the_last_token_and_the_end_of_the_segment_before() -> None:
    numbers, yes = jnp.arange(4, dtype=jnp.int32), jnp.ones(4, bool)
    continued = Continued(jnp.array([True, True, False, False]), numbers + 50, jnp.array([False, True, False, True]))
    slots = SlotState(*[numbers] * 7, live=jnp.array([True, True, True, True]), begins=~yes, continued=continued)
    got = with_continued(slots)
    assert got.last.tolist() == [50, 51, 2, 3]
    assert got.live.tolist() == [True, False, True, True]  # only what has ended is not decoded further


def letters(ids: list[int]) -> str:
    """Decodes ids to eight letters, and every ninth id to nothing."""
    return "".join("abcdefgh "[i % 9].strip() for i in ids)
