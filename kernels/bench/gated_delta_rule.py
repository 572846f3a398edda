"""Time of `gated_delta_rule` on this device: `python kernels/bench/gated_delta_rule.py [--prompt 512] ...`.

Forward and backward of one layer, each implementation, the shortest of several interleaved runs; rows have a prompt and its
completions. `copies` is the same with a copy of the prompt for each completion, as without shared prompts.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import seconds_interleaved

from grpo_kernels import KeyRanges, gated_delta_rule, plan_delta_rule
from grpo_kernels.ops.gated_delta_rule.shapes import QWEN3_5_4B, SMALL, Shape


def row(prompt: int, completion: int, generations: int) -> KeyRanges:
    """The ranges of a row: a prompt and its completions."""
    own_start = np.concatenate([np.zeros(prompt), prompt + np.repeat(np.arange(generations), completion) * completion])
    own_end = np.arange(own_start.size) + 1
    prompt_end = np.where(own_start > 0, prompt, 0)
    return KeyRanges(*(jnp.asarray(x, jnp.int32)[None] for x in (0 * own_end, prompt_end, own_start, own_end)))


def forward_and_backward(implementation: str) -> Callable[..., Any]:
    """Jitted (ranges, q, k, v, log decays, β, gradient of the result) → result and gradients."""

    def run(ranges: KeyRanges, arguments: tuple[jax.Array, ...], d_out: jax.Array) -> Any:
        plan = plan_delta_rule(ranges, prompts=True, implementation=implementation)
        out, pullback = jax.vjp(lambda *x: gated_delta_rule(*x, plan=plan)[0], *arguments)
        return out, pullback(d_out)

    return jax.jit(run)


def arrays(shape: Shape, rows: int, tokens: int, dtype: str) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Random arguments, keys and queries of norm 1, and a gradient of the result."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(heads: int, width: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, tokens, heads, width))

    q, k = (normal(shape.key_heads, shape.key_dim) for _ in range(2))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, d_out = (normal(shape.value_heads, shape.value_dim) for _ in range(2))
    numbers = (rows, tokens, shape.value_heads)
    log_decay, beta = -jnp.exp(jax.random.normal(next(keys), numbers) - 3), jax.random.uniform(next(keys), numbers)
    q, k, v, d_out = (x.astype(dtype) for x in (q, k, v, d_out))
    return (q, k, v, log_decay, beta), d_out


def main() -> None:
    """Prints one line an implementation."""
    device = jax.default_backend()
    parser = argparse.ArgumentParser(description=__doc__)
    for name, number in {"prompt": 512, "completion": 128, "generations": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=number if device == "cpu" or name == "generations" else 1024)
    parser.add_argument("--implementation", action="append", help="several times for several; all that run here if left out")
    args = parser.parse_args()
    shape, dtype = (SMALL, "float32") if device == "cpu" else (QWEN3_5_4B, "bfloat16")
    names = args.implementation or (["xla", "mosaic_tpu"] if device == "tpu" else ["xla"])
    shared = args.prompt + args.generations * args.completion
    whole, one = row(args.prompt, args.completion, args.generations), row(args.prompt, args.completion, 1)
    copies = KeyRanges(*(jnp.tile(x, (args.generations, 1)) for x in one))
    programs = {}
    for name in names:
        program = forward_and_backward(name)
        programs[name] = functools.partial(program, whole, *arrays(shape, 1, shared, dtype))
        rows, tokens = copies.own_end.shape
        programs[f"{name}, copies"] = functools.partial(program, copies, *arrays(shape, rows, tokens, dtype))
    print(f"{jax.devices()[0].device_kind}: {dtype}, {shape}; {shared} tokens, {copies.own_end.size} with copies of the prompt")
    for name, seconds in seconds_interleaved(programs).items():
        print(f"{name:>20}: {seconds * 1e3:,.1f} ms")


if __name__ == "__main__":
    main()
