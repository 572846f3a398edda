"""The optimisers by name: on stacked layers against plain Optax on each layer's matrix by itself, and against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from optax.contrib import muon
from plain_oracles import golden_config

from grpo_jax.config import Config, ConfigError, OptimConfig
from grpo_jax.learner.optim import SKIPPED, ZERO_GRADIENT, apply_gradient, check_plus_ratio, make_optimizer
from grpo_jax.learner.sharded import state_shardings
from grpo_jax.models.families import read_spec
from grpo_jax.run.doctor.ranges import setting_notes
from grpo_jax.runtime.sharding import MESH_AXES, Layout
from grpo_jax.types import TrainState
from grpo_jax.weights.axes import model_axes

RATE = 0.01
NAMED: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon"},
    "adafactor": {"name": "adafactor"},
    "adafactor with momentum": {"name": "adafactor", "b1": 0.9},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd", "b1": 0.5},
    "factored": {"name": "adamw", "moments": "factored"},
    "int8": {"name": "adamw", "moments": "int8"},
}
PLAIN: dict[str, optax.GradientTransformation] = {
    "muon": muon(RATE, consistent_rms=0.2),
    "adafactor": optax.adafactor(RATE, multiply_by_parameter_scale=False),
    "adafactor with momentum": optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.ema(0.9, debias=False), optax.scale(-RATE)
    ),
    "lion": optax.lion(RATE, weight_decay=0.0),
    "sgd": optax.sgd(RATE, momentum=0.5),
}


def stacked_parameters(rows: int = 130, columns: int = 129) -> dict[str, Any]:
    """Two layers with a matrix, a small one and a vector; an embedding. The matrix is large enough to be factored."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, rows, columns), "a": (2, 6, 3), "scale": (2, 5)}
    layers = {"q_proj": {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}}
    return {"embed": {"embedding": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)}, "layers": layers}


def gradients_like(params: Any, count: int) -> list[Any]:
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params) for _ in range(count)]


def unstacked(tree: Any) -> dict[str, Any]:
    """The same parameters with one entry for each layer's."""
    own = tree["layers"]["q_proj"]
    return {"embedding": tree["embed"]["embedding"]} | {
        f"{name}{layer}": leaf[layer] for name, leaf in own.items() for layer in range(2)
    }


def trained(optimizer: Any, params: Any, gradients: list[Any]) -> Any:
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "lion" else [pytest.mark.slow]) for name in PLAIN])
def test_stacked_layers_are_trained_as_plain_optax_trains_each_matrix(name: str) -> None:
    params = stacked_parameters()
    gradients = gradients_like(params, 3)
    optim = OptimConfig(learning_rate=RATE, max_grad_norm=None, **NAMED[name])
    got = unstacked(trained(make_optimizer(optim, 3), params, gradients))
    plain = PLAIN[name]
    if name == "muon":  # the embedding is a matrix too, which is Adam's here
        dims: Any = {key: None if key == "embedding" else optax.contrib.MuonDimensionNumbers() for key in unstacked(params)}
        dims |= {key: None for key in dims if key.startswith("scale")}
        plain = muon(RATE, consistent_rms=0.2, muon_weight_dimension_numbers=dims)
    with jax.numpy_dtype_promotion("standard"):
        expected = trained(plain, unstacked(params), [unstacked(gradient) for gradient in gradients])
    for key, value in got.items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


def factored_adam(gradients: list[np.ndarray], b1: float, b2: float, eps: float) -> np.ndarray:
    """The sum of the updates' directions of one matrix, in float64: Adam's bias-corrected means, the second one factored."""
    rows, columns = np.zeros(gradients[0].shape[0]), np.zeros(gradients[0].shape[1])
    mean, total = np.zeros(gradients[0].shape), np.zeros(gradients[0].shape)
    for k, gradient in enumerate(np.asarray(gradients, np.float64), 1):
        rows = b2 * rows + (1 - b2) * (gradient**2 + eps).mean(axis=1)
        columns = b2 * columns + (1 - b2) * (gradient**2 + eps).mean(axis=0)
        second = np.outer(rows, columns) / rows.mean() / (1 - b2**k)
        mean = b1 * mean + (1 - b1) * gradient / np.sqrt(second)
        total += mean / (1 - b1**k)
    return total


@pytest.mark.slow
def test_adamw_with_a_factored_second_moment_written_out() -> None:
    params = stacked_parameters()
    gradients = gradients_like(params, 4)
    optim = OptimConfig(name="adamw", moments="factored", learning_rate=RATE, max_grad_norm=None, b1=0.8, b2=0.95)
    after = trained(make_optimizer(optim, 4), params, gradients)["layers"]["q_proj"]["kernel"]
    for layer in range(2):
        own = [np.asarray(gradient["layers"]["q_proj"]["kernel"][layer]) for gradient in gradients]
        expected = np.asarray(params["layers"]["q_proj"]["kernel"][layer]) - RATE * factored_adam(own, 0.8, 0.95, 1e-8)
        np.testing.assert_allclose(after[layer], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_weight_decay_moves_matrices_alone_by_the_learning_rate(name: str) -> None:
    params = stacked_parameters(4, 3)
    optimizer: Any = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5, **NAMED[name]), 1)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    own, before = updates["layers"]["q_proj"], params["layers"]["q_proj"]
    for leaf in ("kernel", "a"):
        np.testing.assert_allclose(own[leaf], -0.05 * before[leaf], rtol=1e-6)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.05 * params["embed"]["embedding"], rtol=1e-6)
    assert not np.any(own["scale"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_updates_that_are_left_out_leave_every_state_bit_for_bit(name: str) -> None:
    params = stacked_parameters(4, 3)
    optimizer: Any = make_optimizer(OptimConfig(learning_rate=RATE, weight_decay=0.1, schedule="linear", **NAMED[name]), 9)
    update = jax.jit(lambda state, gradient: apply_gradient(optimizer, state, gradient, jnp.float32(1)))
    good = gradients_like(params, 1)[0]
    first, _ = update(TrainState(jnp.int32(0), params, optimizer.init(params)), good)
    for value, metric in ((np.nan, SKIPPED), (0.0, ZERO_GRADIENT)):
        after, metrics = update(first, jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), params))
        assert metrics[metric] == 1
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(first), strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    assert not np.array_equal(first.trainable["layers"]["q_proj"]["kernel"], params["layers"]["q_proj"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMED, "adamw"])
def test_zeros_of_smaller_ranks_stay_zeros(name: str) -> None:
    """Layers of a smaller rank, or without an adapter, have zeros in a stack; their gradients are zero too."""
    ranks = np.arange(3)[None, :] < np.array([3, 2, 0])[:, None]
    masks = {"a": jnp.asarray(ranks[:, None, :], jnp.float32), "b": jnp.asarray(ranks[:, :, None], jnp.float32)}
    rng = np.random.default_rng(0)

    def drawn() -> Any:
        shapes = {"a": (3, 8, 3), "b": (3, 3, 6)}
        leaves = {leaf: jnp.asarray(rng.normal(size=shape), jnp.float32) * masks[leaf] for leaf, shape in shapes.items()}
        return {"layers": {"q_proj": leaves}}

    optim = OptimConfig(learning_rate=RATE, weight_decay=0.1, **NAMED.get(name, {}))
    params = drawn()
    after = trained(make_optimizer(optim, 3), params, [drawn() for _ in range(3)])["layers"]["q_proj"]
    for leaf, mask in masks.items():
        outside = np.broadcast_to(np.asarray(mask) == 0, after[leaf].shape)
        assert not np.any(np.asarray(after[leaf])[outside])
        assert np.all(np.asarray(after[leaf])[~outside])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_first_moments_in_bfloat16(name: Any) -> None:
    params = stacked_parameters(4, 3)
    given: dict[str, Any] = {"b1": 0.5} if name == "sgd" else {}
    small, whole = (
        make_optimizer(OptimConfig(name=name, moments=moments, learning_rate=RATE, **given), 1)
        for moments in ("bfloat16", "float32")
    )
    kinds = {leaf.dtype for leaf in jax.tree.leaves(small.init(params))}
    assert jnp.dtype(jnp.bfloat16) in kinds
    assert jnp.dtype(jnp.bfloat16) not in {leaf.dtype for leaf in jax.tree.leaves(whole.init(params))}
    one, other = (trained(optimizer, params, gradients_like(params, 2)) for optimizer in (small, whole))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        # Two updates of about RATE each, whose momentum has 8 bits; Muon enlarges what is rounded in small singular values.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=RATE * (0.5 if name == "muon" else 0.05))


def test_b_learns_faster_by_the_ratio_of_lora_plus() -> None:
    rng = np.random.default_rng(0)
    params = {"layers": {"q_proj": {leaf: jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32) for leaf in ("a", "b")}}}
    gradients = gradients_like(params, 2)
    optim = OptimConfig(learning_rate=RATE, weight_decay=0.1)
    plain: Any = make_optimizer(optim, 2)
    faster: Any = make_optimizer(optim, 2, plus_ratio=16.0)
    for gradient in gradients:
        one, _ = plain.update(gradient, plain.init(params), params)
        other, _ = faster.update(gradient, faster.init(params), params)
        ours, theirs = one["layers"]["q_proj"], other["layers"]["q_proj"]
        np.testing.assert_array_equal(ours["a"], theirs["a"])
        np.testing.assert_allclose(theirs["b"], 16 * ours["b"], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"lora\.plus_ratio is 16\.0: the run has an optimiser of its own"):
        check_plus_ratio(Config.from_dict({"lora": {"plus_ratio": 16}}), optax.sgd(1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adam"}, r"optim\.name is 'adam': expected one of adamw, muon, adafactor, lion, sgd; did you mean adamw\?"),
        ({"name": "sgd", "b2": 0.9}, r"optim\.b2 is 0\.9: sgd has none: leave it out"),
        ({"name": "lion", "eps": 1e-8}, r"optim\.eps is 1e-08: lion has none: leave it out"),
        ({"name": "lion", "moments": "factored"}, r"optim\.moments is 'factored': .*use float32, or optim\.name adamw"),
        ({"name": "sgd", "moments": "bfloat16"}, r"optim\.moments is 'bfloat16': sgd has no momentum with optim\.b1 0"),
        ({"moments": "int4"}, r"optim\.moments is 'int4': expected one of float32, bfloat16, factored, int8"),
        ({"name": "muon", "moments": "int8"}, r"optim\.moments is 'int8': 8 bits are offered for adamw, lion and sgd"),
        ({"name": "sgd", "moments": "int8"}, r"optim\.moments is 'int8': sgd has no momentum with optim\.b1 0"),
    ],
)
def test_settings_that_an_optimiser_does_not_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**given)


def test_every_optimiser_has_its_usual_settings() -> None:
    assert (OptimConfig().b1, OptimConfig().b2, OptimConfig().eps) == (0.9, 0.999, 1e-8)
    assert (OptimConfig(name="lion").b2, OptimConfig(name="lion").eps) == (0.99, None)
    assert (OptimConfig(name="muon").b1, OptimConfig(name="muon", b1=0.9).b1) == (0.95, 0.9)
    assert OptimConfig(name="adafactor").eps == 1e-30


@pytest.mark.parametrize(
    ("name", "rate", "said"),
    [
        ("adamw", 1e-5, None),
        ("muon", 1e-5, None),
        ("lion", 1e-5, None),
        ("lion", 4e-5, "note: optim.learning_rate is 4e-05; usual rates for LoRA with lion are 5e-07 to 1.66667e-05"),
        ("adamw", 1e-3, "note: optim.learning_rate is 0.001; usual rates for LoRA are 5e-06 to 5e-05"),
        ("sgd", 1.0, None),
    ],
)
def test_notes_on_the_learning_rate_go_by_the_optimiser(name: str, rate: float, said: str | None) -> None:
    config = Config.from_dict({"optim": {"name": name, "learning_rate": rate}})
    notes = [note for note in setting_notes(config) if "learning_rate" in note]
    assert notes == ([] if said is None else [said])


@pytest.mark.parametrize("name", ["adafactor", "muon", "factored", "int8"])
def test_every_state_has_a_sharding_on_a_mesh(name: str) -> None:
    """Momentum is sharded as its parameter, scales [L, in, 2] of its blocks too.

    Row means [L, in] of a matrix are replicated, though norms have that shape.
    """
    spec = read_spec(golden_config("qwen2"))
    given: dict[str, Any] = NAMED["adafactor with momentum" if name == "adafactor" else name]
    optim = OptimConfig(**given)
    layout = Layout(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES))
    params = {
        "layers": {
            "q_proj": {"kernel": jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)},
            "attn_norm": {"scale": jax.ShapeDtypeStruct((2, 256), jnp.float32)},
        }
    }

    def start(params: Any) -> TrainState:
        return TrainState(jnp.int32(0), params, make_optimizer(optim, 1).init(params))

    state = jax.eval_shape(start, params)
    found = state_shardings(state, layout, model_axes(spec))
    kernel = PartitionSpec(None, "fsdp", "tensor")
    assert found.trainable["layers"]["q_proj"]["kernel"].spec == kernel
    pairs = list(zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(found.opt_state), strict=True))
    assert any(leaf.shape == (2, 256, 512) for leaf, _ in pairs)
    for leaf, sharding in pairs:
        expected = {(2, 256, 512): kernel, (2, 256, 2): kernel, (2,): PartitionSpec(), (2, 512): PartitionSpec()}.get(leaf.shape)
        assert expected is None or sharding.spec == expected
