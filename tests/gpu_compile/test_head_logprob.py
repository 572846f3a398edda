"""Memory of `head_logprob` on an H200, compiled without one: `make test-gpu-compile`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from grpo_kernels import head_logprob
from grpo_kernels.ops.head_logprob.shapes import QWEN3_8B

MIB = 2**20


@pytest.mark.parametrize("trainable", [False, True])
def test_values_and_gradient_take_a_tile_of_logits(trainable: bool, h200: Any) -> None:
    """Qwen3-8B's head, 8,192 tokens; the vector that the gradient keeps, 64 MiB, counts. A naive form takes 7,122 MiB."""
    x = jax.ShapeDtypeStruct((QWEN3_8B.tokens, QWEN3_8B.width), jnp.bfloat16, sharding=h200)
    w = jax.ShapeDtypeStruct((QWEN3_8B.vocabulary, QWEN3_8B.width), jnp.bfloat16, sharding=h200)
    ids = jax.ShapeDtypeStruct((QWEN3_8B.tokens,), jnp.int32, sharding=h200)
    function = functools.partial(head_logprob, implementation="xla", head_trainable=trainable)

    def gradient(x: Any, w: Any, ids: Any) -> Any:
        return jax.value_and_grad(lambda x, w: jnp.sum(function(x, w, ids)[0]), argnums=(0, 1) if trainable else 0)(x, w)

    told = {name: jax.jit(f).lower(x, w, ids).compile().memory_analysis() for name, f in (("value", function), ("all", gradient))}
    sizes = {name: memory.temp_size_in_bytes / MIB for name, memory in told.items()}
    print(f"H200, {trainable=}: temporaries {sizes['value']:.0f} MiB, with gradient {sizes['all']:.0f}")
    assert sizes["value"] < 100
    assert sizes["all"] < 304
