"""Ceilings of the device, measured: the rate of large matrix products, and of reading and writing memory."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from grpo_kernels.numerics import precision_of


def best_seconds(program: Any, *arguments: Any) -> float:
    """Returns the shortest time of eight calls, after one to warm up."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_ceiling(dtype: Any) -> float:
    """Measures the operations per second of a large square matrix product."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision_of(dtype)))
    return 2 * size**3 / best_seconds(product, x, x)


def memory_ceiling() -> float:
    """Measures the bytes per second, read and written, of an addition to an array larger than any cache."""
    count = 2**26 if jax.default_backend() == "cpu" else 2**29
    x = jnp.ones((count,), jnp.float32)
    return 8 * count / best_seconds(jax.jit(lambda a: a + jnp.float32(1)), x)
