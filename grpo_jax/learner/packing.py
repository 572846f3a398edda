"""Packs prompts and completions of real lengths into rows of a few sizes, on the host.

A row has whole sequences back to back: a prompt, completions that continue it, the next prompt. Where a group does not fit into
what is left of a row, its other completions go to another row, behind a copy of the prompt. An update does not depend on the
packing, but for rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.types import MicroBatches, PackedRows
from grpo_kernels import KeyRanges, Limits

MANY_ROWS = 16
"""Where a step has that many rows, the last one may be half empty: a second size of rows takes longer to compile than it saves."""

QUARTER_PROMPTS = 3
"""Prompts that a row of a quarter of the tokens has room for at least; where it has not, groups would often be cut."""


@dataclass(frozen=True)
class RowSize:
    """The size of packed rows, which a program is compiled for.

    Attributes:
        tokens: T.
        firsts, later: entries of a row: first tokens of completions, and later tokens.
        count: M, micro-batches of such rows.
        limits: what every row keeps to.
    """

    tokens: int
    firsts: int
    later: int
    count: int
    limits: Limits

    @property
    def entries(self) -> int:
        """E."""
        return self.firsts + self.later


@dataclass(frozen=True)
class Lengths:
    """The lengths of a run's texts, in tokens: the shortest and the longest prompt, and the longest completion."""

    shortest_prompt: int
    longest_prompt: int
    completion: int

    def group(self, completions: int) -> int:
        """Tokens of the longest group: a prompt and its completions, of which the last token is in no row."""
        return self.longest_prompt + completions * (self.completion - 1)


def row_sizes(
    lengths: Lengths, prompts: int, generations: int, tokens: int, shards: int = 1, multiple: int = 1
) -> tuple[RowSize, ...]:
    """Returns the sizes of the rows of a run: rows of this many tokens, and smaller ones for what is left over.

    There are as many rows as the longest texts need; those without tokens are not computed.

    Args:
        lengths: of the run's texts.
        prompts, generations: B and G.
        tokens: of a row; fewer where all texts are shorter, and never fewer than the longest prompt and completion.
        shards: R, rows that are computed at once.
        multiple: tokens are rounded up to a multiple of this, so that kernels need not pad a row in every layer.
    """

    def rounded(tokens: int) -> int:
        return -(-tokens // multiple) * multiple

    least, most = lengths.group(1), -(-prompts // shards) * lengths.group(generations)
    tokens = rounded(max(least, min(tokens, most)))
    each = min(generations, (tokens - lengths.longest_prompt) // max(lengths.completion - 1, 1))
    groups = max(1, tokens // lengths.group(generations))  # whole groups of a row
    pieces = -(-prompts // groups) if each == generations else prompts * -(-generations // each)

    def size(tokens: int, count: int) -> RowSize:
        firsts = min(-(-prompts // shards) * generations, max(groups * generations, tokens // 16))
        later = tokens - lengths.shortest_prompt
        limits = Limits(min(prompts, firsts), lengths.longest_prompt, max(lengths.longest_prompt, lengths.completion))
        return RowSize(tokens, firsts, later, count, limits)

    rows = size(tokens, -(-pieces // shards))
    quarter = tokens // 4 >= QUARTER_PROMPTS * lengths.longest_prompt
    small, count = rounded(max(least, -(-tokens // (4 if quarter else 2)))), 3 if quarter else 1
    return (rows, size(small, count)) if small < tokens and rows.count < MANY_ROWS else (rows,)


@dataclass(frozen=True)
class Recorded:
    """The experts that the sampler used.

    Attributes:
        experts: N arrays [tokens, L, k], see `Rollout.experts`.
        shape: L and k.
        dtype: of the arrays.
        replays: see `PackedRows`.
    """

    experts: Sequence[np.ndarray]
    shape: tuple[int, int]
    dtype: Any
    replays: bool


@dataclass
class Piece:
    """A prompt and some of its completions: their numbers, and the length of each."""

    prompt: int
    prompt_tokens: int
    completions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in a row."""
        return self.prompt_tokens + sum(self.lengths) - len(self.lengths)


@dataclass
class Row:
    """A packed row: the room that is left in it, and its pieces."""

    tokens: int
    firsts: int
    pieces: list[Piece] = field(default_factory=list)

    def takes(self, piece: Piece) -> bool:
        """Whether the piece fits into the row."""
        return piece.tokens <= self.tokens and len(piece.completions) <= self.firsts

    def add(self, piece: Piece) -> None:
        """Adds a piece that fits."""
        self.pieces.append(piece)
        self.tokens -= piece.tokens
        self.firsts -= len(piece.completions)

    def cut(self, piece: Piece) -> Piece:
        """Adds as many completions of a piece as fit, and returns the piece without them."""
        own, rest = Piece(piece.prompt, piece.prompt_tokens), Piece(piece.prompt, piece.prompt_tokens)
        for completion, length in zip(piece.completions, piece.lengths, strict=True):
            fits = own.tokens + length - 1 <= self.tokens and len(own.completions) < self.firsts
            target = own if fits else rest
            target.completions.append(completion)
            target.lengths.append(length)
        if own.completions:
            self.add(own)
        return rest


def fill_rows(groups: Sequence[Piece], rows: list[Row]) -> bool:
    """Packs groups into rows, the largest group first; returns whether all fit.

    A group goes whole into the row with the least room that it fits into. One that fits nowhere is cut, and fills the rows with the
    most room.
    """
    cuts: list[Piece] = []
    for piece in sorted(groups, key=lambda piece: -piece.tokens):
        fitting = [row for row in rows if row.takes(piece)]
        if fitting:
            min(fitting, key=lambda row: row.tokens).add(piece)
        else:
            cuts.append(piece)
    for piece in cuts:
        rest = piece
        for row in sorted(rows, key=lambda row: -row.tokens):
            rest = row.cut(rest)
            if not rest.completions:
                break
        if rest.completions:
            return False
    return True


def best_rows(groups: Sequence[Piece], sizes: Sequence[RowSize], shards: int) -> list[list[Row]]:
    """Packs groups into as few tokens as it can, padding included, and returns the rows of each size.

    Raises:
        ValueError: the groups need more rows than there are, which `row_sizes` rules out.
    """
    real = sum(group.tokens for group in groups)
    choices = sorted(
        itertools.product(*(range(size.count + 1) for size in sizes)),
        key=lambda counts: sum(count * size.tokens for count, size in zip(counts, sizes, strict=True)),
    )
    for counts in choices:
        if shards * sum(count * size.tokens for count, size in zip(counts, sizes, strict=True)) < real:
            continue
        rows = [[Row(size.tokens, size.firsts) for _ in range(shards * count)] for count, size in zip(counts, sizes, strict=True)]
        if fill_rows(groups, [row for own in rows for row in own]):
            return rows
    raise ValueError(f"{len(groups)} groups of {real} tokens do not fit into rows of {[size.tokens for size in sizes]} tokens")


def pack(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    trained: Sequence[bool] | np.ndarray,
    sizes: Sequence[RowSize],
    *,
    width: int,
    last: Sequence[bool] | np.ndarray | None = None,
    shards: int = 1,
    sampled: Sequence[np.ndarray] | None = None,
    recorded: Recorded | None = None,
) -> tuple[MicroBatches, ...]:
    """Packs a batch.

    Tokens of an episode that came from outside are in the rows, where later tokens see them, and have no entry.

    Args:
        prompt_ids: of B prompts.
        completion_ids: of N = B·G completions.
        trained: N; completions without a trained token are left out.
        sizes: of the rows; see `row_sizes`.
        width: C, columns of the batch's tables.
        last: B; groups that may turn out to change nothing get micro-batches of their own where there is room, after the others, so
            that they are not computed.
        shards: R.
        sampled: N bool arrays, True = the model sampled the token; None = all.
        recorded: the experts that the sampler used, where they were recorded.

    Returns:
        One entry for each size.

    Raises:
        ValueError: a prompt is shorter or longer than the rows are made for.
    """
    each = len(completion_ids) // len(prompt_ids)
    longest, least = sizes[0].limits.prompt, sizes[0].tokens - sizes[0].later
    for ids in prompt_ids:
        if not least <= len(ids) <= longest:
            raise ValueError(f"a prompt has {len(ids)} tokens; rows are for prompts of {least} to {longest}")
    groups, skipped = [], []
    for number, ids in enumerate(prompt_ids):
        rows = [row for row in range(number * each, (number + 1) * each) if trained[row]]
        rows.sort(key=lambda row: -len(completion_ids[row]))
        if rows:
            target = skipped if last is not None and last[number] else groups
            target.append(Piece(number, len(ids), rows, [len(completion_ids[row]) for row in rows]))
    packed = best_rows(groups, sizes, shards)
    left = [Row(sizes[0].tokens, sizes[0].firsts) for _ in range(sizes[0].count * shards - len(packed[0]))]
    if fill_rows(skipped, left):
        packed[0] += left
    else:
        packed = best_rows([*groups, *skipped], sizes, shards)
    texts = (prompt_ids, completion_ids, sampled)
    return tuple(tables_of(rows, size, *texts, width, shards, recorded) for rows, size in zip(packed, sizes, strict=True))


def tables_of(
    rows: Sequence[Row],
    size: RowSize,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    sampled: Sequence[np.ndarray] | None,
    width: int,
    shards: int,
    recorded: Recorded | None = None,
) -> MicroBatches:
    """Writes rows to arrays, `shards` rows to a micro-batch."""
    m, n, firsts = size.count * shards, len(completion_ids), size.firsts
    ids, positions = np.zeros((m, size.tokens), np.int32), np.zeros((m, size.tokens), np.int32)
    ranges = np.zeros((4, m, size.tokens), np.int32)
    inverse = np.full((m, size.tokens), -1, np.int32)
    selected, targets, columns = (np.zeros((m, size.entries), np.int32) for _ in range(3))
    completions = np.full((m, size.entries), n, np.int32)
    places = np.full((n, width), -1, np.int32)
    experts = None if recorded is None else np.zeros((m, size.tokens, *recorded.shape), recorded.dtype)
    for number, row in enumerate(rows):
        at, first, later = 0, 0, firsts
        for piece in row.pieces:
            p = piece.prompt_tokens
            prompt = slice(at, at + p)
            ids[number, prompt], positions[number, prompt] = prompt_ids[piece.prompt], np.arange(p)
            ranges[2, number, prompt], ranges[3, number, prompt] = at, np.arange(at + 1, at + p + 1)
            if experts is not None and recorded is not None:
                experts[number, prompt] = recorded.experts[piece.completions[0]][:p]
            start, at = at, at + p
            for completion, length in zip(piece.completions, piece.lengths, strict=True):
                own, tokens = slice(at, at + length - 1), np.asarray(completion_ids[completion], np.int32)
                ids[number, own], positions[number, own] = tokens[:-1], p + np.arange(length - 1)
                if experts is not None and recorded is not None:
                    experts[number, own] = recorded.experts[completion][p:]
                ranges[0, number, own], ranges[1, number, own] = start, start + p
                ranges[2, number, own], ranges[3, number, own] = at, np.arange(at + 1, at + length)
                predicted = np.arange(length) if sampled is None else np.flatnonzero(sampled[completion])
                behind = predicted[predicted > 0]
                entries = later + np.arange(len(behind))
                inverse[number, at + behind - 1] = entries - firsts
                if len(behind) < len(predicted):
                    entries, first = np.concatenate([[first], entries]), first + 1
                selected[number, entries] = np.where(predicted > 0, at + predicted - 1, start + p - 1)
                targets[number, entries], columns[number, entries] = tokens[predicted], predicted
                completions[number, entries] = completion
                places[completion, predicted] = number * size.entries + entries
                at, later = at + length - 1, later + len(behind)

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(size.count, shards, *x.shape[1:])

    packed = PackedRows(
        ids=split(ids),
        positions=split(positions),
        ranges=KeyRanges(*map(split, ranges)),
        selected=split(selected),
        inverse=split(inverse),
        targets=split(targets),
        columns=split(columns),
        firsts=firsts,
        limits=size.limits,
        experts=None if experts is None else split(experts),
        replays=recorded is not None and recorded.replays,
    )
    return MicroBatches(packed, split(completions), places)
