"""Times `grpo_loss` with its gradient, and `group_advantages`, on the device that is there: `python kernels/bench/grpo_loss.py`.

For every loss shape and implementation that runs on the device: milliseconds, bytes that must move (each array once), and the share
of the bandwidth that a plain sum of arrays reaches in the same run. JAX differentiates `reference`, the others keep slopes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_kernels import LossSettings, group_advantages, grpo_loss
from grpo_kernels.ops.group_advantages.shapes import PUBLISHED as GROUPS
from grpo_kernels.ops.grpo_loss.shapes import PUBLISHED as TOKENS

REPEATS = 20
TOKEN_BYTES = 4 * 5 + 1
"""Of a token: logp, old, reference, weight and mask are read, its slope is written."""


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The shortest of some runs; the first ones compile and warm up."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


def bandwidth() -> float:
    """Bytes a second of adding two arrays of 64 MiB into a third."""
    x = jnp.ones((2**24,), jnp.float32)
    return 3 * x.nbytes / seconds(jax.jit(jnp.add), x, x)


def loss_and_gradient(logps: Any, *rest: Any, settings: LossSettings, implementation: str) -> Any:
    """Value, sums and slope."""

    def loss_of(logps: Any) -> Any:
        return grpo_loss(logps, *rest, settings=settings, implementation=implementation)

    return jax.value_and_grad(loss_of, has_aux=True)(logps)


def main() -> None:
    """Prints the table."""
    implementations = ("reference", "xla", "mosaic_tpu") if jax.default_backend() == "tpu" else ("reference", "xla")
    limit = bandwidth()
    print(f"{jax.devices()[0].device_kind}: {limit / 1e9:.1f} GB/s")
    for name, shape in TOKENS.items():
        size = (shape.rows, shape.length)
        logps, old, ref = (-jax.random.exponential(jax.random.key(seed), size) for seed in range(3))
        advantages, mask = jnp.ones(shape.rows).at[::2].set(-1), jnp.ones(size, bool)
        arguments = (logps, old, ref, advantages, mask, jnp.full(size, 1 / logps.size))
        for loss in ("dapo", "gspo"):
            for implementation in implementations:
                settings = LossSettings(loss=loss, beta=0.04)
                program = jax.jit(functools.partial(loss_and_gradient, settings=settings, implementation=implementation))
                taken = seconds(program, *arguments)
                share = TOKEN_BYTES * logps.size / limit / taken
                print(f"grpo_loss {name} {loss:5} {implementation:10} {1e3 * taken:8.3f} ms, {share:4.0%} of the bandwidth")
    for name, shape in GROUPS.items():
        rewards = jax.random.normal(jax.random.key(0), (shape.groups, shape.size))
        for implementation in implementations:
            taken = seconds(jax.jit(functools.partial(group_advantages, implementation=implementation)), rewards)
            print(f"group_advantages {name} {implementation:10} {1e3 * taken:8.3f} ms")


if __name__ == "__main__":
    main()
