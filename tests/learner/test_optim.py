"""The optimiser against AdamW written out in float64, and its schedules against hand-worked rates."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.config import Config, ConfigError, OptimConfig
from grpo_jax.learner.optim import SKIPPED, ZERO_GRADIENT, apply_gradient, learning_rate_at, make_optimizer, updates_of
from grpo_jax.learner.optimizers import decay_mask
from grpo_jax.types import TrainState


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two stacked layers: a matrix [L, in, out], a bias [L, out], a norm's scale [L, D]; and the last norm's scale [D]."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "scale": (2, 3)}
    layers = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return {"layers": layers, "final": {"norm_scale": jnp.asarray(rng.normal(size=3), dtype)}}


def one_update(optim: OptimConfig, params: dict[str, Any], grads: dict[str, Any]) -> Any:
    optimizer = make_optimizer(optim, 1)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def oracle_adamw(
    optim: OptimConfig, rates: list[float], params: list[np.ndarray], gradients: list[list[np.ndarray]], decayed: list[bool]
):
    assert optim.b2 is not None
    assert optim.eps is not None
    params = [array.astype(np.float64) for array in params]
    first, second = [np.zeros(array.shape) for array in params], [np.zeros(array.shape) for array in params]
    for k, (rate, grads) in enumerate(zip(rates, gradients, strict=True)):
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
        factor = 1.0 if optim.max_grad_norm is None or norm < optim.max_grad_norm else optim.max_grad_norm / norm
        for i, grad in enumerate(grads):
            first[i] = optim.b1 * first[i] + (1 - optim.b1) * grad * factor
            second[i] = optim.b2 * second[i] + (1 - optim.b2) * (grad * factor) ** 2
            direction = first[i] / (1 - optim.b1 ** (k + 1)) / (np.sqrt(second[i] / (1 - optim.b2 ** (k + 1))) + optim.eps)
            params[i] = params[i] - rate * (direction + (optim.weight_decay * params[i] if decayed[i] else 0))
    return params


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_adamw_written_out(max_grad_norm: float | None, weight_decay: float) -> None:
    optim = OptimConfig(
        learning_rate=0.01, schedule="linear", warmup_steps=2, max_grad_norm=max_grad_norm, weight_decay=weight_decay, b2=0.95
    )
    rates = [0.0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    params = parameters()
    start, shape = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    gradients = [[rng.normal(size=leaf.shape, scale=2.0**-k) for leaf in start] for k in range(5)]

    optimizer = make_optimizer(optim, 5)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(jax.tree.unflatten(shape, [jnp.asarray(grad, jnp.float32) for grad in grads]), state, params)
        params = optax.apply_updates(params, updates)

    decayed = jax.tree.leaves(decay_mask(params))
    assert sum(decayed) == 1
    expected = oracle_adamw(optim, rates, [np.asarray(leaf) for leaf in start], gradients, decayed)
    for ours, theirs in zip(jax.tree.leaves(params), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-7)


def test_the_first_update_is_the_rate_against_the_gradients_sign() -> None:
    params = {"kernel": jnp.ones((2, 2))}
    grads = {"kernel": jnp.asarray([[3.0, -0.1], [7.0, -2.0]])}
    updates = one_update(OptimConfig(learning_rate=0.5, max_grad_norm=None), params, grads)
    np.testing.assert_allclose(updates["kernel"], [[-0.5, 0.5], [-0.5, 0.5]], rtol=1e-5)


def test_only_matrices_are_decayed_by_name_however_layers_are_stacked() -> None:
    tree = {
        "embedding": np.zeros((9, 4)),
        "layers": {
            "attention": {"q_proj": {"kernel": np.zeros((2, 4, 4)), "bias": np.zeros((2, 4)), "lora_a": np.zeros((2, 4, 1))}},
            "input_norm": {"scale": np.zeros((2, 4))},
            "q_norm_scale": np.zeros((2, 4)),
            "scale_proj": np.zeros((2, 4, 4)),
        },
        "final_norm": {"scale": np.zeros(4)},
        "temperature": np.zeros(()),
    }
    assert decay_mask(tree) == {
        "embedding": True,
        "layers": {
            "attention": {"q_proj": {"kernel": True, "bias": False, "lora_a": True}},
            "input_norm": {"scale": False},
            "q_norm_scale": False,
            "scale_proj": True,
        },
        "final_norm": {"scale": False},
        "temperature": False,
    }


def test_weight_decay_moves_nothing_but_matrices_when_gradients_are_zero() -> None:
    params = parameters()
    updates = one_update(OptimConfig(learning_rate=0.1, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["layers"].pop("kernel"), -0.05 * params["layers"]["kernel"], rtol=1e-6)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_and_the_updates_are_float32(dtype: Any) -> None:
    params = parameters(dtype)
    optimizer = make_optimizer(OptimConfig(warmup_steps=1, weight_decay=0.1), 3)
    state = optimizer.init(params)
    updates, after = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    for tree in (state, after, updates):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(after)]


def test_gradients_are_scaled_to_the_global_norm() -> None:
    # Adam does not see the size of a gradient, except next to eps: with a large eps the update is close to proportional to it.
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    grads = {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}
    updates = one_update(OptimConfig(learning_rate=1.0, max_grad_norm=0.5, eps=1e4), params, grads)
    np.testing.assert_allclose([float(updates["a"][0, 0]) * 1e4, float(updates["b"][0, 0]) * 1e4], [-0.3, -0.4], rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [1.0, 0.8, 0.6, 0.4, 0.2]), ("cosine", [1.0, 0.882843, 0.6, 0.317157, 0.2])]
)
def test_a_schedule_ends_at_its_share_of_the_peak(schedule: Any, expected: list[float]) -> None:
    optim = OptimConfig(learning_rate=1.0, schedule=schedule, final_ratio=0.2)  # 0.2 + 0.8 (1 + cos(π k / 4)) / 2
    np.testing.assert_allclose([learning_rate_at(optim, 4, step) for step in range(5)], expected, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"optim\.final_ratio is 0\.2: it has an effect with optim\.schedule linear or cosine"):
        OptimConfig(final_ratio=0.2)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "steps", "expected"),
    [
        ("constant", 0, 3, [1, 1, 1]),
        ("constant", 2, 4, [0, 0.5, 1, 1]),
        ("linear", 0, 4, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, 6, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 0, 4, [1, 0.8535534, 0.5, 0.1464466, 0]),  # (1 + cos(π k / 4)) / 2
        ("cosine", 1, 4, [0, 1, 0.75, 0.25, 0]),
        ("cosine", 0, 1, [1]),
        ("linear", 3, 4, [0, 1 / 3, 2 / 3, 1]),
    ],
)
def test_hand_worked_learning_rates(schedule: Any, warmup_steps: int, steps: int, expected: list[float]) -> None:
    optim = OptimConfig(learning_rate=2e-5, schedule=schedule, warmup_steps=warmup_steps)
    rates = [learning_rate_at(optim, steps, step) for step in range(len(expected))]
    assert all(rate.dtype == jnp.float32 and rate.shape == () for rate in rates)
    np.testing.assert_allclose(rates, np.array(expected) * 2e-5, rtol=1e-6, atol=1e-12)
    traced = jax.jit(lambda step: learning_rate_at(optim, steps, step))
    np.testing.assert_allclose([traced(step) for step in range(len(expected))], rates, rtol=1e-6, atol=1e-12)


def test_a_plan_needs_no_rows_to_know_the_steps_of_epochs() -> None:
    config = Config.from_dict({"train": {"epochs": 3}, "optim": {"warmup_ratio": 0.1, "schedule": "linear"}})
    assert config.train.steps == 0
    make_optimizer(config.optim, updates_of(config, supervised=False))


def test_a_warm_up_by_its_share_of_all_updates_is_rounded_up_as_transformers_does() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_ratio=0.3, schedule="linear")  # 0.3 of 5 updates is 1.5: 2 of them
    rates = [float(learning_rate_at(optim, 5, k)) for k in range(5)]
    np.testing.assert_allclose(rates, [0, 1 / 2, 1, 2 / 3, 1 / 3], rtol=1e-6)
    twice = [float(learning_rate_at(optim, 10, k, updates_per_step=2)) for k in range(4)]  # 3 of 10 updates, whatever a step has
    np.testing.assert_allclose(twice, [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"optim\.warmup_ratio is 0\.3: use fewer than the 1 optimiser updates"):
        make_optimizer(optim, 1)


@pytest.mark.parametrize(("warmup_steps", "steps"), [(10, 10), (11, 10), (1, 1)])
def test_a_warm_up_that_does_not_end_is_refused(warmup_steps: int, steps: int) -> None:
    optim = OptimConfig(warmup_steps=warmup_steps)
    with pytest.raises(ConfigError, match=rf"optim.warmup_steps is {warmup_steps}: use fewer than the {steps}"):
        make_optimizer(optim, steps)
    with pytest.raises(ConfigError, match="warmup_steps"):
        learning_rate_at(optim, steps, 0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        make_optimizer(OptimConfig(), 0)


def test_warm_up_counts_training_steps_where_a_step_has_several_updates() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule="linear")
    # Two training steps of three updates each warm up: 6 of 12 updates, then down to 0 in the other 6.
    rates = [float(learning_rate_at(optim, 12, step, updates_per_step=3)) for step in range(12)]
    np.testing.assert_allclose(rates, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps is 2: use fewer than the 2 training steps"):
        make_optimizer(optim, 6, 3)


def contents(state: TrainState) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    ("poison", "loss", "norm"),
    [
        (np.nan, 0.5, np.nan),
        (np.inf, 0.5, np.inf),
        (-np.inf, 0.5, np.inf),
        (3e38, 0.5, np.inf),
        (1.0, np.nan, None),
        (1.0, -np.inf, None),
    ],
)
def test_what_is_not_finite_leaves_the_state_as_if_the_step_had_not_been(poison: float, loss: float, norm: float | None):
    optim = OptimConfig(learning_rate=0.1, schedule="cosine", warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(optim, 6)
    update = jax.jit(lambda state, gradient, loss: apply_gradient(optimizer, state, gradient, loss))
    params = parameters()
    rng = np.random.default_rng(2)
    good = [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params) for _ in range(2)]
    bad = jax.tree.map(jnp.copy, good[1])
    bad["layers"]["kernel"] = bad["layers"]["kernel"].at[1, 2, 3].set(poison)
    first, metrics = update(TrainState(jnp.int32(0), params, optimizer.init(params)), good[0], jnp.float32(1))
    assert metrics[SKIPPED] == 0
    skipped, metrics = update(first, bad, jnp.float32(loss))
    assert contents(skipped) == contents(first)
    assert metrics[SKIPPED] == 1
    if norm is not None:
        np.testing.assert_equal(float(metrics["grad_norm"]), norm)
    after, expected = update(skipped, good[1], jnp.float32(1))[0], update(first, good[1], jnp.float32(1))[0]
    assert contents(after) == contents(expected)
    assert contents(after) != contents(first)
    assert int(after.step) == 2


def test_a_zero_gradient_moves_nothing_although_there_are_momentum_and_weight_decay():
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, schedule="cosine", weight_decay=0.1), 6)
    update = jax.jit(lambda state, gradient, loss: apply_gradient(optimizer, state, gradient, loss))
    params = parameters()
    good = jax.tree.map(jnp.ones_like, params)
    first, metrics = update(TrainState(jnp.int32(0), params, optimizer.init(params)), good, jnp.float32(1))
    assert (metrics[ZERO_GRADIENT], metrics[SKIPPED]) == (0, 0)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, metrics = update(first, zero, jnp.float32(0))
    assert contents(after) == contents(first)
    assert (metrics[ZERO_GRADIENT], metrics[SKIPPED], metrics["grad_norm"]) == (1, 0, 0)
    zero["layers"]["kernel"] = zero["layers"]["kernel"].at[1, 2, 3].set(1e-6)
    after, metrics = update(first, zero, jnp.float32(0))
    assert contents(after) != contents(first)
    assert (metrics[ZERO_GRADIENT], metrics[SKIPPED]) == (0, 0)
