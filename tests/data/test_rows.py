"""Reading rows: every kind of source gives the same rows in the same order, and what cannot be read is named with its line."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from grpo_jax.config import ConfigError, DataConfig
from grpo_jax.data import DataError, load_rows
from grpo_jax.data.conversations import with_prompts
from grpo_jax.data.table import Table, given_rows

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": 'say "a,\nb"', "answer": "007"}, {"prompt": "é", "answer": ""}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in cells))
    return path


def read(path: Path | str, split: str = "train", **settings: Any) -> Table:
    return load_rows(DataConfig(path=str(path), **settings), split)


def as_list(table: Table) -> list[dict[str, Any]]:
    return [table[number] for number in range(len(table))]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_rows_in_order(tmp_path: Path, suffix: str) -> None:
    table = read(write(tmp_path / f"rows{suffix}"))
    assert as_list(table) == ROWS
    assert table.columns == ("prompt", "answer")


def test_a_byte_order_mark_and_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(row) for row in ROWS).encode())
    assert as_list(read(path)) == ROWS


def test_a_column_that_only_some_rows_have_is_none_elsewhere(tmp_path: Path) -> None:
    table = read(write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "level": 2}]))
    assert as_list(table) == [{"prompt": "a", "level": None}, {"prompt": "b", "level": 2}]


def test_python_rows_come_as_a_list_or_a_dataset() -> None:
    assert as_list(given_rows(ROWS)) == as_list(given_rows(datasets.Dataset.from_list(ROWS))) == ROWS


def test_a_folder_is_read_by_split_and_by_parts(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[2:])
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    assert as_list(read(tmp_path)) == ROWS
    assert as_list(read(tmp_path, "test")) == ROWS[:1]
    (tmp_path / "main").mkdir()
    write(tmp_path / "main" / "validation.jsonl", ROWS[1:])
    assert as_list(read(tmp_path, "validation", name="main")) == ROWS[1:]
    with pytest.raises(ConfigError, match=r"data\.split is 'tset'.*did you mean test\? splits: test, train"):
        read(tmp_path, "tset")
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"several files have this name.*test\.csv.*test\.jsonl"):
        read(tmp_path, "test")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"data\.path is .*has no \.json"):
        read(tmp_path)


def test_one_file_has_no_other_split(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm8k_test.jsonl")
    assert len(read(path)) == len(read(path, "test")) == 3
    with pytest.raises(ConfigError, match=r"data\.split is 'validation'.*one file"):
        read(path, "validation")


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"data\.path is .*trian\.jsonl.*no such file.*did you mean .*train\.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(ConfigError, match=r"there is no such file or folder \(looked in "):
        read("missing.parquet")
    with pytest.raises(ConfigError, match=r"data\.path is null"):
        load_rows(DataConfig(), "train")


@pytest.mark.parametrize("name", ["rows.pkl", "rows.txt", "rows"])
def test_a_pickle_or_any_other_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ConfigError, match=r"data\.path is .*use \.json, \.jsonl, \.csv, \.parquet"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"r\.jsonl, line 2, column 15"),
        ("r.jsonl", b'{"prompt": "a"}\n\n["b"]\n', r"r\.jsonl, line 3: expected an object .*not \['b'\]"),
        ("r.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"r\.jsonl, line 2: not UTF-8"),
        ("r.json", b'[{"prompt": "a"},\n {"prompt": }]', r"r\.json, line 2, column 13"),
        ("r.json", b'[{"prompt": "a"}, 5]', r"r\.json, row 1 \(counting from 0\): expected a dict of columns, not 5"),
        ("r.json", b"\xff\xfe", r"r\.json, line 1: not UTF-8"),
        ("r.json", b'{\n "train": []\n}', r"r\.json, line 1, column 2"),
        ("r.csv", b"prompt,answer\na,1\nb\n", r"r\.csv, line 3: 1 fields where the header has 2 \(prompt, answer\)"),
        ("r.csv", b"prompt,prompt\na,1\n", r"r\.csv, line 1: column names must differ"),
        ("r.csv", b'prompt\na\n"b', r"r\.csv, line 3: unexpected end of data"),
        ("r.csv", b"prompt\n\xff\n", r"r\.csv, line 2: not UTF-8"),
        ("r.parquet", b"PAR1 no", r"r\.parquet cannot be read as Parquet"),
        ("r.jsonl", b"\n", r"r\.jsonl has no rows"),
        ("r.json", b"[]", r"r\.json has no rows"),
        ("r.csv", b"prompt\n", r"r\.csv has no rows"),
    ],
)
def test_malformed_and_empty_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "dataset has no rows"),
        ([{"prompt": "a"}, "b"], r"dataset, row 1 \(counting from 0\): expected a dict"),
        ([{1: "a"}], r"dataset, row 0 .*expected a dict"),
        ({"train": ROWS}, r"dataset is a dict: pass one split of it"),
        (7, r"dataset is a int: pass a list of dicts"),
        ("rows.jsonl", r"dataset is a str"),
    ],
)
def test_python_rows_of_another_kind_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        given_rows(dataset)


def test_the_hub_is_asked_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **more: Any) -> datasets.Dataset:
        asked.append((arguments, more))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert as_list(read("openai/gsm8k", "test", name="main")) == ROWS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."),
            r"data\.split is 'tset'.*did you mean test\? splits: train, test",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
            r"data\.path is 'a/b'.*licence.*hf auth login",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            r"data\.path is 'a/b': there is no such file here",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"),
            r"data\.name is null.*\n.*socratic",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['main']"), r"data\.name is null.*main"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            r"data\.path is 'a/b'.*scripts are no longer supported",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), r"data\.path is 'a/b'.*Couldn't reach"),
    ],
)
def test_errors_of_the_hub_name_the_setting(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=message):
        read("a/b", "tset")


def test_gsm8k_is_read_in_full(shared_data: Path) -> None:
    assert (len(read(shared_data / "gsm8k")), len(read(shared_data / "gsm8k", "test"))) == (7473, 1319)
    assert read(shared_data / "gsm8k", "test")[0]["answer"].endswith("#### 18")


def test_a_jsonl_file_takes_some_bytes_of_memory_a_row_however_long_its_rows_are(tmp_path: Path) -> None:
    count = 4000
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"{number} " + "x" * 300, "answer": number} for number in range(count)])
    read(path)  # imports
    tracemalloc.start()
    try:
        table = read(path)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken_bytes < 60 * count  # a dict with its texts takes 700
    assert [table[number]["answer"] for number in (0, 1, count - 1)] == [0, 1, count - 1]


def test_rows_stay_those_that_were_checked_where_the_file_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    table = read(path)
    write(tmp_path / "other.jsonl", [{"prompt": "x"}]).replace(path)
    assert as_list(table) == ROWS
    path = write(tmp_path / "rows.jsonl")
    table = read(path)
    path.write_text("x" * 200)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3, column 1: Expecting value"):
        table[1]


def test_parts_of_a_split_are_one_table_with_the_columns_of_all(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write(tmp_path / "train-00001-of-00003.parquet", [{"prompt": "c", "answer": "3"}])
    write(tmp_path / "train-00002-of-00003.json", [{"prompt": "d"}, {"answer": "5"}])
    assert [tuple(row.values()) for row in as_list(read(tmp_path))] == [
        ("a", None),
        ("b", None),
        ("c", "3"),
        ("d", None),
        (None, "5"),
    ]


def test_a_csv_field_may_have_a_megabyte_and_the_limit_of_other_readers_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert read(write(tmp_path / "r.csv", [{"prompt": "a" * 10**6, "answer": "\x00"}]))[0]["prompt"] == "a" * 10**6
    assert csv.field_size_limit() == before


def test_a_parquet_file_with_bad_texts_or_columns_is_named(tmp_path: Path) -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet cannot be read as Parquet: .*UTF-?8"):
        read(tmp_path / "r.parquet")
    time = pyarrow.array([-(10**14)], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "time": time}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 0 \(counting from 0\) cannot be read"):
        read(tmp_path / "t.parquet")[0]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: column names must differ"):
        read(tmp_path / "d.parquet")


def test_a_conversation_becomes_a_prompt_and_the_assistants_last_message_its_completion() -> None:
    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
    earlier = [*asked, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Really?"}]
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "4"}], "level": 1},
        {"messages": [*earlier, {"role": "assistant", "content": "No, 4"}]},
        {"messages": asked},
    ]
    expected = [
        {"prompt": asked, "completion": "4", "level": 1},
        {"prompt": earlier, "completion": "No, 4", "level": None},
        {"prompt": asked, "completion": None, "level": None},
    ]
    assert as_list(with_prompts(given_rows(rows), DataConfig())) == expected
    assert as_list(with_prompts(given_rows(datasets.Dataset.from_list(rows)), DataConfig())) == expected
    named = with_prompts(given_rows(rows), DataConfig(prompt_column="question", completion_column="answer"))
    assert named[0] == {"question": asked, "answer": "4", "level": 1}


def test_a_table_with_a_prompt_column_keeps_its_messages() -> None:
    rows = [{"prompt": "2+2=", "messages": [{"role": "user", "content": "other"}]}]
    assert as_list(with_prompts(given_rows(rows), DataConfig())) == rows


def test_a_completion_column_is_not_replaced_by_the_conversations_last_message() -> None:
    rows = [{"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "5"}], "completion": "4"}]
    assert as_list(with_prompts(given_rows(rows), DataConfig())) == [{"prompt": rows[0]["messages"][:1], "completion": "4"}]


def test_messages_that_are_no_conversation_are_named_with_their_row() -> None:
    table = with_prompts(given_rows([{"messages": []}, {"messages": ["hello"]}]), DataConfig())
    with pytest.raises(DataError, match=r"row 1 .*messages must be a list"):
        table[1]
