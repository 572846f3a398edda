"""The loop, end to end on a tiny model: what it writes, what it gives back, what it tells."""

from __future__ import annotations

import io
import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import jax
import numpy as np
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import (
    B,
    C,
    Finished,
    G,
    additions,
    arrays,
    assert_same_arrays,
    build_model,
    config_of,
    expected_advantages,
    letters,
    records,
    run,
    settings,
    tiny_model,
    write_rows,
)

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.data.source import PromptSource
from grpo_jax.policy import Policy
from grpo_jax.run.folder import FILES
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.steps.setup import begin

ROWS = additions()
HELD_OUT = [{"prompt": f"{i}-{j}=", "answer": str(i - j)} for i in (7, 8, 9) for j in (1, 2)]
SECTIONS: dict[str, dict[str, Any]] = {"train": {"steps": 3}, "rewards": {"accuracy_threshold": 0.25}}

FACTS = {
    *(
        "reward/mean",
        "reward/std",
        "reward/frac_zero_std",
        "rewards/letters/mean",
        "rewards/letters/std",
        "policy_loss",
        "kl_divergence",
    ),
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")),
    *("entropy", "grad_norm", "learning_rate", "clip_ratio/low", "clip_ratio/high", "clip_ratio/region"),
    *("sampling/logp_difference/mean", "sampling/logp_difference/max"),
    *("step_seconds", "rollout_seconds", "reward_seconds", "update_seconds"),
    *("rollout_tokens_per_second", "update_tokens_per_second"),
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three steps, with LoRA and of every weight."""
    sections = SECTIONS | ({"lora": {"rank": 0}, "optim": {"learning_rate": 1e-3}} if request.param == "full" else {})
    return run(config_of(tmp_path_factory.mktemp(request.param), **sections), eval_dataset=HELD_OUT)


def test_every_metric_that_people_look_for_is_there_at_every_step(finished: Finished):
    history = finished.result.history
    assert [record["step"] for record in history] == [1, 2, 3]
    for record in history:
        assert record.keys() >= FACTS
        assert all(math.isfinite(value) for value in record.values())
    assert any("completions/mean_terminated_length" in record for record in history)
    assert history == records(finished.result.run_dir / "metrics.jsonl")


def test_the_run_folder_holds_what_it_says(finished: Finished):
    folder = finished.result.run_dir
    assert {*FILES, "settings.json"} <= {path.name for path in folder.iterdir()}
    assert (folder / "adapter").is_dir() == (finished.result.policy.adapters is not None)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == finished.result.summary
    keys = {"accuracy_before", "accuracy_after", "held_out_problems", "seconds", "steps", "versions", "devices"}
    assert keys <= summary.keys()
    assert (summary["steps"], summary["held_out_problems"]) == (3, len(HELD_OUT))
    assert summary["seconds"] > 0
    assert summary["devices"] == [device.device_kind for device in jax.devices()]
    assert {"python", "jax", "flax", "optax", "grpo_jax"} <= summary["versions"].keys()
    sources = {entry["name"]: entry["source"] for entry in json.loads((folder / "settings.json").read_text())}
    assert (sources["lora.alpha"], sources["objective.beta"]) == ("set in Python", "default")
    assert gx.Config.from_yaml(folder / "config.yaml").train.steps == 3


def test_accuracy_before_and_after_is_that_of_greedy_answers_to_the_held_out_prompts(finished: Finished):
    before = Policy.from_pretrained(tiny_model())
    prompts = [row["prompt"] for row in HELD_OUT]
    for policy, name in ((before, "accuracy_before"), (finished.result.policy, "accuracy_after")):
        groups = policy.generate(prompts, max_completion_length=C, temperature=0.0)
        right = [letters([group[0].text])[0] >= 0.25 for group in groups]
        assert finished.result.summary[name] == pytest.approx(np.mean(right))
    steps = [record["step"] for record in records(finished.result.run_dir / "evaluations.jsonl")]
    assert steps == [0, 3]


def test_the_completions_file_holds_every_completion_with_its_reward_and_advantage(finished: Finished):
    assert list(finished.completions) == [1, 2, 3]
    prompts = {row["prompt"] for row in ROWS}
    for step, rows in finished.completions.items():
        assert len(rows) == B * G
        for start in range(0, B * G, G):
            assert len({row["prompt"] for row in rows[start : start + G]}) == 1
        assert {row["prompt"] for row in rows} <= prompts
        rewards = np.array([row["rewards"]["letters"] for row in rows])
        np.testing.assert_array_equal(rewards, letters([row["completion"] for row in rows]))
        np.testing.assert_allclose([row["advantage"] for row in rows], expected_advantages(rewards), atol=1e-5)
        metrics = finished.result.history[step - 1]
        assert metrics["reward/mean"] == pytest.approx(rewards.mean(), abs=1e-6)
        assert metrics["reward/std"] == pytest.approx(rewards.std(ddof=1), abs=1e-6)
        cut = np.mean([row["finish_reason"] == "length" for row in rows])
        assert metrics["completions/clipped_ratio"] == pytest.approx(cut)


def test_training_changes_the_policy_that_it_returns(finished: Finished):
    policy, start = finished.result.policy, Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=4, alpha=8.0))
    if policy.adapters is None:
        old, new = arrays(start.params), arrays(policy.params)
    else:
        assert_same_arrays(policy.params, start.params)
        old, new = arrays(start.adapters), arrays(policy.adapters)
    assert old.keys() == new.keys()
    assert all(np.abs(new[name] - old[name]).max() > 1e-5 for name in old)
    history = finished.result.history
    assert history[0]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert history[2]["kl_divergence"] > 1e-6
    # Sampler and trainer compute the same model.
    assert max(record["sampling/logp_difference/max"] for record in history) < 1e-4


def test_a_quiet_run_prints_no_control_codes_on_a_terminal(finished: Finished):
    assert not {"\x1b", "\r", "\x08"} & set(finished.printed)
    lines = finished.printed.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    said = "\n".join(lines)
    for part in ("setting train.steps", "compiling rollout", "compiled update: ", "held-out accuracy before training", "written: "):
        assert part in said
    assert "prompts: 24 to train on, 6 held out\n" in said


@pytest.mark.parametrize("lora", [gx.LoraConfig(rank=4, alpha=8.0), None], ids=["lora", "full"])
def test_a_policy_that_is_handed_over_stays_as_it_is(lora: gx.LoraConfig | None, tmp_path: Path):
    policy = Policy.from_pretrained(tiny_model(), lora=lora)
    before = arrays((policy.params, policy.adapters))
    spoken = policy.generate(["1+1="], num_generations=2, max_completion_length=C, seed=3)
    own = config_of(tmp_path, lora=dict(gx.LoraConfig().__dict__))
    result = gx.train(own, policy=policy, dataset=datasets.Dataset.from_list(ROWS), reward_funcs=[letters])
    after = arrays((policy.params, policy.adapters))
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    again = policy.generate(["1+1="], num_generations=2, max_completion_length=C, seed=3)
    assert [row.ids for row in again[0]] == [row.ids for row in spoken[0]]
    trained, kept = (p.params if lora is None else p.adapters for p in (result.policy, policy))
    assert any(not np.array_equal(new, old) for new, old in zip(arrays(trained).values(), arrays(kept).values(), strict=True))
    assert result.policy.generate(["1+1="], max_completion_length=C)[0][0].ids
    # What the run says of itself is what the policy was.
    stored = gx.Config.from_yaml(tmp_path / "config.yaml")
    assert stored.lora.rank == (4 if lora else 0)
    assert (stored.model.path, stored.model.dtype) == (str(tiny_model()), "float32")


def test_one_fetch_of_the_rollout_and_one_of_the_metrics_bring_a_step_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # On CPU the transfer guard does not see device-to-host copies, and NumPy reads an array's memory without asking it: so fetches
    # are counted where they are made, and every other way for a value to leave raises.
    fetched: list[int] = []
    inside = [False]
    real_get, real_step, array = jax.device_get, GrpoStep.run, type(jax.numpy.zeros(1))

    def device_get(tree: Any) -> Any:
        if inside[0]:
            fetched.append(len(jax.tree.leaves(tree)))
        inside[0], before = False, inside[0]
        try:
            return real_get(tree)
        finally:
            inside[0] = before

    def one_step(*arguments: Any) -> Any:
        inside[0] = True
        try:
            return real_step(*arguments)
        finally:
            inside[0] = False

    def watched(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def method(*arguments: Any, **named: Any) -> Any:
            assert not (inside[0] and isinstance(arguments[0], jax.Array)), f"a device array leaves by {name}"
            return real(*arguments, **named)

        return method

    for name in ("__float__", "__int__", "__bool__", "__index__", "__iter__", "item", "tolist"):
        monkeypatch.setattr(array, name, watched(array, name))
    for name in ("asarray", "array"):
        monkeypatch.setattr(np, name, watched(np, name))
    monkeypatch.setattr(jax, "device_get", device_get)
    monkeypatch.setattr(GrpoStep, "run", one_step)
    gx.train(config_of(tmp_path), dataset=ROWS, reward_funcs=letters)
    assert fetched == [6, 1] * 2  # arrays of the one segment's tokens, and the packed metrics


def test_the_command_trains_from_a_yaml_file_with_rewards_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, answer, bonus=0.0):\n"
        "    return [sum(c in 'aeiou' for c in text) / 8 + bonus + len(goal) for text, goal in zip(completions, answer)]\n"
    )
    write_rows(tmp_path / "rows.jsonl", ROWS)
    values = settings(
        tmp_path / "run",
        data={"path": str(tmp_path / "rows.jsonl")},
        rewards={"functions": [{"name": f"{tmp_path}/mine.py:vowels", "bonus": 0.25}, "exact_match"], "weights": [1.0, 0.0]},
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), "--train.steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "setting train.steps" in printed
    assert "(command line)" in printed
    assert "(recipe.yaml)" in printed
    for row in records(tmp_path / "run" / "completions.jsonl"):
        answer = next(known["answer"] for known in ROWS if known["prompt"] == row["prompt"])
        expected = sum(c in "aeiou" for c in row["completion"]) / 8 + 0.25 + len(answer)
        assert row["rewards"] == {"vowels": pytest.approx(expected), "exact_match": 0.0}


def test_conversations_are_rendered_by_the_chat_template_and_reach_the_rewards_as_messages(tmp_path: Path):
    seen: list[tuple[Any, Any]] = []

    def polite(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return letters(completions)

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    sections = {"rollout": {"num_generations": G, "max_prompt_length": 48, "max_completion_length": C}, "train": {"steps": 1}}
    done = run(config_of(tmp_path, data={"system_prompt": "Add."}, **sections), dataset=rows, reward_funcs=polite)
    for prompt, completion in seen:
        assert [message["role"] for message in prompt] == ["system", "user"]
        assert prompt[0]["content"] == "Add."
        assert [message["role"] for message in completion] == ["assistant"]
    # What was sampled from is the rendered conversation: its ids, drawn again from the same seed, give the same texts.
    source = PromptSource.build(config_of(tmp_path, data={"system_prompt": "Add."}, **sections), done.result.policy.tokenizer, rows)
    batch = source.batch(0)
    rendered = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = done.result.policy.need_tokenizer()
    for messages, ids in zip(cast(list[list[dict[str, str]]], batch.prompts), batch.prompt_ids, strict=True):
        assert tokenizer.hf.decode(ids) == rendered.format(messages[-1]["content"])
    assert [row["prompt"] for row in done.completions[1]][::G] == batch.prompts
    assert [message[0]["content"] for _, message in seen] == [row["completion"] for row in done.completions[1]]


@pytest.mark.parametrize(("overlong", "said"), [("drop", "3 dropped"), ("shorten", "3 shortened")])
def test_prompts_that_are_too_long_are_counted_and_reported(overlong: str, said: str, tmp_path: Path):
    rows = ROWS + [{"prompt": f"what is {i}+{i} then=", "answer": str(2 * i)} for i in range(3)]
    done = run(
        config_of(tmp_path, data={"overlong": overlong}, train={"steps": 1}), dataset=rows, eval_dataset=[*HELD_OUT, rows[-1]]
    )
    kept = len(ROWS) + (3 if overlong == "shorten" else 0)
    held_out = len(HELD_OUT) + (1 if overlong == "shorten" else 0)
    other = ", 1 held-out ones dropped" if overlong == "drop" else ""
    line = f"prompts: {kept} to train on, {held_out} held out; longer than 8 tokens: {said}{other}\n"
    assert line in done.printed
    assert done.result.summary["held_out_problems"] == held_out


def test_a_model_without_a_chat_template_trains_on_plain_prompts(tmp_path: Path):
    folder = build_model(tmp_path / "model", None)
    done = run(config_of(tmp_path / "run", model={"path": str(folder), "remat": "none"}, train={"steps": 1}))
    assert len(done.completions[1]) == B * G


def test_the_lazy_package_gives_the_loop():
    assert gx.train is sys.modules["grpo_jax.training"].train


def test_a_policy_without_adapters_is_trained_in_full_and_the_run_says_so(tmp_path: Path):
    plain, adapted = (gx.Policy.from_pretrained(tiny_model(), lora=lora) for lora in (None, gx.LoraConfig(rank=2)))
    config = replace(config_of(tmp_path), lora=gx.LoraConfig(), model=gx.ModelConfig(remat="none"))
    for policy, said in ((plain, True), (adapted, False)):
        with redirect_stdout(io.StringIO()) as out:
            trainer = gx.Trainer(config, policy=policy, dataset=ROWS, reward_funcs=letters)
        assert ("it has no adapters, so every weight is trained" in out.getvalue()) == said
        assert (set(trainer.state.trainable) == set(plain.params)) == said


def test_an_old_jax_on_a_gpu_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(tmp_path)
    for backend, version, warned in (("gpu", (0, 10, 2), True), ("gpu", (0, 11, 2), False), ("cpu", (0, 10, 2), False)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "__version_info__", version)
        with redirect_stdout(io.StringIO()) as out:
            begin(config, None, resume=False)
        assert ("copies all weights, keys and values at every sampled token" in out.getvalue()) == warned
