"""`head_logprob` with its head on four devices, held to the reference on one. A program: devices are made at the start.

`python tests/support/vocabulary_parallel.py` ends silently, or with what differs. One token is no row of the head.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec

from grpo_kernels import head_logprob

T, H, V = 23, 16, 4 * 297
ABSENT = 3


def loss(x: Any, w: Any, ids: Any, along: Any, trainable: bool, axis: str | None, implementation: str) -> Any:
    """Sum of the outputs along random directions; and the outputs."""
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 4.0, "head_trainable": trainable}
    outputs = head_logprob(x, w, ids, vocab_axis=axis, implementation=implementation, **options)
    present = jnp.arange(T, dtype=jnp.int32) != ABSENT
    logp = jnp.where(present, outputs[0], jnp.float32(0))
    return jnp.sum(along * jnp.stack([logp, *outputs[1:]])), outputs


def agree(implementation: str, trainable: bool, checked: bool) -> None:
    """Values, dx and dW; float32 keeps seven digits."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(rows, H)), jnp.float32) for rows in (T, V))
    ids = jnp.asarray(rng.integers(0, V, T), jnp.int32).at[ABSENT].set(V)
    along = jnp.asarray(rng.normal(size=(3, T)), jnp.float32)

    def both(axis: str | None, name: str) -> Any:
        return lambda x, w: loss(x, w, ids, along, trainable, axis, name)

    parts = (PartitionSpec(), PartitionSpec("model"))
    mesh = Mesh(np.array(jax.devices()), ("model",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(both("model", implementation), mesh=mesh, in_specs=parts, out_specs=PartitionSpec(), check_vma=checked)
    with pltpu.force_tpu_interpret_mode() if implementation == "mosaic_tpu" else contextlib.nullcontext():
        got = jax.jit(jax.value_and_grad(spread, argnums=(0, 1), has_aux=True))(x, w)
    expected = jax.jit(jax.value_and_grad(both(None, "reference"), argnums=(0, 1), has_aux=True))(x, w)
    assert np.isneginf(got[0][1][0][ABSENT])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        case = f"{implementation}, {trainable=}, {checked=}"
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=case)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    for case in (
        ("reference", True, True),
        ("xla", False, True),
        ("xla", False, False),
        ("xla", True, True),
        ("xla", True, False),
        ("mosaic_tpu", False, True),
    ):
        agree(*case)
