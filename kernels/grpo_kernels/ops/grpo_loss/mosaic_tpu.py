"""`grpo_loss` on a TPU: one Pallas kernel over blocks of rows and tokens, which reads each array once and writes the slopes.

The kernel traces the reference's own formulas. The slopes are their forward-mode derivatives, since one token's term depends on
that token alone. The exceptions are ratios and factors that belong to the row (`needs_rows`): the kernel then sweeps a block of
rows twice, first for the row's sums and then as for the other losses. Where a row fits one block, the second sweep finds it in
vector memory and nothing is read twice.

Sums over tokens accumulate in scalar memory, block after block, so the grid runs in order. Tails are masked in the kernel: nothing
is padded. Only the mask is copied, to one byte a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from grpo_kernels.ops.grpo_loss.block_sizes import BlockSizes
from grpo_kernels.ops.grpo_loss.kl import kl_term
from grpo_kernels.ops.grpo_loss.policy_terms import ROW_RATIOS, Term
from grpo_kernels.ops.grpo_loss.reference import (
    Constants,
    RowSums,
    Sums,
    Terms,
    Tokens,
    as_columns,
    at_least_one,
    either,
    finished_terms,
    masked,
    needs_rows,
    only,
    per_token,
    policy_term,
    row_factor,
    row_ratio,
    row_sums,
    times,
    token_factor,
    token_sums,
)
from grpo_kernels.ops.grpo_loss.settings import LossSettings
from grpo_kernels.ops.grpo_loss.xla import Slopes

FLOPS_PER_TOKEN, EXPONENTIALS_PER_TOKEN = 40, 2
"""Roughly, for the cost estimate: the ratio, its clip, the KL term, their derivatives and the sums."""


@dataclass(frozen=True)
class KernelArrays:
    """Names and sizes of the arrays that the kernel is called with.

    Attributes:
        rows, length: N and C; the last blocks may reach beyond.
        inputs: names of the input arrays, among logps, whole, old, ref, sampler, weights, mask, advantage, chosen.
        sums: names of the sums, in their order in scalar memory.
        slopes: number of slope arrays that are written: 0, 1 (by logps), or 2 (also by whole, where that is given).
    """

    rows: int
    length: int
    inputs: tuple[str, ...]
    sums: tuple[str, ...]
    slopes: int


def load(inputs: dict[str, Any], arrays: KernelArrays, row_block: Any, token_block: Any) -> Tokens:
    """Loads one block, with 0 where no token is trained and past the arrays' ends."""
    blocks: dict[str, Any] = dict.fromkeys(("whole", "old", "ref", "sampler", "chosen")) | {
        name: ref[...] for name, ref in inputs.items()
    }
    mask = blocks.pop("mask").astype(jnp.int32) != 0
    size = mask.shape
    if blocks["chosen"] is not None:
        blocks["chosen"] = blocks["chosen"].astype(jnp.int32) != 0
    row = row_block * size[0] + jax.lax.broadcasted_iota(jnp.int32, size, 0)
    token = token_block * size[1] + jax.lax.broadcasted_iota(jnp.int32, size, 1)
    return masked(**blocks, mask=mask & (row < arrays.rows) & (token < arrays.length))


def term_and_slope(tokens: Tokens, settings: LossSettings, rows: RowSums | None) -> tuple[Term, Array]:
    """Computes m, and the slope by logps of the row's Σ weight·m·factor."""
    one, (of_row, _) = jnp.ones_like(tokens.logps), row_factor(tokens, settings, rows)
    if rows is None or settings.loss not in ROW_RATIOS:

        def of_token(logps: Array) -> tuple[Array, Term]:
            term = policy_term(logps, row_ratio(logps, tokens, settings).value, tokens, settings, rows)
            return term.value, term

        _, slope, term = jax.jvp(of_token, (tokens.logps,), (one,), has_aux=True)
        return term, times(tokens.weights * slope, token_factor(tokens, settings)[0], of_row)

    def of_mean(mean: Array) -> tuple[Array, Term]:
        term = policy_term(tokens.logps, mean, tokens, settings, rows)
        return term.value, term

    def of_logps(logps: Array) -> tuple[Array, Term]:
        ratio = row_ratio(logps, tokens, settings)
        return ratio.value, ratio

    count = at_least_one(rows.count)
    mean = rows.log_ratio / count
    _, by_mean, term = jax.jvp(of_mean, (mean,), (jnp.ones_like(mean),), has_aux=True)
    _, by_token, ratio = jax.jvp(of_logps, (tokens.logps,), (one,), has_aux=True)
    slope = by_token * times(by_mean * rows.mass / count, of_row)
    return Term(term.value, either(term.low, ratio.low), either(term.high, ratio.high)), slope


def terms_and_slopes(tokens: Tokens, settings: LossSettings, rows: RowSums | None) -> tuple[Terms, Array, Array | None]:
    """Computes the terms and the loss's slopes: by logps without the KL term's part by `whole`, and that part.

    Args:
        rows: sums over whole rows; None where no term needs them.
    """
    term, slope = term_and_slope(tokens, settings, rows)
    ref, kl, kl_slope = tokens.ref, None, None
    if settings.beta > 0 and ref is not None:
        one, zero, beta = jnp.ones_like(tokens.logps), jnp.zeros_like(tokens.logps), jnp.float32(settings.beta)

        def kl_of(logps: Array, whole: Array) -> Array:
            return kl_term(logps, whole, tokens.old, ref, settings.kl)

        kl, kl_slope = jax.jvp(kl_of, (tokens.logps, tokens.whole), (zero, one))
        kl, kl_slope = beta * only(tokens.mask, kl), tokens.weights * beta * kl_slope
        if settings.kl == "k3_corrected":
            slope = slope + tokens.weights * beta * jax.jvp(kl_of, (tokens.logps, tokens.whole), (one, zero))[1]
    return finished_terms(term, kl, tokens, settings, rows), only(tokens.mask, slope), kl_slope


def loss_kernel(*refs: Any, arrays: KernelArrays, settings: LossSettings) -> None:
    """One block. refs: `arrays.inputs` [rows, tokens], the sums in scalar memory, the slopes, and row sums as scratch."""
    inputs = dict(zip(arrays.inputs, refs, strict=False))
    sums, *rest = refs[len(inputs) :]
    slopes, scratch = rest[: arrays.slopes], rest[arrays.slopes :]
    row_block, sweep, token_block = (pl.program_id(axis) for axis in range(3))
    tokens = load(inputs, arrays, row_block, token_block)

    @pl.when((row_block == 0) & (sweep == 0) & (token_block == 0))
    def _() -> None:
        for index in range(len(arrays.sums)):
            sums[index] = jnp.float32(0)

    def finish(rows: RowSums | None) -> None:
        terms, slope, kl_slope = terms_and_slopes(tokens, settings, rows)
        new = {"loss": jnp.sum(tokens.weights * per_token(terms)), **token_sums(tokens, terms)}
        for index, name in enumerate(arrays.sums):
            sums[index] = jnp.maximum(sums[index], new[name]) if name.endswith("_max") else sums[index] + new[name]
        if arrays.slopes == 2:
            slopes[0][...], slopes[1][...] = slope, kl_slope
        elif arrays.slopes == 1:
            slopes[0][...] = slope if kl_slope is None else slope + kl_slope

    if not needs_rows(settings):
        finish(None)
        return

    @pl.when(sweep == 0)
    def _() -> None:
        for total, part in zip(scratch, row_sums(tokens, settings), strict=True):
            total[...] = part + jnp.where(token_block == 0, jnp.float32(0), total[...])

    @pl.when(sweep == 1)
    def _() -> None:
        finish(RowSums(*(total[...] for total in scratch)))


def grpo_loss_mosaic_tpu(
    logps: Float[Array, "N C"],
    whole: Float[Array, "N C"] | None,
    constants: Constants,
    settings: LossSettings,
    blocks: BlockSizes,
    slopes: bool,
) -> tuple[tuple[Float[Array, ""], Sums], Slopes | None]:
    """Computes `grpo_loss` by the kernel; the slopes are None where they are not asked for."""
    rows, length = logps.shape
    # An array that is not used is not passed: some versions of libtpu return zeros where a kernel leaves an operand unused.
    uses_whole = whole is not None and constants.ref is not None
    has_kl_term = settings.beta > 0 and constants.ref is not None
    uses_old = (
        settings.loss not in ("reinforce", "gpg")
        or constants.sampler is not None
        or (has_kl_term and settings.kl == "k3_corrected")
    )
    given = {"logps": logps, "ref": constants.ref, "sampler": constants.sampler}
    given |= {"whole": whole} if uses_whole else {}
    given |= {"old": constants.old} if uses_old else {}
    inputs = {name: array for name, array in given.items() if array is not None}
    inputs |= {"weights": constants.weights, "mask": constants.mask.astype(jnp.int8), "advantage": as_columns(constants.advantages)}
    inputs |= {} if constants.chosen is None else {"chosen": constants.chosen.astype(jnp.int8)}
    names = ["loss", "policy_loss", "tokens", "clipped_low", "clipped_high"]
    names += ["kl"] if constants.ref is not None else []
    names += ["importance_outside"] if settings.has_importance else []
    names += ["logp_difference", "logp_difference_max"] if constants.sampler is not None else []
    count = (2 if uses_whole and has_kl_term else 1) if slopes else 0
    arrays = KernelArrays(rows, length, tuple(inputs), tuple(names), count)

    twice = needs_rows(settings)
    block = pl.BlockSpec((blocks.rows, blocks.tokens), lambda i, sweep, j: (i, j))
    # The first of two sweeps writes nothing: its block stays the first one, with which the second sweep begins.
    written = pl.BlockSpec((blocks.rows, blocks.tokens), lambda i, sweep, j: (i, sweep * j if twice else j))
    column = pl.BlockSpec((blocks.rows, 1), lambda i, sweep, j: (i, 0))
    sweeps, read_twice = 1 + twice, twice and length > blocks.tokens
    sums, *out = pl.pallas_call(
        functools.partial(loss_kernel, arrays=arrays, settings=settings),
        grid=(pl.cdiv(rows, blocks.rows), sweeps, pl.cdiv(length, blocks.tokens)),
        in_specs=[column if name == "advantage" and constants.advantages.ndim == 1 else block for name in inputs],
        out_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[written] * count],
        out_shape=[jax.ShapeDtypeStruct((len(names),), jnp.float32), *[jax.ShapeDtypeStruct((rows, length), jnp.float32)] * count],
        scratch_shapes=[pltpu.VMEM((blocks.rows, 1), jnp.float32)] * (len(RowSums._fields) if twice else 0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=FLOPS_PER_TOKEN * sweeps * logps.size,
            bytes_accessed=sum(x.nbytes for x in inputs.values()) * (1 + read_twice) + 4 * count * logps.size,
            transcendentals=EXPONENTIALS_PER_TOKEN * logps.size,
        ),
        name=f"grpo_loss_{settings.loss}",
    )(*inputs.values())
    results = dict(zip(names, sums, strict=True))
    loss = results.pop("loss")
    if not slopes:
        return (loss, results), None
    by_whole = None if whole is None else out[1] if count == 2 else jnp.zeros_like(whole)
    return (loss, results), (out[0], by_whole)
