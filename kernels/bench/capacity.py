"""Time of a rollout whose KV cache has room for longer completions, next to one whose cache is filled, interleaved in one process.

    python kernels/bench/capacity.py --model runs/random_qwen3 --completion_length 128 --capacity 1024

Prints medians, their ratio, and the median of the pairs' ratios. Both rollouts draw completions of the same lengths; only
`rollout.max_completion_length` differs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np

import grpo_jax as gx
from grpo_jax.config import LoraConfig, RolloutConfig
from grpo_jax.policy import sampler_of


def arguments() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder of a Hugging Face model")
    for name, default in (
        ("prompts", 4),
        ("num_generations", 8),
        ("prompt_length", 64),
        ("completion_length", 128),
        ("capacity", 1024),
        ("rounds", 15),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    return options.parse_args()


def main() -> None:
    """Measures and prints."""
    given = arguments()
    policy = replace(gx.Policy.from_pretrained(given.model, lora=LoraConfig(rank=16)), stop_ids=())
    prompts = np.random.default_rng(0).integers(0, policy.spec.vocab, (given.prompts, given.prompt_length)).tolist()
    limits = np.full(given.prompts * given.num_generations, given.completion_length)
    rooms = (given.completion_length, given.capacity)
    samplers = {room: sampler_of(policy) for room in rooms}
    settings = {room: RolloutConfig(num_generations=given.num_generations, max_completion_length=room) for room in rooms}

    def rollout(room: int) -> float:
        start = time.perf_counter()
        samplers[room].sample(policy.variables, prompts, settings[room], seed=0, limits=limits)
        return time.perf_counter() - start

    for room in rooms:
        for _ in range(2):
            rollout(room)
    seconds: dict[int, list[float]] = {room: [] for room in rooms}
    for number in range(given.rounds):
        for room in rooms if number % 2 else reversed(rooms):
            seconds[room].append(rollout(room))
    filled, roomy = (statistics.median(seconds[room]) for room in rooms)
    pairs = statistics.median(b / a for a, b in zip(*(seconds[room] for room in rooms), strict=True))
    print(
        f"rollout of {given.completion_length} tokens: room for as many {filled:.3f} s, for {given.capacity} {roomy:.3f} s: "
        f"{roomy / filled - 1:+.1%}; median of pairs {pairs - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
