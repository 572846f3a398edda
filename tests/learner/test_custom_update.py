"""The update with a user's loss or optimiser in place of the built-in ones, and how often it is traced.

One tiny model of two layers; programs are compiled once for all tests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from padded_batches import PaddedBatch
from plain_oracles import LORA, moved, quick_compiling, tiny_policy

from grpo_jax.config import Config
from grpo_jax.learner.custom_loss import custom_loss, finish_custom_stats
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.learner.loss import grpo_loss, token_weights, total_stats
from grpo_jax.learner.optim import make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.runtime.programs import Program
from grpo_jax.types import Frozen, Params, TrainBatch, TrainState

B, G, P, C = 2, 2, 4, 4
N = B * G
FAMILY, RATE = "qwen2", 0.05
CONFIG = Config.from_dict(
    {
        "objective": {"loss": "grpo", "beta": 0.1, "importance_cap": 2.0, "scale_rewards": "group"},
        "rollout": {"num_generations": G, "max_completion_length": C, "temperature": 0.8},
    }
)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def batch(width: int = C, seed: int = 0) -> PaddedBatch:
    """Four completions of up to `width` tokens."""
    rng = np.random.default_rng(seed)
    vocab = tiny_policy(FAMILY).spec.vocab
    mask = np.arange(width)[None, :] < np.array([width, 1, 2, width])[:, None]
    return PaddedBatch(
        prompt_ids=rng.integers(6, vocab, (B, P)).astype(np.int32),
        prompt_lengths=np.array([2, P], np.int32),
        completion_ids=rng.integers(6, vocab, (N, width)).astype(np.int32),
        completion_mask=mask,
        sampler_logprobs=np.where(mask, rng.normal(-4, 1, (N, width)), 0).astype(np.float32),
        rewards=rng.normal(size=(B, G)).astype(np.float32),
        valid=np.ones((B, G), bool),
    )


def learner(optimizer: optax.GradientTransformation | None, loss_fn: Any = None) -> Learner:
    model = tiny_policy(FAMILY, LORA).model.clone(unroll=False)
    return Learner.of(CONFIG, model, full=False, updates=10, stop_ids=(2,), optimizer=optimizer, loss_fn=loss_fn)


def start() -> tuple[Params, Frozen]:
    policy = tiny_policy(FAMILY, LORA)
    assert policy.adapters is not None
    return jax.tree.map(jnp.copy, policy.adapters), Frozen(policy.params, moved(policy.adapters, 3, 0.02))


@functools.cache
def gradient_as_state() -> optax.GradientTransformation:
    """An optimiser that changes nothing and stores the gradient as its state."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


@functools.cache
def update(
    optimizer: optax.GradientTransformation, loss_fn: Any = None, cut: tuple[int, int] = (B, G)
) -> tuple[Params, Any, dict[str, float]]:
    """Trained arrays, state of the optimiser and metrics of one update."""
    made, (trainable, frozen) = learner(optimizer, loss_fn), start()
    given = batch().packed(cut, skips=made.skips)
    state, packed = Program("update", functools.partial(train_step, made), donate=(0,))(made.init(trainable), given, frozen)
    return state.trainable, state.opt_state, packed.to_dict()


def same_loss(**arguments: Any) -> Any:
    """The built-in loss, as a user calls it."""
    return grpo_loss(**arguments)


def reinforce(*, logps: Any, advantages: Any, weights: Any, completion_mask: Any, **_: Any) -> Any:
    """−Σ w A logπ, and two metrics."""
    loss = -jnp.sum(jnp.where(completion_mask, weights * advantages[:, None] * logps, jnp.float32(0)))
    tokens = jnp.maximum(jnp.sum(completion_mask.astype(jnp.float32)), jnp.float32(1))
    mean = jnp.sum(jnp.where(completion_mask, logps, jnp.float32(0))) / tokens
    return loss, {"policy_loss": loss, "logp": mean, "logp/max": jnp.max(jnp.where(completion_mask, logps, -jnp.inf))}


@pytest.mark.parametrize("cut", [pytest.param((B, G), marks=pytest.mark.slow), (1, 1)])
def test_a_loss_function_that_calls_grpo_loss_gives_the_built_in_update_bit_for_bit(cut: tuple[int, int]) -> None:
    _, gradient, metrics = update(gradient_as_state(), cut=cut)
    _, own_gradient, own_metrics = update(gradient_as_state(), same_loss, cut)
    chex.assert_trees_all_equal(own_gradient, gradient)
    assert np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])) > 0
    for name in ("loss", "policy_loss", "grad_norm", "entropy", "sampling/logp_difference/max"):
        assert own_metrics[name] == metrics[name], name
    assert own_metrics == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in metrics.items()}


def likelihood(*, logps: Any, weights: Any, completion_mask: Any, **_: Any) -> Any:
    """−Σ w logπ: a term without the advantage."""
    return -jnp.sum(jnp.where(completion_mask, weights * logps, jnp.float32(0))), {}


def test_without_a_kl_term_a_loss_function_sees_groups_without_an_advantage() -> None:
    """All rewards are equal. The oracle is the loss with β > 0, where every group is given to the loss anyway."""
    equal = replace(batch(), rewards=np.ones((B, G), np.float32)).packed((1, G))
    losses = []
    for beta in (0.0, 0.1):
        trainable, frozen = start()
        config = replace(CONFIG, objective=replace(CONFIG.objective, beta=beta))
        model = tiny_policy(FAMILY, LORA).model.clone(unroll=False)
        made = Learner.of(config, model, full=False, updates=10, stop_ids=(2,), optimizer=optax.sgd(RATE), loss_fn=likelihood)
        _, packed = Program("update", functools.partial(train_step, made), donate=(0,))(made.init(trainable), equal, frozen)
        losses.append(packed.to_dict()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 1


def test_a_reinforce_loss_is_that_of_numpy() -> None:
    _, _, metrics = update(gradient_as_state(), reinforce, (1, 1))
    policy, given = tiny_policy(FAMILY, LORA), batch()
    logps, _ = jax.jit(functools.partial(completion_logprobs, policy.model))(
        policy.variables, given.prompt_ids, given.prompt_lengths, given.completion_ids, jnp.float32(0.8)
    )
    logps, mask = np.asarray(logps, np.float64), given.completion_mask
    mean, deviation = given.rewards.mean(axis=1, keepdims=True), given.rewards.std(axis=1, ddof=1, keepdims=True)
    advantages = ((given.rewards - mean) / (deviation + 1e-4)).reshape(-1)
    weights = mask / (N * mask.sum(axis=1, keepdims=True))  # grpo's: the mean over completions of means over tokens
    loss = -(weights * advantages[:, None] * logps)[mask].sum()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["policy_loss"] == metrics["loss"]
    assert metrics["logp"] == pytest.approx(logps[mask].mean(), rel=1e-5)
    assert metrics["logp/max"] == pytest.approx(logps[mask].max(), rel=1e-5)


def test_the_gradient_and_the_metrics_of_a_custom_loss_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    logps, advantages = rng.normal(size=(N, C)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    mask = rng.random((N, C)) < 0.7
    weights = np.asarray(token_weights(mask, CONFIG.objective, C))
    parts, gradients = [], []
    for rows in (slice(0, 1), slice(1, N)):
        tokens = jax.device_put({"advantages": advantages[rows], "completion_mask": mask[rows], "weights": weights[rows]})

        def loss(logps: Any, tokens: Any = tokens) -> Any:
            return custom_loss(reinforce, tokens | {"logps": logps}, CONFIG.objective, C, None)

        gradient, stats = jax.grad(loss, has_aux=True)(jnp.asarray(logps[rows]))
        gradients.append(gradient)
        parts.append(stats)
    np.testing.assert_allclose(np.concatenate(gradients), -weights * advantages[:, None] * mask, rtol=1e-6)
    metrics = finish_custom_stats(total_stats(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)))
    expected = {
        "policy_loss": -(weights * advantages[:, None] * logps)[mask].sum(),
        "logp": logps[mask].mean(),
        "logp/max": logps[mask].max(),
    }
    chex.assert_trees_all_close(metrics, expected, rtol=1e-5)


@functools.cache
def sgd_step() -> tuple[Learner, Any]:
    """A learner with SGD, and its jitted update, which may be traced twice."""
    chex.clear_trace_counter()
    made = learner(optax.sgd(RATE))

    def step(state: TrainState, given: TrainBatch, frozen: Frozen) -> Any:
        return train_step(made, state, given, frozen)

    return made, jax.jit(chex.assert_max_traces(step, n=2))


def test_any_optax_transformation_makes_the_update() -> None:
    """SGD: parameters − rate · gradient; a constant rate is not in its state, and there is no metric of it."""
    (made, step), (trainable, frozen) = sgd_step(), start()
    after, packed = step(made.init(trainable), batch().packed((B, G)), frozen)
    gradient = update(gradient_as_state())[1]
    expected = jax.tree.map(lambda p, g: p - jnp.float32(RATE) * g, trainable, gradient)
    chex.assert_trees_all_close(after.trainable, expected, rtol=1e-6)
    assert "learning_rate" not in packed.to_dict()


def test_a_factored_optimiser_with_injected_settings_reports_its_learning_rate() -> None:
    adafactor = optax.inject_hyperparams(optax.adafactor, static_args=("min_dim_size_to_factor",))
    optimizer = adafactor(learning_rate=0.02, min_dim_size_to_factor=4)
    made, (trainable, frozen) = learner(optimizer), start()
    state = made.init(trainable)
    expected, _ = optimizer.update(update(gradient_as_state())[1], state.opt_state, trainable)
    after, packed = jax.jit(functools.partial(train_step, made))(state, batch().packed((B, G)), frozen)
    assert packed.to_dict()["learning_rate"] == pytest.approx(0.02)
    chex.assert_trees_all_close(after.trainable, optax.apply_updates(trainable, expected), rtol=1e-4, atol=1e-6)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert any(len(shape) == 2 for shape in shapes - {leaf.shape for leaf in jax.tree.leaves(trainable)}), "a factored moment"


def test_without_an_optimiser_the_settings_make_adamw() -> None:
    made, (trainable, frozen) = learner(None), start()
    metrics = jax.eval_shape(functools.partial(train_step, made), made.init(trainable), batch().packed((B, G)), frozen)[1]
    assert "learning_rate" in metrics.names
    chex.assert_trees_all_equal(made.init(trainable).opt_state, make_optimizer(CONFIG.optim, 10).init(trainable))


def test_an_update_is_traced_once_for_each_width() -> None:
    """The state that an update returns has the types of the one that it got, so the second batch finds the program."""
    (made, step), (trainable, frozen) = sgd_step(), start()
    cut = (B, G)
    state, _ = step(made.init(trainable), batch().packed(cut), frozen)
    state, _ = step(state, batch(seed=1).packed(cut), frozen)
    step.lower(state, batch(width=3).packed(cut), frozen)
    step.lower(state, batch(width=3, seed=1).packed(cut), frozen)
    with pytest.raises(AssertionError, match="traced > 2 times"):
        step.lower(state, batch(width=2).packed(cut), frozen)
