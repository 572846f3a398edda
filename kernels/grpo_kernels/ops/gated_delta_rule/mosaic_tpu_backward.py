"""The gradient of `gated_delta_rule` on a TPU: one Pallas kernel that passes over the blocks of a row backwards.

Of each block it first computes the states, inverses and added values of its chunks again, from the states at the block's start, and
keeps them in vector memory. Then it passes over the chunks backwards, with the gradients of the states.

With S the state that a token starts from, r = β (v − γ kᵀS) and u = (I + A)⁻¹ r the added values: dr = (I + A)⁻ᵀ du and
dA = −dr uᵀ, so the inverse itself has no gradient to compute.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.gated_delta_rule.block_sizes import kernel_memory_bytes
from grpo_kernels.ops.gated_delta_rule.tpu_arrays import Arrays, cost, specs_of
from grpo_kernels.ops.gated_delta_rule.tpu_chunk import (
    Chunk,
    Static,
    chunk_rows,
    chunks_of,
    columns_of,
    computed_if,
    flags_at,
    follow,
)
from grpo_kernels.ops.gated_delta_rule.triangular import inverse_of


class Known(NamedTuple):
    """What a chunk's backward pass is given, for one head of values.

    Attributes:
        states: before the chunk, [Dk, Dv] each.
        d_next: gradients of the states behind it.
        inverse: (I + A)⁻¹ [c, c].
        added: [c, Dv].
        value: [c, Dv].
        rate: β [c, 1].
        d_out: [c, Dv].
    """

    states: list[Array]
    d_next: list[Array]
    inverse: Array
    added: Array
    value: Array
    rate: Array
    d_out: Array


class Gradients(NamedTuple):
    """Gradients of a chunk of one head of values.

    Attributes:
        q, k: [c, Dk], without the part through products of keys and queries.
        of_keys, of_queries: [c, c], of those products.
        value: [c, Dv].
        log_decay, beta: [1, c].
        states: of those before the chunk.
    """

    q: Array
    k: Array
    of_keys: Array
    of_queries: Array
    value: Array
    log_decay: Array
    beta: Array
    states: list[Array]


class Read(NamedTuple):
    """What depends on one state before the chunk: kᵀS with its decay [c, Dv], and gradients of q, k, the decay and the state."""

    expected: Array
    q: Array
    k: Array
    enter: Array
    state: Array


def through_state(chunk: Chunk, number: int, state: Array, d_surprise: Array, d_out: Array) -> Read:
    """What the chunk's keys and queries read from a state.

    Args:
        number: of the state.
        d_surprise: gradient of v − γ kᵀS, [c, Dv].
    """
    given = chunk.k.dtype

    def compute() -> Read:
        enter, read = chunk.enter[number], state.astype(given)
        of_keys, of_queries = (einsum_float32("id,de->ie", left, read) for left in (chunk.k, chunk.q))
        d_keys, d_queries = (-enter * d_surprise).astype(given), (enter * d_out.astype(jnp.float32)).astype(given)
        d_enter = jnp.sum(d_out.astype(jnp.float32) * of_queries - d_surprise * of_keys, axis=1, keepdims=True)
        d_state = einsum_float32("di,ie->de", chunk.k_columns, d_keys)
        d_state += einsum_float32("di,ie->de", chunk.q_columns, d_queries)
        dq, dk = (einsum_float32("ie,de->id", left, read) for left in (d_queries, d_keys))
        return Read(enter * of_keys, dq, dk, d_enter, d_state)

    return computed_if(chunk.reads(number), compute)


def through_next(chunk: Chunk, number: int, d_next: Array, added: Array) -> tuple[Array, Array, Array]:
    """What reaches the chunk through a state behind it: gradients of the added values [c, Dv], of decays [c, c] and of k.

    Args:
        number: of the state.
        d_next: its gradient.
    """
    given, end, masks = chunk.k.dtype, chunk.flags[number], chunk.masks

    def compute() -> tuple[Array, Array, Array]:
        leave, narrow = chunk.leave(end), d_next.astype(given)
        of_next = einsum_float32("id,de->ie", chunk.k, narrow)
        d_leave = masks.to_row(jnp.sum(of_next * added, axis=1, keepdims=True))
        dk = einsum_float32("ie,de->id", (leave * added).astype(given), narrow)
        return leave * of_next, jnp.where(masks.row == end, d_leave, jnp.float32(0)), dk

    return computed_if(chunk.ends(number), compute)


def chunk_gradients(chunk: Chunk, known: Known) -> Gradients:
    """Computes the gradients of a chunk of one head."""
    given, masks = chunk.k.dtype, chunk.masks
    between, before, row = chunk.decays.between, masks.before, masks.row
    behind = [through_next(chunk, number, d_next, known.added) for number, d_next in enumerate(known.d_next)]
    d_added, d_between, dk = (functools.reduce(jnp.add, parts) for parts in zip(*behind, strict=True))
    d_added += einsum_float32("ij,ie->je", (chunk.of_queries * between).astype(given), known.d_out)
    d_solved = einsum_float32("ij,ie->je", known.inverse, d_added)
    d_surprise = known.rate * d_solved
    reads = [through_state(chunk, number, state, d_surprise, known.d_out) for number, state in enumerate(known.states)]
    surprise = known.value - sum(read.expected for read in reads)
    d_matrix = -einsum_float32("ie,je->ij", d_solved, known.added) * before
    d_beta = jnp.sum(d_solved * surprise, axis=1, keepdims=True)
    d_beta += jnp.sum(d_matrix * chunk.of_keys * between, axis=1, keepdims=True)
    d_matrix *= known.rate
    d_scores = einsum_float32("ie,je->ij", known.d_out, known.added.astype(given))
    d_between += d_scores * chunk.of_queries + d_matrix * chunk.of_keys
    d_passed = einsum_float32("ij,ik->jk", masks.seen, d_between * between) * before
    d_since, d_states = jnp.zeros_like(known.rate), []
    for source, (read, state) in enumerate(zip(reads, known.states, strict=True)):
        enter, d_enter, d_state = chunk.enter[source], read.enter, read.state
        for number, d_next in enumerate(known.d_next):
            end = chunk.flags[number]
            kept = masks.pick(end, enter)
            if source == number:
                kept += (end < 0).astype(jnp.float32)
            d_state += kept * d_next
            d_enter += jnp.where(row == end, jnp.sum(state * d_next, keepdims=True), jnp.float32(0))
        d_since += enter * d_enter
        d_states.append(d_state)
    d_log_decay = jnp.sum(masks.seen * d_since, axis=0, keepdims=True)
    d_log_decay += masks.to_row(jnp.sum(d_passed, axis=1, keepdims=True))
    return Gradients(
        q=sum(read.q for read in reads),  # type: ignore[arg-type] - there is at least one state
        k=dk + sum(read.k for read in reads),
        of_keys=d_matrix * between,
        of_queries=d_scores * between,
        value=d_surprise,
        log_decay=d_log_decay,
        beta=masks.to_row(d_beta),
        states=d_states,
    )


def backward_kernel(*refs: Any, static: Static) -> None:
    """A block of chunks of one head of keys and its R heads of values, the last block of the row first.

    Args:
        refs: flags; q, k, v, log_decay, beta, table as of the forward kernel, the states at the block's start
            [1, 1, s, R, Dk, Dv], gradients of the result and the final state; dq, dk, dv, those of log_decay, beta and the initial
            state; then scratch: gradients of the states [s, R, Dk, Dv], and for each chunk its states, inverse and added values.
    """
    scalars, q, k, v, log_decay, beta, table, kept, d_out, d_final = refs[:10]
    dq, dk, dv, d_log_decay, d_beta, d_initial, d_states, starts, inverses, added = refs[10:]
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    first_chunk = (pl.program_id(0) * pl.num_programs(2) + block) * static.chunks

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_states[...] = jnp.zeros_like(d_states)
        d_states[0] = d_final[0]

    def heads_at(number: Array, flags: Any) -> list[Chunk]:
        own, first = chunk_rows(static, number), (block * static.chunks + number) * static.chunk
        return chunks_of(static, q[0, own], k[0, own], table[0, :, own], log_decay[0, 0, :, own], first, flags)

    starts[0] = kept[0, 0]

    def again(number: Array, _: Any) -> None:
        flags, own = flags_at(scalars, first_chunk + number), chunk_rows(static, number)
        following = jnp.minimum(number + 1, static.chunks - 1)

        @pl.when(number + 1 < static.chunks)
        def _() -> None:
            starts[following] = starts[number]

        @pl.when(flags[0] >= 0)
        def _() -> None:
            for head, chunk in enumerate(heads_at(number, flags)):
                before = [starts[number, state, head] for state in range(static.states)]
                rate = chunk.masks.to_column(beta[0, 0, head : head + 1, own])
                value = v[0, own, columns_of(v, static, head)].astype(jnp.float32)
                inverse = inverse_of(chunk.matrix(rate))
                result = einsum_float32("ij,je->ie", inverse, rate * (value - chunk.read(chunk.k, before)))
                inverses[number, head], added[number, head] = inverse, result

                @pl.when(number + 1 < static.chunks)
                def _(chunk: Chunk = chunk, before: list[Array] = before, result: Array = result, head: int = head) -> None:
                    follow(chunk, before, result, starts.at[following], head)

    def one(turn: Array, _: Any) -> None:
        number = static.chunks - 1 - turn
        flags, own = flags_at(scalars, first_chunk + number), chunk_rows(static, number)

        @pl.when(flags[0] < 0)
        def _() -> None:
            for result in (dq, dk, dv):
                result[0, own] = jnp.zeros((static.chunk, result.shape[2]), result.dtype)
            for result in (d_log_decay, d_beta):
                result[0, 0, :, own] = jnp.zeros((static.each, static.chunk), jnp.float32)

        @pl.when(flags[0] >= 0)
        def _() -> None:
            found = []
            for head, chunk in enumerate(heads_at(number, flags)):
                columns = columns_of(v, static, head)
                known = Known(
                    states=[starts[number, state, head] for state in range(static.states)],
                    d_next=[d_states[state, head] for state in range(static.states)],
                    inverse=inverses[number, head],
                    added=added[number, head],
                    value=v[0, own, columns].astype(jnp.float32),
                    rate=chunk.masks.to_column(beta[0, 0, head : head + 1, own]),
                    d_out=d_out[0, own, columns],
                )
                gradients = chunk_gradients(chunk, known)
                dv[0, own, columns] = gradients.value.astype(dv.dtype)
                d_log_decay[0, 0, head : head + 1, own] = gradients.log_decay
                d_beta[0, 0, head : head + 1, own] = gradients.beta
                for state, gradient in enumerate(gradients.states):
                    d_states[state, head] = gradient
                found.append(gradients)
            keys, queries = k[0, own], q[0, own]
            of_keys, of_queries = sum(one.of_keys for one in found), sum(one.of_queries for one in found)
            of_keys = (of_keys + of_keys.T).astype(k.dtype)  # type: ignore[union-attr] - there is a head
            transposed, of_queries = of_queries.T.astype(k.dtype), of_queries.astype(k.dtype)  # type: ignore[union-attr] - as above
            of_q = sum(one.q for one in found) + einsum_float32("ij,jd->id", of_queries, keys)
            of_k = sum(one.k for one in found) + einsum_float32("ij,jd->id", transposed, queries)
            of_k += einsum_float32("ij,jd->id", of_keys, keys)
            dq[0, own], dk[0, own] = of_q.astype(dq.dtype), of_k.astype(dk.dtype)

    jax.lax.fori_loop(0, static.chunks, again, None)
    jax.lax.fori_loop(0, static.chunks, one, None)

    @pl.when(block == 0)
    def _() -> None:
        d_initial[0] = d_states[0]


def run_backward(
    arrays: Arrays,
    flags: Int[Array, "numbers"],
    kept: Float[Array, "B blocks s H Wk Wv"],
    d_out: Float[Array, "B U columns"],
    d_final: Float[Array, "B H Wk Wv"],
    static: Static,
) -> Any:
    """Launches the backward kernel; returns gradients of q, k, v, log_decay, beta and the initial state."""
    rows, size, _ = arrays.q.shape
    c, m, each, states = static.chunk, static.chunks, static.each, static.states
    shape = d_final.shape
    specs = specs_of(arrays, static, shape, backwards=True)
    of_tokens = ("keys", "keys", "values", "numbers", "numbers")
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:5], d_final)]
    scratch = [(states, each, *shape[2:]), (m, states, each, *shape[2:]), (m, each, c, c), (m, each, c, shape[3])]
    return pl.pallas_call(
        functools.partial(backward_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, static.key_heads, size // (c * m)),
            in_specs=[specs[kind] for kind in (*of_tokens, "table", "kept", "values", "state")],
            out_specs=[specs[kind] for kind in (*of_tokens, "state")],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=kernel_memory_bytes()
        ),
        cost_estimate=cost(arrays, [*results, kept, d_out, d_final], static, shape, products=3),
        name="gated_delta_rule_backward",
    )(flags, *arrays, kept, d_out, d_final)
