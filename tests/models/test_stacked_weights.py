"""Quantised weights that a loop over layers reads in place: the same model as with slices of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from plain_oracles import moved, quick_compiling

from grpo_jax.config import LoraConfig
from grpo_jax.models import linear
from grpo_jax.models.attention import group_attend
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.stacked_weights import STACKS, split_stacks
from grpo_jax.models.transformer import Transformer, forward
from grpo_jax.runtime.sharding import MESH_AXES, Layout
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantize_params
from grpo_kernels import Limits, prompt_ranges

LAYERS, TOKENS = 3, 8
SPEC = ModelSpec(
    family="llama",
    vocab=32,
    layers=LAYERS,
    width=64,
    ffw=64,
    heads=1,
    kv_heads=1,
    head_dim=64,
    norm_eps=1e-5,
    tied=True,
    windows=(None,) * LAYERS,
    ropes=(Rope(1e4),),
    rope_of_layer=(0,) * LAYERS,
    query_scale=0.125,
)
LORA = LoraConfig(rank=2)


@functools.cache
def variables() -> tuple[Any, Any]:
    """A base in nf4, and adapters."""
    params = jax.jit(lambda key: quantize_params(SPEC, init_params(SPEC, key, jnp.float32), "nf4"))(jax.random.key(0))
    return params, moved(init_lora(SPEC, LORA, jax.random.key(1)), 2, 0.1)


def gradients(implementation: str, *, remat: Any = "none", layout: Layout | None = None) -> Any:
    """A sum over the hidden states of two rows, and its gradient by the adapters."""
    model = Transformer(SPEC, jnp.dtype("float32"), LORA.scale, remat, implementation=implementation, layout=layout)
    ids = jnp.arange(2 * TOKENS, dtype=jnp.int32).reshape(2, TOKENS)
    positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), ids.shape)
    ranges = prompt_ranges(jnp.array([TOKENS, TOKENS - 3], jnp.int32), TOKENS)
    attend = group_attend(model.clone(implementation="reference"), ranges, Limits(prompts=0, prompt=0, own=TOKENS))

    @jax.jit
    def value_and_gradient(adapters: Any, params: Any) -> Any:
        def total(adapters: Any) -> jax.Array:
            return jnp.sum(jnp.sin(forward(model, {"params": params, "lora": adapters}, ids, positions, attend)[0]))

        return jax.value_and_grad(total)(adapters)

    params, adapters = variables()
    with quick_compiling():
        return jax.tree.map(np.asarray, value_and_gradient(adapters, params))


@pytest.mark.parametrize(
    ("one_scan", "remat", "mesh"),
    [
        (True, "layer", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, "none", True), (False, "layer", False))),
    ],
    ids=str,
)
def test_the_model_is_the_same_with_stacks_as_with_slices(
    one_scan: bool, remat: str, mesh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one scan over all layers and in the loops of a model with several kinds of them, with and without a mesh."""
    expected = gradients("reference")
    monkeypatch.setattr(ModelSpec, "one_scan", property(lambda spec: one_scan))
    stacks, product = [], linear.quantized_matmul

    def watched(x: Any, w: Any, **options: Any) -> Any:
        stacks.append(w.shape[0] == LAYERS and options["layer"] is not None)
        return product(x, w, **options)

    monkeypatch.setattr(linear, "quantized_matmul", watched)
    # The plain interpreter, which knows no memory spaces: the TPU's own has effects, which `jax.checkpoint` does not take.
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, space: x)
    layout = Layout(jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)) if mesh else None
    got = gradients("mosaic_tpu", remat=remat, layout=layout)
    assert len(stacks) >= 7
    assert all(stacks)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Sums of 64 terms in another order, through three layers and back.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_weights_that_are_gathered_or_not_the_kernels_are_sliced() -> None:
    params, _ = variables()
    plain = {"params": params}
    assert split_stacks(plain, "xla", None) is plain
    sharded = Layout(jax.sharding.AbstractMesh((1, 2, 1), MESH_AXES))  # type: ignore[arg-type] - only its shape is read
    assert split_stacks(plain, "mosaic_tpu", sharded) is plain
    split = split_stacks(plain, "mosaic_tpu", None)
    assert set(split[STACKS]["layers"]) == set(SPEC.linear_shapes())
    assert split["params"]["layers"]["q_proj"]["kernel"].tolist() == [0, 1, 2]
    assert plain["params"]["layers"]["q_proj"]["kernel"] is split[STACKS]["layers"]["q_proj"]["kernel"]
