"""`gated_delta_rule` in plain JAX: chunks of a block side by side, block after block.

With the decays γ_ij = exp(Σ log decay of the tokens after j up to i) between tokens that depend on each other, the values that the
tokens of a chunk add to the state are (I + A)⁻¹ β (v − γ_i kᵢᵀS), A_ij = β_i γ_ij kᵢᵀkⱼ, where S is the state before the chunk that
token i starts from (https://arxiv.org/abs/2412.06464, section 3.3, and https://arxiv.org/abs/2406.06484). Sums of log decays are
never subtracted from each other, so no exponent is positive and none loses digits.

The backward pass keeps the arguments and the states at the starts of blocks, and computes the rest again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.gated_delta_rule.plan import CARRIED, DeltaPlan
from grpo_kernels.ops.gated_delta_rule.triangular import unit_lower_inverse
from grpo_kernels.ops.group_attention.key_ranges import sees


class Tokens(NamedTuple):
    """A block's arguments, cut into its n chunks of c tokens; R heads of values for each of K heads of keys.

    Attributes:
        q, k: [B, n, c, K, Dk].
        v: [B, n, c, K, R, Dv].
        log_decay, beta: [B, n, c, K, R], float32.
        bounds: [B, 4, n, c].
        at: [n, c], index of each token in the row.
        sources: [B, n, c].
        ends: [B, n, 2].
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array
    beta: Array
    bounds: Array
    at: Array
    sources: Array
    ends: Array


class Chunk(NamedTuple):
    """What a chunk needs next to its states; the leading axes are [n, B, K, R].

    Attributes:
        q, k: [n, B, c, K, Dk].
        v: [n, B, c, K, R, Dv].
        beta: [c].
        inverse: [c, c], (I + A)⁻¹.
        scores: [c, c], γ_ij qᵢᵀkⱼ.
        enter: [n, B, K, R, s, c], decay of state s until each token that starts from it; 0 for others.
        leave: [n, B, K, R, s, c], decay of each token's part until the next state s.
        stay: [n, B, K, R, s, s], decay of the second state until the first, which is the next one.
    """

    q: Array
    k: Array
    v: Array
    beta: Array
    inverse: Array
    scores: Array
    enter: Array
    leave: Array
    stay: Array


def prepare(tokens: Tokens, states: int) -> Chunk:
    """Computes what does not depend on the states, for all chunks of a block."""
    bounds = [tokens.bounds[:, row, :, :, None] for row in range(4)]
    visible = sees(bounds, tokens.at[None, :, None, :])
    size = visible.shape[-1]
    seen = visible.astype(jnp.float32)
    before = jnp.tril(seen, -1)
    decays = jnp.moveaxis(tokens.log_decay, 2, 4)
    passed = einsum_float32("bnkrij,bnjl->bnkril", seen[:, :, None, None] * decays[..., None, :], before)
    between = jnp.where(visible[:, :, None, None], jnp.exp(passed), jnp.float32(0))
    keys = einsum_float32("bnikd,bnjkd->bnkij", tokens.k, tokens.k)[:, :, :, None]
    queries = einsum_float32("bnikd,bnjkd->bnkij", tokens.q, tokens.k)[:, :, :, None]
    beta = jnp.moveaxis(tokens.beta, 2, 4)
    inverse = unit_lower_inverse(beta[..., None] * keys * between * before[:, :, None, None])
    since = jnp.exp(einsum_float32("bnij,bnkrj->bnkri", seen, decays))
    starts = (tokens.sources[:, :, None, :] == jnp.arange(states, dtype=jnp.int32)[None, None, :, None]).astype(jnp.float32)
    enter = since[:, :, :, :, None] * starts[:, :, None, None]
    ends = tokens.ends[:, :, :states, None]
    last = (ends == jnp.arange(size, dtype=jnp.int32)[None, None, None, :]).astype(jnp.float32)
    leave = einsum_float32("bnsi,bnkrij->bnkrsj", last, between)
    unchanged = (ends < 0).astype(jnp.float32) * jnp.eye(states, dtype=jnp.float32)[None, None]
    stay = einsum_float32("bnzi,bnkrsi->bnkrzs", last, enter) + unchanged[:, :, None, None]
    parts = (tokens.q, tokens.k, tokens.v, beta, inverse, queries * between, enter, leave, stay)
    return Chunk(*(jnp.moveaxis(x, 1, 0) for x in parts))


def follow(states: Float[Array, "B K R s Dk Dv"], chunk: Chunk) -> tuple[Array, Array]:
    """Computes a chunk's result [B, c, K, R, Dv] and the next states. Products take operands of the arguments' format."""
    given = chunk.q.dtype
    read = states.astype(given)
    of_keys = einsum_float32("bikd,bkrsde->bkrsie", chunk.k, read)
    expected = jnp.sum(chunk.enter[..., None] * of_keys, axis=3)
    surprise = chunk.beta[..., None] * (jnp.moveaxis(chunk.v, 1, 3).astype(jnp.float32) - expected)
    added = einsum_float32("bkrij,bkrje->bkrie", chunk.inverse, surprise)
    of_queries = einsum_float32("bikd,bkrsde->bkrsie", chunk.q, read)
    out = jnp.sum(chunk.enter[..., None] * of_queries, axis=3)
    out += einsum_float32("bkrij,bkrje->bkrie", chunk.scores.astype(given), added.astype(given))
    parts = (chunk.leave[..., None] * added[:, :, :, None]).astype(given)
    states = einsum_float32("bkrzs,bkrsde->bkrzde", chunk.stay, states) + einsum_float32("bjkd,bkrsje->bkrsde", chunk.k, parts)
    return states, jnp.moveaxis(out, 3, 1).astype(given)


def gated_delta_rule_xla(
    q: Float[Array, "B U K Dk"],
    k: Float[Array, "B U K Dk"],
    v: Float[Array, "B U H Dv"],
    log_decay: Float[Array, "B U H"],
    beta: Float[Array, "B U H"],
    plan: DeltaPlan,
    initial_state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B U H Dv"], Float[Array, "B H Dk Dv"]]:
    """Computes `gated_delta_rule` of rows of whole blocks; log_decay, beta and the state are float32."""
    rows, size, key_heads, width = q.shape
    heads, wide = v.shape[2:]
    each, states = heads // key_heads, 2 if plan.prompts else 1
    chunk, chunks = plan.blocks.chunk, plan.blocks.chunks
    cut = (size // plan.blocks.tokens, chunks, chunk)

    def blocks(x: Array, dim: int, *shape: int) -> Array:
        """Cuts a dimension of tokens into blocks, which come first."""
        whole = x.reshape(*x.shape[:dim], *cut, *(shape or x.shape[dim + 1 :]))
        return jnp.moveaxis(whole, dim, 0)

    tokens = Tokens(
        q=blocks(q, 1),
        k=blocks(k, 1),
        v=blocks(v, 1, key_heads, each, wide),
        log_decay=blocks(log_decay, 1, key_heads, each),
        beta=blocks(beta, 1, key_heads, each),
        bounds=blocks(plan.bounds, 2),
        at=jnp.arange(size, dtype=jnp.int32).reshape(cut),
        sources=blocks(plan.sources, 1),
        ends=jnp.moveaxis(plan.ends.reshape(rows, *cut[:2], 2), 1, 0),
    )

    def block(before: Array, own: Tokens) -> tuple[Array, Any]:
        return jax.lax.scan(follow, before, prepare(own, states))

    first = jnp.broadcast_to(
        initial_state.reshape(rows, key_heads, each, 1, width, wide), (rows, key_heads, each, states, width, wide)
    )
    last, out = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), first, tokens)
    out = jnp.moveaxis(out, 2, 0).reshape(rows, size, heads, wide)
    return out, last[:, :, :, CARRIED].reshape(initial_state.shape)
