"""Which kind of chip a program is traced for: this process's own, or one that is not here and is only compiled for.

Enters: a `Target` for the time of `tracing_for`. Leaves: `platform()`, by which operations choose their implementation where none
is named. It is part of the key of JAX's caches, so that nothing traced for one chip is taken for another.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Target:
    """A chip that is not here.

    Attributes:
        platform: as `jax.default_backend()` would say.
        vector_memory_bytes: of a TPU's core; 0 elsewhere.
    """

    platform: Platform
    vector_memory_bytes: int = 0


TARGET: Any = jax.make_user_context(default_value=None)


def tracing_for(target: Target | None) -> AbstractContextManager[Any]:
    """Within it programs are traced for the chip; None is this process's own."""
    return TARGET(target)


def target() -> Target | None:
    """The chip that is traced for, where it is not this process's own."""
    return TARGET.value


def platform() -> str:
    """`jax.default_backend()`, or that of the chip that is traced for."""
    chosen = target()
    return jax.default_backend() if chosen is None else chosen.platform
