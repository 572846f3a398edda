"""Decides when a segment is dispatched before the tokens of the one before are on the host (`rollout.dispatch_ahead`).

Between two segments the devices else wait for the host: it fetches the tokens, ends and begins completions, and dispatches the next
segment.
"""

from __future__ import annotations

from typing import Literal

from grpo_jax.config import RolloutConfig
from grpo_kernels.target import platform

__all__ = ["Ahead", "dispatches_ahead"]

Ahead = Literal["never", "where nothing waits", "always"]
"""When segments are dispatched before the tokens of the one before are on the host."""


def dispatches_ahead(rollout: RolloutConfig, *, episodes: bool) -> Ahead:
    """Resolves `rollout.dispatch_ahead`.

    A stop token is known a segment later, and then a slot is refilled, or a turn answered, a segment later. That costs more than
    the host's time between two segments: `auto` dispatches ahead only where it delays nothing. A CPU computes all of it itself.

    Args:
        episodes: whether completions have several turns.
    """
    if rollout.dispatch_ahead != "auto":
        return "always" if rollout.dispatch_ahead else "never"
    return "never" if platform() == "cpu" or episodes else "where nothing waits"
