"""The settings section `eval`: further sets of held-out rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.config.checks import check_types, require, require_choice

KEYS = ("path", "split", "size")


@dataclass(frozen=True)
class EvalConfig:
    """Further held-out rows, in addition to those of `data.eval_path`, `eval_split` and `eval_size`, which remain the main ones.

    Args:
        sets: {name: {path, split, size}}. `path` is a file, folder or hub id, by default data.path; `split` is one of its splits;
            `size` takes the first rows only. Columns have the names that `data` gives. Each is evaluated when the main ones are.
    """

    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "eval")
        for name, chosen in self.sets.items():
            where = f"eval.sets.{name}"
            fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None
            require(fits, "eval.sets", name, "name a set with letters, digits, _, - and ., such as math500")
            for key, value in chosen.items():
                require_choice(where, key, KEYS)
                if key == "size":
                    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                    require(ok, f"{where}.size", value, "use a number of rows, at least 1")
                else:
                    require(isinstance(value, str) and bool(value), f"{where}.{key}", value, "expected text")
            require("path" in chosen or "split" in chosen, where, chosen, "give a path, or another split of data.path")
