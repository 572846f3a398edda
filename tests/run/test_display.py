"""The display: readable on a terminal, plain in a log, and safe against control codes in a model's text."""

from __future__ import annotations

import io
import math
import re
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import Config, Setting, resolved_settings
from grpo_jax.run.display import Display, step_values
from grpo_jax.run.tables import choose_samples, clock, duration, shorten

EVIL = "[bold red]hi[/] :smile: [/] [link=https://x.y]z[/link] \x1b]0;title\x07\x1b[2J\x9b1m\r\nnew \u202egnp \ud800"


class Output:
    """A display with its recorded output."""

    def __init__(self, *, terminal: bool, quiet: bool = False, width: int = 100, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        file = io.TextIOWrapper(self.bytes, encoding=encoding, newline="")
        console = Console(file=file, force_terminal=terminal, width=width, height=40, force_jupyter=False, color_system="truecolor")
        self.encoding = encoding
        self.display = Display(quiet, console)

    def text(self) -> str:
        self.display._console.file.flush()
        return self.bytes.getvalue().decode(self.encoding)


def show_a_run(display: Display) -> None:
    """Makes every call that a run makes, with hostile text wherever text comes from outside."""
    config = Config.from_dict({"model": {"path": EVIL}, "train": {"steps": 2}})
    display.settings(resolved_settings(config, {"model.path": EVIL}))
    display.note(f"note {EVIL}")
    display.warning(f"reward {EVIL} failed")
    with display.busy(f"reading {EVIL}"):
        pass
    display.evaluation(0, 0.41, 256)
    with display.progress(2):
        with display.compiling("update"):
            pass
        for step in (1, 2):
            display.step(step, {"reward": 0.5, "KL": 0.001, "length": 34.12, "rollout seconds": 1.234, EVIL: math.nan})
            prompts = [EVIL, [{"role": "user", "content": EVIL}]]
            completions = [EVIL, "b", [{"role": "assistant", "content": EVIL}], "d"]
            rewards = {"exact": [1.0, 0.0, math.nan, 0.0], EVIL: np.zeros(4, np.float32)}
            display.completions(
                step, prompts, completions, rewards, np.array([1, -1, 0, 0], np.float32), ["stop", "length", "stop", "stop"]
            )
    display.report(
        {"accuracy_before": 0.41, "accuracy_after": 0.934, "held_out_problems": 256, "seconds": 75, "steps": 2}, {EVIL: "curves"}
    )


def test_plain_output_has_one_line_a_step_and_no_control_codes() -> None:
    output = Output(terminal=False)
    show_a_run(output.display)
    text = output.text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    assert steps[0].startswith("step 1/2  reward 0.500  KL 0.00100  length 34.1  rollout 1.23 s  [bold red]hi[/] :smile:")
    assert "held-out accuracy before training: 41.0 %  (256 problems, greedy)" in text
    assert "held-out accuracy: 41.0 % -> 93.4 %  (256 problems, greedy)" in text
    assert "compiled update: 0.0" in text
    assert "exact 1.00" in text
    assert "setting train.steps = 2  (set in Python)" in text


def test_quiet_output_is_plain_on_a_terminal_and_shows_no_completions() -> None:
    output = Output(terminal=True, quiet=True)
    show_a_run(output.display)
    text = output.text()
    assert "\x1b" not in text
    assert "exact" not in text
    assert len([line for line in text.splitlines() if line.startswith("step ")]) == 2


def test_a_terminal_shows_tables_and_interprets_nothing_of_a_models_text() -> None:
    output = Output(terminal=True, width=300)
    show_a_run(output.display)
    text = output.text()
    ours = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours and cursor moves of the display itself
    assert "\x1b" not in ours
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", ours)
    assert "\x1b[2J" not in text
    assert "]8;" not in text  # no hyperlink
    spelled = r"[bold red]hi[/] :smile: [/] [link=https://x.y]z[/link] \x1b]0;title\x07\x1b[2J\x9b1m\r\nnew \u202egnp \ud800"
    assert ours.count(spelled) >= 4
    assert "Completions of step 2" in ours
    assert "(cut at the limit)" in ours
    assert "41.0 % -> 93.4 %" in ours


def test_output_in_another_encoding_does_not_end_a_run() -> None:
    for encoding in ("ascii", "latin-1", "cp1252"):
        output = Output(terminal=True, encoding=encoding)
        assert output.display.plain
        show_a_run(output.display)
        output.display.note("漢")
        assert "\\u6f22" in output.text()


def test_a_forced_colour_does_not_make_a_pipe_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display()
    assert display.plain
    display.note("hello")
    assert capsys.readouterr().out == "hello\n"


def test_the_bar_shows_compiling_and_restores_the_screen_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(terminal=True)
    stdout = sys.stdout

    def fail() -> None:
        with output.display.progress(4), output.display.compiling("rollout"):
            time.sleep(0.6)  # at four pictures a second
            raise KeyError("boom")

    with pytest.raises(KeyError):
        fail()
    assert sys.stdout is stdout
    text = output.text()
    assert "compiling rollout" in text
    assert "step 0/4" in text
    assert "compiled rollout" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is shown again
    with output.display.progress(4, done=2):
        output.display.step(3, {"loss": 1.5, "token accuracy": 0.25})
        time.sleep(0.4)
    assert "1.50" in output.text()
    output.display.step(4, {"loss": 1.25})  # one step at a time, without a bar
    assert "step 4  loss 1.25" in output.text()


def test_chosen_settings_come_first_and_defaults_are_grouped() -> None:
    settings = [
        Setting("model.path", "m", "default"),
        Setting("optim.b1", 0.9, "default"),
        Setting("optim.eps", None, "default"),
        Setting("train.steps", 5, "command line"),
    ]
    output = Output(terminal=False)
    output.display.settings(settings)
    lines = output.text().splitlines()
    assert lines == ["setting train.steps = 5  (command line)", "default model: path m", "default optim: b1 0.9, eps null"]


def test_the_best_and_the_worst_of_the_first_prompts_are_shown() -> None:
    rewards = {"f": [0, 1, 2, 5, 5, 5, 1, 0, 0]}
    advantages = [-1, 0, 1, 0, 0, 0, 1, -0.5, -0.5]
    samples = choose_samples(["p", "q", "r"], [f"c{row}" for row in range(9)], rewards, advantages, ["stop"] * 9, count=4)
    assert [(sample.prompt, sample.completion) for sample in samples] == [("p", "c2"), ("p", "c0"), ("q", "c3"), ("r", "c6")]


def test_the_bar_shows_the_main_metrics_in_order() -> None:
    metrics = {"update_seconds": 3.0, "reward/mean": 0.5, "kl_divergence": 0.1, "entropy": 2.0, "rollout_seconds": 1.0}
    assert list(step_values(metrics).items()) == [("reward", 0.5), ("KL", 0.1), ("rollout seconds", 1.0), ("update seconds", 3.0)]


@pytest.mark.parametrize(
    ("seconds", "text", "running"),
    [
        (0, "0.00 s", "0:00"),
        (9.994, "9.99 s", "0:10"),
        (9.996, "10.0 s", "0:10"),
        (59.96, "1 m 00 s", "1:00"),
        (125, "2 m 05 s", "2:05"),
    ],
)
def test_times_are_formatted_for_people(seconds: float, text: str, running: str) -> None:
    assert duration(seconds) == text
    assert clock(seconds) == running
    assert (duration(3725), clock(3725)) == ("1 h 02 m", "1:02:05")


def test_long_texts_lose_their_middle() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 6 + "b" * 6, 9) == "aaaaaa […] bbb"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reward_that_takes_long_is_named(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo_jax.run.display.WAITING_SECONDS", 0.2)
    output = Output(terminal=terminal)
    with output.display.progress(2), output.display.waiting(lambda: ["judge", "other \x1b]0;"]):
        time.sleep(1.0)
    line = re.search(r"waiting for reward judge and other .*, \d+ s", output.text())
    assert line is not None
    assert "\x1b]0" not in output.text()
    quiet = Output(terminal=terminal)
    with quiet.display.progress(2), quiet.display.waiting(list[str]):
        time.sleep(0.5)
    assert "waiting" not in quiet.text()
