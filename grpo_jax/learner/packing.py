"""Packs prompts and completions of real lengths into rows of a few sizes, on the host.

A row has whole sequences back to back: a prompt, completions that continue it, the next prompt. Where a group does not fit into
what is left of a row, its other completions go to another row, behind a copy of the prompt. An update does not depend on the
packing, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo_jax.types import MicroBatches, PackedRows
from grpo_kernels import KeyRanges, Limits


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


def row_sizes(lengths: Lengths, prompts: int, generations: int, tokens: int, shards: int = 1) -> tuple[RowSize, ...]:
    """Returns the sizes of the rows of a run: rows of this many tokens, and one of half as many for what is left over.

    There are as many rows as the longest texts need; those without tokens are not computed.

    Args:
        lengths: of the run's texts.
        prompts, generations: B and G.
        tokens: of a row; fewer where all texts are shorter, and never fewer than the longest prompt and completion.
        shards: R, rows that are computed at once.
    """
    least, most = lengths.group(1), -(-prompts // shards) * lengths.group(generations)
    tokens = max(least, min(tokens, most))
    each = min(generations, (tokens - lengths.longest_prompt) // max(lengths.completion - 1, 1))
    groups = max(1, tokens // lengths.group(generations))  # whole groups of a row
    pieces = -(-prompts // groups) if each == generations else prompts * -(-generations // each)

    def size(tokens: int, count: int) -> RowSize:
        firsts = min(-(-prompts // shards) * generations, max(groups * generations, tokens // 16))
        later = tokens - lengths.shortest_prompt
        limits = Limits(min(prompts, firsts), lengths.longest_prompt, max(lengths.longest_prompt, lengths.completion))
        return RowSize(tokens, firsts, later, count, limits)

    half = max(least, -(-tokens // 2))
    rows = size(tokens, -(-pieces // shards))
    return (rows, size(half, 1)) if half < tokens and rows.count < 8 else (rows,)


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
    """The pieces of a packed row."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def firsts(self) -> int:
        """Completions in the row."""
        return sum(len(piece.completions) for piece in self.pieces)

    def room(self, size: RowSize) -> int:
        """Tokens that are free."""
        return size.tokens - self.tokens

    def takes(self, piece: Piece, size: RowSize) -> bool:
        """Whether the piece fits into the row."""
        return piece.tokens <= self.room(size) and self.firsts + len(piece.completions) <= size.firsts

    def cut(self, piece: Piece, size: RowSize) -> Piece | None:
        """Moves as much of a piece into the row as fits; returns the rest, or None where nothing fits."""
        own = Piece(piece.prompt, piece.prompt_tokens)
        room, firsts = self.room(size) - piece.prompt_tokens, size.firsts - self.firsts
        count = 0
        while count < min(len(piece.lengths), firsts) and piece.lengths[count] - 1 <= room:
            room -= piece.lengths[count] - 1
            count += 1
        if count == 0:
            return None
        own.completions, own.lengths = piece.completions[:count], piece.lengths[:count]
        self.pieces.append(own)
        return Piece(piece.prompt, piece.prompt_tokens, piece.completions[count:], piece.lengths[count:])


def fill_rows(groups: Sequence[Piece], size: RowSize, *, split: bool) -> list[Row]:
    """Packs groups into rows: the largest first, each into the fullest row that it fits into.

    Args:
        split: a group that fits nowhere is cut to fill the row with the most room, if at least half of that room is left for
            completions.
    """
    rows: list[Row] = []
    for group in sorted(groups, key=lambda piece: -piece.tokens):
        piece: Piece | None = group
        while piece is not None and piece.completions:
            fitting = [row for row in rows if row.takes(piece, size)]
            if fitting:
                min(fitting, key=lambda row: row.room(size)).pieces.append(piece)
                break
            roomy = max(rows, key=lambda row: row.room(size), default=None)
            if split and roomy is not None and roomy.room(size) >= 2 * piece.prompt_tokens:
                rest = roomy.cut(piece, size)
                if rest is not None:
                    piece = rest
                    continue
            rows.append(Row())
            piece = rows[-1].cut(piece, size)
    return rows


def cost(rows: Sequence[Row], sizes: Sequence[RowSize], shards: int) -> tuple[int, list[list[Row]]]:
    """Returns the tokens that are computed, padding included, and the rows of each size.

    The last rows have the second size where they fit.
    """
    ordered = sorted(rows, key=lambda row: -row.tokens)
    by_size = [ordered, *([] for _ in sizes[1:])]
    if len(sizes) > 1 and ordered:
        last = (len(ordered) - 1) % shards + 1
        small = ordered[-last:]
        if all(row.tokens <= sizes[1].tokens and row.firsts <= sizes[1].firsts for row in small):
            by_size = [ordered[:-last], small]
    used = [-(-len(own) // shards) * size.tokens for own, size in zip(by_size, sizes, strict=True)]
    return sum(used), by_size


def best_rows(groups: Sequence[Piece], sizes: Sequence[RowSize], shards: int) -> list[list[Row]]:
    """Packs groups so that few tokens are computed, with whole groups or with groups that are cut.

    Whole groups never need more rows than there are, so there is always a packing.
    """
    packings = [cost(fill_rows(groups, sizes[0], split=split), sizes, shards) for split in (False, True)]
    possible = [
        (tokens, rows)
        for tokens, rows in packings
        if all(len(own) <= size.count * shards for own, size in zip(rows, sizes, strict=True))
    ]
    return min(possible, key=lambda packing: packing[0])[1]


def pack(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    trained: Sequence[bool] | np.ndarray,
    sizes: Sequence[RowSize],
    *,
    width: int,
    last: Sequence[bool] | np.ndarray | None = None,
    shards: int = 1,
) -> tuple[MicroBatches, ...]:
    """Packs a batch.

    Args:
        prompt_ids: of B prompts.
        completion_ids: of N = B·G completions.
        trained: N; completions without a trained token are left out.
        sizes: of the rows; see `row_sizes`.
        width: C, columns of the batch's tables.
        last: B; groups that may turn out to change nothing get rows of their own, after the others, so that they are not computed.
        shards: R.

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
    groups = []
    for number, ids in enumerate(prompt_ids):
        rows = [row for row in range(number * each, (number + 1) * each) if trained[row]]
        groups.append(Piece(number, len(ids), rows, [len(completion_ids[row]) for row in rows]))
    groups = [group for group in groups if group.completions]
    skipped = [group for group in groups if last is not None and last[group.prompt]]
    packed = best_rows([group for group in groups if group not in skipped], sizes, shards)
    if skipped:
        # Rounded up to whole micro-batches, so that no micro-batch has rows of both kinds.
        packed[0] += [Row()] * (-len(packed[0]) % shards)
        more = fill_rows(skipped, sizes[0], split=False)
        if len(packed[0]) + len(more) > sizes[0].count * shards:  # together they fit, but not apart
            packed = best_rows(groups, sizes, shards)
        else:
            packed[0] += more
    return tuple(
        tables_of(rows, size, prompt_ids, completion_ids, width, shards) for rows, size in zip(packed, sizes, strict=True)
    )


def tables_of(
    rows: Sequence[Row],
    size: RowSize,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    width: int,
    shards: int,
) -> MicroBatches:
    """Writes rows to arrays, `shards` rows to a micro-batch."""
    m, n, firsts = size.count * shards, len(completion_ids), size.firsts
    ids, positions = np.zeros((m, size.tokens), np.int32), np.zeros((m, size.tokens), np.int32)
    ranges = np.zeros((4, m, size.tokens), np.int32)
    inverse = np.full((m, size.tokens), -1, np.int32)
    selected, targets, columns = (np.zeros((m, size.entries), np.int32) for _ in range(3))
    completions = np.full((m, size.entries), n, np.int32)
    places = np.full((n, width), -1, np.int32)
    for number, row in enumerate(rows):
        at, first, later = 0, 0, firsts
        for piece in row.pieces:
            p = piece.prompt_tokens
            prompt = slice(at, at + p)
            ids[number, prompt], positions[number, prompt] = prompt_ids[piece.prompt], np.arange(p)
            ranges[2, number, prompt], ranges[3, number, prompt] = at, np.arange(at + 1, at + p + 1)
            start, at = at, at + p
            for completion, length in zip(piece.completions, piece.lengths, strict=True):
                own, tokens = slice(at, at + length - 1), np.asarray(completion_ids[completion], np.int32)
                ids[number, own], positions[number, own] = tokens[:-1], p + np.arange(length - 1)
                ranges[0, number, own], ranges[1, number, own] = start, start + p
                ranges[2, number, own], ranges[3, number, own] = at, np.arange(at + 1, at + length)
                entries = np.concatenate([[first], later + np.arange(length - 1)])
                selected[number, entries] = np.concatenate([[start + p - 1], np.arange(at, at + length - 1)])
                inverse[number, own] = later - firsts + np.arange(length - 1)
                targets[number, entries], columns[number, entries] = tokens, np.arange(length)
                completions[number, entries] = completion
                places[completion, :length] = number * size.entries + entries
                at, first, later = at + length - 1, first + 1, later + length - 1

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
    )
    return MicroBatches(packed, split(completions), places)
