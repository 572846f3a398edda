"""Log-probabilities of tokens from hidden states and the head, in one pass over the vocabulary: no [tokens, vocabulary] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.head_logprob.frozen import HeadOptions, frozen_head
from grpo_kernels.ops.head_logprob.reference import head_logprob_reference
from grpo_kernels.ops.head_logprob.trained import trained_head
from grpo_kernels.target import platform, resolve_implementation

__all__ = ["BlockSizes", "choose_block_sizes", "head_logprob"]


def head_logprob(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
    head_trainable: bool = False,
    vocab_axis: str | None = None,
    keep_rows: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Computes the log-probability of each token, and the entropy and log-sum-exp of its distribution.

    Args:
        x: hidden states, float32 or bfloat16; with `w` in the same dtype.
        w: the head, one row per vocabulary entry.
        ids: the tokens. A token that is no row of the head has probability 0, logp −∞.
        temperature: divides the (capped) logits; has no gradient.
        softcap: c in c·tanh(logit / c); None is off.
        head_trainable: whether `w`, or the entropy, needs a gradient. If not, the gradient with respect to x takes one vector per
            token, found in the forward pass, and entropy has none. If so, every implementation but `reference` computes logits
            again in the backward pass, in plain JAX ("mosaic_tpu" too): twice the operations.
        vocab_axis: within `shard_map`, the mesh axis along which the head is split: `w` has this device's rows, equally many on
            each device, in the order of the axis; ids index the rows of all devices. x and ids are the same on each device, and so
            are the results and a frozen head's gradient, whose backward pass has no collective. Take gradients outside of
            `shard_map`, or within one that checks how values vary (its default).
        keep_rows: with a frozen head, keep the tokens' rows of `w` for the backward pass, T·H values, instead of `w`. Where the
            call is in a branch (`cond`), what the backward pass keeps is the branch's result: `w` would be copied.
        implementation: "reference" (plain, builds [T, V]), "xla" (plain JAX, at most 4,096 × 2,048 logits at once; runs anywhere),
            "mosaic_tpu" (Pallas, no logits in device memory), or None: "mosaic_tpu" on a TPU, else "xla".
        block_sizes: of "xla" and "mosaic_tpu"; None = `choose_block_sizes`.

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
    named = resolve_implementation("head_logprob", implementation, "mosaic_tpu" if platform() == "tpu" else "xla")
    ids, tau = ids.astype(jnp.int32), jnp.asarray(temperature, jnp.float32)
    w = w if head_trainable else jax.lax.stop_gradient(w)
    if named == "reference":
        logp, entropy, lse = head_logprob_reference(x, w, ids, tau, softcap, vocab_axis)
        return logp, entropy if head_trainable else jax.lax.stop_gradient(entropy), lse

    def blocks(with_mean: bool) -> BlockSizes:
        (tokens, width), form = x.shape, "xla" if head_trainable else named
        return block_sizes or choose_block_sizes(tokens, width, w.shape[0], x.dtype.itemsize, form, with_mean=with_mean)

    if head_trainable:
        return trained_head(x, w, ids, tau, softcap, vocab_axis, blocks(False))
    return frozen_head(x, w, ids, tau, HeadOptions(named, softcap, vocab_axis, (blocks(False), blocks(True)), keep_rows))
