"""Which keys a query sees: two ranges of a packed row, its prompt's and its own sequence's up to itself.

A packed row has sequences back to back: a prompt, the sequences that continue it, the next prompt, and so on. A sequence that
continues a prompt is a completion, or an episode of several turns. Two numbers for each range describe any such row, whatever the
lengths.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

AnyArray: TypeAlias = Array | np.ndarray
"""An array on the device or on the host."""


class KeyRanges(NamedTuple):
    """The keys that each query of a row sees, by their index in the row: from a start up to, and not including, an end.

    Positions follow from the ranges: the keys of a prompt count from 0, those of a sequence behind it from the prompt's length on.

    Attributes:
        prompt_start, prompt_end: the keys of the prompt that the query's sequence continues; equal where there is none.
        own_start: the first key of the query's own sequence.
        own_end: one after the query's own key; equal to own_start where the query sees none of its own sequence.

    Example:
        A prompt of 2 tokens and two completions of 2: KeyRanges(
            prompt_start=[0, 0, 0, 0, 0, 0], prompt_end=[0, 0, 2, 2, 2, 2],
            own_start=[0, 0, 2, 2, 4, 4], own_end=[1, 2, 3, 4, 5, 6])
    """

    prompt_start: Int[AnyArray, "B N"]
    prompt_end: Int[AnyArray, "B N"]
    own_start: Int[AnyArray, "B N"]
    own_end: Int[AnyArray, "B N"]


def within_window(ranges: KeyRanges, window: int | Int[Array, ""]) -> Int[Array, "B 4 N"]:
    """Returns the four numbers of each query without the keys that are `window` or more positions before it."""
    ranges = KeyRanges(*map(jnp.asarray, ranges))
    prompt_tokens = ranges.prompt_end - ranges.prompt_start
    position = prompt_tokens + ranges.own_end - 1 - ranges.own_start
    hidden = jnp.maximum(position - window + 1, 0)
    prompt_start = jnp.minimum(ranges.prompt_start + hidden, ranges.prompt_end)
    own_start = jnp.minimum(ranges.own_start + jnp.maximum(hidden - prompt_tokens, 0), ranges.own_end)
    return jnp.stack([prompt_start, ranges.prompt_end, own_start, ranges.own_end], axis=1)


def sees(bounds: Any, key: Int[Array, "..."]) -> Bool[Array, "..."]:
    """True = a query with these four bounds sees the key. Ends are compared as unsigned numbers, one comparison a range."""
    prompt_start, prompt_end, own_start, own_end = bounds

    def inside(start: Any, end: Any) -> Any:
        return (key - start).astype(jnp.uint32) < (end - start).astype(jnp.uint32)

    return inside(prompt_start, prompt_end) | inside(own_start, own_end)


def prompt_ranges(lengths: Int[Array, "B"], width: int) -> KeyRanges:
    """The key ranges of rows with one prompt each, padded on the right to `width`; padding sees nothing."""
    at = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (lengths.shape[0], width))
    zero = jnp.zeros_like(at)
    return KeyRanges(zero, zero, zero, jnp.where(at < lengths[:, None], at + 1, 0))
