"""`group_attention` on a Hopper GPU (H100, H200): tokamax's flash attention for each of a query's two ranges of keys, merged.

tokamax (https://github.com/openxla/tokamax) is imported when a program is traced, and only here. Its forward kernel skips blocks of
keys that lie before or behind all ranges of a block of queries. Its own gradient does not skip them, and would drop the gradient of
the log-sum-exp. So the merged result has one `custom_vjp`; its backward pass (`mosaic_gpu_backward`) takes the merged result and
log-sum-exp.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.group_attention import stand_ins
from grpo_kernels.ops.group_attention.gpu_tiles import LOG2_E, TILE, Tiles, tiles_of
from grpo_kernels.ops.group_attention.names import named
from grpo_kernels.target import HOPPER, compute_capability, platform, uses_stand_ins

HEAD_DIMS = (64, 128, 256)


class Kernels(NamedTuple):
    """What computes the parts; tests put plain JAX here.

    Attributes:
        forward: (q [B, N, H, Dh], k and v [B, T, K, Dh], start and end [B, N], soft cap) → attention to the keys of one range,
            as q, and its log-sum-exp [B, H, N], -inf where the range is empty.
        backward: as `mosaic_gpu_backward.backward`.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class Static(NamedTuple):
    """What a program is compiled for.

    Attributes:
        softcap: None is off.
        prompts: some queries see a prompt besides their own sequence.
    """

    softcap: float | None
    prompts: bool
    kernels: Kernels


def refusal(head_dim: int | None, dtype: Any) -> str | None:
    """Says why these kernels do not run here, or not with these shapes (None where unknown); returns None where they run.

    Where stand-ins are compiled for an absent GPU, the environment of the run is not this one, and is taken to have tokamax.
    """
    if sys.version_info < (3, 12) and not uses_stand_ins():
        return f"needs tokamax, which needs Python 3.12 or newer; this is {sys.version_info[0]}.{sys.version_info[1]}"
    if importlib.util.find_spec("tokamax") is None and not uses_stand_ins():
        return "needs tokamax: pip install 'grpo-jax[cuda]'"
    if platform() != "gpu" or compute_capability() != HOPPER:
        device = f"a GPU of compute capability {'.'.join(map(str, compute_capability()))}" if platform() == "gpu" else platform()
        return f"runs on a GPU of compute capability 9.0 (H100, H200), and this is {device}"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"takes heads of {', '.join(map(str, HEAD_DIMS))} elements, not {head_dim}"
    if dtype is not None and jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype)}"
    return None


def forward(
    q: Float[Array, "B N H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    start: Int[Array, "B N"],
    end: Int[Array, "B N"],
    softcap: float | None,
) -> tuple[Float[Array, "B N H Dh"], Float[Array, "B H N"]]:
    """Computes attention to one range of keys a query, and its log-sum-exp, with tokamax's kernel for Hopper GPUs."""
    from tokamax._src.ops.attention import base  # pyright: ignore[reportMissingImports]
    from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as sm90  # pyright: ignore[reportMissingImports]

    empty = start >= end
    # An empty range must not widen that of its block of queries.
    start, end = jnp.where(empty, k.shape[1], start), jnp.where(empty, 0, end)
    kernel = functools.partial(
        sm90.flash_attention_kernel,
        is_causal=False,
        logits_soft_cap=softcap,
        logits_scale=1.0,
        out_dtype=q.dtype,
        normalize_output=True,
        return_residuals=True,
        use_stable_softmax=True,
        rescale_threshold=1.0,
        # Blocks of queries differ in their work, so each is a program of its own: the GPU balances them.
        config=sm90.Config(block_q=64, block_kv=128 if q.shape[-1] <= 128 else 64, num_stages=2, persistent=False),
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out, (top, total) = base.vmap_batch_dims(kernel)(q, k, v, None, None, start[:, None], end[:, None])
    seen = total > 0
    return out, jnp.where(seen, top + jnp.log(jnp.where(seen, total, jnp.float32(1))), -jnp.inf)


def backward(*arguments: Any) -> tuple[Array, Array, Array]:
    """Computes gradients with kernels that are imported here, because importing Mosaic GPU takes 0.3 s on every machine."""
    from grpo_kernels.ops.group_attention import mosaic_gpu_backward

    return mosaic_gpu_backward.backward(*arguments)


def merge(
    one: tuple[Float[Array, "B N H Dh"], Float[Array, "B H N"]], other: tuple[Float[Array, "B N H Dh"], Float[Array, "B H N"]]
) -> tuple[Float[Array, "B N H Dh"], Float[Array, "B H N"]]:
    """Merges attention to two sets of keys by their log-sum-exps, in float32."""
    lse = jnp.stack([one[1], other[1]])
    top = jnp.max(lse, axis=0, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, jnp.float32(0)))
    total = jnp.sum(weights, axis=0, keepdims=True)
    safe = jnp.where(total > 0, total, jnp.float32(1))
    shares = jnp.swapaxes(weights / safe, 2, 3)[..., None]
    out = shares[0] * one[0].astype(jnp.float32) + shares[1] * other[0].astype(jnp.float32)
    return out.astype(one[0].dtype), (top + jnp.log(safe))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q: Float[Array, "B N H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    tiles: Tiles,
    static: Static,
) -> Float[Array, "B N H Dh"]:
    """Computes `group_attention_mosaic_gpu` with its gradient, of whole tiles."""
    return attention_forward(q, k, v, bounds, tiles, static)[0]


def attention_forward(q: Array, k: Array, v: Array, bounds: Array, tiles: Tiles, static: Static) -> tuple[Array, Any]:
    """Computes `attention`, and the arrays that its backward pass needs."""
    part = functools.partial(static.kernels.forward, q, k, v)
    out, lse = part(bounds[:, 2], bounds[:, 3], static.softcap)
    if static.prompts:
        out, lse = merge(part(bounds[:, 0], bounds[:, 1], static.softcap), (out, lse))
    out, lse = named(out, lse)
    return out, (q, k, v, bounds, tiles, out, lse)


def attention_backward(static: Static, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """Computes gradients of q, k and v."""
    q, k, v, bounds, tiles, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # At +inf the weights of a query that sees nothing are 0.
    lse = jnp.where(jnp.isfinite(lse), lse * jnp.float32(LOG2_E), jnp.inf)
    of_query = jnp.stack([lse, jnp.swapaxes(delta, 1, 2)], axis=2)
    dq, dk, dv = static.kernels.backward(q, k, v, d_out, of_query, bounds, tiles, static.softcap)
    return dq, dk, dv, *jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (bounds, tiles))


attention.defvjp(attention_forward, attention_backward)


def to_tiles(x: Array, axis: int) -> Array:
    """Pads an axis to whole tiles with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], TILE) - x.shape[axis])
    return jnp.pad(x, widths)


def plan_tiles(bounds: Int[Array, "B 4 N"], keys: int) -> Tiles:
    """What all layers share: the blocks that the backward pass visits."""
    return tiles_of(to_tiles(bounds, 2), round_up(keys, TILE))


def group_attention_mosaic_gpu(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    tiles: Tiles,
    softcap: float | None,
    *,
    prompts: bool,
    kernels: Kernels | None = None,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention`; queries and keys that fill the last tiles see nothing and are not seen."""
    b, n, kv, r, width = q.shape
    q_tiles, k_tiles, v_tiles = (to_tiles(x, 1) for x in (q.reshape(b, n, kv * r, width), k, v))
    kernels = kernels or (Kernels(stand_ins.forward, stand_ins.backward) if uses_stand_ins() else Kernels(forward, backward))
    static = Static(softcap, prompts, kernels)
    out: Any = attention(q_tiles, k_tiles, v_tiles, to_tiles(bounds, 2), tiles, static)
    return out[:, :n].reshape(q.shape)
