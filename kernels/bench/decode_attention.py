"""Time of `decode_attention` on this device, next to the bytes that it must read.

    python kernels/bench/decode_attention.py [--slots 64] [--filled 512] [--kv int8|int4] [--implementation xla]

One layer at the sizes of an 8B model, every slot with `filled` past tokens. The bandwidth is that of a sum over an array of the
same size, measured in the same run.
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

from grpo_kernels import KVCache, decode_attention
from grpo_kernels.ops.decode_attention import GROUP, pack_int4
from grpo_kernels.ops.decode_attention.shapes import EIGHT_B, Shape


def seconds_of(program: Callable[..., Any], *arguments: Any, times: int = 20) -> float:
    """The shortest of several runs."""
    jax.block_until_ready(program(*arguments))
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


def cache(key: jax.Array, texts: int, shape: Shape, size: int, kv: str) -> KVCache:
    """Random keys and values."""
    k, v = jax.random.normal(key, (2, texts, shape.kv_heads, size, shape.width), jnp.bfloat16)
    if kv == "bfloat16":
        return KVCache(k, v)
    most, each = (127, 40) if kv == "int8" else (7, 3)
    k, v = (jnp.clip(jnp.round(x * each), -most, most).astype(jnp.int8) for x in (k, v))
    if kv == "int8":
        scale = jnp.full(k.shape[:-1], 1 / each, jnp.bfloat16)
        return KVCache(k, v, scale, scale)
    scale = jnp.full((texts, shape.kv_heads * -(-shape.width // GROUP), size), 1 / each, jnp.bfloat16)
    return KVCache(None, pack_int4(k, v), scale, scale)


def main() -> None:
    """Prints one line an implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=EIGHT_B.slots)
    parser.add_argument("--filled", type=int, default=512)
    parser.add_argument("--kv", choices=["bfloat16", "int8", "int4"], default="bfloat16")
    parser.add_argument("--implementation", action="append", help="several times for several; all that run here if left out")
    args = parser.parse_args()
    shape = dataclasses.replace(EIGHT_B, slots=args.slots)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    prefix = cache(next(keys), shape.prompts, shape, shape.prompt, args.kv)
    past_blocks = [cache(next(keys), shape.slots, shape, size, args.kv) for size in shape.past_blocks]
    segment_cache = cache(next(keys), shape.slots, shape, shape.segment, args.kv)
    q = jax.random.normal(next(keys), (shape.slots, shape.kv_heads, shape.queries, shape.width), jnp.bfloat16)
    numbers = (jnp.full((shape.prompts,), shape.prompt, jnp.int32), jnp.full((shape.slots,), args.filled, jnp.int32))
    column = sum(x.nbytes for x in jax.tree.leaves(segment_cache)) / shape.segment
    needed = sum(x.nbytes for x in jax.tree.leaves(prefix)) + column * (args.filled + 1)

    array = jnp.zeros((int(needed) // 4,), jnp.float32)
    bandwidth = needed / seconds_of(jax.jit(jnp.sum), array)
    print(f"{jax.devices()[0].device_kind}: {needed / 2**20:,.0f} MiB to read, sum over as much at {bandwidth / 1e9:,.0f} GB/s")
    kernels = {"tpu": ["mosaic_tpu"], "gpu": ["mosaic_gpu"] if args.kv == "bfloat16" else []}
    default = ["reference", "xla", *kernels.get(jax.default_backend(), [])]
    arguments = (q, prefix, numbers[0], past_blocks, segment_cache, numbers[1], jnp.int32(0))
    expected = jax.jit(functools.partial(decode_attention, implementation="reference"))(*arguments).astype(jnp.float32)
    for name in args.implementation or default:
        program = jax.jit(functools.partial(decode_attention, implementation=name))
        apart = float(jnp.max(jnp.abs(program(*arguments).astype(jnp.float32) - expected)))
        seconds = seconds_of(program, *arguments)
        share = needed / seconds / bandwidth
        print(
            f"{name:>10}: {seconds * 1e6:,.0f} µs, {needed / seconds / 1e9:,.0f} GB/s, {share:.0%} of that, "
            f"at most {apart:.4f} from the reference"
        )


if __name__ == "__main__":
    main()
