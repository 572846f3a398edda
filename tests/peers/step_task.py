"""Options, prompts, reward and clock that the three trainers of the step comparison share.

The time of a step is measured the same way for all: from one call of the reward function to the next, which includes one rollout,
scoring by the reference, and one update, in the order of the trainer. The first WARM_UP steps are left out. The result is one line
of JSON, last on standard output. Only the standard library is imported, so that it runs in every trainer's environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_qwen3 import FIRST_WORD

WARM_UP = 2
RANK, ALPHA, BETA, LEARNING_RATE = 16, 32.0, 0.04, 1e-4


def parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every trainer has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", required=True, help="folder that random_qwen3.py wrote, or of a chat model with --questions")
    made.add_argument("--prompt_length", type=int, default=64, help="tokens of every prompt; with --questions the most")
    made.add_argument(
        "--questions", default=None, help="JSON lines with `question` for a chat model, whose completions end as it says"
    )
    made.add_argument("--ragged", action="store_true", help="completions end where the model says, at completion_length at last")
    add_shape_options(made)
    return made


def equally_long(given: argparse.Namespace) -> bool:
    """Whether every completion has `completion_length` tokens."""
    return given.questions is None and not given.ragged


def add_shape_options(to: argparse.ArgumentParser) -> None:
    """Adds the options of a step's shape, except the length of the prompts, and the number of timed steps."""
    to.add_argument("--completion_length", type=int, default=128, help="tokens of every completion, or of the longest")
    to.add_argument("--prompts", type=int, default=4, help="prompts a step")
    to.add_argument("--num_generations", type=int, default=8, help="completions a prompt")
    to.add_argument("--steps", type=int, default=4, help=f"steps timed, after {WARM_UP} of warm-up")


def calls(given: argparse.Namespace) -> int:
    """Returns the number of steps that a trainer runs; the last one only ends the time of the one before."""
    return WARM_UP + given.steps + 1


def prompts_of(given: argparse.Namespace) -> list[Any]:
    """Returns the prompts of all steps, all different: random words, or the first questions of the file as conversations."""
    if given.questions is None:
        return made_up_prompts(given)
    with open(given.questions, encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line, _ in zip(lines, range(given.prompts * calls(given)), strict=False)]
    return [[{"role": "user", "content": question}] for question in questions]


def made_up_prompts(given: argparse.Namespace) -> list[str]:
    """Returns prompts of random words, different ones for every prompt of every step."""
    vocabulary = json.loads((Path(given.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    draws = random.Random(0)
    count = given.prompts * calls(given)
    return [" ".join(f"w{draws.randrange(FIRST_WORD, vocabulary)}" for _ in range(given.prompt_length)) for _ in range(count)]


@dataclass(frozen=True)
class Watch:
    """Observes a trainer from its reward function: checks the completions, records the time, and differs within a group.

    Attributes:
        given: the command line.
        times: seconds at which the reward was called, one a step.
        distinct: different completions in each step.
        tokens: mean tokens of a completion in each step.
    """

    given: argparse.Namespace
    times: list[float] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def reward(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> list[float]:
        """Returns the rewards of a step's completions, each a list of its tokens, as ids or as words."""
        self.times.append(time.perf_counter())
        given = self.given
        assert len(prompts) == len(completions) == given.prompts * given.num_generations, (len(prompts), len(completions))
        assert len(set(map(str, prompts))) == given.prompts
        lengths = {len(row) for row in completions}
        if given.questions is None:
            assert {len(prompt.split()) for prompt in prompts} == {given.prompt_length}
        if equally_long(given):
            assert lengths == {given.completion_length}, f"completions of {sorted(lengths)} tokens"
        assert 0 < max(lengths) <= given.completion_length, f"completions of {sorted(lengths)} tokens"
        self.tokens.append(sum(map(len, completions)) / len(completions))
        texts = [" ".join(map(str, row)) for row in completions]
        self.distinct.append(len(set(texts)))
        return [float(zlib.crc32(text.encode()) % 7) for text in texts]

    def step_seconds(self) -> list[float]:
        """Returns the seconds of every step after the warm-up."""
        between = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return between[WARM_UP:]


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Wraps a function so that the seconds of every call are recorded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def report(
    watch: Watch, *, rollout_seconds: list[float], losses: list[float], trained: int, change: float, packages: Sequence[str]
) -> None:
    """Checks that the trainer trained, and prints the line of the result.

    Args:
        watch: the observer in the reward function.
        rollout_seconds: of every rollout; that of a timed step is the one before the call that ends the step.
        losses: one for every finished step.
        trained: number of trained parameters.
        change: norm of the change of the adapters.
        packages: packages whose versions are printed.
    """
    steps = watch.step_seconds()
    assert len(steps) == watch.given.steps, f"{len(steps)} steps were timed"
    assert len(losses) >= len(steps), losses
    assert all(math.isfinite(loss) for loss in losses), losses
    assert 0 < change < math.inf, f"the adapters changed by {change}"
    rows = watch.given.prompts * watch.given.num_generations
    if equally_long(watch.given):
        assert watch.distinct == [rows] * len(watch.times), f"of {rows} completions {watch.distinct} are different"
    result = {
        "step_seconds": steps,
        "rollout_seconds": rollout_seconds[WARM_UP + 1 :][: len(steps)],
        "median_step_seconds": statistics.median(steps),
        "called_at_seconds": watch.times,
        "completion_tokens_mean": watch.tokens,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
        "trained_parameters": trained,
        "adapter_change": change,
        "settings": {name: value for name, value in vars(watch.given).items() if name != "model"},
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]},
    }
    print(json.dumps(result), flush=True)
