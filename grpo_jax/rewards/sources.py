"""Where a worker process finds a reward function: by an entry of rewards.functions, or in the bytes that cloudpickle made of it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_jax.rewards.builtin import BUILTINS
from grpo_jax.rewards.protocol import RewardFunction
from grpo_jax.rewards.resolve import resolve_functions


@dataclass(frozen=True)
class Source:
    """What a worker needs to find one function again.

    Attributes:
        entry: of rewards.functions; None where the function was pickled.
        max_completion_length: rollout.max_completion_length, for built-ins that need it.
        pickled: the function; None where an entry names it.

    Example:
        Source(entry="my_rewards.py:polite").load()
    """

    entry: str | Mapping[str, Any] | None = None
    max_completion_length: int | None = None
    pickled: bytes | None = None

    @property
    def is_built_in(self) -> bool:
        """Whether it is a function of this package, quick to load."""
        name = self.entry if isinstance(self.entry, str) else (self.entry or {}).get("name")
        return name in BUILTINS

    def load(self) -> RewardFunction:
        """Finds the function: imports what the entry names, or reads the pickle."""
        if self.pickled is not None:
            return pickle.loads(self.pickled)
        assert self.entry is not None
        ((_, function),) = resolve_functions([self.entry], max_completion_length=self.max_completion_length)
        return function


def pickled_source(function: RewardFunction) -> Source:
    """Returns the source of a Python object.

    Raises:
        Exception: cloudpickle is not installed, or cannot pickle the function; the kind depends on what the function holds.
    """
    import cloudpickle  # here, because most runs need none

    return Source(pickled=cloudpickle.dumps(function))
