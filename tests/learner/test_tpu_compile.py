"""The update and the rollout, compiled for a real TPU by XLA's own compiler. It needs no TPU, only the libtpu wheel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from padded_batches import shapes_of

from goldens.folders import build_model_folder
from grpo_jax.config import LoraConfig, ObjectiveConfig, OptimConfig, RolloutConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.models.parameters import abstract_params
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import SlotState, decode_segment
from grpo_jax.rollout.kv_cache import empty_past_block, write_segment
from grpo_jax.rollout.prefill import insert_prompts, prefill
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.weights import prepare_weights
from grpo_jax.types import Frozen
from grpo_jax.weights.hf import read_folder_spec
from grpo_jax.weights.lora import init_lora

B, G, P, C = 2, 4, 16, 24
LORA = LoraConfig(rank=8)
STOPS = (1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """Gemma 3: sliding windows, two ropes, norms around each block."""
    spec = read_folder_spec(build_model_folder(tmp_path_factory.mktemp("model"), "gemma3", "new"))
    return Transformer(spec, jnp.dtype("bfloat16"), LORA.scale, "layer")


def on(device: Any, tree: Any) -> Any:
    """The shapes of a tree, on the device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def variables_of(model: Transformer, device: Any) -> Any:
    """Shapes of the base in bfloat16 and of adapters in float32."""
    adapters = jax.eval_shape(lambda: init_lora(model.spec, LORA, jax.random.key(0)))
    return {"params": on(device, abstract_params(model.spec, jnp.bfloat16)), "lora": on(device, adapters)}


def compiled_for(program: Any, *arguments: Any) -> Any:
    """A jitted function, compiled."""
    return program.lower(*arguments).compile()


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_update_compiles_for_a_tpu(chips: Any, model: Transformer):
    variables = variables_of(model, chips["v5e"])
    optim = OptimConfig()
    learner = Learner(
        model, ObjectiveConfig(), make_optimizer(optim, 10), functools.partial(learning_rate_at, optim, 10), False, 1.0, C
    )
    batch = shapes_of(B, G, P, C, (B, G))
    state = on(chips["v5e"], jax.eval_shape(learner.init, variables["lora"]))
    jitted = jax.jit(functools.partial(train_step, learner), donate_argnums=0)
    update = compiled_for(jitted, state, on(chips["v5e"], batch), Frozen(variables["params"], {}))
    # The new state uses the memory of the old one.
    assert update.memory_analysis().alias_size_in_bytes >= bytes_of(state)


@pytest.fixture(scope="module")
def prefilled(chips: Any, model: Transformer) -> Callable[[str], tuple[Any, Any]]:
    """Compiles what comes before decoding, once for each format of the cache; shapes of the weights and of the prompts."""
    model = model.clone(implementation="mosaic_tpu")

    def shape(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=chips["v5e"])

    @functools.cache
    def of(kv_dtype: str) -> tuple[Any, Any]:
        prepared = functools.partial(prepare_weights, model, unroll=False)
        weights = compiled_for(jax.jit(prepared), variables_of(model, chips["v5e"]))
        assert weights.out_info["params"]["layers"]["qkv_proj"]["kernel"].shape[0] == model.spec.layers
        weights = on(chips["v5e"], weights.out_info)

        computed = functools.partial(prefill, model, kv_dtype=kv_dtype)
        prompts = compiled_for(jax.jit(computed), weights, shape(B, P), shape(B)).out_info
        cache = (model.spec.layers, B, model.spec.kv_heads, P, model.spec.head_dim)
        assert (prompts.cache.v.shape, prompts.cache.v.dtype) == (cache, jnp.bfloat16 if kv_dtype == "auto" else jnp.int8)
        assert (prompts.cache.k is None) == (kv_dtype == "int4")
        prompts = on(chips["v5e"], prompts)
        one = on(chips["v5e"], jax.eval_shape(computed, weights, shape(1, P), shape(1)))
        placed = compiled_for(jax.jit(insert_prompts, donate_argnums=0), prompts, one, shape(1))
        assert placed.memory_analysis().alias_size_in_bytes >= bytes_of(prompts.cache)
        return weights, prompts

    return of


@pytest.mark.parametrize(
    ("refilled", "past_blocks", "kv_dtype"),
    [(False, 1, "auto"), (True, 2, "auto"), *(pytest.param(True, 1, few, marks=pytest.mark.slow) for few in ("int8", "int4"))],
)
def test_the_rollout_compiles_for_a_tpu(
    chips: Any, model: Transformer, prefilled: Callable[[str], tuple[Any, Any]], refilled: bool, past_blocks: int, kv_dtype: str
):
    """With stacked layers and the TPU's kernels."""
    model = model.clone(implementation="mosaic_tpu")
    slots, length = (6 if refilled else B * G), 8
    weights, prompts = prefilled(kv_dtype)

    def shape(*size: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=chips["v5e"])

    past = [
        on(
            chips["v5e"],
            jax.eval_shape(functools.partial(empty_past_block, model.spec, model.dtype, slots, 8, kv_dtype=kv_dtype, unroll=False)),
        )
        for _ in range(past_blocks)
    ]
    integers = [shape(slots) for _ in range(7)]
    state = SlotState(*integers, live=shape(slots, dtype=jnp.bool_), begins=shape(slots, dtype=jnp.bool_))
    table = shape(B, G) if refilled else None
    controls = on(chips["v5e"], controls_of(RolloutConfig(num_generations=G, max_completion_length=C, top_p=0.9), seed=0, step=0))
    program = jax.jit(functools.partial(decode_segment, model, STOPS, length=length))
    tokens, segment_cache, _ = compiled_for(program, weights, prompts, tuple(past), state, table, controls).out_info
    assert (tokens.ids.shape, tokens.logps.shape, tokens.ends.shape) == ((slots, length + 1), (slots, length + 1), (slots,))
    writing = jax.jit(functools.partial(write_segment, together=not refilled), donate_argnums=0)
    compiled = compiled_for(writing, tuple(past), on(chips["v5e"], segment_cache), shape(slots))
    after = compiled.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), tuple(past))
    # The segment is written in place.
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(past)
