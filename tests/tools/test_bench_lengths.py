"""Lengths of a benchmark: the heavy tail, the formats of files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.run.folder import RunFolder
from grpo_jax.tools.bench.lengths import StepLengths, heavy_tail, read_lengths


def test_lengths_have_a_heavy_tail_with_the_mean_and_the_end_they_should() -> None:
    for rows, longest in ((32, 128), (64, 1024), (8, 16)):
        lengths = heavy_tail(rows, longest)
        assert np.array_equal(lengths, heavy_tail(rows, longest))
        assert lengths.min() >= 1
        assert lengths.max() == longest
        assert abs(lengths.mean() / longest - 0.25) < 1 / rows + 0.02  # the longest is put to the end afterwards
        assert np.median(lengths) < lengths.mean()


def test_steps_take_lengths_in_order_and_begin_again() -> None:
    lengths = StepLengths(np.array([1, 2, 3, 4, 5]), rows=2, first=1)
    assert [lengths.of_step(step).tolist() for step in range(5)] == [[4, 5], [1, 2], [3, 4], [5, 1], [2, 3]]


def test_a_step_may_take_more_rows_than_there_are_lengths() -> None:
    assert StepLengths(np.array([7, 9]), rows=5).of_step(1).tolist() == [9, 7, 9, 7, 9]


@pytest.mark.parametrize(
    "text",
    [
        "5\n12\n1\n",
        "  5\r\n\r\n12\r\n1",
        "[5, 12,\n 1]",
        "".join(json.dumps({"step": 1, "completion": "[3]", "completion_tokens": tokens}) + "\n" for tokens in (5, 12, 1)),
    ],
    ids=["lines", "blank lines", "list", "records"],
)
def test_formats_of_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_bytes(text.encode())
    found = read_lengths(str(tmp_path / "lengths"), "lengths", 12, "completion_length", records=True)
    assert found.tolist() == [5, 12, 1]


def test_the_completions_of_a_run_are_read(tmp_path: Path) -> None:
    with RunFolder(tmp_path, resumed=False) as folder:
        for step, lengths in ((1, [4, 9]), (2, [1, 30])):
            folder.write_completions(step, ["p"], ["a", "b"], {"f": [1.0, 0.0]}, [0.5, -0.5], ["stop", "length"], lengths=lengths)
    found = read_lengths(str(tmp_path / "completions.jsonl"), "lengths", 30, "completion_length", records=True)
    assert found.tolist() == [4, 9, 1, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lengths: FILE has no lengths; give one whole number a line, or a JSON list of them"),
        ("[]", "lengths: FILE has no lengths"),
        ("3\nmany\n", "lengths: FILE, line 2 is 'many'; give one whole number a line"),
        ("3\n2.5\n", "lengths: FILE, line 2 is 2.5; give one whole number a line"),
        ("[3, true]", "lengths: FILE, entry 2 is true; give one whole number a line"),
        ("[3, 4", "lengths: FILE begins with [ but is not a JSON list"),
        ("3\n\n0\n", "lengths: FILE, line 3 is 0; a length is at least 1 token"),
        ("3\n11\n12\n", "lengths: FILE has 2 of 3 lengths above completion_length (10); use --completion_length 12"),
        ('{"completion": "a"}', "lengths: FILE, line 1 has no completion_tokens: older runs did not write it"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_lengths(str(path), "lengths", 10, "completion_length", records=True)
    assert str(error.value).startswith(message.replace("FILE", str(path)))


def test_a_missing_file_and_records_where_none_may_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_lengths: nowhere\.txt: there is no such file"):
        read_lengths("nowhere.txt", "prompt_lengths", 10, "prompt_length")
    path = tmp_path / "records"
    path.write_text('{"completion_tokens": 3}\n')
    with pytest.raises(ConfigError, match=r"line 1 is \{'completion_tokens': 3\}; give one whole number a line"):
        read_lengths(str(path), "prompt_lengths", 10, "prompt_length")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        read_lengths(str(path), "lengths", 10, "completion_length")
