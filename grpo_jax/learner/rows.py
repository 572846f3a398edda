"""Rows of whole sequences back to back, and the arrays that a program reads them from; `packing.py` decides what goes where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def of_rows(self, rows: Sequence[Row], shape: tuple[int, int]) -> np.ndarray:
        """Returns the experts of the tokens in rows, [rows, tokens, L, k]."""
        experts = np.zeros((*shape, *self.shape), self.dtype)
        for number, row in enumerate(rows):
            at = 0
            for piece in row.pieces:
                p = piece.prompt_tokens
                experts[number, at : at + p] = self.experts[piece.completions[0]][:p]
                at += p
                for completion, length in zip(piece.completions, piece.lengths, strict=True):
                    experts[number, at : at + length - 1] = self.experts[completion][p:]
                    at += length - 1
        return experts


@dataclass(frozen=True)
class PlacedTexts:
    """Where texts lie in rows, one number of each text.

    Attributes:
        row: its row.
        at: where it begins in its row.
        number: of the prompt, or of the completion.
        prompt_at, prompt_tokens: of the prompt that a completion continues; of a prompt its own.
    """

    row: np.ndarray
    at: np.ndarray
    number: np.ndarray
    prompt_at: np.ndarray
    prompt_tokens: np.ndarray


@dataclass(frozen=True)
class Placed:
    """Where prompts and completions lie in rows, in the order of the rows."""

    prompts: PlacedTexts
    completions: PlacedTexts


def placed_texts(rows: Sequence[Row]) -> Placed:
    """Lays the pieces of rows back to back."""
    prompts, completions = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for number, row in enumerate(rows):
        at = 0
        for piece in row.pieces:
            prompt = (at, piece.prompt_tokens)
            prompts.append((number, at, piece.prompt, *prompt))
            at += piece.prompt_tokens
            for completion, length in zip(piece.completions, piece.lengths, strict=True):
                completions.append((number, at, completion, *prompt))
                at += length - 1
    return Placed(*(PlacedTexts(*np.array(texts, int).reshape(-1, 5).T) for texts in (prompts, completions)))


def flat(texts: Sequence[Sequence[Any] | np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins texts to one array; returns it, and of each of its tokens the index of its text and its column there."""
    lengths = np.array([len(text) for text in texts], int)
    text = np.repeat(np.arange(len(texts)), lengths)
    column = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.fromiter(itertools.chain.from_iterable(texts), np.int32, len(text)), text, column


def places_in_rows(row: np.ndarray, rows: int) -> np.ndarray:
    """Counts entries within each row: `row` is that of each entry, in order."""
    counts = np.bincount(row, minlength=rows)
    return np.arange(len(row)) - (np.cumsum(counts) - counts)[row]


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
    # One axis for all rows: one index is quicker than two.
    ids, positions, starts, ends, own_starts, own_ends = (np.zeros(m * size.tokens, np.int32) for _ in range(6))
    inverse = np.full(m * size.tokens, -1, np.int32)
    selected, targets, columns = (np.zeros(m * size.entries, np.int32) for _ in range(3))
    completions = np.full(m * size.entries, n, np.int32)
    places = np.full((n, width), -1, np.int32)
    placed = placed_texts(rows)

    texts = placed.prompts
    tokens, text, column = flat([prompt_ids[number] for number in texts.number])
    at = texts.at[text]
    here = texts.row[text] * size.tokens + at + column
    ids[here], positions[here], own_starts[here], own_ends[here] = tokens, column, at, at + column + 1

    texts = placed.completions
    tokens, text, column = flat([completion_ids[number] for number in texts.number])
    row, number, start, at = texts.row[text], texts.number[text], texts.prompt_at[text], texts.at[text] + column
    end, here = start + texts.prompt_tokens[text], row * size.tokens + at
    seen = text[:-1] == text[1:]  # all but a completion's last token, which nothing follows
    here_seen = here[:-1][seen]
    ids[here_seen], positions[here_seen] = tokens[:-1][seen], (end - start + column)[:-1][seen]
    starts[here_seen], ends[here_seen] = start[:-1][seen], end[:-1][seen]
    own_starts[here_seen], own_ends[here_seen] = (at - column)[:-1][seen], at[:-1][seen] + 1

    predicted = (
        np.ones(len(tokens), bool) if sampled is None else flat([sampled[number] for number in texts.number])[0].astype(bool)
    )
    first, behind = np.flatnonzero(predicted & (column == 0)), np.flatnonzero(predicted & (column > 0))
    later = places_in_rows(row[behind], m)
    inverse[here[behind] - 1] = later
    for some, entries, state in ((first, places_in_rows(row[first], m), end - 1), (behind, firsts + later, at - 1)):
        entry = row[some] * size.entries + entries
        selected[entry], targets[entry], columns[entry], completions[entry] = state[some], tokens[some], column[some], number[some]
        places[number[some], column[some]] = entry
    experts = None if recorded is None else recorded.of_rows(rows, (m, size.tokens))

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(size.count, shards, -1)

    packed = PackedRows(
        ids=split(ids),
        positions=split(positions),
        ranges=KeyRanges(split(starts), split(ends), split(own_starts), split(own_ends)),
        selected=split(selected),
        inverse=split(inverse),
        targets=split(targets),
        columns=split(columns),
        firsts=firsts,
        limits=size.limits,
        experts=None if experts is None else experts.reshape(size.count, shards, *experts.shape[1:]),
        replays=recorded is not None and recorded.replays,
    )
    return MicroBatches(packed, split(completions), places)
