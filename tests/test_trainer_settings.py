"""What settings do to a run: rewards and their failures, masking, several updates, KL in the reward, presets, micro-batches."""

from __future__ import annotations

import io
import itertools
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from padded_batches import PaddedBatch
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import (
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
    saved_weights,
    settings,
    tiny_model,
)

import grpo_jax as gx
from grpo_jax.config.presets import PRESETS
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.learner.batches import train_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.packing import Lengths, row_sizes
from grpo_jax.learner.step import train_step
from grpo_jax.policy import Policy
from grpo_jax.rewards import RewardError, ScoredBatch
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.skipped import NotFiniteError
from grpo_jax.types import Frozen, PromptBatch, Rollout

ROWS = additions()


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)  # test_trainer.py has them drawn
        yield


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two steps with LoRA, that others are compared with."""
    return run(config_of(tmp_path_factory.mktemp("lora")))


def test_sync_and_async_rewards_with_weights_and_none_add_up(tmp_path: Path):
    async def shortness(completion_ids: list[list[int]]) -> list[float | None]:
        return [None if len(ids) == C else 1 - len(ids) / C for ids in completion_ids]

    def parity(answer: list[str], **columns: Any) -> list[bool]:
        return [int(text) % 2 == 0 for text in answer]

    config = config_of(tmp_path, rewards={"weights": [1.0, 0.5, 2.0]})
    done = run(config, reward_funcs=[letters, shortness, parity])
    answers = {row["prompt"]: int(row["answer"]) for row in ROWS}
    seen: set[bool] = set()
    for step, rows in done.completions.items():
        rewards = []
        for row in rows:
            text, short, even = (row["rewards"][name] for name in ("letters", "shortness", "parity"))
            assert even == (answers[row["prompt"]] % 2 == 0)
            seen.add(short is None)
            rewards.append(text + 0.5 * (short or 0.0) + 2 * even)
        np.testing.assert_allclose([row["advantage"] for row in rows], expected_advantages(np.array(rewards)), atol=1e-4)
        metrics = done.result.history[step - 1]
        assert metrics["reward/mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
        given = [row["rewards"]["shortness"] for row in rows if row["rewards"]["shortness"] is not None]
        assert metrics["rewards/shortness/mean"] == pytest.approx(np.mean(given), abs=1e-6)
        assert metrics["rewards/failed"] == 0
    assert seen == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_offload_keeps_what_is_trained_in_the_hosts_memory_between_updates_and_changes_no_result(
    adapter: bool, lora_run: Finished, tmp_path: Path
):
    """With the adapter of another run to start from, which is the reference too, and with a new one."""
    found: list[set[str | None]] = []

    class Watch(gx.Callback):
        def on_step_end(self, trainer: gx.Trainer, *_: Any) -> None:
            found.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(trainer.state)})

    lora = {"lora": {"adapter": str(lora_run.result.run_dir / "adapter")}} if adapter else {}
    expected = run(config_of(tmp_path / "device", **lora)) if adapter else lora_run
    config = config_of(tmp_path / "host", **lora)
    offloaded = run(replace(config, optim=replace(config.optim, offload=True)), callbacks=[Watch()])
    assert found == [{"pinned_host"}, {"pinned_host"}]
    assert_same_arrays(offloaded.result.policy.adapters, expected.result.policy.adapters)
    assert offloaded.completions == expected.completions


@pytest.mark.slow
def test_a_supervised_warm_up_offloads_too_and_changes_no_result(tmp_path: Path):
    """Its adapters are trained, held-out rows decoded in between, and it stops and is resumed in the host's memory."""
    found: list[set[str | None]] = []

    class Watch(gx.Callback):
        def on_step_end(self, trainer: gx.Trainer, *_: Any) -> None:
            found.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(trainer.state)})

    def warmed_up(name: str, steps: int = 2, *, resume: bool = False, **optim: Any) -> gx.TrainResult:
        data, train = {"completion_column": "answer", "eval_size": 3}, {"steps": steps, "save_every": 1, "eval_every": 1}
        config = config_of(tmp_path / name, data=data, train=train, optim=optim)
        with redirect_stdout(io.StringIO()):
            return gx.sft(config, dataset=ROWS, callbacks=[Watch()], resume=resume)

    expected = warmed_up("device")
    assert "pinned_host" not in set().union(*found)
    found.clear()
    warmed_up("host", 1, offload=True)
    offloaded = warmed_up("host", offload=True, resume=True)
    assert found == [{"pinned_host"}, {"pinned_host"}]
    assert_same_arrays(offloaded.policy.adapters, expected.policy.adapters)
    assert offloaded.history[1]["loss"] == expected.history[1]["loss"]


def test_a_row_that_a_reward_fails_on_is_left_out_counted_and_named(lora_run: Finished, tmp_path: Path):
    texts = [row["completion"] for row in lora_run.completions[1]]
    row = next(i for i, text in enumerate(texts) if texts.count(text) == 1)
    poison = texts[row]

    def judge(completions: list[str]) -> list[float]:
        if poison in completions:
            raise KeyError("no verdict")
        return letters(completions)

    done = run(config_of(tmp_path, train={"steps": 1}, rewards={"row_by_row": ["judge"]}), reward_funcs=judge)
    rows = done.completions[1]
    assert [other["completion"] for other in rows] == texts
    assert done.result.history[0]["rewards/failed"] == 1
    warnings = [line for line in done.printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: judge raised KeyError: 'no verdict'")
    assert warnings[0].endswith(f"row {row}")
    assert rows[row]["rewards"]["judge"] is None
    assert rows[row]["advantage"] == 0
    group = [i for i in range(row // G * G, row // G * G + G) if i != row]
    rest = np.array(letters([texts[i] for i in group]))
    std = rest.std(ddof=1)
    expected = (rest - rest.mean()) / (std + 1e-4) if std > 0 else np.zeros(G - 1)
    np.testing.assert_allclose([rows[i]["advantage"] for i in group], expected, atol=1e-5)
    others = letters([text for i, text in enumerate(texts) if i != row])
    assert done.result.history[0]["reward/mean"] == pytest.approx(np.mean(others), abs=1e-6)


def test_too_many_failures_stop_the_run(tmp_path: Path):
    def judge(completions: list[str]) -> list[float]:
        raise TimeoutError("the judge sleeps")

    with pytest.raises(
        RewardError, match=r"(?s)8 of 8 rows could not be scored.*judge raised TimeoutError: the judge sleeps.*8 rows"
    ):
        gx.train(config_of(tmp_path), dataset=ROWS, reward_funcs=judge)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_masked_truncated_completion_is_in_no_loss():
    def batch_for(masked: bool) -> Any:
        ids = [[7, 8, 4], [9, 9, 9]]
        rollout = Rollout(ids, [np.zeros(3, np.float32)] * 2, ["stop", "length"])
        prompts = PromptBatch(0, np.array([0]), ["x"], [[5, 6]], {})
        scored = ScoredBatch(np.ones(2, np.float32), np.ones(2, bool), {}, [])
        config = replace(gx.Config(), objective=gx.ObjectiveConfig(mask_truncated=masked))
        return train_batch(prompts, rollout, scored, config, row_sizes(Lengths(2, 2, 512), 1, 2, 100))

    np.testing.assert_array_equal(np.asarray(batch_for(False).completion_mask).sum(axis=1), [3, 3])
    np.testing.assert_array_equal(np.asarray(batch_for(True).completion_mask).sum(axis=1), [3, 0])
    assert np.asarray(batch_for(True).valid).all()


def test_where_all_are_truncated_and_masked_nothing_is_learnt(tmp_path: Path):
    sections = {"objective": {"mask_truncated": True}, "rollout": {"min_completion_length": C}}
    done = run(config_of(tmp_path, **sections))
    assert {row["finish_reason"] for step in done.completions.values() for row in step} == {"length"}
    assert [record["grad_norm"] for record in done.result.history] == [0, 0]
    start = Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=4, alpha=8.0))
    assert_same_arrays(done.result.policy.adapters, start.adapters)


def test_epochs_say_how_many_steps_there_are_and_are_resumed(
    lora_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values = settings(tmp_path, train={"epochs": 0.15})  # 0.15 · 24 rows / 2 prompts is 1.8 steps: two
    del values["train"]["steps"]
    done = run(gx.Config.from_dict(values))
    assert_same_arrays(saved_weights(tmp_path), saved_weights(lora_run.result.run_dir))
    assert "train.epochs: 0.15 passes over 24 rows are 2 steps" in done.printed
    stored = gx.Config.from_yaml(tmp_path / "config.yaml").train
    assert (stored.steps, stored.epochs) == (2, 0.15)
    again = run(gx.Config.from_dict(values), resume=True)  # nothing is left to do
    assert [record["step"] for record in again.result.history] == [1, 2]
    values["train"]["steps"] = 3
    with pytest.raises(
        gx.ConfigError, match=r"train\.steps is 3: train\.epochs 0\.15 of 24 rows are 2 steps: leave out one of the two"
    ):
        run(gx.Config.from_dict({**values, "train": {**values["train"], "run_dir": str(tmp_path / "other")}}))


def test_several_updates_a_batch_follow_the_schedule_and_end_elsewhere(lora_run: Finished, tmp_path: Path):
    config = config_of(tmp_path, objective={"num_iterations": 2}, optim={"learning_rate": 1e-2, "schedule": "linear"})
    done = run(config)
    # Four updates at 1, 3/4, 1/2 and 1/4 of the peak; a step reports its last.
    rates = [record["learning_rate"] for record in done.result.history]
    np.testing.assert_allclose(rates, [0.75e-2, 0.25e-2], rtol=1e-6)
    assert [row["completion"] for row in done.completions[1]] == [row["completion"] for row in lora_run.completions[1]]
    # The second update sees a policy that has moved off the old log-probabilities.
    first = done.result.history[0]
    assert first["kl_divergence"] > 1e-7
    assert lora_run.result.history[0]["kl_divergence"] < 1e-9


def test_kl_in_the_reward_is_taken_off_before_advantages_are_formed(lora_run: Finished, tmp_path: Path):
    done = run(config_of(tmp_path, objective={"kl_in_reward": True, "beta": 0.5}))
    first, second = (done.completions[step] for step in (1, 2))
    plain = expected_advantages(np.array([row["rewards"]["letters"] for row in first]))
    np.testing.assert_allclose([row["advantage"] for row in first], plain, atol=1e-4)  # the policy is still the reference
    plain = expected_advantages(np.array([row["rewards"]["letters"] for row in second]))
    assert np.abs(np.array([row["advantage"] for row in second]) - plain).max() > 1e-3
    assert done.result.history[1]["reward/mean"] == pytest.approx(np.mean([row["rewards"]["letters"] for row in second]), abs=1e-6)


def test_a_truncated_completion_pays_for_its_kl_where_it_is_masked_out_of_the_loss(monkeypatch: pytest.MonkeyPatch):
    objective = gx.ObjectiveConfig(kl_in_reward=True, beta=0.04, mask_truncated=True)
    policy = Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=2))
    train = gx.TrainConfig(prompts_per_step=1)
    config = replace(gx.Config(), objective=objective, rollout=gx.RolloutConfig(num_generations=2), train=train)
    learner, _ = grpo_learner(config, policy, 100)
    # Sums of k1 = logp - ref_logp: 5 nats for the finished completion, 9 for the truncated one.
    scores = iter([jnp.array([[-5.0, 0, 0], [-9.0, 0, 0]]), jnp.zeros((2, 3))])  # the reference, then the policy
    monkeypatch.setattr(Learner, "fixed_logprobs", lambda *_: (next(scores),) * 3)
    padded = PaddedBatch(
        prompt_ids=np.array([[5, 6]], np.int32),
        prompt_lengths=np.array([2], np.int32),
        completion_ids=np.array([[7, 8, 4], [9, 9, 9]], np.int32),
        completion_mask=np.array([[True, True, True], [False, False, False]]),
        sampler_logprobs=np.zeros((2, 3), np.float32),
        rewards=np.ones((1, 2), np.float32),
        valid=np.ones((1, 2), bool),
        completion_lengths=np.array([3, 3], np.int32),
    )
    _, packed = train_step(learner, learner.init(policy.trainable()), padded.packed((1, 2)), Frozen(policy.params, {}))
    # Rewards 1 - 0.04 * 5 = 0.80 and 1 - 0.04 * 9 = 0.64: mean 0.72, deviation 0.1131.
    np.testing.assert_allclose(packed.to_host()[1], [0.08 / 0.11323708, -0.08 / 0.11323708], rtol=1e-4)


USUAL = ("dapo", "gspo", "cispo")


@pytest.mark.parametrize("preset", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS])
def test_every_preset_trains(preset: str, tmp_path: Path):
    done = run(config_of(tmp_path, objective={"preset": preset}, train={"steps": 1}))
    (metrics,) = done.result.history
    uncomputed = {"kl_divergence"} if PRESETS[preset].get("beta") == 0 else set()
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == uncomputed
    assert metrics["grad_norm"] > 0
    assert f"(preset {preset})" in done.printed
    trained = done.result.policy.adapters
    assert trained is not None
    assert max(np.abs(leaf["b"]).max() for leaf in trained["layers"].values()) > 0


def test_micro_batches_train_the_same_policy(lora_run: Finished, tmp_path: Path):
    done = run(config_of(tmp_path, train={"micro_batch_prompts": 1, "micro_batch_completions": 2}))
    assert [row["completion"] for row in done.completions[1]] == [row["completion"] for row in lora_run.completions[1]]
    for name in ("loss", "policy_loss", "kl_divergence", "entropy", "grad_norm", "clip_ratio/region"):
        one, other = done.result.history[0][name], lora_run.result.history[0][name]
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6), name
    # Adam divides a gradient by its own size, so rounding in a gradient that is nearly nothing shows in full.
    old, new = arrays(lora_run.result.policy.adapters), arrays(done.result.policy.adapters)
    for name in old:
        np.testing.assert_allclose(new[name], old[name], atol=2e-4, err_msg=name)


def test_without_a_kl_term_no_divergence_is_shown_and_evaluations_compute_it_where_asked(tmp_path: Path):
    held_out = ROWS[:5]
    sections = {"objective": {"beta": 0.0}, "train": {"steps": 2, "eval_kl": True, "micro_batch_prompts": 1}}
    done = run(config_of(tmp_path, **sections), eval_dataset=held_out)
    assert all(np.isnan(record["kl_divergence"]) for record in done.result.history)
    assert [record["kl_divergence"] for record in records(tmp_path / "metrics.jsonl")] == [None, None]
    assert "KL not computed" in done.printed
    assert "kl_divergence_last" not in done.result.summary
    before, after = records(tmp_path / "evaluations.jsonl")
    assert before["kl_divergence"] == pytest.approx(0, abs=1e-9)
    trained, base = done.result.policy, gx.Policy.from_pretrained(tiny_model())
    prompts = [row["prompt"] for row in held_out]
    ids = [own[0].ids for own in trained.generate(prompts, max_completion_length=C, seed=0)]
    prompt_ids = [trained.need_tokenizer().encode_prompt(prompt, chat=False) for prompt in prompts]
    d = np.concatenate(base.logprobs(prompt_ids, ids)) - np.concatenate(trained.logprobs(prompt_ids, ids))
    assert after["kl_divergence"] == pytest.approx(float(np.mean(np.exp(d) - d - 1)), rel=1e-3)
    assert after["kl_divergence"] > 1e-6
    assert f"KL to the reference {after['kl_divergence']:.4f} nats a token" in done.printed


def test_a_run_whose_weights_have_gone_astray_stops_and_keeps_the_checkpoints_before(tmp_path: Path):
    """After one step at a learning rate of 1e30 no loss is finite any more."""
    sections = {"optim": {"learning_rate": 1e30, "max_skipped_steps": 3}, "train": {"steps": 12, "save_every": 1}}
    config = config_of(tmp_path, **sections)
    with pytest.raises(NotFiniteError, match=r"in 3 steps in a row .* after step 1, the last one .* is saved as step 4"):
        run(config)
    history = records(tmp_path / "metrics.jsonl")
    assert [record["update/skipped"] for record in history] == [0, 1, 1, 1]
    assert all(record["grad_norm"] is None or record["loss"] is None for record in history[1:])
    states = {step: saved_weights(tmp_path, step) for step in (1, 4)}  # none of 2 and 3, which would have replaced 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "4"}
    assert_same_arrays(states[1], states[4])
    assert all(np.isfinite(array).all() for array in arrays(states[4]).values())
    with pytest.raises(NotFiniteError, match="the last one with an update, is saved as step 7"):
        run(config, resume=True)
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_a_skipped_step_is_counted_and_shown_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The sampler's log-probabilities of the second step are NaN, and so is a loss with importance weights."""
    calls = itertools.count(1)

    def poisoned(*arguments: Any, **named: Any) -> Any:
        batch = train_batch(*arguments, **named)
        if next(calls) != 2:
            return batch
        return replace(batch, sampler_logprobs=np.full_like(batch.sampler_logprobs, np.nan))

    monkeypatch.setattr("grpo_jax.steps.grpo.train_batch", poisoned)
    done = run(config_of(tmp_path, objective={"importance_cap": 2.0}, train={"steps": 3, "save_every": 2}))
    assert [record["update/skipped"] for record in done.result.history] == [0, 1, 0]
    assert done.result.summary["skipped_steps"] == 1
    assert "warning: step 2: loss nan, gradient norm nan; " in done.printed
    assert "Skipped in a row: 1; the run stops at 5" in done.printed
    # The checkpoint that was due after step 2 was saved after step 3.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_model_without_a_stop_token_is_mentioned(tmp_path: Path):
    folder = build_model(tmp_path / "model", None, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name != "eos_token"})
    )
    said: dict[bool, str] = {}
    for stops in (False, True):
        config = config_of(
            tmp_path / str(stops), model={"path": str(folder)}, rollout={"num_generations": 2, "stop": ["."] if stops else []}
        )
        with redirect_stdout(io.StringIO()) as out:
            gx.Trainer(config, dataset=additions(), reward_funcs=letters).close()
        said[stops] = out.getvalue()
    assert "names an end-of-sequence token" in said[False]
    assert "rollout.max_completion_length" in said[False]
    assert "end-of-sequence" not in said[True]


def test_completions_without_tokens_that_stop_at_once_or_are_all_cut_give_finite_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows as a sampler might give them; a reward that differs within groups, so that each step learns from what is there."""
    sample, steps = Sampler.sample, itertools.count()
    N = 2 * G

    def scripted(*arguments: Any, **named: Any) -> Rollout:
        drawn, kind = sample(*arguments, **named), next(steps)
        ids = ([[4]] * N, [[10 + row] * C for row in range(N)], [[]] * N, [[4], []] * (N // 2))[kind]
        logprobs = [np.full(len(row), -1.0, np.float32) for row in ids]
        reasons: Any = ["length"] * N if kind == 1 else ["stop"] * N
        return replace(drawn, completion_ids=ids, logprobs=logprobs, finish_reasons=reasons)

    monkeypatch.setattr(Sampler, "sample", scripted)
    config = config_of(tmp_path, train={"steps": 4, "prompts_per_step": 2, "save_every": 0, "run_dir": str(tmp_path)})
    done = run(config, reward_funcs=lambda completions: [float(row % G) for row in range(len(completions))])
    for record in done.result.history:
        assert math.isfinite(record["loss"])
        assert math.isfinite(record["grad_norm"])
        assert record["update/skipped"] == 0
    assert [record["grad_norm"] > 0 for record in done.result.history] == [True, True, False, True]
    assert all(np.isfinite(array).all() for array in arrays(done.result.policy.adapters).values())
