"""Training attention over [P | C_1 ... C_G]: a prompt is computed once for all its completions.

Published for torch as PrefixGrouper (https://arxiv.org/abs/2506.05433) and DualKV (https://arxiv.org/abs/2605.15422). Tokens fall
from G·(P + C) to P + G·C.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.group_attention.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_attention.mosaic_tpu import group_attention_mosaic_tpu
from grpo_kernels.ops.group_attention.reference import group_attention_reference
from grpo_kernels.ops.group_attention.xla import group_attention_xla
from grpo_kernels.target import platform, resolve_implementation

__all__ = ["BlockSizes", "choose_block_sizes", "group_attention"]


def group_attention(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    *,
    prompt_width: int,
    generations: int,
    window: int | Int[Array, ""],
    softcap: float | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B N K R Dh"]:
    """Computes softmax attention, in float32, of queries that see the keys of their prompt and of their own completion.

    The tokens of prompt b are [P | C_1 ... C_G], T = P + G·C; the prompt is padded on its right. Positions count from 0 in the
    prompt, and from its length on in each completion. A query sees a key that is in the prompt (before its length) or in the
    same completion, at most `window` - 1 positions before it and not after it. A query that sees nothing gets 0.

    The backward pass computes scores again from each query's log-sum-exp; it keeps only that, the arguments and the result. A group
    may be split: the other completions do not change a completion's result, and the keys' gradients are sums over the parts. Heads
    may be split too, with `shard_map` over K.

    Args:
        q: queries, already scaled, R for each of the K heads of keys; float32 or bfloat16. N = T, or N = T - P + 1: then the first
            is the query of the prompt's last token, and the prompt has no other query.
        k, v: keys and values, in the format of q.
        prompt_lengths: tokens of each prompt, at least 1.
        prompt_width: P.
        generations: G; 0 where there are prompts alone.
        window: positions that a query sees, its own included; 2**30 is no window. May differ from call to call of one program.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        implementation: "reference" (plain, builds [B, K, R, T, T]), "xla" (plain JAX in blocks; runs anywhere), "mosaic_tpu"
            (Pallas: whole blocks that see nothing cost nothing), or None: "mosaic_tpu" on a TPU, else "xla".
        block_sizes: of "xla" and "mosaic_tpu"; None = `choose_block_sizes`.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or an unknown implementation.
    """
    check(q, k, v, prompt_lengths, prompt_width, generations, softcap)
    named = resolve_implementation("group_attention", implementation, "mosaic_tpu" if platform() == "tpu" else "xla")
    rest = (k, v, prompt_lengths, prompt_width, generations, jnp.asarray(window, jnp.int32), softcap)
    completion = (k.shape[1] - prompt_width) // max(generations, 1)
    blocks = block_sizes or choose_block_sizes(prompt_width, completion, generations, q.shape[2], q.shape[3], named)
    if named == "xla":
        return group_attention_xla(q, *rest, blocks)
    last_only = q.shape[1] != k.shape[1]
    q = at_last(q, prompt_lengths, prompt_width) if last_only else q
    out = group_attention_reference(q, *rest) if named == "reference" else group_attention_mosaic_tpu(q, *rest, blocks)
    return last_and_completions(out, prompt_lengths, prompt_width) if last_only else out


def check(q: Array, k: Array, v: Array, lengths: Array, prompt_width: int, generations: int, softcap: float | None) -> None:
    """Raises ValueError, naming the argument that does not fit."""
    if q.ndim != 5 or k.ndim != 4 or q.shape[::2] != (k.shape[0], k.shape[2], k.shape[3]) or k.shape != v.shape:
        raise ValueError(
            f"group_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit; q is [B, N, K, R, Dh], k and v [B, T, K, Dh]"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"group_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all float32 or all bfloat16")
    if lengths.shape != k.shape[:1]:
        raise ValueError(f"group_attention: prompt_lengths {lengths.shape} do not fit k {k.shape}; one number per prompt")
    tokens = k.shape[1]
    if not 1 <= prompt_width <= tokens:
        raise ValueError(f"group_attention: prompt_width {prompt_width} is not between 1 and the {tokens} tokens of k {k.shape}")
    if generations < 0 or (tokens - prompt_width) % max(generations, 1) or (generations == 0 and tokens > prompt_width):
        raise ValueError(
            f"group_attention: the {tokens - prompt_width} tokens behind prompt_width {prompt_width} are not {generations} "
            "completions of one width; give the number of completions as generations"
        )
    if q.shape[1] not in (tokens, tokens - prompt_width + 1):
        raise ValueError(
            f"group_attention: {q.shape[1]} queries; there must be {tokens}, one for each key, or {tokens - prompt_width + 1}, "
            "one for the prompt's last token and one for each token of a completion"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"group_attention: softcap {softcap} is not positive; None turns it off")


def at_last(q: Array, lengths: Array, prompt_width: int) -> Array:
    """[B, 1 + G·C, ...] → [B, T, ...]: the first query moves to the prompt's last token, the prompt's other queries are zeros."""
    at = jnp.arange(prompt_width, dtype=jnp.int32)[None, :] == lengths[:, None] - 1
    prompt = jnp.where(at[:, :, None, None, None], q[:, :1], jnp.zeros((), q.dtype))
    return jnp.concatenate([prompt, q[:, 1:]], axis=1)


def last_and_completions(x: Array, lengths: Array, prompt_width: int) -> Array:
    """The inverse of `at_last`."""
    last = jnp.take_along_axis(x[:, :prompt_width], (lengths - 1)[:, None, None, None, None], axis=1)
    return jnp.concatenate([last, x[:, prompt_width:]], axis=1)
