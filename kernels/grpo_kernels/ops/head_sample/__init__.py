"""The last layer and the draw of a token from it, without storing logits where a kernel is there for the device.

The draw inverts the distribution function at one uniform number a row, first among groups of 128 tokens, then within one. Gumbel
noise would need V random numbers a row and give up that one number fixes the token: here the same number gives the same token
on every device and in every implementation, near-ties aside, and those are reported.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.head_sample.draws import NEAR_LOGITS, Draws
from grpo_kernels.ops.head_sample.mosaic_tpu import head_sample_tpu
from grpo_kernels.ops.head_sample.reference import head_sample_reference
from grpo_kernels.target import platform

__all__ = ["Draws", "Implementation", "head_sample"]

Implementation = Literal["reference", "tpu"]


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
) -> Draws:
    """One token a row from softmax(cap(x Wᵀ) / temperature), its log-probability and the entropy. Nothing has a gradient.

    Args:
        x: hidden states, float32 or bfloat16; with `w` in the same dtype.
        w: the head, one row per vocabulary entry.
        uniform: float32 numbers in [0, 1).
        temperature: float32; divides the (capped) logits. 0 takes the most probable token, the first of them where they tie, and
            log-probability and entropy are then those at temperature 1.
        softcap: c in c·tanh(logit / c); None is off.
        banned_ids: tokens that some rows may not draw; not all of the vocabulary. Numbers past its end are no tokens anyhow.
        banned: True = the row may not draw `banned_ids`; None where no row is so.
        near: logits this close are a near-tie.
        vocab_axis: within `shard_map(check_vma=False)`, the mesh axis along which the head lies: `w` is this device's rows, equally
            many on each, in the order of the axis; all else is the same on each, and so are the results, whose ids count through
            all rows. A row's token is the one that a single device draws, near-ties aside; ten numbers of it pass between
            the devices.
        implementation: `reference` (plain, builds [S, V]), `tpu` (Pallas, [S, V/128]), or None: `tpu` on a TPU, else `reference`.

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
    if implementation is None:
        implementation = "tpu" if platform() == "tpu" else "reference"
    if implementation not in ("reference", "tpu"):
        raise ValueError(f"head_sample: implementation {implementation!r} is unknown; use 'reference', 'tpu' or None")
    vocabulary = w.shape[0] * (1 if vocab_axis is None else jax.lax.axis_size(vocab_axis))
    banned_ids = () if banned is None else tuple(token for token in banned_ids if token < vocabulary)
    function = head_sample_tpu if implementation == "tpu" else head_sample_reference
    return function(x, w, uniform, temperature, softcap, banned_ids, banned if banned_ids else None, near, vocab_axis)
