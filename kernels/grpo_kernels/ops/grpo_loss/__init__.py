"""The policy loss with its KL term, the sums of a step's metrics, and the loss's slope at every token, in one pass over the tokens.

The slope is all that the backward pass keeps: there it is a product per element.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from grpo_kernels.ops.grpo_loss.mosaic_tpu import grpo_loss_tpu
from grpo_kernels.ops.grpo_loss.reference import Constants, Sums, grpo_loss_reference
from grpo_kernels.ops.grpo_loss.settings import LossSettings
from grpo_kernels.ops.grpo_loss.xla import Slopes, grpo_loss_and_slopes
from grpo_kernels.target import platform

__all__ = ["LossSettings", "check_shapes", "checked", "grpo_loss"]


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
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Σ weights·(m + β·KL) over the trained tokens of some rows of a batch, and sums for metrics; `reference` has the formulas.

    Log-probabilities are nats per token, taken as float32. Gradients flow through `logps` and `whole_logps`; the sums have none.
    Every result is a sum (or a maximum) over tokens: results of pieces of whole rows add up. So under `shard_map` over rows, call
    it on each device's rows (with `check_vma=False`, which a Pallas call needs) and `psum` what it returns (`pmax` where the name
    ends in "_max"); the gradient needs no communication. The weights hold the denominators, and so come from the whole batch.

    Args:
        logps: [N, C], of the policy that is trained.
        old_logps: [N, C], of the policy before the first update on this batch; None = the same as logps, without gradient.
        ref_logps: [N, C], of the reference; None where there is none.
        advantages: [N].
        completion_mask: [N, C], True = the token is trained. What stands elsewhere, NaN included, changes nothing.
        weights: [N, C], of each token in the loss.
        settings: static.
        sampler_logps: [N, C], of the distribution that the tokens were drawn from, as the sampler computed them.
        whole_logps: [N, C], of the policy's whole distribution, for KL, where logps are of a truncated one; None = logps.
        implementation: "reference" (plain, differentiated by JAX), "tpu" (Pallas), "gpu" (XLA's fused loops, on any device), or
            None: "tpu" on a TPU, else "gpu".

    Returns:
        The loss, and float32 sums: `tokens`, `clipped_low` and `clipped_high` (tokens whose ratio is held by a bound),
        `policy_loss` (the loss without β·KL); with a reference `kl` (k3, nats); with the sampler's `logp_difference` and
        `logp_difference_max` (|logπ_old − logπ_sampler|, nats).

    Raises:
        ValueError: shapes do not agree, the settings need log-probabilities that are not given, or an unknown implementation.
    """
    if implementation is None:
        implementation = "tpu" if platform() == "tpu" else "gpu"
    if implementation not in ("reference", "tpu", "gpu"):
        raise ValueError(f"implementation is {implementation!r}: choose from reference, tpu, gpu, or None")
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
    )
    if implementation == "reference":
        return grpo_loss_reference(policy, whole, constants, settings)
    return compiled(policy, whole, constants, settings, implementation)


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
) -> tuple[Float[Array, "N C"], Float[Array, "N C"] | None, Constants]:
    """The arguments of `grpo_loss` as float32 arrays that agree: logps, whole, and what has no gradient.

    Raises:
        ValueError: as `grpo_loss`.
    """
    given = {"old_logps": old_logps, "ref_logps": ref_logps, "sampler_logps": sampler_logps, "whole_logps": whole_logps}
    check_shapes(logps, advantages, **given, completion_mask=completion_mask, weights=weights)
    if settings.beta > 0 and ref_logps is None:
        raise ValueError(f"ref_logps is None, but beta is {settings.beta:g}: give ref_logps, or set beta to 0")
    if settings.importance_cap is not None and sampler_logps is None:
        raise ValueError(f"sampler_logps is None, but importance_cap is {settings.importance_cap:g}: give them, or set it to None")

    def float32(array: ArrayLike | None) -> Any:
        return None if array is None else jnp.asarray(array, jnp.float32)

    constants = Constants(
        old=float32(old_logps),
        ref=float32(ref_logps),
        sampler=float32(sampler_logps),
        advantages=float32(advantages),
        mask=jnp.asarray(completion_mask).astype(bool),
        weights=float32(weights),
    )
    return float32(logps), float32(whole_logps), jax.lax.stop_gradient(constants)


def check_shapes(logps: ArrayLike, advantages: ArrayLike | None = None, **others: ArrayLike | None) -> None:
    """Refuses logps that are not [N, C], and what does not fit them.

    Raises:
        ValueError: names the argument, its shape and the right one.
    """
    shape = jnp.shape(logps)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"logps has shape {shape}: it must be [N, C], one row a completion, one column a token")
    for name, array in others.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}: it must have the shape of logps, [N, C] = {shape}")
    if advantages is not None and jnp.shape(advantages) != shape[:1]:
        raise ValueError(f"advantages has shape {jnp.shape(advantages)}: it must be [N] = {shape[:1]}, one number a row of logps")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def one_pass(logps: Array, whole: Array | None, constants: Constants, settings: LossSettings, implementation: str) -> Any:
    """No gradient is wanted: no slopes are computed."""
    if implementation == "tpu":
        return grpo_loss_tpu(logps, whole, constants, settings, slopes=False)[0]
    return grpo_loss_reference(logps, whole, constants, settings)


def one_pass_forward(
    logps: Array, whole: Array | None, constants: Constants, settings: LossSettings, implementation: str
) -> tuple[tuple[Array, Sums], Slopes | None]:
    """The result, and the slopes for the backward pass."""
    if implementation == "tpu":
        return grpo_loss_tpu(logps, whole, constants, settings, slopes=True)
    return grpo_loss_and_slopes(logps, whole, constants, settings)


def one_pass_backward(settings: LossSettings, implementation: str, slopes: Slopes, cotangents: tuple[Array, Sums]) -> tuple:
    """A product per element."""
    of_logps, of_whole = slopes
    return cotangents[0] * of_logps, None if of_whole is None else cotangents[0] * of_whole, None


one_pass.defvjp(one_pass_forward, one_pass_backward)

# One program even where nothing around it is compiled.
compiled = jax.jit(one_pass, static_argnums=(3, 4))
