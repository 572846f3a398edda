"""Times 512 calls of math_verify: one after the other in this process, and in reward workers, by turns.

    python tests/tools/scoring_times.py [--calls 512] [--workers N] [--rounds 3]

Both have been called before they are timed, so that neither imports anything. It prints a line of JSON: the seconds of each round,
and the medians' ratio to the serial time divided by the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards import math_verify, resolve_functions, runner_of, score

ANSWERS = [r"\frac{3}{4}", "x^2 + 2x + 1", "1{,}234", r"\sqrt{2}/2", "(-\\infty, 3]", "42", r"\{1, 2, 3\}", "0.125"]


def main() -> None:
    """Runs the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=512)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    answers = [ANSWERS[number % len(ANSWERS)] for number in range(given.calls)]
    texts = [f"So the result is $\\boxed{{{other}}}$." for other in (*answers[3:], *answers[:3])]
    function: Any = math_verify("answer")
    functions = resolve_functions([function])
    runner = runner_of(RewardsConfig(workers=given.workers), [function], functions, None, print)

    def serial(count: int) -> list[float]:
        return [function(completions=[text], answer=[other])[0] for text, other in zip(texts[:count], answers[:count], strict=True)]

    def parallel(count: int) -> list[float]:
        return score(
            functions,
            None,
            prompts=["p"] * count,
            completions=texts[:count],
            completion_ids=[[1]] * count,
            columns={"answer": answers[:count]},
            timeout_seconds=60.0,
            max_failed_share=0.0,
            runner=runner,
        ).rewards.tolist()

    assert serial(16) == parallel(16)
    for _ in range(given.workers):  # each worker has imported what it needs
        parallel(8 * given.workers)
    seconds: dict[str, list[float]] = {"serial": [], "workers": []}
    for _ in range(given.rounds):
        for name, how in (("serial", serial), ("workers", parallel)):
            started = time.perf_counter()
            how(given.calls)
            seconds[name].append(round(time.perf_counter() - started, 3))
    runner.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["workers"] / (medians["serial"] / given.workers)
    print(json.dumps({"calls": given.calls, "workers": given.workers, **seconds, "ratio to serial / workers": round(ratio, 3)}))


if __name__ == "__main__":
    main()
