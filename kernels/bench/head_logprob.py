"""Time and memory of `head_logprob` on this device, next to the plain form and a product's speed.

    python kernels/bench/head_logprob.py [--tokens 2048 --width 1024 --vocabulary 151936 --dtype float32]

The default shape suits a CPU: a small model with a large vocabulary. `reference` is the plain form with all logits.
Operations are 4·T·V·H with the gradient and 2·T·V·H without one; they are compared with a product of T
tokens with a part of the head, measured in the same run. Use bfloat16 on a TPU or GPU.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
from timing import seconds_interleaved

from grpo_kernels import head_logprob
from grpo_kernels.ops.head_logprob.shapes import LAPTOP

PART = 8192
"""Rows of the head in the product that gives the device's speed."""


def gradient_of(function: Any) -> Any:
    """Log-probabilities, and their sum's gradient with respect to the hidden states."""

    def scalar(x: jax.Array, w: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = function(x, w, ids)[0]
        return jnp.sum(logp), logp

    return jax.grad(scalar, has_aux=True)


def main() -> None:
    """Prints one line an implementation, with the gradient and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=LAPTOP.tokens)
    parser.add_argument("--width", type=int, default=LAPTOP.width)
    parser.add_argument("--vocabulary", type=int, default=LAPTOP.vocabulary)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--implementation", action="append", help="several times for several; all that run here if left out")
    given = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (given.tokens, given.width), given.dtype)
    w = jax.random.normal(keys[1], (given.vocabulary, given.width), given.dtype) * jnp.asarray(0.02, given.dtype)
    ids = jax.random.randint(keys[2], (given.tokens,), 0, given.vocabulary)
    names = given.implementation or ["reference", "xla"] + ["mosaic_tpu"] * (jax.default_backend() == "tpu")
    forms = {name: functools.partial(head_logprob, implementation=name) for name in names}

    part = w[: min(PART, given.vocabulary)]
    product = jax.jit(functools.partial(jnp.einsum, "th,vh->tv", preferred_element_type=jnp.float32)).lower(x, part).compile()
    programs: dict[str, Any] = {"product": lambda: product(x, part)}
    lines: list[tuple[str, float, int]] = []
    for name, form in forms.items():
        for passes, function in ((2, gradient_of(form)), (1, form)):
            compiled = jax.jit(function).lower(x, w, ids).compile()
            key = f"{name}, {'with' if passes == 2 else 'without'} gradient"
            programs[key] = functools.partial(compiled, x, w, ids)
            memory: Any = compiled.memory_analysis()
            operations = passes * 2.0 * given.tokens * given.vocabulary * given.width
            lines.append((key, operations, memory.temp_size_in_bytes))
    seconds = seconds_interleaved(programs, given.rounds)
    speed = 2.0 * given.tokens * part.size / seconds["product"]
    shape = f"T {given.tokens:,}, H {given.width:,}, V {given.vocabulary:,}, {given.dtype}"
    print(f"{jax.devices()[0].device_kind}: {shape}; a product does {speed / 1e12:.3g} tera-operations a second")
    for key, operations, temporaries in lines:
        share = operations / seconds[key] / speed
        print(f"{key:>28}: {seconds[key] * 1e3:,.1f} ms, {share:.0%} of that, {temporaries / 2**20:,.0f} MiB of temporaries")


if __name__ == "__main__":
    main()
