"""Stand-ins for the kernels of "mosaic_gpu", in programs that are compiled for an absent GPU to learn their memory and never run.

Tracing the kernels takes tokamax and a JAX that describes absent devices. A stand-in takes and returns the same arrays, which all
exist at once, and needs no other memory, as the kernels do. Its values mean nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def touched(*arrays: Any) -> Float[Array, ""]:
    """A number that depends on every array."""
    return jnp.stack([x[(0,) * x.ndim].astype(jnp.float32) for x in arrays]).sum()


def moved(x: Array, number: Float[Array, ""]) -> Array:
    """An array of x's shape that cannot be written over x, as its rows change places."""
    return jnp.flip(x, axis=1) + number.astype(x.dtype)


def forward(
    q: Float[Array, "B N H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    start: Int[Array, "B N"],
    end: Int[Array, "B N"],
    softcap: float | None,
) -> tuple[Float[Array, "B N H Dh"], Float[Array, "B H N"]]:
    """Returns arrays of the shapes of a part's result and log-sum-exp."""
    q, k, v, start, end = jax.lax.optimization_barrier((q, k, v, start, end))
    number = touched(q, k, v, start, end)
    # Not from q with its axes swapped: the compiler would give q another layout, and copy it.
    lse = jnp.broadcast_to(start[:, None].astype(jnp.float32) + number, (q.shape[0], q.shape[2], q.shape[1]))
    return jax.lax.optimization_barrier((moved(q, number), lse))


def backward(
    q: Float[Array, "B N H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    d_out: Float[Array, "B N H Dh"],
    of_query: Float[Array, "B H two N"],
    bounds: Int[Array, "B 4 N"],
    tiles: Any,
    softcap: float | None,
) -> tuple[Array, Array, Array]:
    """Returns arrays of the shapes of dq, dk and dv."""
    arguments = jax.lax.optimization_barrier((q, k, v, d_out, of_query, bounds, tiles))
    number = touched(*jax.tree.leaves(arguments))
    return jax.lax.optimization_barrier((moved(arguments[0], number), moved(arguments[1], number), moved(arguments[2], number)))
