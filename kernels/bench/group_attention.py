"""Time of `group_attention` on this device: `python kernels/bench/group_attention.py [--prompt 512] ...`.

Forward and backward of one layer, each implementation, the shortest of several interleaved runs. Next to the milliseconds:
operations of the pairs of tokens that see each other (14 · H · Dh a pair: 4 forward, 10 backward), as a share of what a matrix
product of the same dtype reaches in the same run; and the bytes of q, k, v, the result and their gradients, each once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_kernels import group_attention
from grpo_kernels.ops.group_attention.shapes import EVEN, PUBLISHED, SMALL, Lengths, Shape

REPEATS = 7
PRODUCT = 2048
"""Rows, columns and depth of the product that operations are measured against."""


def seconds(program: Callable[..., Any], *arguments: Any) -> float:
    """Times one run."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def operations_per_second(dtype: str) -> float:
    """Returns the operations a second of a square matrix product."""
    x = jnp.ones((PRODUCT, PRODUCT), dtype)
    program = jax.jit(functools.partial(jnp.dot, precision="highest" if dtype == "float32" else None))
    seconds(program, x, x)
    return 2 * PRODUCT**3 / min(seconds(program, x, x) for _ in range(REPEATS))


def forward_and_backward(implementation: str | None, lengths: Lengths) -> Callable[..., Any]:
    """Jitted (q, k, v, prompt lengths, window, gradient of the result) → result and gradients."""

    def run(q: Any, k: Any, v: Any, prompts: Any, window: Any, d_out: Any) -> Any:
        sizes = {"prompt_width": lengths.prompt, "generations": lengths.generations}
        attend = functools.partial(group_attention, prompt_lengths=prompts, window=window, implementation=implementation, **sizes)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    return jax.jit(run)


def visible_pairs(lengths: Lengths, window: int) -> int:
    """Counts the pairs of a query and a key that it sees, of one head with full prompts."""

    def causal(tokens: int, before: int) -> int:
        return sum(min(before + at + 1, window) for at in range(tokens))

    own = lengths.generations * causal(lengths.completion, lengths.prompt)
    return lengths.prompts * (causal(lengths.prompt, 0) + own)


def main() -> None:
    """Prints one line a shape and implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Lengths):
        parser.add_argument(f"--{field.name}", type=int)
    parser.add_argument("--implementation", action="append", help="several times for several; all that run here if left out")
    args = parser.parse_args()
    device = jax.default_backend()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Lengths) if getattr(args, field.name)}
    lengths = dataclasses.replace(Lengths(4, 8, 512, 128) if device == "cpu" else EVEN, **given)
    shapes: dict[str, Shape] = {"small": SMALL} if device == "cpu" else PUBLISHED
    dtype = "float32" if device == "cpu" else "bfloat16"
    names = args.implementation or (["reference", "xla", "mosaic_tpu"] if device == "tpu" else ["reference", "xla"])
    limit = operations_per_second(dtype)
    print(f"{jax.devices()[0].device_kind}: {limit / 1e12:.2f} TFLOP/s in {dtype}; {lengths}")
    tokens = lengths.prompt + lengths.generations * lengths.completion
    for title, shape in shapes.items():
        window = shape.window or 2**30
        keys = (lengths.prompts, tokens, shape.kv_heads, shape.head_dim)
        queries = (*keys[:3], shape.queries, shape.head_dim)
        q, k, v, d_out = (jax.random.normal(jax.random.key(n), s, dtype) for n, s in enumerate((queries, keys, keys, queries)))
        arguments = (q / 8, k, v, jnp.full((lengths.prompts,), lengths.prompt, jnp.int32), jnp.int32(window), d_out)
        programs = {name: forward_and_backward(name, lengths) for name in names}
        for program in programs.values():
            seconds(program, *arguments)
        taken = {name: [] for name in names}
        for _ in range(REPEATS):
            for name, program in programs.items():
                taken[name].append(seconds(program, *arguments))
        work = 14 * shape.kv_heads * shape.queries * shape.head_dim * visible_pairs(lengths, window)
        moved = 2 * (2 * q.nbytes + k.nbytes + v.nbytes)
        for name, times in taken.items():
            best = min(times)
            print(f"{title} {name:10} {1e3 * best:9.2f} ms, {work / best / limit:4.0%}, {moved / best / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
