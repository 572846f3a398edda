"""Gated delta rule over packed rows, in which a prompt's states are computed once for all sequences that continue it.

The linear attention of Qwen3-Next and Qwen3.5: gated DeltaNet (https://arxiv.org/abs/2412.06464) in its chunked form
(https://arxiv.org/abs/2406.06484). Rows are those of `group_attention`.

`plan_delta_rule` prepares what all layers share, `gated_delta_rule` computes a layer, `gated_delta_step` a token of decoding.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.gated_delta_rule.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.gated_delta_rule.mosaic_tpu import gated_delta_rule_mosaic_tpu
from grpo_kernels.ops.gated_delta_rule.plan import DeltaPlan, plan_delta_rule
from grpo_kernels.ops.gated_delta_rule.reference import gated_delta_rule_reference
from grpo_kernels.ops.gated_delta_rule.step import delta_step
from grpo_kernels.ops.gated_delta_rule.xla import gated_delta_rule_xla

__all__ = ["BlockSizes", "DeltaPlan", "choose_block_sizes", "gated_delta_rule", "gated_delta_step", "plan_delta_rule"]


def gated_delta_rule(
    q: Float[Array, "B T K Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T H Dv"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    plan: DeltaPlan,
    initial_state: Float[Array, "B H Dk Dv"] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dk Dv"]]:
    """Computes linear attention by the gated delta rule; equation 10 of https://arxiv.org/abs/2412.06464, states transposed.

    A token's state is S = e^g S₋ + k (β (v − e^g S₋ᵀk))ᵀ and its result Sᵀq, where S₋ is the state before it: of its sequence, at
    its first token of its prompt, or of zeros. Padding changes no state, and its result is 0. H is a multiple of
    K: each head of keys serves H / K heads of values that follow each other, and is not repeated in memory.

    Every argument but the plan has a gradient. The backward pass keeps the arguments and one or two states for each block, and
    computes the rest again. States, sums of decays and inverses are float32; the other products take operands in the format of q.
    Rows may be split with `shard_map` over B, heads over K and H.

    Args:
        q: queries, already normalised and scaled; float32 or bfloat16.
        k: keys, already normalised; of norm 1 or less for a stable state.
        v: values. k and v have the format of q.
        log_decay: g, at most 0, and finite.
        beta: β, how much of the value replaces what the state has for the key.
        plan: of this batch.
        initial_state: where each row's first sequence begins, float32. Later sequences that continue no prompt begin at zero, and
            for None the first one does too.

    Returns:
        The result in the format of v, and the state after each row's last token that is not padding, in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Example:
        plan = plan_delta_rule(rows.ranges, prompts=rows.limits.prompts > 0)
        out, _ = gated_delta_rule(q, k, v, log_decay, beta, plan)
    """
    check(q, k, v, log_decay, beta, initial_state)
    if (q.shape[0], q.shape[1]) != (plan.bounds.shape[0], plan.tokens):
        raise ValueError(f"gated_delta_rule: the plan is for {plan.bounds.shape[0]} rows of {plan.tokens} tokens; q is {q.shape}")
    state = initial_state
    if state is None:
        state = jnp.zeros((q.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
    log_decay, beta = log_decay.astype(jnp.float32), beta.astype(jnp.float32)
    if plan.implementation == "reference":
        return gated_delta_rule_reference(q, k, v, log_decay, beta, plan.bounds[:, :, : plan.tokens], state)
    padding = plan.bounds.shape[2] - plan.tokens
    q, k, v, log_decay, beta = (
        jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x for x in (q, k, v, log_decay, beta)
    )
    run = gated_delta_rule_mosaic_tpu if plan.implementation == "mosaic_tpu" else gated_delta_rule_xla
    out, final = run(q, k, v, log_decay, beta, plan, state)
    return out[:, : plan.tokens], final


def gated_delta_step(
    q: Float[Array, "S K Dk"],
    k: Float[Array, "S K Dk"],
    v: Float[Array, "S H Dv"],
    log_decay: Float[Array, "S H"],
    beta: Float[Array, "S H"],
    state: Float[Array, "S H Dk Dv"],
) -> tuple[Float[Array, "S H Dv"], Float[Array, "S H Dk Dv"]]:
    """Computes one token of S sequences, as `gated_delta_rule` does, and the next states; plain JAX on every device.

    Args:
        q, k, v, log_decay, beta: of the token; see `gated_delta_rule`.
        state: of each sequence, float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check(q[:, None], k[:, None], v[:, None], log_decay[:, None], beta[:, None], state)
    return delta_step(q, k, v, log_decay, beta, state)


def check(q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array | None) -> None:
    """Raises ValueError, naming the argument that does not fit."""
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"gated_delta_rule: q {q.shape}, k {k.shape} and v {v.shape} do not fit; q and k are [B, T, K, Dk], v is "
            "[B, T, H, Dv], with H a multiple of K"
        )
    if not log_decay.shape == beta.shape == v.shape[:3]:
        raise ValueError(f"gated_delta_rule: log_decay {log_decay.shape} and beta {beta.shape} are not [B, T, H], {v.shape[:3]}")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"gated_delta_rule: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all float32 or all bfloat16")
    expected = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if state is not None and (state.shape != expected or state.dtype != jnp.float32):
        raise ValueError(f"gated_delta_rule: the state is {state.dtype} {state.shape}; make it float32 {expected}")
