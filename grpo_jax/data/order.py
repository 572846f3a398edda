"""Computes the rows of a step as a pure function of seed and step, so that a resumed run continues where it stopped."""

from __future__ import annotations

import functools
import math

import numpy as np


def rows_of_step(step: int, size: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the rows of a step, as positions in the training rows.

    Steps visit one epoch after another, each a permutation of all rows. A step may begin in one epoch and end in the
    next; the next epoch's order is then changed so that no row occurs twice within the step.

    Args:
        step: Number of the step, from 0.
        size: Rows in a step, at most `count`.
        count: Number of training rows.
        seed: Seed of the permutations, together with the epoch.
        shuffle: False visits the rows in the order of the dataset in every epoch.

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
    """Returns the order of all rows in an epoch, read-only.

    Where a step begins in the previous epoch, this epoch's first rows must differ from the step's rows there: they are taken from
    the rest, in order. So an order depends on the end of the previous order, back to an epoch that begins with a new step. With at
    least two steps' rows per epoch, the change at an order's start does not affect its end, and one epoch back is enough.
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
    """Returns all positions in the drawn order of an epoch, not yet changed for steps that span two epochs."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def held_out_positions(count: int, size: int, seed: int) -> np.ndarray:
    """Draws `size` of `count` positions, sorted; the random numbers are independent of every epoch's order."""
    return np.sort(np.random.default_rng([seed, 0, 1]).permutation(count)[:size])
