"""A finished run is read from disk, evaluated, exported, and used to start another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from fake_hub import fake_hub
from plain_oracles import quick_compiling
from safetensors.numpy import load_file
from shared_programs import shared_programs
from tiny_runs import (
    Finished,
    additions,
    arrays,
    assert_same_arrays,
    build_model,
    config_of,
    run,
    settings,
    tiny_model,
    words_of,
    write_rows,
)
from tiny_tokenizers import CHATML

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy, with_template
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.due import evaluates_after, saves_after
from grpo_jax.run.given_policy import config_with_policy
from grpo_jax.run.result import ending_lines
from grpo_jax.run.saved import export_run, load_run

PROMPTS, COMPLETIONS = [[54, 48, 54, 66], [57, 48]], [[40, 41, 42], [60, 61, 62, 63, 4]]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)  # test_trainer.py has them drawn
        yield


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs two steps with adapters that differ from the default: rank-stabilised, on some layers."""
    lora = {"rank": 4, "alpha": 6.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}
    return run(config_of(tmp_path_factory.mktemp("lora"), lora=lora, train={"save_every": 1}))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs two steps that train every weight, without a KL term."""
    sections = {"lora": {"rank": 0}, "optim": {"learning_rate": 1e-3}, "objective": {"beta": 0.0}}
    return run(config_of(tmp_path_factory.mktemp("full"), **sections))


def logprobs(policy: Policy) -> np.ndarray:
    return np.concatenate(policy.logprobs(PROMPTS, COMPLETIONS))


def test_a_loaded_run_has_the_policy_that_it_ended_with(lora_run: Finished, full_run: Finished):
    for finished in (lora_run, full_run):
        config, policy = load_run(finished.result.run_dir)
        trained = finished.result.policy
        assert config == gx.Config.from_yaml(finished.result.run_dir / "config.yaml")
        assert (policy.name, policy.dtype, policy.lora, policy.stop_ids) == (
            trained.name,
            trained.dtype,
            trained.lora,
            trained.stop_ids,
        )
        assert_same_arrays(policy.variables, trained.variables)
        np.testing.assert_array_equal(logprobs(policy), logprobs(trained))


def test_an_exported_adapter_loads_again_as_the_trained_policy(
    lora_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["export", "--run", str(lora_run.result.run_dir), "--out", str(tmp_path / "adapter"), "--format", "adapter"]
    assert cli.main(words) == 0
    name, base = f"{tiny_model().name}-grpo", str(tiny_model())
    assert capsys.readouterr().out.splitlines() == [
        f"wrote adapter to {tmp_path / 'adapter'}",
        f"    vllm serve {base} --enable-lora --lora-modules {name}={tmp_path / 'adapter'}",
        f"    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{tmp_path / 'adapter'}')",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, True)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == lora_run.result.policy.name
    again = Policy.from_pretrained(tiny_model(), adapter=tmp_path / "adapter")
    assert_same_arrays(again.adapters, lora_run.result.policy.adapters)
    np.testing.assert_array_equal(logprobs(again), logprobs(lora_run.result.policy))
    # The run itself wrote the same adapter at its end.
    written = [
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", lora_run.result.run_dir / "adapter")
    ]
    assert_same_arrays(*written)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_exported_model_loads_again_as_the_trained_policy(kind: str, lora_run: Finished, full_run: Finished, tmp_path: Path):
    finished = {"lora": lora_run, "full": full_run}[kind]
    words = ["export", "--run", str(finished.result.run_dir), "--out", str(tmp_path / "merged"), "--format", "merged"]
    assert cli.main(words) == 0
    merged = Policy.from_pretrained(tmp_path / "merged")
    assert merged.adapters is None
    np.testing.assert_allclose(logprobs(merged), logprobs(finished.result.policy), atol=2e-5)
    base = Policy.from_pretrained(tiny_model())
    assert np.abs(logprobs(merged) - logprobs(base)).max() > 1e-3
    texts = [
        policy.generate(["1+1="], max_completion_length=8, temperature=0.0)[0][0].text
        for policy in (merged, finished.result.policy)
    ]
    assert texts[0] == texts[1]
    original = {path.name for path in tiny_model().iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == original | {"digests.json", "README.md"}


def test_merging_adds_the_scaled_product_of_the_adapters(lora_run: Finished, tmp_path: Path):
    export_run(lora_run.result.run_dir, tmp_path / "merged", "merged")
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny_model()))
    adapter = load_file(lora_run.result.run_dir / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    touched = 0
    for name, weight in base.items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{leaf}.weight") for leaf in "AB")
        if a is not None and b is not None:
            touched += 1
            weight = weight + 6.0 / np.sqrt(4) * (b @ a)
        np.testing.assert_allclose(merged[name], weight, atol=1e-6, err_msg=name)
    assert touched == 6


def test_a_run_that_trained_every_weight_has_no_adapter_to_export(
    full_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["export", "--run", str(full_run.result.run_dir), "--out", str(tmp_path / "out"), "--format", "adapter"]
    assert cli.main(words) == 2
    assert "trained every weight, so there is no adapter: use --format merged" in capsys.readouterr().err
    with pytest.raises(ModelError, match="use save_merged"):
        full_run.result.policy.save_adapter(tmp_path / "out")


TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.mark.slow
def test_a_chat_template_of_the_users_renders_prompts_and_comes_out_of_every_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    data = {"chat_template_file": str(tmp_path / "mine.jinja"), "eval_size": 0}
    lora = {"rank": 4, "alpha": 6.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}  # those of `lora_run`
    finished = run(config_of(tmp_path / "run", data=data, lora=lora, train={"steps": 1}))
    (tmp_path / "mine.jinja").unlink()  # the run has it
    assert finished.result.policy.need_tokenizer().chat_template == TEMPLATE
    _, policy = load_run(tmp_path / "run")
    tokenizer = policy.need_tokenizer()
    ids = tokenizer.encode_prompt("1+1=", chat=True)
    assert ids == tokenizer.encode_text("<1+1=>!")
    uploads = fake_hub(monkeypatch)
    words = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "gguf"), "--format", "gguf"]
    assert cli.main([*words, "--gguf_type", "q8_0", "--push_to_hub", "me/mine", "--private"]) == 0
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model-q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'TEMPLATE """{{ range' in modelfile
    assert "PARAMETER temperature 1\n" in modelfile
    printed = capsys.readouterr().out
    template = tmp_path / "run" / "adapter" / "chat_template.jinja"
    assert any(f"--chat-template {template} --lora-modules" in line for line in ending_lines(policy, tmp_path / "run"))
    with Checkpointer(tmp_path / "run" / "checkpoints", keep=None) as checkpoints:  # a resumed run is compared with it
        assert checkpoints.host()["inputs"]["chat template"] == f"sha256:{hashlib.sha256(TEMPLATE.encode()).hexdigest()}"
    assert f"    ollama create {tiny_model().name}-grpo -f {tmp_path / 'gguf' / 'Modelfile'}\n" in printed
    assert "uploaded to https://hub/commit\n" in printed
    (upload,) = uploads
    assert (upload["repo_id"], upload["private"]) == ("me/mine", True)
    assert upload["files"].keys() >= {"model-q8_0.gguf", "Modelfile", "README.md", "digests.json"}
    assert "# mine\n" in upload["files"]["README.md"]


def test_a_chat_template_that_is_set_is_in_adapter_and_merged_folders(lora_run: Finished, tmp_path: Path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    trained = lora_run.result.policy
    config = gx.Config(data=gx.DataConfig(chat_template_file=str(tmp_path / "mine.jinja")))
    for name, policy in (("file", with_template(trained, config)), ("set", replace(trained, tokenizer=copied(trained)))):
        tokenizer = policy.need_tokenizer()
        if name == "set":
            tokenizer.chat_template = TEMPLATE
        assert tokenizer.encode_prompt("1+1=", chat=True) == tokenizer.encode_text("<1+1=>!")
        for folder in (policy.save_adapter(tmp_path / name / "adapter"), policy.save_merged(tmp_path / name / "merged")):
            read = gx.Tokenizer.from_folder(folder)
            assert read is not None
            assert read.chat_template == TEMPLATE
    assert trained.need_tokenizer().chat_template == CHATML  # that of the run stayed
    with pytest.raises(gx.ConfigError, match=r"data\.chat_template_file is .*: there is no such file; give a Jinja template"):
        with_template(trained, gx.Config(data=gx.DataConfig(chat_template_file=str(tmp_path / "none"))))


def copied(policy: Policy) -> gx.Tokenizer:
    tokenizer = policy.need_tokenizer()
    return tokenizer.with_chat_template(tokenizer.chat_template)


def test_options_of_an_export_that_do_not_belong_to_it_are_refused(
    lora_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["export", "--run", str(lora_run.result.run_dir), "--out", str(tmp_path / "out"), "--format", "merged"]
    assert cli.main([*words, "--gguf_type", "f16"]) == 2
    assert "--gguf_type is 'f16': it is for --format gguf alone" in capsys.readouterr().err
    assert cli.main([*words, "--private"]) == 2
    assert "--private is for a new repository: give --push_to_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_result_is_uploaded_with_a_card_of_its_run(lora_run: Finished, monkeypatch: pytest.MonkeyPatch):
    uploads = fake_hub(monkeypatch)
    assert lora_run.result.push_to_hub("me/mine", private=False) == "https://hub/commit"
    lora_run.result.policy.push_to_hub("me/mine", "merged")
    card, bare = (upload["files"]["README.md"] for upload in uploads)
    assert "| steps | 2 |" in card
    assert "## Settings" in card
    assert "## Settings" not in bare
    assert "model.safetensors" in uploads[1]["files"]
    assert (lora_run.result.run_dir / "adapter" / "README.md").is_file()


def test_a_run_without_a_checkpoint_cannot_be_read(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\n")
    with pytest.raises(CheckpointError, match="no folder with checkpoints"):
        load_run(tmp_path)


@pytest.fixture(scope="module")
def exported(lora_run: Finished) -> Path:
    return lora_run.result.run_dir / "adapter"


def by_settings(folder: Path, adapter: Path) -> Finished:
    return run(config_of(folder, lora={"rank": 16, "alpha": 32.0, "adapter": str(adapter)}))


def by_policy(folder: Path, adapter: Path) -> Finished:
    policy = Policy.from_pretrained(tiny_model(), adapter=adapter)
    return run(config_of(folder, lora=dict(gx.LoraConfig().__dict__)), policy=policy)


def by_the_result(folder: Path, adapter: Path) -> Finished:
    """Trains a policy like `result.policy` of an earlier run, whose settings do not name an adapter folder."""
    result = Policy.from_pretrained(tiny_model(), adapter=adapter)
    bare = gx.LoraConfig(rank=4, alpha=6.0, rslora=True, targets=["q_proj", "v_proj", "down_proj"])
    return run(config_of(folder, lora=dict(gx.LoraConfig().__dict__)), policy=replace(result, lora=bare))


@pytest.mark.parametrize("start", [by_settings, by_policy, by_the_result])
def test_training_from_an_adapter_has_that_adapter_as_the_reference(
    start: Callable[[Path, Path], Finished], exported: Path, tmp_path: Path
):
    finished = start(tmp_path, exported)
    first, second = finished.result.history
    assert first["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert second["kl_divergence"] > 1e-6
    # If the base were the reference, the divergence of the first step would be this large.
    started, base = Policy.from_pretrained(tiny_model(), adapter=exported), Policy.from_pretrained(tiny_model())
    assert np.abs(logprobs(started) - logprobs(base)).mean() > 1e-3
    # Rank, alpha and targets are those of the adapter folder, whatever the settings say, and training changed the adapter.
    lora = finished.result.policy.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.rslora, set(lora.targets)) == (4, 6.0, True, {"q_proj", "v_proj", "down_proj"})
    old, new = arrays(started.adapters), arrays(finished.result.policy.adapters)
    assert any(not np.array_equal(new[name], old[name]) for name in old)


def test_a_run_is_evaluated_with_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(tmp_path / "rows.jsonl", additions())
    (tmp_path / "mine.py").write_text("def short(completions):\n    return [len(text) <= 4 for text in completions]\n")
    sections: dict[str, Any] = {
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_size": 6},
        "rewards": {"functions": [f"{tmp_path}/mine.py:short"]},
    }
    values = settings(tmp_path / "run", **sections)
    assert cli.main(["train", *words_of(values)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(tmp_path / "run"), "--pass_k", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"greedy accuracy {summary['accuracy_after']:.1%} (" in printed
    assert "pass@4 " in printed
    assert "6 held-out problems" in printed
    assert cli.main(["eval", "--config", str(tmp_path / "run" / "config.yaml"), "--pass_k", "4"]) == 0
    assert f"greedy accuracy {summary['accuracy_before']:.1%} (" in capsys.readouterr().out


def test_the_model_folder_may_be_gone_if_its_name_still_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = {"model": build_model(tmp_path / "cache")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **named: str(folder["model"]))
    finished = run(config_of(tmp_path / "run", model={"path": "someone/a-model", "remat": "none"}, train={"steps": 1}))
    folder["model"] = (tmp_path / "cache").rename(tmp_path / "elsewhere")
    _, policy = load_run(tmp_path / "run")
    assert policy.name == "someone/a-model"
    assert_same_arrays(policy.variables, finished.result.policy.variables)


def test_evaluations_and_checkpoints_are_due_at_fixed_steps():
    train = gx.TrainConfig(steps=7, eval_every=3, save_every=2)
    assert [step for step in range(8) if evaluates_after(train, step)] == [0, 3, 6, 7]
    assert [step for step in range(1, 8) if saves_after(train, step)] == [2, 4, 6, 7]
    train = gx.TrainConfig(steps=7, eval_every=0, save_every=0)
    assert [step for step in range(8) if evaluates_after(train, step)] == [0, 7]
    assert [step for step in range(1, 8) if saves_after(train, step)] == [7]


def test_settings_take_the_model_and_the_adapters_from_a_given_policy():
    lora = gx.LoraConfig(rank=2, alpha=3.0)
    policy = Policy.from_pretrained(tiny_model(), lora=lora, dtype="bfloat16")
    own = config_with_policy(gx.Config(), policy)
    assert (own.model.path, own.model.dtype, own.lora) == (str(tiny_model()), "bfloat16", lora)
    assert config_with_policy(own, policy) == own
    bare = Policy.from_pretrained(tiny_model())
    assert config_with_policy(gx.Config(lora=gx.LoraConfig(rank=0)), bare).lora.rank == 0
