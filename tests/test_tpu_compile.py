"""The update and the rollout, compiled for a real TPU by XLA's own compiler. It needs no TPU, only the libtpu wheel."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from goldens.folders import build_model_folder
from grpo_jax.config import LoraConfig, ObjectiveConfig, OptimConfig, RolloutConfig
from grpo_jax.models import Transformer, init_lora, read_folder_spec
from grpo_jax.models.spec import abstract_params
from grpo_jax.optim import learning_rate_at, make_optimizer
from grpo_jax.sampler import controls_of, decode
from grpo_jax.step import Learner
from grpo_jax.types import Frozen, TrainBatch

B, G, P, C = 2, 4, 16, 24


@pytest.fixture(scope="module")
def tpu() -> Any:
    """One v5e core that is not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the libtpu wheel, which is for Linux on x86-64")
    from jax.experimental import topologies

    return SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])


def on(device: Any, tree: Any) -> Any:
    """The shapes of a tree, on the device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def test_the_update_and_the_rollout_compile_for_a_tpu(tpu: Any, tmp_path: Path):
    spec = read_folder_spec(build_model_folder(tmp_path, "gemma3", "new"))
    lora = LoraConfig(rank=8)
    model = Transformer(spec, jnp.dtype("bfloat16"), lora.scale, "layer")
    base = on(tpu, abstract_params(spec, jnp.bfloat16))
    adapters = jax.eval_shape(lambda: init_lora(spec, lora, jax.random.key(0)))
    optim = OptimConfig()
    learner = Learner(
        model, ObjectiveConfig(), make_optimizer(optim, 10), functools.partial(learning_rate_at, optim, 10), False, 1.0, C, (1, 2)
    )
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "prompt_ids": ((B, P), jnp.int32),
        "prompt_lengths": ((B,), jnp.int32),
        "completion_ids": ((B * G, C), jnp.int32),
        "completion_mask": ((B * G, C), jnp.bool_),
        "sampler_logprobs": ((B * G, C), jnp.float32),
        "rewards": ((B, G), jnp.float32),
        "valid": ((B, G), jnp.bool_),
    }
    batch = TrainBatch(**{name: jax.ShapeDtypeStruct(*value) for name, value in shapes.items()})
    state = on(tpu, jax.eval_shape(learner.init, adapters))
    update = jax.jit(learner.train_step, donate_argnums=0).lower(state, on(tpu, batch), Frozen(base, {})).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert update.memory_analysis().alias_size_in_bytes >= size  # the new state takes over the old one's memory

    rollout = RolloutConfig(num_generations=G, max_completion_length=C, top_p=0.9)
    arguments = (
        {"params": base, "lora": on(tpu, adapters)},
        on(tpu, batch.prompt_ids),
        on(tpu, batch.prompt_lengths),
        on(tpu, batch.prompt_lengths),
        on(tpu, controls_of(rollout, seed=0, step=0)),
        on(tpu, jax.ShapeDtypeStruct((G, C), jnp.int32)),
    )
    compiled = jax.jit(functools.partial(decode, model, (1, 2))).lower(*arguments).compile()
    ids, logps, lengths, done = compiled.out_info
    assert (ids.shape, logps.shape, lengths.shape, done.shape) == ((B, G, C), (B, G, C), (B, G), (B, G))
