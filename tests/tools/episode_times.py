"""Measures episodes: against computing the history again at every turn, and how long the device waits for a slow environment.

    python tests/tools/episode_times.py turns    # six turns of 32 sampled and 32 outside tokens behind a history of 1,024
    python tests/tools/episode_times.py waits    # 32 episodes whose answers take log-normal times with a mean of 0.5 s

Both train nothing and use a small random model. What is compiled is compiled before the measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import RolloutConfig
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.turns import Answer
from grpo_jax.types import FinishReason, Params

TURNS, SAMPLED, OUTSIDE, HISTORY = 6, 32, 32, 1024


def small_model(layers: int, width: int) -> tuple[Sampler, Params]:
    """A random model without stop tokens, as it runs on this machine."""
    heads = width // 64
    spec = ModelSpec(
        family="qwen2",
        vocab=4096,
        layers=layers,
        width=width,
        ffw=4 * width,
        heads=heads,
        kv_heads=max(1, heads // 2),
        head_dim=64,
        norm_eps=1e-6,
        tied=True,
        windows=(None,) * layers,
        ropes=(Rope(10000.0),),
        rope_of_layer=(0,) * layers,
        query_scale=64**-0.5,
    )
    cpu = jax.default_backend() == "cpu"
    model = Transformer(spec, jnp.dtype(jnp.float32 if cpu else jnp.bfloat16), unroll=cpu)
    return Sampler.build(model, ()), {"params": init_params(spec, jax.random.key(0), jnp.float32)}


@dataclass
class FixedTurns:
    """Turns of `SAMPLED` tokens with answers of `OUTSIDE` tokens, after a time that is drawn for each answer.

    Attributes:
        rows: episodes.
        mean_seconds: of the log-normal times; 0 answers at once.
    """

    rows: int
    mean_seconds: float = 0.0
    max_turn_tokens: int | None = SAMPLED
    answers: list[Answer] = field(default_factory=list)
    come: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.first_ids: Sequence[Sequence[int]] = [[]] * self.rows
        self.turns, self.waited = [0] * self.rows, [0.0] * self.rows
        self.rng = np.random.default_rng(0)

    def ended(self, row: int, ids: list[int], reason: FinishReason) -> None:
        self.turns[row] += 1
        last = self.turns[row] == TURNS
        answer = Answer(row, [] if last else [(ids[-1] + n) % 4096 for n in range(OUTSIDE)])
        if not self.mean_seconds:
            self.answers.append(answer)
            return
        # exp(μ + σ²/2) is the mean; σ = 1.
        seconds = float(self.rng.lognormal(np.log(self.mean_seconds) - 0.5, 1.0))
        self.waited[row] += seconds
        threading.Timer(seconds, self.answer, [answer]).start()

    def answer(self, answer: Answer) -> None:
        with self.come:
            self.answers.append(answer)
            self.come.notify()

    def ready(self, *, wait: bool) -> list[Answer]:
        with self.come:
            while wait and not self.answers:
                self.come.wait()
            answers, self.answers = self.answers, []
        return sorted(answers, key=lambda answer: answer.row)


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 4096, HISTORY).tolist() for _ in range(count)]


def with_cache(sampler: Sampler, weights: Params, prompts: Sequence[Sequence[int]], rollout: RolloutConfig, turns: Any) -> int:
    """Runs the episodes; returns the sampled tokens."""
    got = sampler.sample(weights, prompts, rollout, seed=0, turns=turns)
    assert got.sampled is not None
    return sum(int(own.sum()) for own in got.sampled)


def with_prefills(sampler: Sampler, weights: Params, prompts: Sequence[Sequence[int]], generations: int) -> int:
    """Runs episodes as a rollout a turn, which computes the history of each again; returns the sampled tokens."""
    turn = RolloutConfig(num_generations=1, max_completion_length=SAMPLED)
    histories, count = [list(prompt) for prompt in prompts for _ in range(generations)], 0
    for number in range(TURNS):
        # As wide as the histories are, so that no padding is computed.
        shapes = sampler.shapes_for(turn, len(histories), (len(histories[0]),), None)
        got = sampler.sample(weights, histories, turn, seed=0, step=number, shapes=shapes)
        for history, ids in zip(histories, got.completion_ids, strict=True):
            history += [*ids, *((ids[-1] + n) % 4096 for n in range(OUTSIDE))]
            count += len(ids)
    return count


def seconds_of(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    count = function(*arguments)
    seconds = time.perf_counter() - start
    print(f"  {function.__name__}: {count} tokens sampled in {seconds:.2f} s", flush=True)
    return seconds


def compare(rounds: int, layers: int, width: int) -> None:
    """Prints the seconds of both ways, by turns, and their ratio."""
    sampler, weights = small_model(layers, width)
    prompts, generations = prompts_of(2), 4
    rollout = RolloutConfig(num_generations=generations, max_completion_length=TURNS * (SAMPLED + OUTSIDE), segment=SAMPLED)
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        pair = (
            seconds_of(with_cache, sampler, weights, prompts, rollout, FixedTurns(len(prompts) * generations)),
            seconds_of(with_prefills, sampler, weights, prompts, generations),
        )
        times += [pair] if number else []  # the first one compiles
    ratios = [again / once for once, again in times]
    print(f"computing every history again takes {statistics.median(ratios):.2f} times as long (of {len(ratios)}: {ratios})")


def waits(slots: int, mean_seconds: float, layers: int, width: int) -> None:
    """Prints the share of the time in which the device computes nothing.

    A rollout takes at least as long as its longest episode waits. So the share says something about the sampler only where the
    device computes for much longer than that.
    """
    sampler, weights = small_model(layers, width)
    prompts, generations = prompts_of(8), 4
    settings = {"max_completion_length": TURNS * (SAMPLED + OUTSIDE), "segment": 8, "slots": slots}
    rollout = RolloutConfig(num_generations=generations, **settings)  # type: ignore[arg-type] - fields by name
    busy = 0.0

    def observe(begun: float, results: Any) -> None:
        nonlocal busy
        jax.block_until_ready(results)
        busy += time.perf_counter() - begun

    for mean, refill in ((0.02, True), (0.02, False), (0.0, True), (mean_seconds, True), (mean_seconds, False)):
        turns, busy = FixedTurns(len(prompts) * generations, mean), 0.0
        for program in sampler.programs:
            program.observe = observe
        seconds = seconds_of(with_cache, sampler, weights, prompts, dataclasses.replace(rollout, refill=refill), turns)
        if mean == 0.02:
            continue  # compiles
        waited = f"the episode that waited longest did so for {max(turns.waited):.1f} s"
        print(
            f"answers after {mean} s, refilled slots: {refill}; idle {1 - busy / seconds:.1%} of {seconds:.1f} s; {waited}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["turns", "waits"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    given = parser.parse_args()
    if given.what == "turns":
        compare(given.rounds, given.layers, given.width)
    else:
        waits(given.slots, given.seconds, given.layers, given.width)
