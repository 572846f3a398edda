"""`gated_delta_rule` on a TPU: a Pallas kernel that passes over the chunks of a row, with its states in vector memory.

`mosaic_tpu_backward.py` has its gradient. The grid is (rows, heads of keys, blocks of chunks); the R heads of values that a head of
keys serves share its products of keys and queries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.gated_delta_rule.block_sizes import kernel_memory_bytes
from grpo_kernels.ops.gated_delta_rule.mosaic_tpu_backward import run_backward
from grpo_kernels.ops.gated_delta_rule.plan import OF_PROMPT, DeltaPlan
from grpo_kernels.ops.gated_delta_rule.tpu_arrays import Arrays, arrays_of, cost, flat, specs_of, unflat, wide_state
from grpo_kernels.ops.gated_delta_rule.tpu_chunk import Static, chunk_rows, chunks_of, columns_of, flags_at, follow
from grpo_kernels.ops.gated_delta_rule.triangular import inverse_of


def forward_kernel(*refs: Any, static: Static, keeps: bool) -> None:
    """A block of chunks of one head of keys and its R heads of values.

    Args:
        refs: flags; q, k [1, tokens, Dk], v [1, tokens, R·Dv], log_decay, beta [1, 1, R, tokens], table [1, 5, tokens], initial
            state [1, R, Dk, Dv]; out as v, final state; where they are kept the states at the block's start [1, 1, s, R, Dk, Dv];
            then scratch: the states [s, R, Dk, Dv].
        keeps: whether there is a backward pass.
    """
    scalars, q, k, v, log_decay, beta, table, initial, out, final, *kept, states = refs
    block = pl.program_id(2)
    first_chunk = (pl.program_id(0) * pl.num_programs(2) + block) * static.chunks

    @pl.when(block == 0)
    def _() -> None:
        for state in range(static.states):
            states[state] = initial[0]

    if keeps:
        kept[0][0, 0] = states[...]

    def one(number: Array, _: Any) -> None:
        flags = flags_at(scalars, first_chunk + number)
        own = chunk_rows(static, number)
        first = (block * static.chunks + number) * static.chunk

        @pl.when(flags[0] < 0)
        def _() -> None:
            out[0, own] = jnp.zeros((static.chunk, out.shape[2]), out.dtype)

        @pl.when(flags[0] >= 0)
        def _() -> None:
            heads = chunks_of(static, q[0, own], k[0, own], table[0, :, own], log_decay[0, 0, :, own], first, flags)
            for head, chunk in enumerate(heads):
                columns = columns_of(v, static, head)
                before = [states[state, head] for state in range(static.states)]
                rate = chunk.masks.to_column(beta[0, 0, head : head + 1, own])
                surprise = rate * (v[0, own, columns].astype(jnp.float32) - chunk.read(chunk.k, before))
                added = einsum_float32("ij,je->ie", inverse_of(chunk.matrix(rate)), surprise)
                scores = (chunk.of_queries * chunk.decays.between).astype(v.dtype)
                result = chunk.read(chunk.q, before) + einsum_float32("ij,je->ie", scores, added.astype(v.dtype))
                out[0, own, columns] = result.astype(out.dtype)
                follow(chunk, before, added, states, head)

    jax.lax.fori_loop(0, static.chunks, one, None)

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        final[0] = states[0]


def run_forward(
    arrays: Arrays, flags: Int[Array, "numbers"], initial: Float[Array, "B H Wk Wv"], static: Static, *, keeps: bool
) -> Any:
    """Launches the forward kernel; returns the result, the final state, and the kept states [B, blocks, s, H, Wk, Wv]."""
    rows, size, _ = arrays.q.shape
    tokens, shape = static.chunk * static.chunks, initial.shape
    specs = specs_of(arrays, static, shape)
    kept = jax.ShapeDtypeStruct((rows, size // tokens, static.states, *shape[1:]), jnp.float32)
    results = [jax.ShapeDtypeStruct(arrays.v.shape, arrays.v.dtype), jax.ShapeDtypeStruct(shape, jnp.float32)]
    results += [kept] if keeps else []
    return pl.pallas_call(
        functools.partial(forward_kernel, static=static, keeps=keeps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, static.key_heads, size // tokens),
            in_specs=[specs[kind] for kind in ("keys", "keys", "values", "numbers", "numbers", "table", "state")],
            out_specs=[specs[kind] for kind in ("values", "state", "kept")[: len(results)]],
            scratch_shapes=[pltpu.VMEM((static.states, static.each, *shape[2:]), jnp.float32)],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=kernel_memory_bytes()
        ),
        cost_estimate=cost(arrays, results, static, shape, products=1),
        name="gated_delta_rule",
    )(flags, *arrays, initial)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    initial: Array,
    table: Int[Array, "B 5 U"],
    flags: Int[Array, "numbers"],
    static: Static,
) -> tuple[Array, Array]:
    """Computes `gated_delta_rule_mosaic_tpu` with its gradient."""
    arrays = arrays_of(static, q, k, v, log_decay, beta, table)
    out, final = run_forward(arrays, flags, wide_state(initial), static, keeps=False)
    return unflat(out, v), final[:, :, : k.shape[3], : v.shape[3]]


def rule_forward(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, initial: Array, table: Array, flags: Array, static: Static
) -> tuple[Any, Any]:
    """Computes `rule`, and the arrays that its backward pass needs."""
    arrays = arrays_of(static, q, k, v, log_decay, beta, table)
    out, final, kept = run_forward(arrays, flags, wide_state(initial), static, keeps=True)
    results = unflat(out, v), final[:, :, : k.shape[3], : v.shape[3]]
    return results, (q, k, v, log_decay, beta, table, flags, kept)


def rule_backward(static: Static, residuals: Any, d_results: tuple[Array, Array]) -> tuple[Any, ...]:
    """Computes the gradients of all arguments but the plan's."""
    q, k, v, log_decay, beta, table, flags, kept = residuals
    d_out, d_final = d_results
    arrays = arrays_of(static, q, k, v, log_decay, beta, table)
    gradients = run_backward(arrays, flags, kept, flat(d_out.astype(v.dtype)), wide_state(d_final), static)
    dq, dk, dv, d_log_decay, d_beta, d_initial = gradients

    def of_tokens(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[3]), 1, 2)

    none = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in (table, flags))
    numbers = of_tokens(d_log_decay), of_tokens(d_beta)
    return unflat(dq, q), unflat(dk, k), unflat(dv, v), *numbers, d_initial[:, :, : k.shape[3], : v.shape[3]], *none


rule.defvjp(rule_forward, rule_backward)


def gated_delta_rule_mosaic_tpu(
    q: Float[Array, "B U K Dk"],
    k: Float[Array, "B U K Dk"],
    v: Float[Array, "B U H Dv"],
    log_decay: Float[Array, "B U H"],
    beta: Float[Array, "B U H"],
    plan: DeltaPlan,
    initial_state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B U H Dv"], Float[Array, "B H Dk Dv"]]:
    """Computes `gated_delta_rule` of rows of whole blocks; log_decay, beta and the state are float32."""
    states = 2 if plan.prompts else 1
    static = Static(plan.blocks.chunk, plan.blocks.chunks, q.shape[2], v.shape[2] // q.shape[2], states)
    table = jnp.concatenate([plan.bounds, plan.sources[:, None]], axis=1)
    of_prompt = (plan.sources == OF_PROMPT).reshape(*plan.ends.shape[:2], -1)
    flags = jnp.concatenate([plan.ends, jnp.any(of_prompt, axis=2, keepdims=True).astype(jnp.int32)], axis=2).reshape(-1)
    return rule(q, k, v, log_decay, beta, initial_state, table, flags, static)
