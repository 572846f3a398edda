"""Packing of prompts and completions into rows: every token once, few tokens computed, and never too few rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_jax.learner.batches import padding_share
from grpo_jax.learner.packing import Lengths, pack, row_sizes
from grpo_jax.tools.bench import heavy_tail
from grpo_jax.types import MicroBatches, TrainBatch


def texts(seed: int, prompts: int, generations: int, prompt: int, completion: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and completions of 1 to the longest number of tokens; every token is another number."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, prompt + 1, prompts), *rng.integers(1, completion + 1, prompts * generations)]
    lengths[0], lengths[prompts] = prompt, completion
    starts = np.cumsum([1, *lengths])
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return ids[:prompts], ids[prompts:]


def computed(packed: tuple[MicroBatches, ...]) -> tuple[int, int]:
    """Tokens in rows, and tokens of the micro-batches that have any."""
    seen = [np.asarray(part.rows.ranges.own_end) > 0 for part in packed]
    return sum(int(x.sum()) for x in seen), sum(int(x.any(axis=(1, 2)).sum()) * x[0].size for x in seen)


def read_back(packed: tuple[MicroBatches, ...], n: int, width: int) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """From the arrays alone: targets as a table, and for each completion the tokens that its last entry sees and its positions."""
    table = np.zeros((n, width), int)
    contexts: list[list[int]] = [[] for _ in range(n)]
    positions: list[list[int]] = [[] for _ in range(n)]
    for part in packed:
        rows: Any = part.rows
        flat = {name: np.asarray(getattr(rows, name)).reshape(-1, getattr(rows, name).shape[-1]) for name in ("ids", "positions")}
        ranges = [np.asarray(x).reshape(flat["ids"].shape) for x in rows.ranges]
        entries = [np.asarray(x).reshape(flat["ids"].shape[0], -1) for x in (rows.selected, rows.targets, part.completions)]
        for number in range(flat["ids"].shape[0]):
            for selected, target, completion, column in zip(
                *(x[number] for x in entries), np.asarray(rows.columns).reshape(entries[0].shape)[number], strict=True
            ):
                if completion == n:
                    continue
                assert table[completion, column] == 0  # each token once
                table[completion, column] = target
                seen = [*range(ranges[0][number, selected], ranges[1][number, selected])]
                seen += [*range(ranges[2][number, selected], ranges[3][number, selected])]
                context = flat["ids"][number, seen].tolist()
                if len(context) >= len(contexts[completion]):
                    contexts[completion], positions[completion] = context, flat["positions"][number, seen].tolist()
        where = np.asarray(part.places)
        size = entries[0].shape[1]
        for completion, column in zip(*np.nonzero(where >= 0), strict=True):
            row, entry = divmod(where[completion, column], size)
            assert entries[1][row, entry] == table[completion, column]
    return table, contexts, positions


@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_predicted_once_from_its_prompt_and_its_own_completion(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    shards, prompts = int(rng.choice([1, 2, 4])), 4 * int(rng.integers(1, 4))
    generations, prompt, completion = int(rng.integers(1, 7)), int(rng.integers(1, 30)), int(rng.integers(1, 40))
    prompt_ids, completion_ids = texts(seed, prompts, generations, prompt, completion)
    lengths = Lengths(min(map(len, prompt_ids)), prompt, completion)
    tokens, multiple = int(rng.integers(lengths.group(1), prompts * lengths.group(generations) + 1)), int(rng.choice([1, 16]))
    sizes = row_sizes(lengths, prompts, generations, tokens, shards, multiple)
    assert all(size.tokens % multiple == 0 for size in sizes)
    trained = rng.random(prompts * generations) < 0.9
    last = rng.random(prompts) < 0.3
    packed = pack(prompt_ids, completion_ids, trained, sizes, width=completion, last=last, shards=shards)
    table, contexts, positions = read_back(packed, prompts * generations, completion)
    for number, ids in enumerate(completion_ids):
        expected = ids if trained[number] else []
        assert table[number].tolist() == expected + [0] * (completion - len(expected))
        if trained[number]:
            assert contexts[number] == prompt_ids[number // generations] + ids[:-1]
            assert positions[number] == list(range(len(contexts[number])))
    for part, size in zip(packed, sizes, strict=True):
        assert part.rows.ids.shape == (size.count, shards, size.tokens)
        assert part.completions.shape == (size.count, shards, size.entries)
        _, lengths_of_prompts = np.asarray(part.rows.ranges.prompt_start), part.rows.ranges
        assert np.max(np.asarray(lengths_of_prompts.prompt_end) - np.asarray(lengths_of_prompts.prompt_start)) <= size.limits.prompt


@pytest.mark.parametrize("completion", [30, 1])
@pytest.mark.parametrize("tokens", [1, 100, 300, 10_000])
def test_the_longest_texts_always_have_room(tokens: int, completion: int) -> None:
    for prompts, generations, shards in ((1, 1, 1), (5, 4, 1), (8, 3, 4), (6, 8, 2)):
        sizes = row_sizes(Lengths(20, 20, completion), prompts, generations, tokens, shards)
        prompt_ids, completion_ids = [[1] * 20] * prompts, [[2] * completion] * (prompts * generations)
        packed = pack(prompt_ids, completion_ids, [True] * len(completion_ids), sizes, width=30, shards=shards)
        entries = sum(int((np.asarray(part.completions) < len(completion_ids)).sum()) for part in packed)
        assert entries == completion * len(completion_ids)


def test_equal_lengths_leave_no_padding() -> None:
    lengths = Lengths(16, 16, 17)
    sizes = row_sizes(lengths, 4, 8, lengths.group(8))
    packed = pack([[1] * 16] * 4, [[2] * 17] * 32, [True] * 32, sizes, width=17)
    assert computed(packed) == (4 * (16 + 8 * 16), 4 * (16 + 8 * 16))


@pytest.mark.parametrize(("prompt", "completion", "least"), [(512, 512, 2.4), (64, 128, 2.6), (100, 192, 2.6)])
def test_a_heavy_tail_costs_little_more_than_its_tokens(prompt: int, completion: int, least: float) -> None:
    """Lengths with a mean of a quarter of the longest; four prompts with eight completions, one group of the longest in a row."""
    drawn = heavy_tail(32, completion)
    lengths = Lengths(prompt, prompt, completion)
    sizes = row_sizes(lengths, 4, 8, lengths.group(8))
    packed = pack([[1] * prompt] * 4, [[2] * n for n in drawn], [True] * 32, sizes, width=completion)
    assert 4 * lengths.group(8) / computed(packed)[1] >= least


def test_padding_is_the_share_of_computed_tokens_that_are_none() -> None:
    """One prompt of 4 tokens with completions of 5 and 2, in a row of 12: 4 + 4 + 1 tokens."""
    sizes = row_sizes(Lengths(4, 4, 5), 1, 2, 12)
    packed = pack([[1] * 4], [[2] * 5, [3] * 2], [True] * 2, sizes[:1], width=5)
    empty = np.zeros((2, 5), np.float32)
    batch = TrainBatch(packed, empty > 0, empty, empty[:1, :2], empty[:1, :2] == 0)
    assert padding_share([batch]) == pytest.approx(1 - 9 / 12)


def test_groups_that_may_be_skipped_are_packed_apart() -> None:
    lengths = Lengths(4, 4, 5)
    sizes = row_sizes(lengths, 4, 2, lengths.group(2))
    last = [True, False, True, False]
    (packed, *_) = pack([[1] * 4] * 4, [[2] * 5] * 8, [True] * 8, sizes, width=5, last=last)
    groups = np.asarray(packed.completions) // 2
    for row in groups.reshape(groups.shape[0], -1):
        assert len({last[number] for number in row[row < 4]}) <= 1


def test_a_prompt_of_another_length_is_refused() -> None:
    sizes = row_sizes(Lengths(3, 5, 4), 1, 2, 100)
    for length in (2, 6):
        with pytest.raises(ValueError, match=f"a prompt has {length} tokens; rows are for prompts of 3 to 5"):
            pack([[1] * length], [[2] * 4] * 2, [True] * 2, sizes, width=4)
