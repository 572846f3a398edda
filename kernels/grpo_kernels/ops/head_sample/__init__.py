"""Sampling of a token a row from hidden states and the head; the TPU kernel stores no logits.

Sampling inverts the CDF at one uniform number a row, first among groups of 128 tokens, then within one. The same number gives the
same token on every device and in every implementation, except for near-ties, which are reported. Gumbel noise would need V random
numbers a row and lose this property.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.head_sample.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.head_sample.inverse_cdf import NEAR_LOGITS, Draws
from grpo_kernels.ops.head_sample.mosaic_tpu import head_sample_mosaic_tpu
from grpo_kernels.ops.head_sample.reference import head_sample_reference
from grpo_kernels.target import platform, resolve_implementation

__all__ = ["BlockSizes", "Draws", "choose_block_sizes", "head_sample"]


def head_sample(
    x: Float[Array, "S H"],
    w: Float[Array, "V H"],
    uniform: Float[Array, "S"],
    *,
    temperature: Float[Array, ""],
    softcap: float | None = None,
    banned_ids: tuple[int, ...] = (),
    banned: Bool[Array, "S"] | None = None,
    near: float = NEAR_LOGITS,
    vocab_axis: str | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Draws:
    """Samples one token a row from softmax(cap(x Wᵀ) / temperature), with its log-probability and the entropy. Has no gradient.

    Args:
        x: hidden states, float32 or bfloat16; with `w` in the same dtype.
        w: the head, one row per vocabulary entry.
        uniform: float32 numbers in [0, 1).
        temperature: float32; divides the (capped) logits. 0 takes the most probable token, the first where several tie;
            log-probability and entropy are then those at temperature 1.
        softcap: c in c·tanh(logit / c); None is off.
        banned_ids: tokens that some rows may not draw; not all of the vocabulary. Ids past its end are ignored.
        banned: True = the row may not draw `banned_ids`; None = no row is banned.
        near: logits this close count as a near-tie.
        vocab_axis: within `shard_map(check_vma=False)`, the mesh axis along which the head is split: `w` has this device's rows,
            equally many on each device, in the order of the axis. All other arguments are the same on each device, and so are the
            results, whose ids index the rows of all devices. Except for near-ties, the token is the one that a single device
            draws. Ten numbers a row are communicated.
        implementation: "reference" (plain, builds [S, V]), "mosaic_tpu" (Pallas, [S, V/128]), or None: "mosaic_tpu" on a TPU, else
            "reference".
        block_sizes: of "mosaic_tpu"; None = `choose_block_sizes`.

    Raises:
        ValueError: shapes, dtypes or banned ids that do not fit, or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"head_sample: x {x.shape} and w {w.shape} do not fit; x is [S, H], w is [V, H]")
    if uniform.shape != x.shape[:1]:
        raise ValueError(f"head_sample: uniform {uniform.shape} does not fit x {x.shape}; one number per row")
    if x.dtype != w.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"head_sample: x is {x.dtype} and w is {w.dtype}; make both float32 or both bfloat16")
    if any(token < 0 for token in banned_ids):
        raise ValueError(f"head_sample: banned_ids {banned_ids} are not all tokens; they start at 0")
    default = "mosaic_tpu" if platform() == "tpu" else "reference"
    named = resolve_implementation("head_sample", implementation, default, ("reference", "mosaic_tpu"))
    vocabulary = w.shape[0] * (1 if vocab_axis is None else jax.lax.axis_size(vocab_axis))
    banned_ids = () if banned is None else tuple(token for token in banned_ids if token < vocabulary)
    arguments = (x, w, uniform, temperature, softcap, banned_ids, banned if banned_ids else None, near, vocab_axis)
    if named == "reference":
        return head_sample_reference(*arguments)
    return head_sample_mosaic_tpu(*arguments, block_sizes or choose_block_sizes(x.shape[0], x.shape[1], x.dtype.itemsize))
