"""Time of `group_attention` on this device: `python kernels/bench/group_attention.py [--prompt 512] ...`.

Forward and backward of one layer, each implementation, the shortest of several interleaved runs. Next to the milliseconds:
operations of the pairs of tokens that see each other (14 · H · Dh a pair: 4 forward, 10 backward), as a share of what a matrix
product of the same dtype reaches in the same run; and the bytes of q, k, v, the result and their gradients, each once.

On an NVIDIA GPU `cudnn` is next to them: each completion with a copy of its prompt, as without shared prompts.
`--check` compares results and gradients with the reference in float32 first, at lengths that differ, and fails if one is wrong.
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
import numpy as np

from grpo_kernels import NO_WINDOW, group_attention
from grpo_kernels.ops.group_attention import KeyRanges, Limits, plan_attention
from grpo_kernels.ops.group_attention.mosaic_gpu import refusal
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


def packed(groups: list[tuple[int, list[int]]], tokens: int) -> np.ndarray:
    """[4, tokens]: the key ranges of one row, of prompts and the lengths of the completions behind each."""
    ranges, at = np.zeros((4, tokens), np.int32), 0
    for prompt, completions in groups:
        first = at
        for number, length in enumerate((prompt, *completions)):
            own = slice(at, at + length)
            ranges[:2, own] = np.array([[first], [first + prompt]]) if number else 0
            ranges[2, own], ranges[3, own] = at, np.arange(at, at + length) + 1
            at += length
    return ranges


def forward_and_backward(
    implementation: str | None, shape: Shape, limits: Limits, softcap: float | None = None
) -> Callable[..., Any]:
    """Jitted (key ranges, q, k, v, gradient of the result) → result and gradients."""

    def run(ranges: KeyRanges, q: Any, k: Any, v: Any, d_out: Any) -> Any:
        plan = plan_attention(
            ranges,
            limits,
            keys=k.shape[1],
            kv_heads=shape.kv_heads,
            heads_of_key=shape.queries,
            window=shape.window or NO_WINDOW,
            head_dim=shape.head_dim,
            dtype=q.dtype,
            implementation=implementation,
        )
        out, pullback = jax.vjp(functools.partial(group_attention, plan=plan, softcap=softcap), q, k, v)
        return out, *pullback(d_out)

    return jax.jit(run)


def cudnn(shape: Shape) -> Callable[..., Any]:
    """Jitted (q, k, v, gradient of the result) → result and gradients: causal attention of one completion a row."""

    def run(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        window = None if shape.window is None else (shape.window - 1, 0)
        attend = functools.partial(
            jax.nn.dot_product_attention, scale=1.0, is_causal=True, local_window_size=window, implementation="cudnn"
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    return jax.jit(run)


CHECKED = {
    "64": (Shape(1, 7, 64), None),
    "128": (Shape(2, 4, 128), None),
    "128, window": (Shape(2, 4, 128, 300), None),
    "128, soft cap": (Shape(2, 4, 128), 20.0),
    "256, window": (Shape(2, 2, 256, 200), None),
}
TOLERANCE = {None: 6e-3, 20.0: 1e-2}
"""Of the norm, by soft cap. Weights and results are rounded to bfloat16, 2⁻⁹ each; a GPU's tanh has an error of 2⁻¹¹ besides."""


def check(names: list[str]) -> bool:
    """Prints errors relative to the reference in float32; returns whether all are small."""
    rows = [
        [(200, [190, 3, 150]), (77, [120, 64])],
        [(400, [300, 100]), (5, [])],
        [(1, [1]), (130, [128])],
    ]
    ranges = KeyRanges(*map(jnp.asarray, np.stack([packed(row, 900) for row in rows], axis=1)))
    limits, fine = Limits(2, 400, 400), True
    for title, (shape, softcap) in CHECKED.items():
        keys = (len(rows), 900, shape.kv_heads, shape.head_dim)
        sizes = ((*keys[:3], shape.queries, shape.head_dim), keys, keys, (*keys[:3], shape.queries, shape.head_dim))
        arrays = [jax.random.normal(jax.random.key(n), size, jnp.bfloat16) for n, size in enumerate(sizes)]
        arrays[0] = arrays[0] / 8
        expected = forward_and_backward("reference", shape, limits, softcap)(ranges, *(x.astype(jnp.float32) for x in arrays))
        for name in names:
            got = forward_and_backward(name, shape, limits, softcap)(ranges, *arrays)
            errors = [
                float(np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other))
                for one, other in zip(got, map(np.asarray, expected), strict=True)
            ]
            good = all(error < TOLERANCE[softcap] for error in errors)  # NaN is not
            fine &= good
            numbers = ", ".join(f"{what} {error:.1e}" for what, error in zip(("out", "dq", "dk", "dv"), errors, strict=True))
            print(f"{title:14} {name:10} {numbers} {'' if good else 'WRONG'}", flush=True)
    return fine


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
    parser.add_argument("--check", action="store_true", help="results and gradients first")
    args = parser.parse_args()
    device = jax.default_backend()
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Lengths) if getattr(args, field.name)}
    lengths = dataclasses.replace(Lengths(4, 8, 512, 128) if device == "cpu" else EVEN, **given)
    shapes: dict[str, Shape] = {"small": SMALL} if device == "cpu" else PUBLISHED
    dtype = "float32" if device == "cpu" else "bfloat16"
    reason = refusal(None, jnp.bfloat16)
    if device == "gpu" and reason is not None:
        print(f"mosaic_gpu {reason}")
    names = (
        args.implementation
        or {
            "tpu": ["reference", "xla", "mosaic_tpu"],
            "gpu": ["xla", "cudnn"] if reason else ["xla", "mosaic_gpu", "cudnn"],
            "cpu": ["reference", "xla"],
        }[device]
    )
    if args.check and not check([name for name in names if name not in ("reference", "cudnn")]):
        raise SystemExit("wrong results; not timed")
    limit = operations_per_second(dtype)
    print(f"{jax.devices()[0].device_kind}: {limit / 1e12:.2f} TFLOP/s in {dtype}; {lengths}")
    tokens = lengths.prompt + lengths.generations * lengths.completion
    row = packed([(lengths.prompt, [lengths.completion] * lengths.generations)], tokens)
    ranges = KeyRanges(*(jnp.broadcast_to(jnp.asarray(x), (lengths.prompts, tokens)) for x in row))
    limits = Limits(1, lengths.prompt, max(lengths.prompt, lengths.completion))

    def random(*sizes: tuple[int, ...]) -> list[jax.Array]:
        return [jax.random.normal(jax.random.key(n), size, dtype) / 3 for n, size in enumerate(sizes)]

    for title, shape in shapes.items():
        keys = (lengths.prompts, tokens, shape.kv_heads, shape.head_dim)
        queries = (*keys[:3], shape.queries, shape.head_dim)
        q, k, v, d_out = random(queries, keys, keys, queries)
        programs = {name: functools.partial(forward_and_backward(name, shape, limits), ranges, q, k, v, d_out) for name in names}
        if "cudnn" in names:
            long = (lengths.prompts * lengths.generations, lengths.prompt + lengths.completion)
            of_keys, of_queries = ((*long, heads, shape.head_dim) for heads in (shape.kv_heads, shape.kv_heads * shape.queries))
            programs["cudnn"] = functools.partial(cudnn(shape), *random(of_queries, of_keys, of_keys, of_queries))
        taken: dict[str, list[float]] = {}
        for name, program in programs.items():
            try:
                seconds(program)
                taken[name] = []
            except Exception as error:
                print(f"{title} {name:10} does not run: {str(error).splitlines()[0][:200]}")
        for _ in range(REPEATS):
            for name, times in taken.items():
                times.append(seconds(programs[name]))
        work = 14 * shape.kv_heads * shape.queries * shape.head_dim * visible_pairs(lengths, shape.window or NO_WINDOW)
        moved = 2 * (2 * q.nbytes + k.nbytes + v.nbytes)
        for name, times in taken.items():
            best = min(times)
            print(f"{title} {name:10} {1e3 * best:9.2f} ms, {work / best / limit:4.0%}, {moved / best / 1e9:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
