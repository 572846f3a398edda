"""Lowers a complete update at the shapes of real models, without weights, for a device that need not exist."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import LoraConfig, ObjectiveConfig, OptimConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.models.parameters import abstract_params, flatten, nest, param_specs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer
from grpo_jax.types import Frozen, TrainBatch
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantized_specs


def on(device: Any, tree: Any) -> Any:
    """Returns the shapes of a tree, on the device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def base_of(spec: ModelSpec, dtype: Any, quantization: str) -> Any:
    """Returns the shapes of the frozen weights."""
    dense = abstract_params(spec, dtype)
    if quantization == "none":
        return dense
    quantized = quantized_specs(param_specs(spec), quantization)
    return nest({path: quantized.get(path, leaf) for path, leaf in flatten(dense)})


def lowered_update(
    spec: ModelSpec,
    batch: TrainBatch,
    device: Any,
    *,
    lora: LoraConfig,
    dtype: Any = jnp.bfloat16,
    beta: float = 0.04,
    remat: Any = "layer",
    implementation: str | None = None,
    quantization: str = "none",
    unroll: bool = False,
) -> Any:
    """Lowers the update of a LoRA run, with the state donated.

    Args:
        quantization: of the layers' matrices.
    """
    optim = OptimConfig()
    model = Transformer(spec, jnp.dtype(dtype), lora.scale, remat, unroll, implementation)
    learner = Learner(
        model=model,
        objective=ObjectiveConfig(beta=beta),
        optimizer=make_optimizer(optim, 10),
        learning_rate=functools.partial(learning_rate_at, optim, 10),
        full=False,
        temperature=1.0,
        max_completion_length=batch.completion_mask.shape[1],
    )
    adapters = jax.eval_shape(lambda: init_lora(spec, lora, jax.random.key(0)))
    state = jax.eval_shape(learner.init, adapters)
    frozen = Frozen(base_of(spec, dtype, quantization), {})
    arguments = tuple(on(device, tree) for tree in (state, batch, frozen))
    return jax.jit(functools.partial(train_step, learner), donate_argnums=0).lower(*arguments)
