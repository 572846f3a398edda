"""The command line: what each command calls, what help shows, how mistakes and Ctrl-C end. The commands' bodies are stand-ins."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from grpo_jax import cli
from grpo_jax.config import Config, ConfigError, RolloutConfig
from grpo_jax.config.command_line import documented
from grpo_jax.config.load import setting_types


class Calls:
    """Remembers how a stand-in was called, and returns or raises what it was told."""

    def __init__(self, answer: Any = None):
        self.answer = answer
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.arguments, self.named = arguments, named
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, answer: Any = None) -> Calls:
    """Replaces `grpo_jax.<module>` by a module with one recording function."""
    calls = Calls(answer)
    fake = types.ModuleType(f"grpo_jax.{module}")
    fake.__dict__[name] = calls
    monkeypatch.setitem(sys.modules, f"grpo_jax.{module}", fake)
    return calls


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that has to end with status 2, and returns its standard error."""
    assert cli.main(words) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "Traceback" not in seen.err
    return seen.err


@pytest.mark.parametrize("command", ["train", "sft"])
def test_training_gets_the_config_its_sources_and_resume(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = stand_in(monkeypatch, "training", command)
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 5, seed: 1}\n")
    words = [
        command,
        "--config",
        str(path),
        "--train.steps",
        "7",
        "--lora.rslora",
        "--rewards.functions",
        "[a, {name: b}]",
        "--resume",
    ]
    assert cli.main(words) == 0
    (config,) = calls.arguments
    assert (config.train.steps, config.train.seed, config.lora.rslora, config.rewards.functions) == (
        7,
        1,
        True,
        ["a", {"name": "b"}],
    )
    assert calls.named["resume"] is True
    assert calls.named["sources"] == {
        "train.seed": "run.yaml",
        "train.steps": "command line",
        "lora.rslora": "command line",
        "rewards.functions": "command line",
    }


def test_training_without_options_is_the_defaults_and_no_resume(monkeypatch: pytest.MonkeyPatch):
    calls = stand_in(monkeypatch, "training", "train")
    assert cli.main(["train"]) == 0
    assert 0 <= time.perf_counter() - calls.named.pop("started") < 60
    assert (calls.arguments, calls.named) == ((Config(),), {"resume": False, "sources": {}})


def test_a_flag_may_be_switched_off_and_a_value_joined_by_an_equals_sign(monkeypatch: pytest.MonkeyPatch):
    calls = stand_in(monkeypatch, "training", "train")
    assert cli.main(["train", "--data.shuffle=false", "--train.quiet", "--rewards.accuracy_threshold=-1e-1"]) == 0
    (config,) = calls.arguments
    assert (config.data.shuffle, config.train.quiet, config.rewards.accuracy_threshold) == (False, True, -0.1)


def test_evaluation_takes_a_config_or_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = stand_in(monkeypatch, "evaluation", "evaluate")
    path = tmp_path / "run.yaml"
    path.write_text("data: {eval_size: 5}\n")
    assert cli.main(["eval", "--config", str(path), "--data.eval_size", "6", "--pass_k", "4"]) == 0
    assert (calls.arguments[0].data.eval_size, calls.named) == (6, {"run_dir": None, "best": False, "pass_k": 4})
    assert cli.main(["eval", "--run", "runs/a"]) == 0
    assert (calls.arguments, calls.named) == ((None,), {"run_dir": "runs/a", "best": False, "pass_k": 8})


def test_evaluation_of_a_run_takes_no_other_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    stand_in(monkeypatch, "evaluation", "evaluate")
    assert "data.eval_size is '5': a run is evaluated with its own settings" in fails(
        ["eval", "--run", "r", "--data.eval_size", "5"], capsys
    )


def test_export_gets_run_out_and_format(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls = stand_in(monkeypatch, "run.saved", "export_run", ["vllm serve out"])
    words = ["--gguf_type", "q8_0", "--push_to_hub", "me/mine", "--private"]
    assert cli.main(["export", "--run", "runs/a", "--out", "out", "--format", "gguf", *words]) == 0
    assert calls.arguments == ("runs/a", "out", "gguf")
    assert (calls.named["gguf_type"], calls.named["repo"], calls.named["private"]) == ("q8_0", "me/mine", True)
    assert capsys.readouterr().out == "wrote gguf to out\n    vllm serve out\n"
    assert cli.main(["export", "--run", "runs/a", "--out", "out", "--format", "merged"]) == 0
    assert (calls.named["gguf_type"], calls.named["repo"], calls.named["private"]) == (None, None, None)


def test_quickstart_gets_its_folder(monkeypatch: pytest.MonkeyPatch):
    calls = stand_in(monkeypatch, "tools.quickstart", "quickstart")
    assert cli.main(["quickstart", "--run_dir", "here"]) == 0
    assert calls.arguments == ("here",)


def test_generation_passes_every_setting_on(monkeypatch: pytest.MonkeyPatch):
    from grpo_jax.tools import generate as module

    calls = Calls()
    monkeypatch.setattr(module, "generate", calls)
    words = "generate --model m --adapter a --prompt hello --num_generations 2 --max_completion_length 9 --temperature 0.5"
    words += " --top_p 0.9 --top_k 4 --min_p 0.1 --stop END --stop ! --seed 3 --dtype bfloat16 --system brief --raw"
    assert cli.main(words.split()) == 0
    (options,) = calls.arguments
    assert options == module.GenerateOptions(
        prompts=["hello"],
        rollout=RolloutConfig(
            num_generations=2, max_completion_length=9, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, stop=["END", "!"]
        ),
        model="m",
        adapter="a",
        dtype="bfloat16",
        system="brief",
        raw=True,
        seed=3,
    )


@pytest.mark.parametrize(("temperature", "expected"), [("0", 1), ("1", 4)])
def test_generation_makes_four_completions_or_one_where_all_would_be_alike(
    temperature: str, expected: int, monkeypatch: pytest.MonkeyPatch
):
    from grpo_jax.tools import generate as module

    calls = Calls()
    monkeypatch.setattr(module, "generate", calls)
    assert cli.main(["generate", "--run", "r", "--prompt", "p", "--temperature", temperature]) == 0
    assert calls.arguments[0].rollout.num_generations == expected
    assert (calls.arguments[0].model, calls.arguments[0].run) == (None, "r")


def test_a_run_has_its_own_adapter(capsys: pytest.CaptureFixture[str]):
    error = fails(["generate", "--run", "r", "--adapter", "a", "--prompt", "p"], capsys)
    assert "--adapter is 'a': a run has its own adapter" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --optim.learning_rte 1",
            "--optim.learning_rte is not an option of grpo-jax train; did you mean --optim.learning_rate?",
        ),
        ("train --learning_rate 1", "did you mean --optim.learning_rate?"),
        ("train --num-generations=4", "did you mean --rollout.num_generations?"),
        ("train --resum", "did you mean --resume?"),
        ("train --optm.x 1", "did you mean --optim.SETTING?"),
        ("generate --model m --prompt p --top_pp 1", "did you mean --top_p?"),
        ("generate --model m --prompt p --zzz 1", "see grpo-jax generate --help"),
        ("train config.yaml", "'config.yaml' stands alone: write each setting as --section.field VALUE"),
        ("train --train.steps many", "train.steps is 'many': expected a whole number"),
        ("train --rollout.slots 0", "rollout.slots is 0: use at least 1, or null"),
        ("sft --config nowhere.yaml", "nowhere.yaml: there is no such file"),
        ("generate --model m --prompt p --temperature -1", "rollout.temperature is -1.0"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_message(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    error = fails(words.split(), capsys)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "words", ["", "trian", "eval", "eval --config a --run b", "export --run a --out b --format zip", "eval --run a --pass_k 0"]
)
def test_a_command_that_does_not_parse_ends_with_status_2(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    assert "usage: grpo-jax" in capsys.readouterr().err


def test_errors_of_this_package_are_messages_and_others_are_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for error in (ConfigError("one\ntwo \x1b[2J"), FileExistsError("one\ntwo \x1b[2J")):
        stand_in(monkeypatch, "training", "train", error)
        assert fails(["train"], capsys) == "error: one\n       two \\x1b[2J\n"
    stand_in(monkeypatch, "training", "train", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_an_interrupt_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "my run.yaml"
    path.write_text(f"train: {{run_dir: {tmp_path / 'run'}}}")
    stand_in(monkeypatch, "training", "train", KeyboardInterrupt())
    assert cli.main(["train", "--config", str(path), "--train.steps", "7"]) == 130
    again = f"    grpo-jax train --config '{path}' --train.steps 7"
    assert capsys.readouterr().err == f"interrupted before anything was saved; this starts at step 0 again:\n{again}\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')  # a folder with a finished step is taken by --resume alone
    assert cli.main(["train", "--config", str(path), "--train.steps", "7"]) == 130
    assert capsys.readouterr().err == f"interrupted before anything was saved; this starts at step 0 again:\n{again} --resume\n"
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    assert cli.main(["train", "--config", str(path), "--train.steps", "7"]) == 130
    assert f"this continues from it:\n{again} --resume\n" in capsys.readouterr().err
    stand_in(monkeypatch, "run.saved", "export_run", KeyboardInterrupt())
    assert cli.main(["export", "--run", "a", "--out", "b", "--format", "adapter"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_training_help_explains_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config FILE.yaml" in shown
    assert "--resume" in shown
    for name in setting_types():
        assert f"--{name} " in shown
    assert (
        "--rollout.top_p VALUE Sample from the smallest set of tokens with at least this probability; 1 takes all tokens." in shown
    )
    assert "(a finite number; default 1e-05)" in shown


def test_every_setting_is_documented():
    for section in fields(Config):
        holder = type(Config().__dict__[section.name])
        summary, said = documented(holder)
        assert summary
        assert list(said) == [field.name for field in fields(holder)]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_does_not_import_jax(words: list[str]):
    code = f"""
import sys
from grpo_jax.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert end.code == 0
heavy = {{"jax", "jaxlib", "flax", "numpy", "transformers", "datasets", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: grpo-jax" in done.stdout


def test_the_module_runs_as_the_program():
    done = subprocess.run([sys.executable, "-m", "grpo_jax", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "grpo-jax 0.1.0\n")


def test_the_package_is_lazy_and_knows_its_names():
    code = """
import sys
import grpo_jax as gx
assert not any(name.startswith("grpo_jax.") for name in sys.modules)
assert set(gx.MODULES) | {"__version__"} == set(gx.__all__) == set(dir(gx))
assert gx.Config().train.steps == 100
assert gx.ConfigError.__module__ == "grpo_jax.config.checks"
assert "jax" not in sys.modules
try:
    gx.nothing
except AttributeError as error:
    assert "'nothing'" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
