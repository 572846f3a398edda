"""The last layer, its log-softmax and the gather of the tokens, without a [tokens, vocabulary] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.frozen import How, frozen_head
from grpo_kernels.ops.head_logprob.reference import head_logprob_reference
from grpo_kernels.ops.head_logprob.trained import trained_head
from grpo_kernels.target import platform

__all__ = ["head_logprob"]


def head_logprob(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
    head_trainable: bool = False,
    vocab_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Log-probability of each token, and the entropy and log-sum-exp of its distribution.

    Args:
        x: hidden states, float32 or bfloat16; with `w` in the same dtype.
        w: the head, one row per vocabulary entry.
        ids: the tokens. One that is no row of the head has probability 0, logp −∞.
        temperature: divides the (capped) logits; has no gradient.
        softcap: c in c·tanh(logit / c); None is off.
        head_trainable: whether `w`, or the entropy, needs a gradient. If not, the gradient with respect to x takes one vector per
            token, found in the forward pass, and entropy has none. If so, every implementation but `reference` computes logits
            again in the backward pass, in plain XLA, `tpu` too: twice the operations.
        vocab_axis: within `shard_map`, the mesh axis along which the head lies: `w` is this device's rows, equally many on each,
            in the order of the axis; ids count through all of them, and x and ids are the same on each. So are the results, and a
            frozen head's gradient, whose backward pass has no collective. Take gradients outside of `shard_map`, or within one
            that checks how values vary (its default).
        implementation: `reference` (plain, builds [T, V]), `tpu` (Pallas, no logits in device memory), `gpu` (plain XLA, at most
            4,096 × 2,048 logits at once; runs anywhere), or None: `tpu` on a TPU, else `gpu`.

    Returns:
        (logp, entropy, lse), float32 nats.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"head_logprob: x {x.shape} and w {w.shape} do not fit; x is [T, H], w is [V, H]")
    if 0 in x.shape or 0 in w.shape:
        raise ValueError(f"head_logprob: x {x.shape} or w {w.shape} is empty; give at least one token and one row")
    if ids.shape != x.shape[:1]:
        raise ValueError(f"head_logprob: ids {ids.shape} do not fit x {x.shape}; one id per row")
    if x.dtype != w.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"head_logprob: x is {x.dtype} and w is {w.dtype}; make both float32 or both bfloat16")
    if implementation is None:
        implementation = "tpu" if platform() == "tpu" else "gpu"
    if implementation not in ("reference", "tpu", "gpu"):
        raise ValueError(
            f"head_logprob: implementation {implementation!r} is unknown; use 'reference', 'tpu', 'gpu' or None for the device's"
        )
    ids, tau = ids.astype(jnp.int32), jnp.asarray(temperature, jnp.float32)
    w = w if head_trainable else jax.lax.stop_gradient(w)
    if implementation == "reference":
        logp, entropy, lse = head_logprob_reference(x, w, ids, tau, softcap, vocab_axis)
        return logp, entropy if head_trainable else jax.lax.stop_gradient(entropy), lse
    if head_trainable:
        return trained_head(x, w, ids, tau, softcap, vocab_axis)
    return frozen_head(x, w, ids, tau, How(implementation, softcap, vocab_axis))
