"""An update on episodes: tokens from outside are read and not trained. Against plain formulas on rows without a shared prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_oracles import LORA, golden_config, moved, plain_model, quick_compiling, tiny_policy

from grpo_jax.config import Config
from grpo_jax.learner.batches import on_devices, text_batch, train_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.packing import Lengths, pack, row_sizes
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.step import train_step
from grpo_jax.rewards.protocol import ScoredBatch
from grpo_jax.run.step_metrics import length_metrics
from grpo_jax.runtime.programs import Program
from grpo_jax.types import Frozen, Params, PromptBatch, Rollout

FAMILY, B, G, C, BETA, TEMPERATURE = "gemma2", 3, 4, 14, 0.1, 0.7
N = B * G
SIZES = row_sizes(Lengths(3, 6, C), B, G, 70)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def recording() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


def episodes() -> tuple[PromptBatch, Rollout, ScoredBatch]:
    """Twelve rows: turns and answers of 1 to 3 tokens; some begin with tokens from outside, row 7 has none of the model's."""
    rng = np.random.default_rng(3)
    vocab = golden_config(FAMILY)["vocab_size"]
    sampled = []
    for row in range(N):
        flags: list[bool] = [False] * int(rng.integers(0, 3))
        while len(flags) < int(rng.integers(4, C)):
            flags += [True] * int(rng.integers(1, 4)) + [False] * int(rng.integers(1, 4))
        own = np.array([*flags[: C - 1], True])
        sampled.append(own if row != 7 else np.zeros(0, bool))
    ids = [rng.integers(6, vocab, len(own)).tolist() for own in sampled]
    logps = [np.where(own, -3 + rng.normal(size=len(own)), 0).astype(np.float32) for own in sampled]
    prompt_ids = [rng.integers(6, vocab, size).tolist() for size in (3, 6, 5)]
    rewards = rng.normal(size=N).astype(np.float32)
    prompts = PromptBatch(step=0, indices=np.arange(B), prompts=["a"] * B, prompt_ids=prompt_ids, columns={})
    reasons: Any = ["length" if row % 5 == 4 else "stop" for row in range(N)]
    scored = ScoredBatch(rewards=rewards, valid=np.ones(N, bool), per_function={"r": rewards}, failures=[])
    return prompts, Rollout(ids, logps, reasons, sampled=sampled), scored


def table(rows: list[Any], fill: Any) -> np.ndarray:
    """Rows of various lengths as [N, C]."""
    made = np.full((N, C), fill)
    for number, own in enumerate(rows):
        made[number, : len(own)] = own
    return made


def config_of(**objective: Any) -> Config:
    settings = {"rollout": {"num_generations": G, "max_completion_length": C, "temperature": TEMPERATURE}, "objective": objective}
    return Config.from_dict(settings | {"train": {"prompts_per_step": B}})


def plain_logps(adapters: Params) -> Any:
    """[N, C], one row after the other with its prompt in front; any value where there is no token."""
    prompts, rollout, _ = episodes()
    rows = [prompts.prompt_ids[row // G] + rollout.completion_ids[row] for row in range(N)]
    ids = np.zeros((N, 6 + C), np.int32)
    for number, own in enumerate(rows):
        ids[number, : len(own)] = own
    logps = jax.nn.log_softmax(plain_model(FAMILY, LORA.scale)(ids, adapters) / TEMPERATURE, axis=-1)
    at = np.array([[len(prompts.prompt_ids[row // G]) + column for column in range(C)] for row in range(N)])
    targets = jnp.asarray(np.take_along_axis(ids, np.minimum(at, ids.shape[1] - 1), axis=1))
    before = jnp.take_along_axis(logps, jnp.asarray(at - 1)[:, :, None], axis=1)
    return jnp.take_along_axis(before, targets[:, :, None], axis=2)[:, :, 0]


def update(
    config: Config, old: np.ndarray, scored: ScoredBatch | None = None, sizes: tuple[RowSize, ...] = SIZES
) -> tuple[Params, dict[str, float], np.ndarray]:
    """Gradient, metrics and advantages of one update."""
    policy = tiny_policy(FAMILY, LORA)
    prompts, rollout, usual = episodes()
    scored = usual if scored is None else scored
    assert policy.adapters is not None
    learner = Learner.of(config, policy.model, full=False, updates=1, stop_ids=(), optimizer=recording())
    batch = train_batch(prompts, rollout, scored, config, sizes, skips=learner.skips)
    batch = on_devices(dataclasses.replace(batch, old_logprobs=old), None)
    frozen = Frozen(policy.params, moved(policy.adapters, 3, 0.02))
    state, packed = Program("update", functools.partial(train_step, learner))(learner.init(policy.adapters), batch, frozen)
    return state.opt_state, *packed.to_host()


def plain_gradient(loss: str, mask: np.ndarray, old: np.ndarray, advantages: np.ndarray, beta: float) -> tuple[Any, Params]:
    """Loss and gradient by the formulas of dapo or gspo, with the corrected k3; advantages of rows [N] or tokens [N, C]."""
    policy = tiny_policy(FAMILY, LORA)
    assert policy.adapters is not None
    ref = jax.lax.stop_gradient(plain_logps(moved(policy.adapters, 3, 0.02)))
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    weights = jnp.asarray(mask / (mask.sum() if loss == "dapo" else N * counts), jnp.float32)
    a = jnp.asarray(advantages.reshape(N, -1), jnp.float32)

    def of(adapters: Params) -> Any:
        logps = plain_logps(adapters)
        log_ratio = jnp.where(mask, logps - old, 0.0)
        own = jnp.exp(log_ratio)
        ratio = own if loss == "dapo" else jnp.exp(log_ratio.sum(axis=1, keepdims=True) / counts)
        d = jnp.where(mask, ref - logps, 0.0)
        term = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a) + beta * own * (jnp.exp(d) - d - 1)
        return jnp.sum(weights * term)

    with jax.numpy_dtype_promotion("standard"):
        return jax.value_and_grad(of)(policy.adapters)


def assert_near(got: Params, expected: Params) -> None:
    one, other = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (got, expected))
    assert np.linalg.norm(other) > 1e-3
    assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@functools.cache
def old_logps() -> np.ndarray:
    """Near the policy's own; where the model sampled nothing 99, which must not be read."""
    _, rollout, _ = episodes()
    assert rollout.sampled is not None
    own = np.asarray(plain_logps(tiny_policy(FAMILY, LORA).adapters or {}))
    mask = table([list(flags) for flags in rollout.sampled], False)
    return np.where(mask, own + 0.3 * np.random.default_rng(1).normal(size=(N, C)), 99).astype(np.float32)


@pytest.mark.parametrize(("loss", "truncated"), [pytest.param("dapo", False, marks=pytest.mark.slow), ("gspo", True)])
def test_outside_tokens_have_no_loss_no_kl_and_no_place_in_denominators(loss: str, truncated: bool) -> None:
    objective: dict[str, Any] = {"loss": loss, "beta": BETA, "kl": "k3_corrected", "mask_truncated": truncated}
    config, old = config_of(epsilon=0.2, epsilon_high=0.2, importance_cap=None, **objective), old_logps()
    gradient, metrics, advantages = update(config, old)
    _, rollout, _ = episodes()
    assert rollout.sampled is not None
    mask = table([list(flags) for flags in rollout.sampled], False)
    if truncated:
        mask &= np.array([reason == "stop" for reason in rollout.finish_reasons])[:, None]
    value, expected = plain_gradient(loss, mask, old, advantages, BETA)
    assert_near(gradient, expected)
    assert metrics["loss"] == pytest.approx(float(value), abs=1e-5)
    assert np.any(advantages)
    apart = np.abs(old - table(rollout.logprobs, 0.0))[mask]
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(apart.mean(), rel=1e-4)


def test_kl_in_the_reward_and_lengths_in_the_advantage_count_the_models_tokens() -> None:
    old = old_logps()
    config = config_of(loss="dapo", beta=BETA, kl_in_reward=True, advantage="opo", mask_truncated=True, importance_cap=None)
    _, _, advantages = update(config, old)
    policy = tiny_policy(FAMILY, LORA)
    assert policy.adapters is not None
    _, rollout, scored = episodes()
    assert rollout.sampled is not None
    mask = table([list(flags) for flags in rollout.sampled], False)
    k1 = np.asarray(plain_logps(policy.adapters)) - np.asarray(plain_logps(moved(policy.adapters, 3, 0.02)))
    rewards = (scored.rewards - BETA * np.where(mask, k1, 0).sum(axis=1)).reshape(B, G)
    lengths = mask.sum(axis=1).reshape(B, G)
    expected = rewards - (lengths * rewards).sum(axis=1, keepdims=True) / lengths.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(advantages.reshape(B, G), expected, rtol=0, atol=1e-5)


def by_turn() -> tuple[ScoredBatch, np.ndarray]:
    """Rewards of turns in halves, and the advantages of tokens by loops: discount 0.5, no deviation; row 4 is not valid."""
    _, rollout, scored = episodes()
    assert rollout.sampled is not None
    rng, turns, numbers = np.random.default_rng(5), [], np.full((N, C), -1)
    for row, own in enumerate(rollout.sampled):
        turn = -1
        for column, flag in enumerate(own):
            turn += int(flag and (column == 0 or not own[column - 1]))
            numbers[row, column] = turn if flag else -1
        turns.append((rng.integers(0, 5, turn + 1) / 2).tolist())
    valid = np.arange(N) != 4
    advantages = np.zeros((N, C))
    for row, column in np.argwhere(numbers >= 0):
        group = [other for other in range(row // G * G, row // G * G + G) if valid[other]]
        turn = numbers[row, column]
        to_go = {
            other: sum(reward / 2 ** (later - turn) for later, reward in enumerate(turns[other]) if later >= turn)
            for other in group
            if len(turns[other]) > turn
        }
        if row in to_go:
            outcomes = [float(scored.rewards[other]) for other in group]
            advantages[row, column] = scored.rewards[row] - np.mean(outcomes) + 2 * (to_go[row] - np.mean(list(to_go.values())))
    environment = np.array([sum(own) for own in turns], np.float32)
    values = {"r": scored.rewards, "environment": environment}
    return dataclasses.replace(scored, valid=valid, per_function=values, turn_rewards=turns), advantages


@pytest.mark.slow
@pytest.mark.parametrize("cut", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_turns_have_their_own_advantages_however_rows_are_cut(cut: bool) -> None:
    settings = {"loss": "dapo", "beta": BETA, "epsilon": 0.2, "epsilon_high": 0.2, "credit": "turn", "turn_discount": 0.5}
    config = config_of(**settings, scale_rewards="none", importance_cap=None)
    rewards = dataclasses.replace(config.rewards, functions=["r", "environment"], weights=[1.0, 2.0])
    scored, advantages = by_turn()
    _, rollout, _ = episodes()
    assert rollout.sampled is not None
    sizes = row_sizes(Lengths(3, 6, C), B, G, 20) if cut else SIZES
    gradient, metrics, shown = update(dataclasses.replace(config, rewards=rewards), old_logps(), scored, sizes)
    mask = table([list(flags) for flags in rollout.sampled], False)
    value, expected = plain_gradient("dapo", mask, old_logps(), advantages, BETA)
    assert_near(gradient, expected)
    assert metrics["loss"] == pytest.approx(float(value), abs=1e-5)
    means = (advantages * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    np.testing.assert_allclose(shown, means, rtol=0, atol=1e-5)


def test_only_sampled_tokens_have_an_entry_and_all_tokens_are_read() -> None:
    prompts, rollout, _ = episodes()
    assert rollout.sampled is not None
    trained = [len(own) > 0 for own in rollout.sampled]
    packed = pack(prompts.prompt_ids, rollout.completion_ids, trained, SIZES, width=C, sampled=rollout.sampled)
    places = np.max([np.asarray(part.places) for part in packed], axis=0)
    np.testing.assert_array_equal(places >= 0, table([list(flags) for flags in rollout.sampled], False))
    entries = sum(int((np.asarray(part.completions) < N).sum()) for part in packed)
    assert entries == sum(int(flags.sum()) for flags in rollout.sampled)
    tokens = sum(int((np.asarray(part.rows.ranges.own_end) > 0).sum()) for part in packed)
    assert tokens >= sum(len(own) - 1 for own in rollout.completion_ids if own) + sum(map(len, prompts.prompt_ids))
    for part in packed:
        rows: Any = part.rows
        for at in np.argwhere(np.asarray(part.completions) < N):
            micro, shard, entry = at
            row, column = np.asarray(part.completions)[tuple(at)], np.asarray(rows.columns)[tuple(at)]
            token = np.asarray(rows.selected)[tuple(at)]
            text = prompts.prompt_ids[row // G] + rollout.completion_ids[row]
            position = len(prompts.prompt_ids[row // G]) + column
            assert np.asarray(rows.targets)[tuple(at)] == text[position]
            assert np.asarray(rows.ids)[micro, shard, token] == text[position - 1]
            assert np.asarray(rows.positions)[micro, shard, token] == position - 1
            inverse = np.asarray(rows.inverse)[micro, shard, token]
            assert column == 0 or inverse == entry - rows.firsts
    texts = text_batch(prompts.prompt_ids[:1], rollout.completion_ids[:1], SIZES, C, sampled=rollout.sampled[:1])
    np.testing.assert_array_equal(np.asarray(texts.completion_mask)[0, : len(rollout.sampled[0])], rollout.sampled[0])


def test_lengths_in_metrics_count_the_models_tokens_and_those_of_episodes_all() -> None:
    sampled = [np.array([True, True, False, True]), np.array([False, True]), np.array([True, False, False, True, False, True])]
    rollout = Rollout([[1] * 4, [1] * 2, [1] * 6], [np.zeros(4)] * 3, ["stop", "length", "stop"], sampled=sampled)
    metrics = length_metrics(rollout)
    assert metrics["completions/mean_length"] == pytest.approx(7 / 3)
    assert metrics["completions/mean_terminated_length"] == 3
    assert (metrics["episodes/mean_length"], metrics["episodes/max_length"], metrics["episodes/mean_turns"]) == (4, 6, 2)
