"""Packs prompts and completions of real lengths into rows of a few sizes, on the host.

A row has whole sequences back to back: a prompt, completions that continue it, the next prompt. Where a group does not fit into
what is left of a row, its other completions go to another row, behind a copy of the prompt. An update does not depend on the
packing, but for rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.learner.rows import Piece, Recorded, Row, RowSize, tables_of
from grpo_jax.types import MicroBatches
from grpo_kernels import Limits

MANY_ROWS = 16
"""Where a step has that many rows, the last one may be half empty: a second size of rows takes longer to compile than it saves."""

QUARTER_PROMPTS = 3
"""Prompts that a row of a quarter of the tokens has room for at least; where it has not, groups would often be cut."""


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
    added = lengths.completion - 1  # tokens that a completion adds to a row
    each = min(generations, (tokens - lengths.longest_prompt) // added) if added else generations
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
