"""Computes the rows of a step as a pure function of seed and step, so that a resumed run continues where it stopped."""

from __future__ import annotations

import functools
import heapq
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


def rows_from(start: int, size: int, window: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the rows from a position of the endless order on, in which one epoch follows another.

    It is for steps that do not all draw the same number of rows. Any `window` rows that follow each other are different.

    Args:
        start: Position in the order, from 0.
        size: Number of rows.
        window: Most rows that a step draws, at most `count`.
        count: Number of training rows.
        seed: Seed of the permutations, together with the epoch.
        shuffle: False visits the rows in the order of the dataset in every epoch.

    Returns:
        [size] positions in the training rows, int64.
    """
    if not 0 < window <= count:
        raise ValueError(f"{window} rows in a row cannot differ where there are {count}")
    if start < 0 or size < 0:
        raise ValueError(f"there are no {size} rows from position {start} on")
    parts, stop = [], start + size
    for epoch in range(start // count, -(-stop // count)):
        first = epoch * count
        parts.append(windowed_order(epoch, window, count, seed, shuffle)[max(start - first, 0) : stop - first])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=4)
def windowed_order(epoch: int, window: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the order of an epoch for `rows_from`, read-only: its first rows are not the last ones of the epoch before.

    At most the first 2·(window − 1) rows are moved, so that with three times as many rows the end of an order does not depend on
    the order before, and one epoch back is enough.
    """
    end = window - 1
    first = max(0, epoch - 1) if count >= 3 * end else 0
    order = permutation(first, count, seed, shuffle)
    for later in range(first + 1, epoch + 1):
        order = moved_apart(permutation(later, count, seed, shuffle), order[count - end :])
    order.setflags(write=False)
    return order


def moved_apart(order: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Reorders rows so that row before[j] comes at index j + 1 or later; apart from that they stay in order."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    others = iter(order[~np.isin(order, before)].tolist())
    following = next(others)
    allowed: list[int] = []  # ranks of rows of `before` that may come now
    head = []
    for row in before.tolist():
        if allowed and (following is None or allowed[0] < rank[following]):
            head.append(int(order[heapq.heappop(allowed)]))
        else:
            head.append(following)
            following = next(others, None)
        heapq.heappush(allowed, int(rank[row]))
    return np.concatenate([np.array(head, np.int64), order[~np.isin(order, head)]])


def permutation(epoch: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns all positions in the drawn order of an epoch, not yet changed for steps that span two epochs."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def held_out_positions(count: int, size: int, seed: int) -> np.ndarray:
    """Draws `size` of `count` positions, sorted; the random numbers are independent of every epoch's order."""
    return np.sort(np.random.default_rng([seed, 0, 1]).permutation(count)[:size])
