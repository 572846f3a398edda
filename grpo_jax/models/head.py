"""The output head on a mesh: log-probabilities of tokens from hidden states, with the vocabulary sharded over `tensor`.

Logits are never gathered: each device has its tokens, and either its rows of the head or, where all logits of a token are needed
(`with_full_head`), the full head and a part of the tokens. On one device these are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.runtime.sharding import Layout
from grpo_kernels import head_logprob


def head_logprobs(
    x: Float[Array, "T D"],
    w: Float[Array, "V D"],
    ids: Int[Array, "T"],
    temperature: float | Float[Array, ""],
    layout: Layout | None,
    **options: Any,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Runs `head_logprob`; on a mesh, on each device's tokens and part of the vocabulary.

    Args:
        x: hidden states, one row per token.
        w: the output head.
        layout: None is one device; else T is divisible by its row shards.
        options: softcap, head_trainable and implementation of `head_logprob`.

    Returns:
        What `head_logprob` returns, float32 nats.
    """
    if layout is None:
        return head_logprob(x, w, ids, temperature=temperature, **options)

    def local(x: Array, w: Array, ids: Array, temperature: Array) -> tuple[Array, Array, Array]:
        return head_logprob(x, w, ids, temperature=temperature, vocab_axis=layout.vocab_axis, **options)

    rows = layout.spec("rows")
    inputs = (rows, layout.decoding.spec("vocab", "embed"), rows, layout.spec())
    return layout.local(local, inputs, rows)(x, w, ids, jnp.asarray(temperature, jnp.float32))


def with_full_head(
    function: Callable[..., Any], layout: Layout | None, x: Array, w: Float[Array, "V D"], *rest: Any, scalars: Any = ()
) -> Any:
    """Calls function(x, w, *rest, *scalars); on a mesh with the full head on every device and the tokens split over `tensor` too.

    Args:
        function: treats every row alone; returns float arrays with one entry per row.
        x, rest: one row per token each.
        scalars: the same for all rows.
    """
    if layout is None:
        return function(x, w, *rest, *scalars)
    shards = layout.tensor

    def local(w: Array, scalars: Any, rows: Any) -> Any:
        if shards == 1:
            return function(rows[0], w, *rows[1:], *scalars)
        tokens = rows[0].shape[0]
        size = -(-tokens // shards)
        # All slices have one size, so the last ones start early and overlap; the join below takes each token once.
        start = jnp.minimum(jax.lax.axis_index("tensor") * size, tokens - size)
        own = [jax.lax.dynamic_slice_in_dim(row, start, size) for row in rows]
        parts = jax.lax.all_gather(function(own[0], w, *own[1:], *scalars), "tensor")
        starts = [min(number * size, tokens - size) for number in range(shards)]
        ends = [*starts[1:], tokens]

        def join(part: Array) -> Array:
            return jnp.concatenate([part[i, : ends[i] - starts[i]] for i in range(shards)])

        return jax.tree.map(join, parts)

    rows = layout.spec("rows")
    return layout.local(local, (layout.spec(), layout.spec(), rows), rows)(w, tuple(scalars), (x, *rest))
