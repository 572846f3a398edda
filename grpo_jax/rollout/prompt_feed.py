"""What the sampler needs of a caller who decides, while a rollout goes on, which prompts it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from grpo_jax.rollout.stop_strings import PartialCompletion

__all__ = ["PromptFeed"]


class PromptFeed(Protocol):
    """Decides before every segment which prompts a rollout begins in its free slots, and when it ends.

    All processes of a run must decide alike. What they decide may depend on counts, never on a clock.

    Attributes:
        first: prompts that the rollout begins with. On a mesh they are dealt out to the row shards (`schedule.dealt_order`).
    """

    first: int

    def ended(self, completions: Mapping[int, list[PartialCompletion]]) -> None:
        """Gets the completions of prompts by number: those whose last completion ended in the same segment."""
        ...

    def next(self, room: int, *, busy: bool) -> Sequence[int] | None:
        """Returns further prompts to begin, by number; None ends the rollout, and what is being decoded is dropped.

        Args:
            room: free slots that no completion waits for.
            busy: whether any completion is decoded or waits for a slot.
        """
        ...
