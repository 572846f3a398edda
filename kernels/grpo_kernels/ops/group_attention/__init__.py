"""Training attention over [P | C_1 ... C_G]: a prompt is computed once for all its completions.

Published for torch as PrefixGrouper (https://arxiv.org/abs/2506.05433) and DualKV (https://arxiv.org/abs/2605.15422). Tokens fall
from G·(P + C) to P + G·C.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.group_attention.mosaic_tpu import group_attention_tpu
from grpo_kernels.ops.group_attention.reference import group_attention_reference
from grpo_kernels.ops.group_attention.xla import CPU, GPU, group_attention_xla
from grpo_kernels.target import platform

__all__ = ["Implementation", "group_attention"]

Implementation = Literal["reference", "tpu", "gpu"]


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
) -> Float[Array, "B N K R Dh"]:
    """Softmax attention, in float32, of queries that see the keys of their prompt and of their own completion.

    The tokens of prompt b are [P | C_1 ... C_G], T = P + G·C; the prompt is padded on its right. Positions count from 0 in the
    prompt, and from its length on in each completion. A query sees a key that is in the prompt (before its length) or in the
    same completion, at most `window` - 1 positions before it and not after it. A query that sees nothing gets 0.

    Gradients of q, k and v are computed again from each query's log-sum-exp; only that, the arguments and the result are kept.
    A group may be split: completions left out change nothing for the others, and the keys' gradients are sums over the parts.
    Heads may be split too, with `shard_map` over K.

    Args:
        q: queries, already scaled, R for each of the K heads of keys; float32 or bfloat16. N = T, or N = T - P + 1: then the first
            is the query of the prompt's last token, and the prompt asks nothing else.
        k, v: keys and values, in the format of q.
        prompt_lengths: tokens of each prompt, at least 1.
        prompt_width: P.
        generations: G; 0 where there are prompts alone.
        window: positions that a query sees, its own included; 2**30 is no window. May differ from call to call of one program.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        implementation: `reference` (plain, builds [B, K, R, T, T]); `tpu` (Pallas: whole blocks that see nothing cost nothing);
            `gpu` (blocks in plain JAX; runs anywhere); None: `tpu` on a TPU, else the blocks in a size for the device.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or an unknown implementation.
    """
    check(q, k, v, prompt_lengths, prompt_width, generations, softcap)
    if implementation not in (None, "reference", "tpu", "gpu"):
        raise ValueError(f"group_attention: implementation {implementation!r} is unknown; use 'reference', 'tpu', 'gpu' or None")
    device = platform()
    window = jnp.asarray(window, jnp.int32)
    rest = (prompt_lengths, prompt_width, generations, window, softcap)
    if implementation == "reference" or implementation == "tpu" or (implementation is None and device == "tpu"):
        function = group_attention_reference if implementation == "reference" else group_attention_tpu
        if q.shape[1] == k.shape[1]:
            return function(q, k, v, *rest)
        return last_and_own(function(at_last(q, prompt_lengths, prompt_width), k, v, *rest), prompt_lengths, prompt_width)
    return group_attention_xla(q, k, v, *rest, CPU if implementation is None and device == "cpu" else GPU)


def check(q: Array, k: Array, v: Array, lengths: Array, prompt_width: int, generations: int, softcap: float | None) -> None:
    """Raises ValueError where arguments do not fit."""
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
            f"group_attention: {q.shape[1]} queries; there are to be {tokens}, one for each key, or {tokens - prompt_width + 1}, "
            "one for the prompt's last token and one for each token of a completion"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"group_attention: softcap {softcap} is not positive; None turns it off")


def at_last(q: Array, lengths: Array, prompt_width: int) -> Array:
    """[B, 1 + G·C, ...] → [B, T, ...]: the first query goes to the prompt's last token, the prompt's others are zeros."""
    at = jnp.arange(prompt_width, dtype=jnp.int32)[None, :] == lengths[:, None] - 1
    prompt = jnp.where(at[:, :, None, None, None], q[:, :1], jnp.zeros((), q.dtype))
    return jnp.concatenate([prompt, q[:, 1:]], axis=1)


def last_and_own(x: Array, lengths: Array, prompt_width: int) -> Array:
    """The inverse of `at_last`."""
    last = jnp.take_along_axis(x[:, :prompt_width], (lengths - 1)[:, None, None, None, None], axis=1)
    return jnp.concatenate([last, x[:, prompt_width:]], axis=1)
