"""Counts the programs that a short run compiles, and its seconds: 12 steps of a small model with prompts of 3 to 90 words.

    python tests/tools/compile_counts.py --model FOLDER [--cache FOLDER] [--option SECTION.FIELD=VALUE ...]

FOLDER holds Karpathy's stories260K (MIT) in the layout of Hugging Face. The reward is the number of letters "e"; there are three
evaluations. It prints every program of more than 0.05 s with its time, and a line of JSON with the totals. Without `--cache` an
empty folder is used, so that everything is compiled; run it twice with one folder to measure a second start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

SHOWN_SECONDS = 0.05
"""Programs that take longer are counted."""

WORDS = [*"abcdefghij", "once", "upon", "time", "there", "was", "little", "girl", "liked", "to", "play", "with", "ball", "park"]


def prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with prompts of 3 to 90 words; most are short, as real ones are."""
    draw = random.Random(seed)
    lengths = [3 + int(87 * draw.random() ** 2) for _ in range(count)]
    return [{"prompt": " ".join(draw.choice(WORDS) for _ in range(length))} for length in lengths]


class CompileEvents:
    """Programs that JAX compiled or read from its cache, by `jax.monitoring`.

    Attributes:
        found: (seconds since the start, seconds it took, name, whether it came from the cache) of each.
    """

    def __init__(self) -> None:
        import jax

        self.found: list[tuple[float, float, str, bool]] = []
        self._hit = threading.local()
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_event(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._hit.value = True

    def _on_duration(self, event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cached, self._hit.value = getattr(self._hit, "value", False), False
            self.found.append((time.perf_counter() - STARTED, seconds, str(details.get("fun_name")), cached))

    def summary(self) -> dict[str, Any]:
        """Totals: programs of more than `SHOWN_SECONDS`, and all small ones together."""
        large = [one for one in self.found if one[1] > SHOWN_SECONDS and not one[3]]
        cached = [one for one in self.found if one[3]]
        small = [one for one in self.found if one[1] <= SHOWN_SECONDS and not one[3]]
        return {
            "compiled": len(large),
            "compiled_seconds": round(sum(one[1] for one in large), 2),
            "small_compiled": len(small),
            "small_seconds": round(sum(one[1] for one in small), 2),
            "from_cache": len(cached),
            "from_cache_seconds": round(sum(one[1] for one in cached), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", help="folder of the compilation cache; default: an empty one")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = given.cache or str(scratch / "cache")
    import grpo_jax as gx
    from grpo_jax.config import load

    events = CompileEvents()
    marks: dict[str, float] = {}

    def letters(completions: list[str], **_: Any) -> list[float]:
        marks.setdefault("evaluation", time.perf_counter() - STARTED)
        if len(completions) == 64:
            marks.setdefault("rewards", time.perf_counter() - STARTED)
        return [text.count("e") / 10 for text in completions]

    class Marks(gx.Callback):
        def on_step_end(self, trainer: Any, metrics: Any, completions: Any) -> None:
            marks.setdefault("step_1", time.perf_counter() - STARTED)
            marks[f"programs after step {trainer.steps_done}"] = events.summary()["compiled"]

    settings = {
        "model.path": given.model,
        "model.dtype": "float32",
        "data.eval_size": 16,
        "rollout.max_prompt_length": 256,
        "rollout.max_completion_length": 192,
        "rollout.num_generations": 8,
        "objective.beta": 0.04,
        "optim.learning_rate": 1e-3,
        "train.steps": given.steps,
        "train.prompts_per_step": 8,
        "train.eval_every": given.steps // 2,
        "train.save_every": 0,
        "train.quiet": True,
        "train.run_dir": str(scratch / "run"),
    }
    settings |= dict(option.split("=", 1) for option in given.option)
    result = gx.train(load(None, settings).config, dataset=prompts(200), reward_funcs=letters, callbacks=[Marks()])
    seconds = time.perf_counter() - STARTED
    for at, took, name, cached in events.found:
        if took > SHOWN_SECONDS:
            print(f"{at:8.1f} s  {took:6.2f} s  {'read' if cached else 'compiled'}  {name}")
    totals = {"seconds": seconds, **{name: marks[name] for name in ("evaluation", "rewards", "step_1")}}
    print(json.dumps({**{name: round(value, 2) for name, value in totals.items()}, **events.summary()}))
    after = [marks[f"programs after step {number}"] for number in range(1, given.steps + 1)]
    print(json.dumps({"programs after each step": after, "rewards": [round(row["reward/mean"], 4) for row in result.history]}))


if __name__ == "__main__":
    main()
