"""Bad input, through the command and `train`: one message that names field, value and fix, before anything is compiled."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.numpy import load_file, save_file
from tiny_runs import CONFIG, additions, build_model, config_of, letters, settings, tensors, tiny_model, words_of

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.config import Config
from grpo_jax.data import templates
from grpo_jax.models.spec import ModelError
from grpo_jax.run.folder import RunFolder
from grpo_jax.runtime.programs import Program
from grpo_jax.weights.hf import read_folder_spec
from grpo_jax.weights.lora import init_lora, save_adapter

ROWS = additions(12)
RESPONSE: Any = types.SimpleNamespace(headers={}, request=None)
"""Stands for the hub's answer, whose class is that of whatever HTTP library huggingface_hub has."""


@dataclass
class Input:
    """What a run gets: sections of the settings, lines of the dataset's file (a text stands as it is), the command's last words."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=lambda: list(ROWS))
    words: list[str] = field(default_factory=list)

    def values(self, folder: Path) -> dict[str, dict[str, Any]]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in self.rows]
        (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
        data = {"path": str(folder / "rows.jsonl")} | self.sections.get("data", {})
        rewards = {"functions": ["exact_match"]} | self.sections.get("rewards", {})
        return settings(folder / "run", **self.sections | {"data": data, "rewards": rewards})


def section(name: str, **values: Any) -> Callable[[Path], Input]:
    """An input with one section changed."""
    return lambda folder: Input({name: values})


def rows(*changed: Any) -> Callable[[Path], Input]:
    """An input with rows put behind the first three good ones."""
    return lambda folder: Input(rows=[*ROWS[:3], *changed])


def model(break_it: Callable[[Path], None], chat_template: str | None = None) -> Callable[[Path], Input]:
    """An input whose model folder was broken."""

    def made(folder: Path) -> Input:
        path = build_model(folder / "model", chat_template)
        break_it(path)
        return Input({"model": {"path": str(path)}})

    return made


def attribute(**values: Any) -> Callable[[Path], None]:
    """Changes config.json; None removes the attribute."""

    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | values
        (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return change


def shards(path: Path) -> None:
    """Cuts the weights in two files with an index."""
    weights = tensors()
    (path / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + (number > 9)}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: array for name, array in weights.items() if where[name] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def a_missing_shard(path: Path) -> None:
    shards(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def a_corrupt_shard(path: Path) -> None:
    shards(path)
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_tensor(name: str, array: np.ndarray | None) -> Callable[[Path], None]:
    """Another array in a tensor's place; None takes the tensor out."""

    def change(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        weights.pop(name, None)
        save_file(weights if array is None else weights | {name: array}, path / "model.safetensors", metadata={"format": "pt"})

    return change


def index(**entries: Any) -> Callable[[Path], None]:
    """An index with these files of tensors."""

    def change(path: Path) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))

    return change


def header(change_it: Callable[[dict[str, Any]], None], length: int | None = None) -> Callable[[Path], None]:
    """Another header in front of the same values; `length` is what it says of itself."""

    def change(path: Path) -> None:
        raw = (path / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        made = json.loads(raw[8 : 8 + size])
        change_it(made)
        text = json.dumps(made).encode()
        (path / "model.safetensors").write_bytes(
            (len(text) if length is None else length).to_bytes(8, "little") + text + raw[8 + size :]
        )

    return change


def overlapping(made: dict[str, Any]) -> None:
    """Two tensors with the same values."""
    made["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = made["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]


def beyond(made: dict[str, Any]) -> None:
    """A tensor behind the end of the file."""
    made["model.norm.weight"] |= {"shape": [2**40], "data_offsets": [0, 2**42]}


def whole_numbers(made: dict[str, Any]) -> None:
    """Values that are no floating-point numbers."""
    made["model.norm.weight"]["dtype"] = "I32"


def content(name: str, text: str) -> Callable[[Path], None]:
    """Another content in a file."""
    return lambda path: (path / name).write_text(text) and None


def adapter_attribute(text: str) -> Callable[[Path], None]:
    """Changes adapter_config.json; the text is JSON of some attributes."""

    def change(path: Path) -> None:
        values = json.loads((path / "adapter_config.json").read_text())
        body = json.dumps({name: value for name, value in values.items() if f'"{name}"' not in text})
        (path / "adapter_config.json").write_text(body[:-1] + f", {text}}}")

    return change


def only_a_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def no_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def adapter(change: Callable[[Path], None], **of_model: Any) -> Callable[[Path], Input]:
    """An input that starts from an adapter, made for the model with `of_model` changed, and then changed itself."""

    def made(folder: Path) -> Input:
        import jax

        attribute(**of_model)(build_model(folder / "other"))
        spec = read_folder_spec(folder / "other")
        lora = gx.LoraConfig(rank=2)
        save_adapter(folder / "adapter", spec, init_lora(spec, lora, jax.random.key(0)), lora, "other")
        (folder / "adapter" / "digests.json").unlink()  # others' adapters have none
        change(folder / "adapter")
        return Input({"lora": {"rank": 2, "adapter": str(folder / "adapter")}})

    return made


def cut(name: str) -> Callable[[Path], None]:
    """Cuts a file short."""

    def change(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-50])

    return change


def nothing(path: Path) -> None:
    """Changes nothing."""


def hub(folder: Path) -> Input:
    return Input({"model": {"path": "someone/a-model"}})


def taken(**sections: Any) -> Callable[[Path], Input]:
    """A run folder that holds a run with other settings."""

    def made(folder: Path) -> Input:
        before = Input().values(folder)
        with RunFolder.create(folder / "run", Config.from_dict(before), resume=False) as run:
            run.write_step(1, {"reward/mean": 0.5})
        return Input(sections, words=["--resume"] if sections else [])

    return made


CONVERSATION = {"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WIDE = np.zeros((5, 32), np.float32)

CASES: dict[str, tuple[Callable[[Path], Input], list[str]]] = {
    "an unknown setting": (section("optim", learning_rte=1), ["optim.learning_rte", "did you mean", "optim.learning_rate?"]),
    "an ill-typed setting": (section("train", steps="many"), ["train.steps is 'many': expected a whole number"]),
    "an unknown choice": (section("objective", loss="grop"), ["objective.loss is 'grop'", "did you mean grpo?"]),
    "a number out of range": (section("rollout", top_p=1.5), ["rollout.top_p is 1.5", "at most 1"]),
    "a group of one": (section("rollout", num_generations=1), ["rollout.num_generations is 1", "use 4 to 16", "at least 2"]),
    "greedy completions": (section("rollout", temperature=0), ["rollout.temperature is 0", "use 1.0"]),
    "a micro-batch of prompts that does not divide": (
        section("train", prompts_per_step=4, micro_batch_prompts=3),
        ["train.micro_batch_prompts is 3", "a divisor of train.prompts_per_step (4)"],
    ),
    "a micro-batch of completions that does not divide": (
        section("train", micro_batch_completions=3),
        ["train.micro_batch_completions is 3", "a divisor of rollout.num_generations (4)"],
    ),
    "no slots": (section("rollout", slots=0), ["rollout.slots is 0", "at least 1, or null"]),
    "more prompts than rows": (
        section("train", prompts_per_step=64),
        ["train.prompts_per_step is 64", "only 12 rows", "use at most"],
    ),
    "a warm-up without end": (section("optim", warmup_steps=2), ["optim.warmup_steps is 2", "fewer than train.steps (2)"]),
    "no model": (section("model", path=None), ["model.path is null", "give a model folder or a hub id"]),
    "no data": (section("data", path=None), ["data.path is null", "give a file of prompts"]),
    "a folder that is not there": (section("model", path="./nowhere"), ["model.path", "'./nowhere' is not a folder"]),
    "a file that is not there": (section("data", path="./nowhere.jsonl"), ["data.path is './nowhere.jsonl'", "no such file"]),
    "a missing column": (
        section("data", prompt_column="promt"),
        ["data.prompt_column is 'promt'", "no such column", "did you mean prompt?", "columns: prompt, answer"],
    ),
    "a reward without its column": (
        section("rewards", functions=[{"name": "exact_match", "column": "anwser"}]),
        ["reward function exact_match needs anwser", "its columns are: answer", "Did you mean answer?"],
    ),
    "an unknown reward": (
        section("rewards", functions=["exact_mach"]),
        ["rewards.functions[0] is 'exact_mach'", "did you mean exact_match?"],
    ),
    "too many weights": (
        section("rewards", weights=[1, 2]),
        ["rewards.weights is [1.0, 2.0]", "one weight for each of the 1 functions"],
    ),
    "an unknown accuracy": (section("rewards", accuracy="number_match"), ["rewards.accuracy is 'number_match'", "exact_match"]),
    "an empty dataset": (lambda folder: Input(rows=[]), ["rows.jsonl has no rows"]),
    "a malformed line": (rows('{"prompt": '), ["rows.jsonl, line 4", "each line must be one JSON object"]),
    "a line that is no object": (rows("[1, 2]"), ["rows.jsonl, line 4", "expected an object", "[1, 2]"]),
    "an empty prompt": (rows({"prompt": "  ", "answer": "1"}), ["row 3 (counting from 0)", "the prompt is empty; remove the row"]),
    "a prompt that is null": (rows({"answer": "1"}), ["row 3 (counting from 0)", "there is no prompt", "column prompt"]),
    "a prompt that is no text": (rows({"prompt": 7}), ["row 3 (counting from 0)", "a text or a list of messages, not 7"]),
    "a message without a role": (
        rows({"prompt": [{"content": "1+1="}]}),
        ["row 3 (counting from 0), message 0", "there is no role; it has content"],
    ),
    "a prompt that is too long, to be refused": (
        lambda folder: Input({"data": {"overlong": "error"}}, rows=[*ROWS, {"prompt": "1+1 is what?", "answer": "2"}]),
        ["row 12 (counting from 0)", "12 tokens", "rollout.max_prompt_length (8)", "data.overlong"],
    ),
    "prompts that are all too long": (
        section("rollout", max_prompt_length=2),
        ["all 12 rows are longer", "rollout.max_prompt_length (2 tokens)"],
    ),
    "a conversation without a chat template": (
        lambda folder: Input(model(nothing)(folder).sections, rows=[*ROWS[:3], CONVERSATION]),
        ["row 3 (counting from 0)", "the prompt is a conversation", "no chat template", "use an instruct model, or plain texts"],
    ),
    "a system prompt without a chat template": (
        lambda folder: Input(model(nothing)(folder).sections | {"data": {"system_prompt": "Add."}}),
        ["data.system_prompt is 'Add.'", "no chat template", "set this to null"],
    ),
    "a model without a tokenizer": (model(no_tokenizer), ["the model has no tokenizer", "add tokenizer.json"]),
    "an unknown model family": (
        model(attribute(model_type="qwen4")),
        ["config.json: model_type 'qwen4' is not supported", "nearest: qwen"],
    ),
    "an unknown config attribute": (
        model(attribute(rope_thetta=1e4)),
        ["config.json: attribute rope_thetta = 10000.0 is not known", "did you mean rope_theta?"],
    ),
    "a config attribute that is missing": (model(attribute(hidden_size=None)), ["config.json: attribute hidden_size is missing"]),
    "a config that is no JSON": (model(cut("config.json")), ["config.json is not valid JSON"]),
    "a missing shard": (model(a_missing_shard), ["model-00002-of-00002.safetensors is missing", "download the folder again"]),
    "a corrupt shard": (model(a_corrupt_shard), ["model-00001-of-00002.safetensors is broken", "download it again"]),
    "a missing tensor": (model(a_tensor("model.norm.weight", None)), ["tensor model.norm.weight is missing"]),
    "a tensor of the wrong shape": (
        model(a_tensor("model.layers.1.mlp.up_proj.weight", WIDE)),
        ["tensor model.layers.1.mlp.up_proj.weight has shape (5, 32); config.json asks for (48, 32)"],
    ),
    "a tensor too many": (
        model(a_tensor("model.layers.2.mlp.up_proj.weight", WIDE)),
        ["model.layers.2.mlp.up_proj.weight", "1 tensors"],
    ),
    "only a pickle": (model(only_a_pickle), ["pytorch_model.bin", "pickles are never read; convert to safetensors"]),
    "an adapter of a wider model": (
        adapter(nothing, hidden_size=64),
        ["adapter: tensor base_model.model.model.layers.0", "has shape (2, 64)", "(2, 32)"],
    ),
    "an adapter of a deeper model": (adapter(nothing, num_hidden_layers=3), ["adapter: 14 tensors do not belong", "layers.2"]),
    "an adapter of a shallower model": (
        adapter(nothing, num_hidden_layers=1),
        ["adapter: tensor", "layers.1", "is missing", "2-layer model"],
    ),
    "a corrupt adapter": (adapter(cut("adapter_model.safetensors")), ["adapter_model.safetensors is broken"]),
    "an adapter that is not there": (section("lora", adapter="./nowhere"), ["nowhere", "is not a folder, and not a hub id"]),
    "no heads": (model(attribute(num_attention_heads=0)), ["config.json: num_attention_heads is 0: use a whole number from 1 to"]),
    "a billion layers": (model(attribute(num_hidden_layers=10**9)), ["num_hidden_layers is 1000000000: use a whole number from 1"]),
    "layers below zero": (model(attribute(num_hidden_layers=-1)), ["config.json: num_hidden_layers is -1: use a whole number"]),
    "a norm's epsilon without end": (
        model(content("config.json", json.dumps(CONFIG)[:-1] + ', "rms_norm_eps": 1e999}')),
        ["config.json: rms_norm_eps is inf: use a number from 1e-12 to 1"],
    ),
    "a config without bottom": (
        model(content("config.json", "[" * 100_000)),
        ["config.json is not valid JSON", "nested deeper than 100 levels"],
    ),
    "a stop id below zero": (
        model(content("generation_config.json", '{"eos_token_id": [4, -5]}')),
        ["generation_config.json: eos_token_id is [4, -5]: use a token id from 0 on"],
    ),
    "a stop id of a trillion": (
        model(content("generation_config.json", '{"eos_token_id": 1000000000000}')),
        ["generation_config.json: eos_token_id is 1000000000000: use a token id"],
    ),
    "an index of numbers": (model(index(a=5)), ["index.json: the file of 'a' is 5: use a file name"]),
    "an index that leaves the folder": (
        model(index(a="../model.safetensors")),
        ["index.json names a file in another folder: '../model.safetensors'"],
    ),
    "an index with an absolute path": (model(index(a="/etc/passwd")), ["names a file in another folder: '/etc/passwd'"]),
    "an index with a name that is none": (model(index(a="a" * 300)), ["no name of a safetensors file"]),
    "a header that lies about a size": (model(header(beyond)), ["model.safetensors is broken", "download it again"]),
    "tensors that overlap": (model(header(overlapping)), ["model.safetensors is broken", "download it again"]),
    "a header of a gigabyte": (model(header(lambda made: None, 10**9)), ["model.safetensors is broken", "header too large"]),
    "a header longer than the file": (model(header(lambda made: None, 10**6)), ["model.safetensors is broken"]),
    "a tensor of whole numbers": (
        model(header(whole_numbers)),
        ["tensor model.norm.weight has values of type I32", "F32"],
    ),
    "an adapter of infinite rank": (
        adapter(adapter_attribute('"r": 1e999')),
        ["adapter_config.json: r is inf: use a whole number from 1 to 65,536"],
    ),
    "an adapter of immense alpha": (
        adapter(adapter_attribute('"lora_alpha": 1e38')),
        ["adapter_config.json: lora_alpha is 1e+38: use a number from 1e-06 to 1e+06"],
    ),
    "an adapter's header of a gigabyte": (
        adapter(lambda path: (path / "adapter_model.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}") and None),
        ["adapter_model.safetensors is broken"],
    ),
    "half a surrogate pair": (
        rows({"prompt": "1+\ud800=", "answer": "2"}),
        ["row 3 (counting from 0)", "the text has '\\ud800' at character 2"],
    ),
    "a number of 5,000 digits": (
        rows('{"prompt": "1", "answer": %s}' % ("9" * 5000)),
        ["rows.jsonl, line 4", "thousands of digits"],
    ),
    "a row without bottom": (
        rows('{"prompt": "1", "answer": ' + "[" * 100_000),
        ["rows.jsonl, line 4", "nested deeper than 100 levels"],
    ),
    "a template that loops": (
        lambda folder: Input(model(nothing, LOOPS)(folder).sections | {"data": {"chat_template": True}}),
        ["row 0 (counting from 0)", "the chat template refuses the conversation: it takes more than 0.2 s"],
    ),
    "a template that fills the memory": (
        lambda folder: Input(model(nothing, "{{ 'x' * 10**10 }}")(folder).sections | {"data": {"chat_template": True}}),
        ["row 0 (counting from 0)", "it needs more than 2000 MB of memory"],
    ),
    "a run folder that is taken": (
        taken(),
        ["run already holds a run", "continue it with --resume, or choose another train.run_dir"],
    ),
    "a resumed run with changed settings": (
        taken(optim={"learning_rate": 0.5}, rollout={"num_generations": 8}),
        ["holds a run with other settings (stored -> now)", "rollout.num_generations: 4 -> 8", "optim.learning_rate: 0.01 -> 0.5"],
    ),
    "a gated model": (hub, ["model.path: 'someone/a-model'", "licence", "hf auth login"]),
}


@pytest.fixture(autouse=True)
def no_program_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is compiled; the hub answers that a repository is gated."""

    def refuse(self: Program, *arguments: Any, **static: Any) -> Any:
        raise AssertionError(f"{self.name} was compiled")

    def gated(*arguments: Any, **named: Any) -> Any:
        raise GatedRepoError("403 Client Error", response=RESPONSE)

    monkeypatch.setattr(Program, "__call__", refuse)
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)


@pytest.mark.parametrize("case", CASES)
def test_the_command_ends_with_one_message_and_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make, said = CASES[case]
    given = make(tmp_path)
    assert cli.main(["train", *words_of(given.values(tmp_path)), *given.words]) == 2
    error = capsys.readouterr().err
    first, *more = error.splitlines()
    assert first.startswith("error: ")
    assert all(line.startswith("       ") for line in more)
    assert "Traceback" not in error
    for part in said:
        assert part in error


@pytest.mark.parametrize("case", CASES)
def test_train_raises_an_error_of_its_own_with_the_same_message(case: str, tmp_path: Path):
    make, said = CASES[case]
    given = make(tmp_path)
    values = given.values(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r".+") as caught:
        gx.train(gx.Config.from_dict(values), resume="--resume" in given.words)
    assert cli.is_users(caught.value)
    for part in said:
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ([], "dataset has no rows"),
        ([*ROWS, "6+6="], "dataset, row 12 (counting from 0): expected a dict of columns, not '6+6='"),
        ({"train": ROWS}, "dataset is a dict: pass one split of it"),
        (iter(ROWS), "pass a list of dicts or a datasets.Dataset"),
        ([*ROWS, {"prompt": ""}], "dataset, row 12 (counting from 0): the prompt is empty"),
        ([{"question": "1+1="}], "data.prompt_column is 'prompt': dataset has no such column; columns: question"),
        ([{"prompt": "1+1=", "completions": "2"}] * 2, "a column completions"),
    ],
    ids=[
        "empty",
        "a row that is no dict",
        "several splits",
        "an iterator",
        "an empty prompt",
        "a missing column",
        "a reserved name",
    ],
)
def test_rows_from_python_are_checked(dataset: Any, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r".+") as caught:
        gx.train(config_of(tmp_path / "run"), dataset=dataset, reward_funcs=letters)
    assert cli.is_users(caught.value)
    assert said in str(caught.value)


def test_a_reward_from_python_that_asks_for_a_column_that_is_not_there_is_refused(tmp_path: Path):
    def judge(completions: list[str], verdict: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(gx.ConfigError, match=r"reward function judge needs verdict, .* its columns are: answer"):
        gx.train(config_of(tmp_path / "run"), dataset=ROWS, reward_funcs=judge)


def test_no_reward_at_all_is_refused(tmp_path: Path):
    with pytest.raises(gx.ConfigError, match=r"rewards\.functions is \[\]: name at least one reward"):
        gx.train(config_of(tmp_path / "run"), dataset=ROWS)


def test_a_policy_and_other_adapters_are_refused(tmp_path: Path):
    policy = gx.Policy.from_pretrained(tiny_model())
    with pytest.raises(
        gx.ConfigError, match=r"lora: .*rank=4.* differs from the handed-over policy's .*rank=0.*; leave one of them out"
    ):
        gx.train(config_of(tmp_path / "run"), policy=policy, dataset=ROWS, reward_funcs=letters)


def test_a_repository_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*arguments: Any, **named: Any) -> Any:
        raise RepositoryNotFoundError("404 Client Error", response=RESPONSE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    config = config_of(tmp_path / "run", model={"path": "someone/a-modle"})
    with pytest.raises(ModelError, match=r"no public hub repository 'someone/a-modle'; if it is private, run `hf auth login`"):
        gx.train(config, dataset=ROWS, reward_funcs=letters)


def test_weights_are_fetched_only_when_everything_else_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def snapshot(path: str, *, allow_patterns: list[str], **named: Any) -> str:
        asked.append(allow_patterns)
        return str(tiny_model())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = config_of(tmp_path / "run", model={"path": "someone/a-model"})
    with pytest.raises(gx.ConfigError, match="no such column"):
        gx.train(config, dataset=[{"question": "1+1="}] * 4, reward_funcs=letters)
    assert asked
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)


@pytest.mark.parametrize("words", [["eval", "--run"], ["export", "--out", "out", "--format", "adapter", "--run"]])
def test_a_folder_without_a_run_is_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*words, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: run: {tmp_path} holds no config.yaml, so it is not the folder of a run\n"
