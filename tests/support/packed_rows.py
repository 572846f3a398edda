"""Packed rows for tests of attention: prompts with the sequences that continue them, and their attention in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo_kernels.ops.group_attention import KeyRanges, Limits

Groups = tuple[tuple[int, tuple[int, ...]], ...]
"""Tokens of each prompt of a row, and of each sequence that continues it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a test.

    Attributes:
        rows: what each row of the batch has; rows are padded to `tokens`.
        tokens: T.
        blocks: queries and keys in a block of the TPU kernels; `xla` takes blocks of 8.
        last: of each prompt only the last token asks, and no padding does.
    """

    rows: tuple[Groups, ...]
    tokens: int
    kv_heads: int = 1
    queries: int = 1
    blocks: tuple[int, int] = (16, 16)
    softcap: float | None = None
    last: bool = False

    @property
    def limits(self) -> Limits:
        prompts = [prompt for row in self.rows for prompt, own in row if own]
        lengths = [length for row in self.rows for prompt, own in row for length in (prompt, *own)]
        return Limits(max(len(row) for row in self.rows), max(prompts, default=0), max(lengths))


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sequence of a row: its own keys, its prompt's, and which query asks with which of its own tokens."""

    own: np.ndarray
    prompt: np.ndarray
    asking: np.ndarray
    queries: np.ndarray


def sequences(case: Case, row: Groups) -> list[Sequence]:
    """The sequences of a row; tokens stand back to back, and so do queries."""
    found, token, query = [], 0, 0
    for prompt, completions in row:
        shared = np.arange(token, token + prompt)
        for number, length in enumerate((prompt, *completions)):
            own = np.arange(token, token + length)
            asking = own[-1:] if case.last and number == 0 else own
            found.append(Sequence(own, shared if number else own[:0], asking, np.arange(query, query + asking.size)))
            token, query = token + length, query + asking.size
    return found


def asked(case: Case) -> int:
    """N."""
    if not case.last:
        return case.tokens
    return max(sum(one.queries.size for one in sequences(case, row)) for row in case.rows)


def key_ranges(case: Case) -> KeyRanges:
    """The ranges of every query; those that no sequence asks with see nothing."""
    numbers = np.zeros((4, len(case.rows), asked(case)), np.int32)
    for b, row in enumerate(case.rows):
        for one in sequences(case, row):
            if one.prompt.size:
                numbers[:2, b, one.queries] = np.array([[one.prompt[0]], [one.prompt[-1] + 1]])
            numbers[2, b, one.queries] = one.own[0]
            numbers[3, b, one.queries] = one.asking + 1
    return KeyRanges(*map(jnp.asarray, numbers))


def group(prompt: int, completion: int, generations: int) -> Groups:
    """One prompt with completions of one length."""
    return ((prompt, (completion,) * generations),)


UNEQUAL = Case((((20, (12, 12)),), ((13, (3, 17, 1)),)), 44, kv_heads=2, queries=2, softcap=2.0, blocks=(8, 16))
CASES = [
    UNEQUAL,
    Case((((5, (13,)), (1, (2, 1, 1)), (9, ()), (3, (30,))),), 70, queries=4, blocks=(16, 8)),
    Case((group(9, 5, 16), group(4, 5, 16)), 89),
    Case(((((17, ()),)), ((3, ()),)), 17, queries=2),
    Case((((6, (9, 2)), (3, (4,))), ((2, (1,)),)), 30, queries=2, last=True),
    Case((((3, (1,)),),), 4),
]


def inputs(case: Case, dtype: str = "float32", head_dim: int = 8) -> tuple[jax.Array, ...]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(case.tokens)
    b = len(case.rows)
    queries, keys = (b, asked(case), case.kv_heads, case.queries, head_dim), (b, case.tokens, case.kv_heads, head_dim)
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in (queries, keys, keys, queries))


def by_the_book(case: Case, window: int, *arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """Result, dq, dk and dv; one sequence after another, each with its prompt in front, one head after another."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    cap = case.softcap
    for b, row in enumerate(case.rows):
        for text in sequences(case, row):
            keys, rows = np.concatenate([text.prompt, text.own]), text.queries
            position = text.prompt.size + text.asking - text.own[0]
            distance = position[:, None] - np.arange(len(keys))[None, :]
            sees = (distance >= 0) & (distance < window)
            for h, r in np.ndindex(case.kv_heads, case.queries):
                one, many, values, d_one = q[b, rows, h, r], k[b, keys, h], v[b, keys, h], d_out[b, rows, h, r]
                scores = one @ many.T
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.where(sees, np.exp(scores - scores.max()), 0)
                weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
                result = weights @ values
                d_scores = weights * (d_one @ values.T - (d_one * result).sum(axis=1, keepdims=True))
                d_scores *= 1 if cap is None else 1 - (scores / cap) ** 2
                out[b, rows, h, r], dq[b, rows, h, r] = result, d_scores @ many
                dk[b, keys, h] += d_scores.T @ one
                dv[b, keys, h] += weights.T @ d_one
    return out, dq, dk, dv


def visible_blocks(case: Case, window: int, blocks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each row and pair of blocks: whether any query sees any key, and whether each sees all keys within one of its ranges."""
    (c, x), n = blocks, asked(case)
    ranges = np.zeros((2, len(case.rows), -(-n // c) * c, -(-case.tokens // x) * x), bool)
    for b, row in enumerate(case.rows):
        for text in sequences(case, row):
            keys = np.concatenate([text.prompt, text.own])
            distance = (text.prompt.size + text.asking - text.own[0])[:, None] - np.arange(len(keys))[None, :]
            sees = (distance >= 0) & (distance < window)
            ranges[0, b, text.queries[:, None], text.prompt[None, :]] = sees[:, : text.prompt.size]
            ranges[1, b, text.queries[:, None], text.own[None, :]] = sees[:, text.prompt.size :]
    ranges = ranges.reshape(2, len(case.rows), -1, c, ranges.shape[3] // x, x)
    return ranges.any(axis=(0, 3, 5)), ranges.all(axis=5).any(axis=0).all(axis=2)
