"""What a report says of a run, against the formulas that the run's records were made of; its size; and that text is no markup."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE, append, completion_of, made_run, made_text, metrics_of

from grpo_jax.config import Config, load
from grpo_jax.run.report import write_report
from grpo_jax.run.report.content import page_data
from grpo_jax.run.report.reading import RunReader, Span
from grpo_jax.run.report.sampling import choose_completions, curves, evenly, shortened
from grpo_jax.run.resume import RunFolderError
from grpo_jax.run.token_records import recorded_tokens, token_texts


def read(folder: Path) -> RunReader:
    reader = RunReader.open(folder)
    reader.refresh()
    return reader


def data_of(page: str) -> Any:
    """The data in a page."""
    found = re.search(r'<script id="data" type="application/octet-stream">([^<]*)</script>', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_a_short_run_is_shown_whole(tmp_path: Path) -> None:
    finding = {"title": "KL explosion", "evidence": "kl 3", "cause": "c", "setting": "objective.beta"}
    data = data_of(write_report(made_run(tmp_path / "run", findings=[finding])).read_text())

    assert data["curves"]["every"] == 1
    assert data["curves"]["steps"] == list(range(1, 13))
    for name in metrics_of(1, 12).keys() - {"step"}:
        expected = [metrics_of(step, 12)[name] for step in range(1, 13)]
        got = data["curves"]["values"][name]
        assert [None if value is None else pytest.approx(value, rel=1e-5) for value in expected] == got
    assert [(one["step"], one["accuracy"]) for one in data["evaluations"]] == [(0, 0), (3, 0.25), (6, 0.5), (9, 0.75), (12, 1)]
    assert data["counts"] == {"steps": 12, "rows": 96, "shown_steps": 12, "shown_rows": 96}
    assert data["head"]["findings"] == [finding]
    assert data["head"]["state"] == "finished"
    # 12 steps of 4 s and 10 s of compiling in a run of 70 s, with 2, 0.5 and 1.25 s of the parts in each step.
    seconds = {"rollout": 24, "reward": 6, "update": 15, "compile": 10, "rest": 3, "other": 12}
    assert data["head"]["seconds"] == {f"{name}_seconds": value for name, value in seconds.items()}

    fifth = data["completions"][4]
    assert (fifth["step"], fifth["of"], fifth["functions"]) == (5, 2, ["right", "form"])
    assert [group["prompt"] for group in fifth["groups"]] == [
        [{"role": "user", "text": f"prompt {index} of step 5"}] for index in range(2)
    ]
    rows = [row for group in fifth["groups"] for row in group["rows"]]
    assert ["".join(row["tokens"]) for row in rows[:4]] == [made_text(5, row) for row in range(4)]
    assert [row["text"] for row in rows[4:]] == [made_text(5, row) for row in range(4, 8)]
    assert [row["rewards"] for row in rows[:2]] == [[1, None], [0, 0.5]]
    assert [row["total"] for row in rows] == [1, 0.25, 1.25, 0.25, 1.25, 0, 1.25, 0.25]  # right + form / 2
    assert [row["reason"] for row in rows[:4]] == ["stop", "stop", "stop", "length"]
    assert rows[1]["logprobs"][2:] == [-0.2, -0.3, -0.4, -0.5, -0.6, None]


def test_a_supervised_warm_up_has_no_rewards_and_no_parts(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", *({"step": step, "loss": 2, "step_seconds": 1, "compile_seconds": 0} for step in (1, 2)))
    data = data_of(write_report(tmp_path, tmp_path / "page.html").read_text())
    assert data["head"]["kind"] == "supervised warm-up"
    assert data["head"]["reproduce"]["alone"] == f"grpo-jax sft --train.run_dir {tmp_path}-again"
    assert data["head"]["seconds"] == {
        "rollout_seconds": 0, "reward_seconds": 0, "update_seconds": 0, "compile_seconds": 0, "rest_seconds": 2
    }  # fmt: skip
    assert data["curves"]["values"]["loss"] == [2, 2]
    assert (data["completions"], data["evaluations"], data["head"]["settings"]) == ([], [], [])


def test_a_command_makes_the_run_again(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "a run")
    made = page_data(read(folder))["head"]["reproduce"]
    program, command, *words = shlex.split(made["alone"])
    assert (program, command) == ("grpo-jax", "train")
    given = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    config = load(None, given).config
    assert config.rewards.functions == ["right", {"name": "form", "pattern": "a b'c"}]
    assert (config.rewards.weights, config.train.steps, config.train.seed) == ([1.0, 0.5], 12, 7)
    assert config.rollout.num_generations == 4
    assert config.objective.epsilon_high == Config().objective.epsilon_high  # a preset's value follows from the preset
    assert config.train.run_dir == f"{folder}-again"
    assert made["from_folder"].startswith(f"grpo-jax train --config '{folder}/config.yaml'")
    assert (made["seed"], made["in_python"]) == (7, ["train.seed"])


def test_text_of_a_model_is_no_part_of_the_markup(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "<b>run $data&", steps=2, text=lambda step, row: f"{HOSTILE} {row}")
    page = write_report(folder).read_text()
    assert "hacked" not in page
    assert "evil" not in page
    assert page.count("<script") == 2
    title = re.search("<title>(.*)</title>", page)
    assert title is not None
    assert title[1].startswith(html.escape(str(folder)))
    rows = data_of(page)["completions"][0]["groups"][1]["rows"]
    assert rows[0]["text"] == f"{HOSTILE} 4"
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "unsafe" not in policy[1]
    assert html.unescape(policy[1]).startswith("default-src 'none'; script-src 'sha256-")


def test_completions_of_a_long_run_are_spread_evenly_within_the_limit() -> None:
    completions = {step: [Span(32 * step + row, 1400) for row in range(32)] for step in range(1, 401)}
    choice = choose_completions(completions, 8, 2_000_000)
    steps = sorted(choice.rows)
    assert (steps[0], steps[-1]) == (1, 400)
    assert len({later - earlier for earlier, later in itertools.pairwise(steps[:-1])}) == 1
    for step in steps:
        assert choice.rows[step] == [row for group in choice.groups[step] for row in range(8 * group, 8 * group + 8)]
        assert {0, 3} <= {*choice.groups[step]}
    shown = 1400 * sum(map(len, choice.rows.values()))
    assert 700_000 < shown <= 2_000_000
    assert sorted(choose_completions(completions, 8, 0).rows) == [1, 400]


@pytest.mark.slow
def test_a_long_run_fits_into_ten_megabytes(tmp_path: Path) -> None:
    """2,000 steps of 64 completions whose texts hardly compress."""
    folder = made_run(tmp_path / "run", steps=2000, prompts=0)
    letters = random.Random(0)
    texts = [
        "".join(letters.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .", k=1200)) for _ in range(64)
    ]
    lines = [json.dumps(completion_of(1, row, 8, texts[row], row < 8)).removeprefix('{"step": 1') for row in range(64)]
    with (folder / "completions.jsonl").open("w") as file:
        for step in range(1, 2001):
            file.write("".join(f'{{"step": {step}{line}\n' for line in lines))
    settings = json.loads((folder / "settings.json").read_text())
    settings[0]["value"] = 8
    (folder / "settings.json").write_text(json.dumps(settings))
    path = write_report(folder)
    assert path.stat().st_size < 10_000_000
    data = data_of(path.read_text())
    assert data["counts"]["rows"] == 128_000
    assert len(data["curves"]["steps"]) == 2000
    steps = [part["step"] for part in data["completions"]]
    assert (steps[0], steps[-1]) == (1, 2000)
    assert len(steps) > 30
    assert all(len(group["rows"]) == 8 for part in data["completions"] for group in part["groups"])
    assert {part["of"] for part in data["completions"]} == {8}


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(0, 3, []), (1, 2, [0]), (5, 5, [0, 1, 2, 3, 4]), (10, 4, [0, 4, 8, 9]), (9, 3, [0, 4, 8]), (9, 2, [0, 8]), (7, 1, [0])],
)
def test_what_is_chosen_is_even(count: int, most: int, expected: list[int]) -> None:
    assert evenly(count, most) == expected


def test_a_point_of_a_long_run_is_the_mean_of_its_steps() -> None:
    records = [{"step": step, "a": None if step == 3 else step, "b": None} for step in range(1, 8)]
    assert curves(records, most=4) == {"every": 2, "steps": [2, 4, 6, 7], "values": {"a": [1.5, 4.0, 5.5, 7.0]}}


def test_the_middle_of_a_long_text_is_left_out_and_said() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghijkl", 8) == "abcdef\n\n[… 4 characters are left out on this page …]\n\nkl"


def test_only_new_lines_are_read_and_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=3)
    reader = read(folder)
    assert [record["step"] for record in reader.metrics] == [1, 2, 3]
    first = reader.metrics[0]
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write('broken\n{"step": 4, "a": 1}\n{"step": 5, "a"')
    reader.refresh()
    assert [record["step"] for record in reader.metrics] == [1, 2, 3, 4]  # half a line is none yet
    assert reader.metrics[0] is first
    with path.open("a") as file:
        file.write(": 2}\n")
    reader.refresh()
    assert reader.metrics[-1] == {"step": 5, "a": 2}
    assert reader.generation == 0

    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before[:2]))  # a resumed run cuts the file back and goes on
    append(path, *({"step": step, "a": 100 * step} for step in range(3, 12)))
    reader.refresh()
    assert reader.generation == 1
    assert [record["step"] for record in reader.metrics] == list(range(1, 12))
    path.unlink()
    reader.refresh()
    assert (reader.generation, reader.metrics) == (2, [])


def test_completions_of_a_step_that_is_not_finished_are_not_shown(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=3)
    append(folder / "completions.jsonl", completion_of(4, 0, 4, "half a step", False))
    assert [part["step"] for part in page_data(read(folder))["completions"]] == [1, 2, 3]


def test_damaged_files_cost_what_was_in_them(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=2)
    lines = (folder / "completions.jsonl").read_text().splitlines(keepends=True)
    lines[1] = '{"step": 1, "prompt": NOTHING}\n'
    lines[2] = '{"step": 1, "prompt": 3, "completion": {"a": 1}, "rewards": [], "advantage": NaN, "tokens": 1}\n'
    (folder / "completions.jsonl").write_text("".join(lines))
    (folder / "settings.json").write_text('{"name"')
    (folder / "summary.json").write_text("[]")
    data = data_of(write_report(folder).read_text())
    rows = data["completions"][0]["groups"][0]["rows"]
    assert len(rows) == 7  # one group of all, as the settings do not say their number
    assert rows[1] == {"rewards": [None, None], "total": None, "advantage": None, "reason": "", "length": None, "text": '{"a": 1}'}
    assert data["head"]["state"] == "stopped without a summary"


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=f"{name} (is not a folder|holds no run)"):
        write_report(tmp_path / name)


def bytes_decoder(ids: list[int]) -> str:
    """A tokenizer of bytes; 0 is a special token, and a space before the first token is dropped, as SentencePiece does."""
    return bytes(i for i in ids if i).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["", "abc", "ü€𝄞 x", "a" * 100 + "€" * 30, " b c"])
def test_texts_of_tokens_make_up_the_text(text: str) -> None:
    ids = [*text.encode(), 0]
    pieces = token_texts(ids, bytes_decoder)
    assert pieces is not None
    assert "".join(pieces) == bytes_decoder(ids)
    assert len(pieces) == len(ids)
    ends = [index for index, piece in enumerate(pieces) if piece]
    shown = text.removeprefix(" ")
    assert [len(text[: text.index(shown) + count].encode()) - 1 for count in range(1, len(shown) + 1)] == ends


def test_tokens_are_recorded_with_two_decimals() -> None:
    import numpy as np

    logprobs = [np.array([-0.126, np.nan], np.float32), np.array([-1.0], np.float32)]
    assert recorded_tokens([[97, 0], [98]], logprobs, 1, bytes_decoder) == [{"tokens": ["a", ""], "logprobs": [-0.13, None]}]
    assert recorded_tokens([[97]], None, 1, bytes_decoder) == []
    values = {"kl": np.array([[0.0004, 0.12345, 9.0]], np.float32), "entropy": np.full((2, 3), np.nan, np.float32)}
    both = recorded_tokens([[97, 0], [98]], logprobs, 2, bytes_decoder, values)
    assert both == [{"tokens": ["a", ""], "logprobs": [-0.13, None], "kl": [0.0, 0.123]}, {"tokens": ["b"], "logprobs": [-1.0]}]
    assert recorded_tokens([[97, 98]], [logprobs[0]], 1, lambda ids: str(len(ids) * 7)[::-1] + "x") == [{}]
