"""Rewards that are computed while others are decoded: of the same step (`train.overlap`) or of the next (`max_staleness`).

Order is proved by events: what must come first sets one, and what comes later waits for it. What a step learned from is compared
with the policies as they were before and after each update.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import G, additions, assert_same_arrays, config_of, records, run, saved_weights

import grpo_jax as gx
from grpo_jax.config import Config, ConfigError
from grpo_jax.rollout.loop import LoopState, RolloutLoop
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.callbacks import Callback, StepCompletions

ROWS = additions()
LONG_SECONDS = 120.0
"""More than any machine needs; a wait that lasts so long has failed."""


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


def by_tokens(completion_ids: list[list[int]]) -> list[float]:
    """A reward that hardly ever gives two completions the same."""
    return [sum(ids) % 997 / 997 for ids in completion_ids]


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in history]


def same_runs(one: Path, other: Path) -> None:
    """Asserts that two runs have the same records and the same weights, bit for bit."""
    assert (one / "completions.jsonl").read_bytes() == (other / "completions.jsonl").read_bytes()
    assert timeless(records(one / "metrics.jsonl")) == timeless(records(other / "metrics.jsonl"))
    assert_same_arrays(saved_weights(one), saved_weights(other))


def test_overlap_changes_no_result(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def spread(completion_ids, prompts):\n"
        "    assert len(completion_ids) == 4 and len(set(prompts)) == 1\n"
        "    most = max(sum(ids) for ids in completion_ids)\n"
        "    return [sum(ids) / max(most, 1) for ids in completion_ids]\n"
        "async def waits(completions):\n"
        "    return [len(text) / 8 for text in completions]\n"
        "def whole(completions):\n"
        "    return [len(completions)] * len(completions)\n"
    )
    functions = [f"{tmp_path}/mine.py:{name}" for name in ("spread", "waits", "whole")] + ["exact_match"]
    for workers, overlap in ((1, False), (1, True), (0, True)):
        config = config_of(
            tmp_path / f"{workers}{overlap}",
            rewards={"functions": functions, "by_group": ["spread"], "row_by_row": ["waits"], "workers": workers},
            rollout={"slots": G},
            train={"steps": 1, "prompts_per_step": 3, "overlap": overlap},
        )
        result = run(config, reward_funcs=None).result
        assert result.history[0]["rewards/whole/mean"] == 12
        assert result.history[0]["rewards/spread/std"] > 0
        same_runs(tmp_path / "1False", result.run_dir)


def test_a_group_that_has_ended_is_scored_before_the_last_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, prompts_seen, real = threading.Event(), list[str](), RolloutLoop.collect

    def judge(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        prompts_seen.append(prompts[0])
        called.set()
        return by_tokens(completion_ids)

    def collect(self: RolloutLoop, state: LoopState) -> None:
        left = [own for own in state.schedule.schedules[0].unfinished if own]
        if len(left) == 1:  # tokens of the last group: it cannot end before this returns
            assert called.wait(LONG_SECONDS), "no group was scored while the last one was decoded"
        real(self, state)

    monkeypatch.setattr(RolloutLoop, "collect", collect)
    train = {"steps": 1, "prompts_per_step": 3}
    config = config_of(tmp_path / "run", rollout={"slots": G}, train=train, rewards={"by_group": ["judge"]})
    done = run(config, reward_funcs=judge)
    assert prompts_seen == [done.completions[1][number * G]["prompt"] for number in range(3)]


class Game:
    """Ends after the second turn."""

    def reset(self, **row: Any) -> None:
        self.turns = 0

    def step(self, message: gx.Message) -> gx.Step:
        self.turns += 1
        return gx.Step("go on", done=self.turns == 2, reward=len(message["content"]) / 100)


def test_a_group_of_episodes_that_has_ended_is_scored_while_others_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, real = threading.Event(), RolloutLoop.collect

    def judge(completion_ids: list[list[int]], environment_info: list[Any], environment_reward: list[float]) -> list[float]:
        assert len(completion_ids) == G
        called.set()
        return [number + own for number, own in zip(by_tokens(completion_ids), environment_reward, strict=True)]

    def whole(completions: list[Any], environments: list[Game]) -> list[float]:
        assert len(completions) == 3 * G
        return [own.turns for own in environments]

    def collect(self: RolloutLoop, state: LoopState) -> None:
        left = [own for own in state.schedule.schedules[0].unfinished if own]
        if len(left) == 1:  # tokens of the last group: it cannot end before this returns
            assert called.wait(LONG_SECONDS), "no group was scored while the last one played"
        real(self, state)

    for overlap in (True, False):
        config = config_of(
            tmp_path / str(overlap),
            environment={"max_turns": 2, "max_turn_tokens": 4},
            rollout={"slots": G, "max_completion_length": 32},
            rewards={"by_group": ["judge"]},
            train={"steps": 1, "prompts_per_step": 3, "overlap": overlap},
        )
        with monkeypatch.context() as patched:
            if overlap:
                patched.setattr(RolloutLoop, "collect", collect)
            result = run(config, reward_funcs=[judge, whole], environment=Game).result
        assert result.history[0]["rewards/judge/std"] > 0
    same_runs(tmp_path / "True", tmp_path / "False")


class Watch(Callback):
    """Keeps the policy after every step, and what the step learned from."""

    def __init__(self) -> None:
        self.policies: list[gx.Policy] = []
        self.completions: list[StepCompletions] = []
        self.metrics: list[dict[str, Any]] = []

    def on_train_begin(self, trainer: Any) -> None:
        self.policies.append(trainer.policy)

    def on_step_end(self, trainer: Any, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        assert completions is not None
        self.policies.append(trainer.policy)
        self.completions.append(completions)
        self.metrics.append(metrics)


STALE: dict[str, Any] = {"steps": 4, "max_staleness": 1}


@pytest.mark.slow
def test_rewards_are_waited_for_after_the_next_rollout_which_the_policy_before_the_update_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, called = ([threading.Event() for _ in range(4)] for _ in range(2))
    real, calls = Sampler.sample, list[int]()

    def sample(self: Sampler, *arguments: Any, **named: Any) -> Any:
        number = named["step"]
        assert number == 0 or called[number - 1].wait(LONG_SECONDS), "the next step is sampled before rewards have begun"
        done = real(self, *arguments, **named)
        sampled[number].set()
        return done

    def judge(completion_ids: list[list[int]]) -> list[float]:
        calls.append(len(calls))
        called[calls[-1]].set()
        following = min(len(calls), 3)  # the last step has none that follows it
        assert sampled[following].wait(LONG_SECONDS), "the next step was not sampled while this one's rewards were computed"
        return by_tokens(completion_ids)

    monkeypatch.setattr(Sampler, "sample", sample)
    watch, epsilon = Watch(), 0.01
    config = config_of(tmp_path / "run", train=STALE, objective={"epsilon": epsilon, "beta": 0.0})
    run(config, reward_funcs=judge, callbacks=[watch])
    assert calls == [0, 1, 2, 3]
    assert [metrics["sampling/staleness"] for metrics in watch.metrics] == [0, 1, 1, 1]
    for number, (own, metrics) in enumerate(zip(watch.completions, watch.metrics, strict=True)):
        assert own.logprobs is not None
        old, now = (logprobs(watch.policies[at], own) for at in (max(0, number - 1), number))
        drawn = np.concatenate(own.logprobs)
        np.testing.assert_allclose(drawn, old, atol=1e-4)
        assert number == 0 or np.abs(drawn - now).max() > 1e-3
        # The update compares the policy that it finds with the one that sampled, and clips.
        ratio = np.exp(now - drawn)
        advantage = np.repeat(own.advantages, [len(ids) for ids in own.ids])
        clipped = ((advantage > 0) & (ratio > 1 + epsilon)) | ((advantage < 0) & (ratio < 1 - epsilon))
        assert metrics["clip_ratio/region"] == pytest.approx(clipped.mean(), abs=1e-6)
        assert (clipped.mean() > 0) == (number > 0)


def logprobs(policy: gx.Policy, completions: StepCompletions) -> np.ndarray:
    """Log-probabilities of all tokens of a step under a policy."""
    prompts = [policy.need_tokenizer().encode_prompt(prompt, chat=False) for prompt in completions.prompts for _ in range(G)]
    return np.concatenate(policy.logprobs(prompts, completions.ids))


def stopping(at: int) -> Any:
    """`by_tokens` until the call of that number, which interrupts the run."""
    calls = list[int]()

    @functools.wraps(by_tokens)
    def stopped(completion_ids: list[list[int]]) -> list[float]:
        calls.append(len(calls))
        if len(calls) == at:
            raise KeyboardInterrupt
        return by_tokens(completion_ids)

    return stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"train": {"save_every": 2}}, id="plain", marks=pytest.mark.slow),
        pytest.param({"train": {"save_every": 2, "updates_per_rollout": 2}, "data": {"curriculum": "learnable"}}, id="curriculum"),
    ],
)
def test_a_resumed_run_goes_on_with_the_completions_of_its_checkpoint(tmp_path: Path, sections: dict[str, Any]) -> None:
    def config(name: str) -> Config:
        return config_of(tmp_path / name, **sections | {"train": STALE | sections["train"]})

    run(config("whole"), reward_funcs=by_tokens)
    with pytest.raises(KeyboardInterrupt):
        run(config("parts"), reward_funcs=stopping(at=4))
    run(config("parts"), reward_funcs=by_tokens, resume=True)
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"max_staleness": 2}}, "train.max_staleness is 2: use 0"),
        ({"objective": {"loss": "reinforce"}}, "train.max_staleness is 1: use 0, or a loss with a ratio such as dapo: reinforce"),
        ({"objective": {"kl_in_reward": True}}, "train.max_staleness is 1: use 0: with objective.kl_in_reward"),
        ({"objective": {"match_sampling": False}}, "train.max_staleness is 1: use 0, or objective.match_sampling true"),
        ({"rollout": {"router_replay": "replay"}}, "rollout.router_replay is 'replay': use none: with train.max_staleness 1"),
        ({"objective": {"importance_cap": 2.0}}, "objective.importance_cap is 2.0: leave it out: with train.max_staleness 1"),
        ({"rewards": {"by_group": ["f"], "row_by_row": ["f"]}}, r"rewards.by_group is \['f'\]: leave these out"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"train": {}} | sections | {"train": {"max_staleness": 1} | sections.get("train", {})})


def test_environments_and_warm_ups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_staleness is 1: use 0 with environments"):
        gx.Trainer(config_of(tmp_path / "a", train=STALE, environment={"name": "number_guessing"}), dataset=ROWS)
    with pytest.raises(ConfigError, match=r"train\.max_staleness is 1: use 0: a supervised warm-up"):
        gx.sft(config_of(tmp_path / "b", train=STALE, data={"completion_column": "answer"}), dataset=ROWS)
