"""Advantages other than the group's standard score: each a formula of one group's rewards, with the paper that it is from.

Plain JAX for every device: these are G² numbers a prompt, so a kernel of their own would save nothing.

r = rewards of a group's G completions, r̄ = their mean, l = their lengths in tokens; sums are over the group's valid completions:

    rloo       r_i − mean of the others' rewards                          Ahmadian 2024, https://arxiv.org/abs/2402.14740
    opo        r_i − Σ_j l_j·r_j / Σ_j l_j                                Hao 2025, https://arxiv.org/abs/2505.23585
    maxrl      (r_i − r̄) / r̄, 0 where r̄ is not positive                   Tajwar 2026, https://arxiv.org/abs/2602.02710
    pass_at_k  G/C(G,k) · Σ over sets S of k completions with i in S of   Walder 2025, https://arxiv.org/abs/2505.15201
               [max r(S) − max r(S without i)]

None divides by a standard deviation. `pass_at_k` is that paper's estimator with the baseline of sets of k − 1 completions, for any
rewards: the mean over completions of A_i·∇log π(i) estimates, without bias, the gradient of the expected best reward of k
completions. For k = G only the best one has an advantage, G times its lead over the second.

Others differ: verl's `grpo_passk` is the case k = G without the factor G, and NeMo RL's GRPO leaves one out in its standard score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Group(NamedTuple):
    """Groups whose completions are compared. Values of completions that are not valid are 0."""

    rewards: Float[Array, "B G"]
    valid: Bool[Array, "B G"]
    lengths: Float[Array, "B G"]
    k: int

    @property
    def count(self) -> Float[Array, "B 1"]:
        """Valid completions, at least 1."""
        return jnp.maximum(jnp.sum(self.valid.astype(jnp.float32), axis=1, keepdims=True), jnp.float32(1))

    @property
    def mean(self) -> Float[Array, "B 1"]:
        """Mean reward."""
        return jnp.sum(self.rewards, axis=1, keepdims=True) / self.count


def rloo(x: Group) -> Float[Array, "B G"]:
    """r_i − mean of the others = (r_i − r̄)·G / (G − 1)."""
    return (x.rewards - x.mean) * x.count / jnp.maximum(x.count - 1, jnp.float32(1))


def opo(x: Group) -> Float[Array, "B G"]:
    """r_i − the mean weighted by length: the baseline of least variance where a gradient's square grows with the length."""
    total = jnp.maximum(jnp.sum(x.lengths, axis=1, keepdims=True), jnp.float32(1))
    return x.rewards - jnp.sum(x.lengths * x.rewards, axis=1, keepdims=True) / total


def maxrl(x: Group) -> Float[Array, "B G"]:
    """(r_i − r̄) / r̄."""
    positive = x.mean > 0
    return jnp.where(positive, (x.rewards - x.mean) / jnp.where(positive, x.mean, jnp.float32(1)), jnp.float32(0))


def pass_at_k(x: Group) -> Float[Array, "B G"]:
    """G/C(G,k) · Σ_S [max r(S) − max r(S without i)].

    Only sets in which i is best count. With the others in rising order from 0, the j-th is second best in C(j, k − 2) of those sets
    where j comes before i, so A_i = G · Σ_j C(j, k − 2)/C(G, k) · max(r_i − r_j, 0).
    """
    own, other = x.rewards[:, :, None], x.rewards[:, None, :]
    index = jnp.arange(x.rewards.shape[1], dtype=jnp.int32)
    before = (other < own) | ((other == own) & (index[None, None, :] < index[None, :, None]))  # ties in any fixed order
    rank = jnp.sum((before & x.valid[:, None, :]).astype(jnp.float32), axis=2)
    share = x.k * (x.k - 1) / (x.count * jnp.maximum(x.count - 1, jnp.float32(1))) * jnp.ones_like(rank)
    for m in range(x.k - 2):  # C(j, k-2)/C(n, k) as a product: the binomials alone overflow
        share = share * jnp.maximum(rank - m, jnp.float32(0)) / jnp.maximum(x.count - 2 - m, jnp.float32(1))
    gain = jnp.where(x.valid[:, None, :], jnp.maximum(own - other, jnp.float32(0)), jnp.float32(0))
    enough = x.count >= x.k
    return jnp.where(enough, x.count * jnp.sum(share[:, None, :] * gain, axis=2), jnp.float32(0))


BASELINES: dict[str, Callable[[Group], Float[Array, "B G"]]] = {"rloo": rloo, "opo": opo, "maxrl": maxrl, "pass_at_k": pass_at_k}


def baseline_advantages(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], lengths: Array, kind: str, k: int
) -> Float[Array, "B G"]:
    """Computes advantages by a formula of the module's table.

    A completion that is not valid gets 0 and enters nothing, and a group whose valid rewards are equal, or fewer than two, gets
    exactly 0. A valid reward that is NaN or infinite is not hidden: its group's advantages are NaN.

    Args:
        rewards: float32.
        lengths: [B, G] sampled tokens of each completion.
        kind: rloo, opo, maxrl or pass_at_k.
        k: of pass_at_k, 2 or more.
    """
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1, keepdims=True)
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1, keepdims=True)
    several = jnp.sum(valid.astype(jnp.int32), axis=1, keepdims=True) >= 2
    differ = several & (highest - lowest != 0)  # NaN != 0
    spread = jnp.where(several, highest - lowest, jnp.float32(0))
    group = Group(
        jnp.where(valid, rewards, jnp.float32(0)), valid, jnp.where(valid, lengths.astype(jnp.float32), jnp.float32(0)), k
    )
    result = BASELINES[kind](group) + spread * jnp.float32(0)  # NaN where a reward is NaN or infinite
    return jnp.where(valid & differ, result, jnp.float32(0))
