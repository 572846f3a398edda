"""Reward calls on groups that end one after the other, against calls on all of them together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from grpo_jax.config import ConfigError, RewardsConfig
from grpo_jax.rewards import RewardRunner, ScoredBatch, resolve_functions, runner_of, score
from grpo_jax.rewards.scoring import reward_inputs

SOURCE = """
import time

def places(completions, prompts):
    assert len(set(prompts)) == 1
    return [sorted(completions).index(text) for text in completions]

def hangs(completions, prompts):
    while "hang" in completions:
        time.sleep(0.01)
    return places(completions, prompts)

async def lengths(completions):
    return [len(text) for text in completions]

def rows(completions):
    return [len(completions)] * len(completions)
"""
PROMPTS, G = ["p", "q", "r"], 2
TEXTS = ["b", "a", "e", "eee", "hang", "d"]  # the hanging group comes last: no other one waits behind it
PLACES, ALL_ROWS = [1, 0, 0, 1, 1, 0], [6.0] * 6

Made = Callable[..., tuple[Any, RewardRunner]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Makes functions and their runner; a runner with the same settings is used again, and all end with the module."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(SOURCE)
    runners: dict[str, tuple[Any, RewardRunner]] = {}

    def make(names: Sequence[str], **settings: Any) -> tuple[Any, RewardRunner]:
        key = f"{names}{settings}"
        if key not in runners:
            entries = [f"{file}:{name}" for name in names]
            functions = resolve_functions(entries)
            runners[key] = functions, runner_of(RewardsConfig(**settings), entries, functions, None, lambda line: None)
        return runners[key]

    yield make
    for _, runner in runners.values():
        runner.close()


def scored(functions: Any, runner: Any, timeout_seconds: float | None = 60.0) -> ScoredBatch:
    return score(
        functions,
        prompts=PROMPTS,
        completions=TEXTS,
        completion_ids=[[1]] * len(TEXTS),
        timeout_seconds=timeout_seconds,
        max_failed_share=1.0,
        runner=runner,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_groups_in_any_order_get_the_values_of_a_whole_batch(made: Made, workers: int) -> None:
    names = ["places", "lengths", "rows"]
    functions, runner = made(names, workers=workers, by_group=["places"], row_by_row=["lengths"])
    whole = scored(functions, runner)
    assert whole.failures == []
    assert {name: values.tolist() for name, values in whole.per_function.items()} == {
        "places": PLACES,
        "lengths": [len(text) for text in TEXTS],
        "rows": ALL_ROWS,
    }
    for told in ([2, 0, 1], [1], []):  # of groups that it is not told of in time, it learns with the whole batch
        calls = runner.begin(functions, len(PROMPTS), G, 60.0, early=True)
        for group in told:
            texts = TEXTS[group * G : (group + 1) * G]
            calls.add({group: reward_inputs([PROMPTS[group]], texts, [[1]] * G, {})})
        early = scored(functions, calls)
        assert early.rewards.tolist() == whole.rewards.tolist()
        assert early.failures == []
    assert runner.pending() == []


def test_a_group_that_hangs_fails_alone(made: Made) -> None:
    functions, runner = made(["hangs"], workers=2, by_group=["hangs"])
    batch = scored(functions, runner, timeout_seconds=2.0)
    assert {failure.row: failure.reason for failure in batch.failures} == dict.fromkeys(
        (4, 5), "took longer than rewards.timeout_seconds = 2"
    )
    assert batch.rewards.tolist() == [1, 0, 0, 1, 0, 0]


def test_calls_that_were_ended_can_be_made_again(made: Made) -> None:
    functions, runner = made(["hangs"], workers=2, by_group=["hangs"])
    calls = runner.begin(functions, len(PROMPTS), G, None, early=True)
    calls.add({2: reward_inputs(["r"], TEXTS[4:], [[1]] * G, {})})
    runner.abandon()
    assert calls.abandoned
    assert runner.pending() == []
    rows = reward_inputs(PROMPTS, [text.replace("hang", "z") for text in TEXTS], [[1]] * len(TEXTS), {})
    assert runner.call_all(functions, rows, None)["hangs"].values == PLACES


def test_a_function_that_gets_environments_waits_for_the_end_of_all_episodes(made: Made) -> None:
    def plain(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    def watching(completions: list[str], environments: list[object]) -> list[float]:
        return [0.0] * len(completions)

    def anything(completions: list[str], **columns: list[object]) -> list[float]:
        return [0.0] * len(completions)

    functions = resolve_functions([plain, watching, anything])
    settings = RewardsConfig(by_group=[name for name, _ in functions])
    runner = runner_of(settings, [plain, watching, anything], functions, None, lambda line: None)
    for episodes, expected in ((False, [True, True, True]), (True, [True, False, False])):
        assert [runner.is_early(name, function, G, episodes=episodes) for name, function in functions] == expected
    functions, runner = made(["places"], workers=2, by_group=["places"])
    ((name, function),) = functions
    assert runner.is_early(name, function, G, episodes=True)  # the objects stay in the trainer's process


def test_a_function_never_runs_in_two_threads_of_the_trainer_s_process() -> None:
    inside, most, entered = list[int](), list[int](), threading.Event()

    def mine(completions: list[str]) -> list[float]:
        inside.append(1)
        most.append(len(inside))
        entered.set()
        threading.Event().wait(0.05)  # time in which another thread could come in
        inside.pop()
        return [0.0] * len(completions)

    functions = resolve_functions([mine])
    runner = runner_of(RewardsConfig(), [mine], functions, None, lambda line: None)
    rows = reward_inputs(PROMPTS, TEXTS, [[1]] * len(TEXTS), {})
    calls = runner.begin(functions, len(PROMPTS), G, None, early=False)
    calls.start(rows)
    assert entered.wait(60)
    runner.call_all(functions, rows, None)
    calls.call_all(functions, rows, None)
    assert most == [1, 1]


def test_a_name_in_by_group_that_is_no_function_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.by_group is 'place': did you mean places\?"):
        made(["places"], by_group=["place"])
