"""Computes log-probabilities under a truncated distribution: the one that completions are drawn from with top-k, top-p or min-p.

One pass also gives the log-probability under the untruncated distribution, and its entropy. With p the softmax of the logits
(temperature and soft cap applied) and S the tokens that stay:

    log p̃(y) = log p(y) − log Σ_{v∈S} p(v)

The ratio of two policies must compare the distributions that tokens are drawn from, so the policy and the old policy use p̃; with p
the update would weigh tokens by a distribution that nothing was drawn from. The sampler's `truncate` finds S from the trainer's own
logits, and S is a constant for the gradient. The sampled token is always in S: rounding, or updates since, may exclude it, and its
log-probability would be −∞. The reference is never truncated, and the KL term uses p for the policy too; `loss.py` says why.

Within rounding of a threshold S may have one token more or less than the sampler's. The log-probability then differs by that
token's probability. In bfloat16 this happens occasionally.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.config import RolloutConfig
from grpo_jax.models.head import head_logprobs, with_full_head
from grpo_jax.rollout.sampling import Thresholds, truncate
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import head_logprob
from grpo_kernels.numerics import precision_of, soft_cap

CHUNK_LOGITS = 2**20
"""Logits computed at once where the distribution is truncated: 4 MiB in float32, because the search for S reads them many times."""

CHUNK_TOKENS = 64
"""The least tokens in a chunk, whatever the size of the vocabulary, because each chunk reads the whole head."""

Outputs = tuple[Array, Array, Array]
"""Log-probability under the truncated and the untruncated distribution, and the entropy of the untruncated one; float32 nats."""


@dataclass(frozen=True)
class Truncation:
    """How sampling changes the distribution; static under jit.

    Attributes:
        top_k, top_p, min_p: as in `RolloutConfig`; 0, 1 and 0 keep all.
        stop_ids: banned at the first min_length positions of a completion.
        min_length: tokens.

    Example:
        Truncation(top_p=0.9, stop_ids=(2,), min_length=16)
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    min_length: int = 0

    @staticmethod
    def of(rollout: RolloutConfig, stop_ids: tuple[int, ...]) -> Truncation | None:
        """Returns the truncation of these settings; None where completions are drawn from the untruncated distribution."""
        bans = rollout.min_completion_length > 0 and bool(stop_ids)
        made = Truncation(
            rollout.top_k,
            rollout.top_p,
            rollout.min_p,
            tuple(sorted(set(stop_ids))) if bans else (),
            rollout.min_completion_length if bans else 0,
        )
        return made if made.truncates or bans else None

    @property
    def truncates(self) -> bool:
        """Whether tokens are removed by their probability, which needs all logits of a token at once."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def thresholds(self) -> Thresholds:
        """top_k, top_p and min_p as arrays."""
        return Thresholds(jnp.asarray(self.top_k, jnp.int32), jnp.float32(self.top_p), jnp.float32(self.min_p))


def truncated_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "T"],
    columns: Int[Array, "T"],
    truncation: Truncation,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
    head_trainable: bool = False,
    entropy_gradient: bool = False,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Computes log-probabilities of tokens under the truncated and the untruncated distribution, and the latter's entropy.

    A ban of stop tokens alone uses `head_logprob` and corrects its result. Truncation by probability computes the logits again in
    the backward pass.

    Args:
        hidden: the state that predicts each token.
        head: one row per vocabulary entry, in the dtype of `hidden`.
        ids: the tokens.
        columns: index of each token in its completion.
        truncation: how sampling changes the distribution.
        temperature: divides the (capped) logits.
        softcap: c in c·tanh(logit / c); None is off.
        head_trainable: whether `head`, or the entropy, needs a gradient.
        entropy_gradient: whether the entropy has a gradient.
        implementation: of `head_logprob`; None chooses by the device.
        layout: None is one device. On a mesh everything but `head_logprob` gathers the full head on every device and splits the
            tokens.

    Returns:
        float32 nats.
    """
    stop_ids = tuple(s for s in truncation.stop_ids if s < head.shape[0])  # a tokenizer may have more tokens than the head
    if not head_trainable:
        head = jax.lax.stop_gradient(head)
    temperature = jnp.asarray(temperature, jnp.float32)
    options: dict[str, Any] = {"softcap": softcap, "head_trainable": head_trainable, "implementation": implementation}
    banned = columns < (truncation.min_length if stop_ids else 0)

    def truncated(x: Array, w: Array, ids: Array, banned: Array, temperature: Array) -> Outputs:
        how: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "entropy_gradient": entropy_gradient}
        return truncated_head(x, w, ids, banned, stop_ids, truncation.thresholds, **how)

    def banning(x: Array, w: Array, ids: Array, banned: Array, temperature: Array) -> Outputs:
        logps, untruncated, entropy = banned_head(x, w, ids, stop_ids, temperature=temperature, **options)
        return jnp.where(banned, logps, untruncated), untruncated, entropy

    if truncation.truncates or stop_ids:
        function = truncated if truncation.truncates else banning
        logps, untruncated, entropy = with_full_head(function, layout, hidden, head, ids, banned, scalars=(temperature,))
    else:
        logps, entropy, _ = head_logprobs(hidden, head, ids, temperature, layout, **options)
        untruncated = logps
    return logps, untruncated, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)


def head_logits(
    x: Float[Array, "T D"], w: Float[Array, "V D"], temperature: Float[Array, ""], softcap: float | None
) -> Float[Array, "T V"]:
    """Computes float32 logits as the sampler does: capped, then divided by the temperature."""
    logits = jnp.einsum("td,vd->tv", x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits, softcap) / temperature


def separating_logit(logits: Float[Array, "T V"], thresholds: Thresholds) -> Float[Array, "T"]:
    """Returns a threshold for each row: the tokens that stay are those whose logits are at least the threshold.

    Every truncation keeps the tokens above some threshold. The result lies midway between the last logit that stays and the first
    that does not, so that logits computed again, with other rounding, give the same set. −inf never stays.
    """
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    stay = truncate(logits, thresholds) & (logits >= lowest)
    last = jnp.min(jnp.where(stay, logits, jnp.inf), axis=-1)
    first = jnp.max(jnp.where(stay, lowest, logits), axis=-1)
    middle = first + (last - first) / 2
    return jnp.where(middle > first, middle, last)  # adjacent float32 values have no middle


def truncated_head(
    x: Float[Array, "T D"],
    w: Float[Array, "V D"],
    ids: Int[Array, "T"],
    banned: Bool[Array, "T"],
    stop_ids: tuple[int, ...],
    thresholds: Thresholds,
    *,
    temperature: Float[Array, ""],
    softcap: float | None,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Computes log p̃, log p and the entropy of p, in chunks of tokens.

    The backward pass computes the logits again. Finding S takes longer than computing logits, so its result is saved: one threshold
    a token.

    Args:
        banned: True = the stop ids are banned at this token.
    """
    tokens, vocabulary = x.shape[0], w.shape[0]
    stops = np.isin(np.arange(vocabulary), np.array(stop_ids, np.int64))
    vocabulary_ids = jnp.arange(vocabulary, dtype=jnp.int32)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("cut"))
    def chunk(x: Array, ids: Array, banned: Array) -> Outputs:
        logits = head_logits(x, w, temperature, softcap)
        allowed = jnp.where(banned[:, None] & stops[None, :], -jnp.inf, logits)
        cut = separating_logit(jax.lax.stop_gradient(allowed), thresholds)
        cut = checkpoint_name(cut, "cut")
        stay = (allowed >= cut[:, None]) | (ids[:, None] == vocabulary_ids[None, :])
        own = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        lse = jax.nn.logsumexp(logits, axis=-1)
        truncated_lse = jax.nn.logsumexp(jnp.where(stay, logits, -jnp.inf), axis=-1)
        whole = logits if entropy_gradient else jax.lax.stop_gradient(logits)
        mean = jnp.sum(jax.nn.softmax(whole, axis=-1) * whole, axis=-1)
        entropy = (lse if entropy_gradient else jax.lax.stop_gradient(lse)) - mean
        return own - truncated_lse, own - lse, entropy

    size = min(tokens, max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary))
    chunks = -(-tokens // size)
    if chunks == 1:
        return chunk(x, ids, banned)
    pad = chunks * size - tokens
    parts = (
        jnp.pad(x, ((0, pad), (0, 0))).reshape(chunks, size, -1),
        jnp.pad(ids, (0, pad)).reshape(chunks, size),
        jnp.pad(banned, (0, pad)).reshape(chunks, size),
    )
    logps, untruncated, entropy = (y.reshape(-1)[:tokens] for y in jax.lax.map(lambda part: chunk(*part), parts))
    return logps, untruncated, entropy


def banned_head(
    x: Float[Array, "T D"],
    w: Float[Array, "V D"],
    ids: Int[Array, "T"],
    stop_ids: tuple[int, ...],
    *,
    temperature: Float[Array, ""],
    softcap: float | None,
    head_trainable: bool,
    implementation: str | None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Computes log p̃ with the stop ids banned, log p, and the entropy of p, from `head_logprob` and a few logits.

    log p̃ = log p − log(1 − Σ_stops p) loses precision where the model is sure to stop, which is where a ban matters. So the head
    runs with the stops' rows replaced by copies of other rows, and what the copies add is subtracted. A row and its copy add the
    same, so that is at most half of the sum, and no precision is lost. (Where stops are the larger part of the vocabulary, rows are
    copied more than once.) log p and its entropy follow by adding the stops.

    Where the token itself is a stop, log p̃ is finite and has no meaning: sampling never draws such a token where stops are banned.

    Raises:
        ValueError: every token is a stop id.
    """
    vocabulary = w.shape[0]
    stops = np.array(stop_ids, np.int32)
    others = list(itertools.islice(itertools.filterfalse(set(stop_ids).__contains__, range(vocabulary)), len(stop_ids)))
    if not others:
        raise ValueError(f"all {vocabulary} tokens are stop ids: none is left to draw before the minimum length")
    others = np.resize(np.array(others, np.int32), stops.shape)
    replaced = w.at[stops].set(w[others])
    options = {"softcap": softcap, "head_trainable": head_trainable, "implementation": implementation}
    logps, entropy, lse = head_logprob(x, replaced, ids, temperature=temperature, **options)
    few = head_logits(x, jnp.concatenate([w[stops], w[others]]), temperature, softcap)
    of_stops, of_copies = few[:, : stops.size], few[:, stops.size :]

    copies = jnp.exp(of_copies - lse[:, None])
    rest = 1 - jnp.sum(copies, axis=-1)  # the probability of everything that is not a copy
    odds = jax.nn.logsumexp(of_stops, axis=-1) - (lse + jnp.log(rest))  # log odds of a stop
    logps = logps - jnp.log(rest)

    mean = (lse - entropy - jnp.sum(copies * of_copies, axis=-1)) / rest
    mean_of_stops = jnp.sum(jax.nn.softmax(of_stops, axis=-1) * of_stops, axis=-1)
    share = jax.nn.sigmoid(odds)
    untruncated_lse = lse + jnp.log(rest) + jax.nn.softplus(odds)
    is_stop = ids[:, None] == jnp.asarray(stops)[None, :]
    of_stop = jnp.sum(jnp.where(is_stop, of_stops, 0), axis=-1) - untruncated_lse
    untruncated = jnp.where(jnp.any(is_stop, axis=-1), of_stop, logps - jax.nn.softplus(odds))
    return logps, untruncated, untruncated_lse - (1 - share) * mean - share * mean_of_stops
