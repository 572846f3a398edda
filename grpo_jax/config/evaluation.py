"""The settings section `eval`: further sets of held-out rows, and samples of each row."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.config.checks import check_types, require, require_choice

KEYS = ("path", "split", "size")

TAKEN = ("completions", "majority_at", "pass_at", "reward", "rewards", "sampled")
"""What metrics of the main set begin with, so that no set can have one of these names."""


@dataclass(frozen=True)
class EvalConfig:
    """What a run evaluates in addition to one greedy completion of each held-out row of the main set, which `data` says.

    Args:
        sets: {name: {path, split, size}}. `path` is a file, folder or hub id, by default data.path; `split` is one of its splits;
            `size` takes the first rows only. Columns have the names that `data` gives. Each is evaluated when the main ones are.
        samples: k, completions drawn of each held-out row at every evaluation of a run, at rollout.temperature and always with the
            same random numbers. Metrics are pass_at/1, pass_at/2, ... pass_at/k, majority_at/k and sampled/.... null draws none.
    """

    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "eval")
        k = self.samples
        require(k is None or k >= 2, "eval.samples", k, "use 2 or more samples of each row, such as 8, or null")
        for name, chosen in self.sets.items():
            where = f"eval.sets.{name}"
            check_set_name("eval.sets", name)
            for key, value in chosen.items():
                require_choice(where, key, KEYS)
                if key == "size":
                    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                    require(ok, f"{where}.size", value, "use a number of rows, at least 1")
                else:
                    require(isinstance(value, str) and bool(value), f"{where}.{key}", value, "expected text")
            require("path" in chosen or "split" in chosen, where, chosen, "give a path, or another split of data.path")


def check_set_name(field_name: str, name: Any) -> None:
    """Raises a ConfigError where a set cannot have this name."""
    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None
    require(fits, field_name, name, "name a set with letters, digits, _, - and ., such as math500")
    require(name not in TAKEN, field_name, name, "use another name: metrics of the main set begin with it")
