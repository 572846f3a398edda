"""Rows that stream: their order against one worked out from the blocks, resuming anywhere, memory, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizers import word_tokenizer

from grpo_jax.config import Config, ConfigError
from grpo_jax.data import DataError, PromptSource
from grpo_jax.data.prompt_stream import PromptStream
from grpo_jax.data.tokenizer import Tokenizer

WORDS = Tokenizer.wrap(word_tokenizer(" ".join(f"w{i}" for i in range(100))))
SEED, BLOCK, ROWS = 5, 7, 25


def settings(**data: Any) -> Config:
    return Config.from_dict(
        {
            "data": {"streaming": True, "shuffle_buffer": BLOCK} | data,
            "rollout": {"max_prompt_length": 4},
            "train": {"prompts_per_step": 2, "seed": SEED, "quiet": True},
        }
    )


def rows(count: int = ROWS, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i}", "answer": i} for i in range(start, start + count)]


def write_jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in values) + "\n")  # with empty lines between
    return path


def jsonl_shards(folder: Path) -> PromptSource:
    write_jsonl(folder / "train-00000-of-00002.jsonl", rows(10))
    write_jsonl(folder / "train-00001-of-00002.jsonl", rows(15, 10))
    return PromptSource.build(settings(path=str(folder)), WORDS)


def parquet_file(folder: Path) -> PromptSource:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "rows.parquet", row_group_size=4)
    return PromptSource.build(settings(path=str(folder / "rows.parquet")), WORDS)


def shuffled_dataset(folder: Path) -> PromptSource:
    dataset = datasets.Dataset.from_list(rows()).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
    return PromptSource.build(settings(), WORDS, dataset)


SOURCES: list[Callable[[Path], PromptSource]] = [jsonl_shards, parquet_file, shuffled_dataset]


def stream_of(source: PromptSource) -> PromptStream:
    assert source.stream is not None
    return source.stream


def drawn(stream: PromptStream, steps: int, size: int = 2, ahead: int = 2) -> list[list[tuple[int, Any, tuple[int, ...]]]]:
    """The prompts of steps that look at `ahead` and use `size` of them: number, answer and token ids of each."""
    found = []
    for _ in range(steps):
        prompts = stream.peek(ahead)[:size]
        found.append([(prompt.number, prompt.row["answer"], tuple(prompt.prompt_ids)) for prompt in prompts])
        stream.advance(size)
    return found


def expected_order(passes: int) -> list[int]:
    """Row numbers by hand: blocks of 7 permuted by (seed, pass, block, 3); a pass of 25 rows has 12 steps of 2, one row is left."""
    order: list[int] = []
    for epoch in range(passes):
        visited: list[int] = []
        for block, first in enumerate(range(0, ROWS, BLOCK)):
            size = min(BLOCK, ROWS - first)
            visited += (first + np.random.default_rng([SEED, epoch, block, 3]).permutation(size)).tolist()
        assert sorted(visited) == list(range(ROWS))
        order += visited[:24]
    return order


@pytest.mark.parametrize("make", SOURCES)
def test_the_order_is_that_of_the_blocks_in_every_pass(make: Callable[[Path], PromptSource], tmp_path: Path) -> None:
    found = [item for step in drawn(stream_of(make(tmp_path)), 36) for item in step]
    assert [number for number, _, _ in found] == expected_order(3)
    if make is not shuffled_dataset:
        assert all(answer == number for number, answer, _ in found)
    assert all(ids == (1, 5 + answer) for _, answer, ids in found)  # <s> in front, word i has id 5 + i


@pytest.mark.parametrize("make", SOURCES)
def test_a_stored_state_continues_with_the_same_prompts(make: Callable[[Path], PromptSource], tmp_path: Path) -> None:
    whole = stream_of(make(tmp_path))
    states, steps = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(whole.state())))
        steps += drawn(whole, 1, ahead=5)  # as dynamic sampling does
    for start in (0, 1, 3, 4, 11, 12, 13, 29):
        resumed = stream_of(make(tmp_path))
        resumed.load_state(states[start])
        assert drawn(resumed, 30 - start, ahead=5) == steps[start:], start


def test_what_a_step_looks_at_and_does_not_use_comes_next(tmp_path: Path) -> None:
    stream = stream_of(jsonl_shards(tmp_path))
    ahead = [prompt.number for prompt in stream.peek(10)]
    stream.advance(3)
    assert [prompt.number for prompt in stream.peek(7)] == ahead[3:]


def test_unshuffled_rows_come_in_the_order_of_the_file_and_long_ones_are_left_out(tmp_path: Path) -> None:
    values = rows(6)
    values[2]["prompt"] = "w1 w2 w3 w4"  # 5 tokens with <s>
    config = settings(path=str(write_jsonl(tmp_path / "rows.jsonl", values)), shuffle=False, shuffle_buffer=4)
    found = drawn(stream_of(PromptSource.build(config, WORDS)), 4)
    # five rows are short enough; the fifth is alone at the end of a pass
    assert [[number for number, _, _ in step] for step in found] == [[0, 1], [3, 4], [0, 1], [3, 4]]


def test_a_batch_has_the_columns_and_held_out_rows_are_of_their_own_file(tmp_path: Path) -> None:
    path, held_out = write_jsonl(tmp_path / "rows.jsonl", rows()), write_jsonl(tmp_path / "test.jsonl", rows(3, 50))
    source = PromptSource.build(settings(path=str(path), eval_path=str(held_out), shuffle=False), WORDS)
    batch = source.streamed_batch(stream_of(source).peek(2), 4)
    assert (batch.step, batch.indices.tolist(), batch.prompts, batch.columns) == (4, [0, 1], ["w0", "w1"], {"answer": [0, 1]})
    assert [held.columns for held in source.held_out_batches(3)] == [{"answer": [50, 51, 52]}]
    lengths, held_out_lengths = source.prompt_lengths
    assert (lengths.tolist(), held_out_lengths.tolist()) == ([1, 4], [2, 2, 2])


def test_conversations_of_openais_shape_stream_too(tmp_path: Path) -> None:
    from tiny_tokenizers import CHATML, byte_tokenizer

    values = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(4)]
    config = Config.from_dict(
        {
            "data": {"streaming": True, "path": str(write_jsonl(tmp_path / "chat.jsonl", values)), "shuffle": False},
            "train": {"prompts_per_step": 2},
        }
    )
    source = PromptSource.build(config, Tokenizer.wrap(byte_tokenizer(CHATML)))
    batch = source.streamed_batch(stream_of(source).peek(2), 0)
    assert batch.prompts == [[{"role": "user", "content": "0"}], [{"role": "user", "content": "1"}]]
    assert batch.columns == {"completion": ["yes", "yes"]}


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    path, count = tmp_path / "rows.jsonl", 1000
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"prompt": f"w{i % 100}", "answer": "x" * 20_000}) + "\n")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        source = PromptSource.build(settings(path=str(path), shuffle_buffer=25), WORDS)
        stream = stream_of(source)
        numbers = []
        for _ in range(38):
            numbers += [prompt.number for prompt in stream.peek(25)]
            stream.advance(25)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(numbers)) == 38 * 25
    assert peak < 4_000_000  # of two blocks, a twentieth of the file


def test_a_broken_line_is_named_when_its_block_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(9))
    with path.open("a") as file:
        file.write("{broken\n")
    stream = stream_of(PromptSource.build(settings(path=str(path), shuffle_buffer=4), WORDS))
    drawn(stream, 4)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 18"):
        drawn(stream, 2)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"shuffle_buffer": 0}, ConfigError, "data.shuffle_buffer is 0: use a number of rows"),
        ({"streaming": False}, ConfigError, "data.shuffle_buffer is 7: use null, or data.streaming true"),
        ({"curriculum": "learnable"}, ConfigError, "data.curriculum is 'learnable': use uniform with data.streaming"),
        ({"overlong_quantile": 0.9}, ConfigError, "data.overlong_quantile is 0.9: use null with data.streaming"),
        ({"eval_size": 4}, ConfigError, "data.eval_size is 4: use 0 or null with data.streaming, or set data.eval_path"),
        ({"path": "rows.csv"}, ConfigError, "rows.csv cannot be streamed; use .jsonl or .parquet"),
        ({"path": "none.jsonl"}, ConfigError, "there is no such file"),
        ({"path": "empty.jsonl"}, DataError, "empty.jsonl has no rows"),
        ({"path": "one.jsonl"}, ConfigError, "a step takes 2 prompts and one.jsonl has 1 within"),
        ({"prompt_column": "question"}, ConfigError, "data.prompt_column is 'question'"),
    ],
)
def test_what_cannot_stream_is_refused_by_name(
    data: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows(4))
    write_jsonl(tmp_path / "one.jsonl", rows(1))
    (tmp_path / "rows.csv").write_text("prompt\nw1\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(error, match=message.replace(".", r"\.")):
        PromptSource.build(settings(**{"path": "rows.jsonl"} | data), WORDS)


def test_epochs_are_refused_and_datasets_must_suit_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs is 1.*: use train\.steps with data\.streaming"):
        Config.from_dict({"data": {"streaming": True}, "train": {"epochs": 1}})
    with pytest.raises(ConfigError, match=r"data\.streaming is true: dataset is a list, which is in memory already"):
        PromptSource.build(settings(), WORDS, rows())
    with pytest.raises(ConfigError, match=r"data\.streaming is false: dataset is an IterableDataset"):
        PromptSource.build(Config(), WORDS, datasets.Dataset.from_list(rows()).to_iterable_dataset())
