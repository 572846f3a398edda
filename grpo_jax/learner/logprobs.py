"""Computes per-token log-probabilities and entropies of completions, under the policy or the reference, in float32 nats.

`row_outputs` takes packed rows, as an update does, and gives the model's distribution and, with a truncation, the one that
completions are drawn from. `completion_logprobs` takes padded prompts and completions.
Each prompt is computed once for its completions. The head and its softmax are one pass over the vocabulary, so no
[rows, tokens, vocabulary] array exists.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.learner.truncated import Outputs, Truncation, truncated_logprobs
from grpo_jax.models.attention import group_attend, select_tokens
from grpo_jax.models.embedding import head_matrix
from grpo_jax.models.head import head_logprobs
from grpo_jax.models.recurrent import packed_recurrence
from grpo_jax.models.routing import RouterInputs, RouterSums
from grpo_jax.models.transformer import Transformer, forward, forward_with_routers
from grpo_jax.types import PackedRows, Params
from grpo_kernels import KeyRanges, Limits

HEAD_BLOCKS = 4
"""Parts that a row's entries are computed in by the head; parts without any entry are skipped."""

LEAST_HEAD_BLOCK = 256
"""The fewest entries of such a part, over all rows, because each part reads the whole head."""


def row_hidden(
    model: Transformer, variables: Params, rows: PackedRows, weights: Float[Array, "R T"] | None = None
) -> tuple[Float[Array, "R E D"], RouterSums | None]:
    """Computes the hidden state that predicts each entry, and what the routers have done where `weights` are given.

    Args:
        weights: of each token in the routers' sums.
    """
    selected = jnp.asarray(rows.selected)
    attend = group_attend(model, rows.ranges, rows.limits, selected)
    how: Any = {"prompts": rows.limits.prompts > 0, "layout": model.layout, "implementation": model.implementation}
    recurrence = packed_recurrence(model.spec, rows.ranges, **how)
    inputs = (model, variables, jnp.asarray(rows.ids), jnp.asarray(rows.positions), attend)
    options: Any = {"recurrence": recurrence, "dropout_keys": rows.dropout_keys}
    sums = None
    if weights is not None or rows.replays:
        hidden, sums = forward_with_routers(*inputs, routers=router_inputs(model, rows, weights), **options)
        hidden = select_tokens(rows)(hidden)
    else:
        hidden = forward(*inputs, select=select_tokens(rows), **options)[0]
    return hidden if model.layout is None else model.layout.constrain(hidden, "rows", None, None), sums


def router_inputs(model: Transformer, rows: PackedRows, weights: Float[Array, "R T"] | None) -> RouterInputs:
    """What routers are told of packed rows; see `row_hidden`. All layers compute all tokens then, also an unrolled model's last."""
    weights = jnp.zeros(rows.ids.shape, jnp.float32) if weights is None else weights
    return RouterInputs(
        recorded=None if rows.experts is None else jnp.moveaxis(jnp.asarray(rows.experts), 2, 0),
        weights=jnp.broadcast_to(weights[None], (model.spec.expert_layers, *weights.shape)),
        replays=rows.replays,
    )


def row_logprobs(
    model: Transformer, variables: Params, rows: PackedRows, *arguments: Any, **options: Any
) -> tuple[Float[Array, "R E"], Float[Array, "R E"] | None, Float[Array, "R E"]]:
    """`row_outputs` without the routers' report."""
    return row_outputs(model, variables, rows, *arguments, **options)[:3]


def row_outputs(
    model: Transformer,
    variables: Params,
    rows: PackedRows,
    truncation: Truncation | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    *,
    used: Array | None = None,
    head_trainable: bool = False,
    entropy_gradient: bool = False,
    router_weights: Float[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R E"], Float[Array, "R E"] | None, Float[Array, "R E"], RouterSums | None]:
    """Computes log-probabilities of the entries of packed rows, and the entropy of the untruncated distribution.

    Args:
        model: the decoder.
        variables: {"params": base, "lora": adapters}, or without "lora" for the base.
        truncation: what sampling does to the distribution; None: nothing.
        temperature: divides the logits.
        used: [R, E], True = the entry is needed; the head skips parts without any. None is all.
        head_trainable: whether the head's weights need a gradient.
        entropy_gradient: whether the entropy needs one. A frozen head is then computed as one that trains: its logits are computed
            again in the backward pass, in plain JAX on every device.
        router_weights: weight of each token in what the routers of a mixture of experts report; None asks for no report.

    Returns:
        Log-probabilities under the truncated distribution; under the untruncated one (None: the same); the entropy; and the
        routers' report, None where there is none.
    """
    hidden, routers = row_hidden(model, variables, rows, router_weights)
    head = head_matrix(model.spec, variables["params"]).astype(hidden.dtype)
    head = head if head_trainable else jax.lax.stop_gradient(head)
    options: dict[str, Any] = {"softcap": model.spec.final_softcap, "head_trainable": head_trainable or entropy_gradient}
    options["implementation"] = model.implementation

    def of_entries(temperature: Array, hidden: Array, targets: Array, columns: Array) -> Outputs:
        r, e, d = hidden.shape
        flat = hidden.reshape(r * e, d), head, targets.reshape(r * e)
        if truncation is None:
            # Parts are branches; see `in_parts`.
            keep_rows = not options["head_trainable"]
            logps, entropy, _ = head_logprobs(*flat, temperature, model.layout, keep_rows=keep_rows, **options)
            outputs = (logps, logps, entropy if entropy_gradient else jax.lax.stop_gradient(entropy))
        else:
            outputs = truncated_logprobs(
                *flat,
                columns.reshape(r * e),
                truncation,
                temperature=temperature,
                entropy_gradient=entropy_gradient,
                layout=model.layout,
                **options,
            )
        first, second, third = (x.reshape(r, e) for x in outputs)
        return first, second, third

    entries = (hidden, jnp.asarray(rows.targets), jnp.asarray(rows.columns))
    logps, untruncated, entropy = in_parts(of_entries, jnp.asarray(temperature, jnp.float32), entries, used)
    return logps, None if truncation is None else untruncated, entropy, routers


def in_parts(function: Any, temperature: Array, entries: tuple[Array, ...], used: Array | None) -> Outputs:
    """Applies a function of temperature and entries to parts of them, and not to parts of which none is used."""
    rows, count = entries[1].shape
    size = max(-(-count // HEAD_BLOCKS), -(-LEAST_HEAD_BLOCK // rows))
    if used is None or size >= count:
        outputs: Outputs = function(temperature, *entries)
        return outputs
    parts = []
    for start in range(0, count, size):
        part = tuple(x[:, start : start + size] for x in entries)
        nothing = tuple(jnp.zeros(part[1].shape, jnp.float32) for _ in range(3))
        needed = jnp.any(used[:, start : start + size])
        parts.append(jax.lax.cond(needed, function, lambda *_, nothing=nothing: nothing, temperature, *part))
    logps, untruncated, entropy = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return logps, untruncated, entropy


def padded_rows(prompt_ids: Int[Array, "B P"], prompt_lengths: Int[Array, "B"], completion_ids: Int[Array, "N C"]) -> PackedRows:
    """Rows of padded prompts and completions: one prompt with its N / B completions in each."""
    b, p = prompt_ids.shape
    n, c = completion_ids.shape
    g, later = n // b, c - 1
    tokens = p + g * later
    own = completion_ids.reshape(b, g, c)
    at = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    of_prompt, behind = at < p, at - p
    number, index = behind // max(later, 1), behind % max(later, 1)
    lengths = prompt_lengths[:, None]
    zero = jnp.zeros((b, tokens), jnp.int32)
    own_start = jnp.where(of_prompt, 0, p + number * later)
    ranges = KeyRanges(
        prompt_start=zero,
        prompt_end=jnp.where(of_prompt, 0, lengths),
        own_start=zero + own_start,
        own_end=zero + jnp.where(of_prompt & (at >= lengths), 0, at + 1),
    )
    entries = g + g * later
    return PackedRows(
        ids=jnp.concatenate([prompt_ids, own[:, :, :later].reshape(b, g * later)], axis=1),
        positions=zero + jnp.where(of_prompt, at, lengths + index),
        ranges=ranges,
        selected=jnp.concatenate([jnp.broadcast_to(lengths - 1, (b, g)), jnp.broadcast_to(at[:, p:], (b, g * later))], axis=1),
        inverse=jnp.broadcast_to(jnp.where(of_prompt, -1, behind), (b, tokens)),
        targets=jnp.concatenate([own[:, :, 0], own[:, :, 1:].reshape(b, g * later)], axis=1),
        columns=jnp.broadcast_to(
            jnp.concatenate([jnp.zeros(g, jnp.int32), jnp.tile(jnp.arange(1, c, dtype=jnp.int32), g)])[None, :], (b, entries)
        ),
        firsts=g,
        limits=Limits(1, p, max(p, c)),
    )


def completion_logprobs(
    model: Transformer,
    variables: Params,
    prompt_ids: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completion_ids: Int[Array, "N C"],
    temperature: float | Float[Array, ""] = 1.0,
    *,
    truncation: Truncation | None = None,
    head_trainable: bool = False,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """Computes log-probabilities of padded completions, and the entropy of the untruncated distribution.

    Args:
        model, variables, temperature, truncation, head_trainable: as in `row_outputs`.
        prompt_ids: padded on the right.
        prompt_lengths: tokens of each prompt, at least 1.
        completion_ids: N = B·G rows, padded on the right.
    """
    rows = padded_rows(prompt_ids, prompt_lengths, completion_ids)
    logps, _, entropy = row_logprobs(model, variables, rows, truncation, temperature, head_trainable=head_trainable)
    n, c = completion_ids.shape

    def table(x: Array) -> Array:
        first, later = x[:, : rows.firsts].reshape(n, 1), x[:, rows.firsts :].reshape(n, c - 1)
        return jnp.concatenate([first, later], axis=1)

    return table(logps), table(entropy)
