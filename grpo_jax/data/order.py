"""Which rows a step visits: a pure function of the seed and the step, so that a resumed run goes on where it stopped."""

from __future__ import annotations

import functools
import math

import numpy as np


def rows_of_step(step: int, size: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """The rows of a step, as positions in the training rows.

    Steps walk through one epoch after another, each a permutation of all rows. A step may begin in one epoch and end in the
    next; the next one's order is then changed so that no row comes twice within the step.

    Args:
        step: Number of the step, from 0.
        size: Rows in a step, at most `count`.
        count: Rows that there are.
        seed: Fixes the permutations, with the epoch.
        shuffle: False visits the rows in their own order, every epoch.

    Returns:
        [size] different positions, int64.
    """
    if not 0 < size <= count:
        raise ValueError(f"a step of {size} rows cannot be taken from {count} without repeating one")
    if step < 0:
        raise ValueError(f"step {step} is negative")
    epoch, offset = divmod(step * size, count)
    head = epoch_order(epoch, size, count, seed, shuffle)[offset : offset + size]
    if len(head) == size:
        return head.copy()
    return np.concatenate([head, epoch_order(epoch + 1, size, count, seed, shuffle)[: size - len(head)]])


@functools.lru_cache(maxsize=4)
def epoch_order(epoch: int, size: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """The order of all rows in an epoch, read-only.

    Where a step begins in the epoch before, its rows there must not be among this epoch's first ones: those are taken from the
    rest, in order. So an order rests on the end of the order before it, back to an epoch that begins with a step of its own;
    with two steps' rows or more, the change at an order's start does not reach its end, and one epoch back is enough.
    """
    first = epoch - epoch % (size // math.gcd(count, size))
    if count >= 2 * size:
        first = max(first, epoch - 1)
    order = permutation(first, count, seed, shuffle)
    for later in range(first + 1, epoch + 1):
        from_before = later * count % size
        previous, order = order, permutation(later, count, seed, shuffle)
        if from_before:
            fresh = np.flatnonzero(~np.isin(order, previous[count - from_before :]))[: size - from_before]
            order = np.concatenate([order[fresh], np.delete(order, fresh)])
    order.setflags(write=False)
    return order


def permutation(epoch: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """All positions in the order of an epoch, before steps that straddle epochs are seen to."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def held_out_positions(count: int, size: int, seed: int) -> np.ndarray:
    """`size` of `count` positions, drawn by the seed apart from every epoch's order, and sorted."""
    return np.sort(np.random.default_rng([seed, 0, 1]).permutation(count)[:size])
