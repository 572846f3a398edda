"""The last layer on a mesh: log-probabilities of tokens from hidden states, the vocabulary cut over `tensor`.

Enters: hidden states, the head and the tokens, one row a token. Leaves: float32 nats, as `grpo_kernels.ops.head_logprob` gives them.
    Logits are never gathered: each device has its tokens, and either its rows of the head or, for what needs all logits of a
    token (`with_whole_head`), the whole head and a smaller share of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.runtime.sharding import Layout
from grpo_kernels.ops.head_logprob import head_logprob


def head_logprobs(
    x: Float[Array, "T D"],
    w: Float[Array, "V D"],
    ids: Int[Array, "T"],
    temperature: float | Float[Array, ""],
    layout: Layout | None,
    **options: Any,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """`head_logprob`; on a mesh of each device's tokens and its part of the vocabulary.

    Args:
        layout: None is one device; else T divides by its row shards.
        options: softcap, head_trainable and implementation of `head_logprob`.
    """
    if layout is None:
        return head_logprob(x, w, ids, temperature=temperature, **options)

    def local(x: Array, w: Array, ids: Array, temperature: Array) -> tuple[Array, Array, Array]:
        return head_logprob(x, w, ids, temperature=temperature, vocab_axis=layout.vocab_axis, **options)

    rows = layout.spec("rows")
    inputs = (rows, layout.decoding.spec("vocab", "embed"), rows, layout.spec())
    return layout.local(local, inputs, rows)(x, w, ids, jnp.asarray(temperature, jnp.float32))


def with_whole_head(
    function: Callable[..., Any], layout: Layout | None, x: Array, w: Float[Array, "V D"], *rest: Any, numbers: Any = ()
) -> Any:
    """function(x, w, *rest, *numbers); on a mesh with the head gathered whole, and a device's tokens shared out over `tensor`.

    Args:
        function: of rows, and of nothing across them; gives float arrays with one entry a row.
        x, rest: one row a token each.
        numbers: scalars, the same for all rows.
    """
    if layout is None:
        return function(x, w, *rest, *numbers)
    shards = layout.tensor

    def local(w: Array, numbers: Any, rows: Any) -> Any:
        if shards == 1:
            return function(rows[0], w, *rows[1:], *numbers)
        tokens = rows[0].shape[0]
        each = -(-tokens // shards)
        # The last share starts early, and what it has twice is taken from the one before it.
        start = jnp.minimum(jax.lax.axis_index("tensor") * each, tokens - each)
        own = [jax.lax.dynamic_slice_in_dim(row, start, each) for row in rows]
        parts = jax.lax.all_gather(function(own[0], w, *own[1:], *numbers), "tensor")
        taken = [min(number * each, tokens - each) for number in range(shards)]
        ends = [*taken[1:], tokens]

        def join(part: Array) -> Array:
            return jnp.concatenate([part[i, : ends[i] - taken[i]] for i in range(shards)])

        return jax.tree.map(join, parts)

    rows = layout.spec("rows")
    return layout.local(local, (layout.spec(), layout.spec(), rows), rows)(w, tuple(numbers), (x, *rest))
