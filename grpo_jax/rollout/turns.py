"""What the sampler needs of the outside of an episode: the tokens that answer a turn of the model.

An episode is a completion of several turns: tokens that the model sampled, and tokens from outside (a tool's result, an
environment's answer, the chat template's markup between turns) that the model reads and is not trained on. This file says how the
two sides talk; who runs environments and renders messages is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo_jax.types import FinishReason

__all__ = ["Answer", "Turns"]


@dataclass(frozen=True)
class Answer:
    """The answer to a turn.

    Attributes:
        row: the episode, b·G + g.
        ids: tokens that the model reads next, after those of its turn; empty = the episode has ended.
    """

    row: int
    ids: Sequence[int]


class Turns(Protocol):
    """Answers the turns of N episodes. Answers may come late and in any order; tokens do not depend on when they come.

    Attributes:
        first_ids: N lists of tokens that an episode reads after its prompt, before the model's first turn; usually empty.
        max_turn_tokens: tokens after which a turn ends with "length"; None = only the episode's limit counts.
    """

    first_ids: Sequence[Sequence[int]]
    max_turn_tokens: int | None

    def ended(self, row: int, ids: list[int], reason: FinishReason) -> None:
        """Is told that a turn has ended, and starts to answer it without waiting.

        It is not called for the turn in which an episode reaches its limit of tokens.

        Args:
            row: the episode.
            ids: tokens of this turn, as they were sampled, the stop token included where there is one.
            reason: why the turn ended.
        """
        ...

    def ready(self, *, wait: bool) -> list[Answer]:
        """Returns the answers that have come since the last call, by row.

        Args:
            wait: return at least one; called only while one is outstanding.
        """
        ...
