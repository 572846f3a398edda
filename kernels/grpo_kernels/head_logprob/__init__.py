"""The last layer, its log-softmax and the gather of the tokens, without a [tokens, vocabulary] array."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.head_logprob.reference import head_logprob_reference
from grpo_kernels.head_logprob.xla import frozen_head, trainable_head

Implementation = Literal["reference", "xla"]


def head_logprob(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
    head_trainable: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Log-probability of each token, and the entropy and log-sum-exp of its distribution.

    Args:
        x: hidden states, float32 or bfloat16; with `w` in the same dtype.
        w: the head, one row per vocabulary entry.
        ids: the tokens.
        temperature: divides the (capped) logits.
        softcap: c in c·tanh(logit / c); None is off.
        head_trainable: whether `w` needs a gradient. If not, the gradient with respect to x takes one vector per token, and
            entropy has none.
        implementation: `reference` (plain, builds [T, V]), `xla` (chunks of tokens), or None for `xla`.

    Returns:
        (logp, entropy, lse), float32 nats.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"head_logprob: x {x.shape} and w {w.shape} do not fit; x is [T, H], w is [V, H]")
    if ids.shape != x.shape[:1]:
        raise ValueError(f"head_logprob: ids {ids.shape} do not fit x {x.shape}; one id per row")
    if x.dtype != w.dtype:
        raise ValueError(f"head_logprob: x is {x.dtype} and w is {w.dtype}; cast one of them")
    tau = jnp.asarray(temperature, jnp.float32)
    if implementation == "reference":
        return head_logprob_reference(x, w, ids, tau, softcap)
    if implementation not in (None, "xla"):
        raise ValueError(f"head_logprob: implementation {implementation!r} is unknown; use 'reference', 'xla' or None")
    if head_trainable:
        return trainable_head(x, w, ids, tau, softcap)
    return frozen_head(x, jax.lax.stop_gradient(w), ids, tau, softcap)
