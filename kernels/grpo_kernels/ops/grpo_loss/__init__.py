"""The policy loss with its KL term, sums for metrics, and the loss's slope at every token, in one pass over the tokens.

The backward pass keeps the slopes alone and is a product per element.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from grpo_kernels.ops.grpo_loss.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.grpo_loss.mosaic_tpu import grpo_loss_mosaic_tpu
from grpo_kernels.ops.grpo_loss.policy_terms import ROW_RATIOS
from grpo_kernels.ops.grpo_loss.reference import Constants, Sums, grpo_loss_reference
from grpo_kernels.ops.grpo_loss.settings import LossSettings
from grpo_kernels.ops.grpo_loss.xla import Slopes, grpo_loss_and_slopes
from grpo_kernels.target import platform, resolve_implementation

__all__ = ["BlockSizes", "LossSettings", "check_shapes", "checked", "choose_block_sizes", "grpo_loss"]


def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    ref_logps: ArrayLike | None,
    advantages: ArrayLike,
    completion_mask: ArrayLike,
    weights: ArrayLike,
    *,
    settings: LossSettings,
    sampler_logps: ArrayLike | None = None,
    whole_logps: ArrayLike | None = None,
    chosen: ArrayLike | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Computes Σ weights·(m + β·KL) over the trained tokens of some rows of a batch, and sums for metrics.

    `reference` has the formulas.

    Log-probabilities are nats per token, taken as float32. Gradients flow through `logps` and `whole_logps`; the sums have none.
    Every result is a sum (or a maximum) over tokens: results of pieces of whole rows add up. So under `shard_map` over rows, call
    it on each device's rows (with `check_vma=False`, which a Pallas call needs) and `psum` the results (`pmax` where the name
    ends in "_max"); the gradient needs no communication. The weights contain the denominators, which come from the whole batch.

    Args:
        logps: [N, C], of the policy that is trained.
        old_logps: [N, C], of the policy before the first update on this batch; None = the same as logps, without gradient.
        ref_logps: [N, C], of the reference; None where there is none.
        advantages: [N], or [N, C] where tokens of a row have their own; then no loss whose ratio is the row's.
        completion_mask: [N, C], True = the token is trained. Values elsewhere, NaN included, change nothing.
        weights: [N, C], of each token in the loss.
        settings: static settings.
        sampler_logps: [N, C], of the distribution that the tokens were drawn from, as the sampler computed them.
        whole_logps: [N, C], of the policy's untruncated distribution, for KL, where logps are of a truncated one; None = logps.
        chosen: [N, C], False = the token has no policy term, only its KL term; in `kl_cov`, that the token is held back. None = all
            are True.
        implementation: "reference" (plain JAX, differentiated by JAX), "xla" (plain JAX, keeps slopes), "mosaic_tpu" (Pallas), or
            None: "mosaic_tpu" on a TPU, else "xla".
        block_sizes: of "mosaic_tpu"; None = `choose_block_sizes`.

    Returns:
        The loss, and float32 sums: `tokens`, `clipped_low` and `clipped_high` (tokens whose ratio is clipped at a bound),
        `policy_loss` (the loss without β·KL); with a reference `kl` (k3, nats); with the sampler's `logp_difference` and
        `logp_difference_max` (|logπ_old − logπ_sampler|, nats); with an importance weight `importance_outside` (tokens whose weight
        was out of its bounds).

    Raises:
        ValueError: shapes do not agree, the settings need log-probabilities that are missing, or an unknown implementation.
    """
    named = resolve_implementation("grpo_loss", implementation, "mosaic_tpu" if platform() == "tpu" else "xla")
    policy, whole, constants = checked(
        logps,
        old_logps,
        ref_logps,
        advantages,
        completion_mask,
        weights,
        settings=settings,
        sampler_logps=sampler_logps,
        whole_logps=whole_logps,
        chosen=chosen,
    )
    if named == "reference":
        return grpo_loss_reference(policy, whole, constants, settings)
    blocks = (block_sizes or choose_block_sizes(*policy.shape)) if named == "mosaic_tpu" else None
    return compiled(policy, whole, constants, settings, blocks)


def checked(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    ref_logps: ArrayLike | None,
    advantages: ArrayLike,
    completion_mask: ArrayLike,
    weights: ArrayLike,
    *,
    settings: LossSettings,
    sampler_logps: ArrayLike | None,
    whole_logps: ArrayLike | None,
    chosen: ArrayLike | None,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"] | None, Constants]:
    """Checks the arguments of `grpo_loss` and returns them as float32 arrays: logps, whole, and those without a gradient.

    Raises:
        ValueError: as `grpo_loss`.
    """
    given = {"old_logps": old_logps, "ref_logps": ref_logps, "sampler_logps": sampler_logps, "whole_logps": whole_logps}
    check_shapes(logps, advantages, **given, completion_mask=completion_mask, weights=weights, chosen=chosen)
    if settings.beta > 0 and ref_logps is None:
        raise ValueError(f"ref_logps is None, but beta is {settings.beta:g}: give ref_logps, or set beta to 0")
    if jnp.ndim(advantages) == 2 and (settings.loss in (*ROW_RATIOS, "vespo") or settings.off_policy_threshold is not None):
        name = settings.loss if settings.off_policy_threshold is None else "off_policy_threshold"
        raise ValueError(f"advantages has shape {jnp.shape(advantages)}: {name} needs [N], one number a row")
    if settings.needs_sampler and sampler_logps is None:
        names = ("importance_cap", "importance_floor", "off_policy_threshold")
        name, value = next((name, getattr(settings, name)) for name in names if getattr(settings, name) is not None)
        raise ValueError(f"sampler_logps is None, but {name} is {value:g}: give them, or set it to None")

    def float32(array: ArrayLike | None) -> Any:
        return None if array is None else jnp.asarray(array, jnp.float32)

    constants = Constants(
        old=float32(old_logps),
        ref=float32(ref_logps),
        sampler=float32(sampler_logps),
        advantages=float32(advantages),
        mask=jnp.asarray(completion_mask).astype(bool),
        weights=float32(weights),
        chosen=None if chosen is None else jnp.asarray(chosen).astype(bool),
    )
    return float32(logps), float32(whole_logps), jax.lax.stop_gradient(constants)


def check_shapes(logps: ArrayLike, advantages: ArrayLike | None = None, **others: ArrayLike | None) -> None:
    """Checks that logps are [N, C] and that the other arrays have fitting shapes.

    Raises:
        ValueError: names the argument, its shape and the required one.
    """
    shape = jnp.shape(logps)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"logps has shape {shape}: it must be [N, C], one row a completion, one column a token")
    for name, array in others.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}: it must have the shape of logps, [N, C] = {shape}")
    if advantages is not None and jnp.shape(advantages) not in (shape[:1], shape):
        raise ValueError(
            f"advantages has shape {jnp.shape(advantages)}: it must be [N] = {shape[:1]}, one number a row of logps, or {shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def one_pass(
    logps: Array, whole: Array | None, constants: Constants, settings: LossSettings, blocks: BlockSizes | None
) -> tuple[Array, Sums]:
    """Computes the loss and the sums without slopes; `blocks` are the TPU kernel's, None runs plain JAX."""
    if blocks is None:
        return grpo_loss_reference(logps, whole, constants, settings)
    return grpo_loss_mosaic_tpu(logps, whole, constants, settings, blocks, slopes=False)[0]


def one_pass_forward(
    logps: Array, whole: Array | None, constants: Constants, settings: LossSettings, blocks: BlockSizes | None
) -> tuple[tuple[Array, Sums], Slopes | None]:
    """Computes the result, and the slopes for the backward pass."""
    if blocks is None:
        return grpo_loss_and_slopes(logps, whole, constants, settings)
    return grpo_loss_mosaic_tpu(logps, whole, constants, settings, blocks, slopes=True)


def one_pass_backward(settings: LossSettings, blocks: BlockSizes | None, slopes: Slopes, cotangents: tuple[Array, Sums]) -> tuple:
    """Multiplies the slopes by the loss's cotangent."""
    by_logps, by_whole = slopes
    return cotangents[0] * by_logps, None if by_whole is None else cotangents[0] * by_whole, None


one_pass.defvjp(one_pass_forward, one_pass_backward)

compiled = jax.jit(one_pass, static_argnums=(3, 4))
"""`one_pass` as one program, even where nothing around the call is compiled."""
