"""Time of `quantized_matmul` on this device, next to a dense product and the reading of the weight.

`python kernels/bench/quantized_matmul.py [--rows 2048 64] [--format int4] [--implementation xla]`: Llama-3.1-8B's feed-forward
matrix, x W and dy Wᵀ in bfloat16. Shares are of the time that a dense bfloat16 product takes in the same run, and of the time that
reading the quantised weight takes at the bandwidth of a sum over an array of 256 MiB.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_kernels import quantize, quantized_matmul, weight_bytes
from grpo_kernels.ops.quantized_matmul.shapes import LLAMA_3_8B_UP, ROWS


def seconds_of(program: Callable[..., Any], *arguments: Any, times: int) -> float:
    """The shortest of several runs; the first one compiles."""
    jax.block_until_ready(program(*arguments))
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Prints a line for each number of rows, format, direction and implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--inputs", type=int, default=LLAMA_3_8B_UP.inputs)
    parser.add_argument("--outputs", type=int, default=LLAMA_3_8B_UP.outputs)
    parser.add_argument("--format", nargs="+", default=["int8", "int4", "nf4"])
    parser.add_argument("--implementation", nargs="+", help="all that run here if left out")
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    array = jnp.zeros((2**26,), jnp.float32)
    bandwidth = array.nbytes / seconds_of(jax.jit(jnp.sum), array, times=args.times)
    print(f"{jax.devices()[0].device_kind}: {bandwidth / 1e9:,.0f} GB/s")
    default = ["reference", "xla", "mosaic_tpu"] if jax.default_backend() == "tpu" else ["reference", "xla"]
    w = jax.random.normal(jax.random.key(0), (args.inputs, args.outputs), jnp.bfloat16)
    for rows in args.rows:
        for transpose in (False, True):
            x = jax.random.normal(jax.random.key(1), (rows, args.outputs if transpose else args.inputs), jnp.bfloat16)
            dense = seconds_of(jax.jit(lambda x, w, t=transpose: x @ (w.T if t else w)), x, w, times=args.times)
            print(f"T={rows} {'x Wᵀ' if transpose else 'x W'}: dense {1e3 * dense:.3f} ms")
            for form in args.format:
                small = jax.jit(quantize, static_argnums=1)(w, form)
                reading = weight_bytes(small) / bandwidth
                for name in args.implementation or default:
                    program = jax.jit(functools.partial(quantized_matmul, transpose=transpose, implementation=name))
                    taken = seconds_of(program, x, small, times=args.times)
                    print(f"  {form:4} {name:10} {1e3 * taken:8.3f} ms; dense {dense / taken:4.0%}, reading {reading / taken:4.0%}")


if __name__ == "__main__":
    main()
