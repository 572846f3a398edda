"""Rotary position embeddings: the frequencies of every kind of scaling, and tables of angles.

A kind that depends on the length of the sequence (`longrope`, `dynamic`) is computed as for short sequences, and `max_length` says
up to how many tokens that is exact. Beyond it a sequence would have to be computed again when it grows, KV cache included; such
lengths are refused (`check_length`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the frequencies theta^(-2i / D), D the number of rotated dimensions of a head.
        kind: `default`; `none` rotates nothing; `linear` divides every frequency by factor; `llama3` divides the low frequencies
            and interpolates between low and high ones (https://github.com/meta-llama/llama-models, `apply_scaling`); `yarn` does so
            by the number of turns within the original length (https://arxiv.org/abs/2309.00071, section 3.2); `longrope` divides
            each frequency by its own factor (https://arxiv.org/abs/2402.13753); `proportional` turns a share of the pairs and
            leaves the others (Gemma 4).
        share: of the pairs that turn, the ones of the highest frequencies; `proportional` only.
        original_length: context length before scaling; `llama3`, `yarn`, and where `query_growth` is not 0.
        attention_factor: factor of cosines and sines; `yarn` and `longrope`.
        beta_fast, beta_slow: turns above which a frequency is unchanged, and below which it is divided by factor; `yarn` only.
        truncate: the range between them is widened to whole pairs; `yarn` only.
        pair_factors: divisor of each frequency; `longrope` only.
        max_length: longest sequence in tokens for which the frequencies are the model's; None is any.
        query_growth: β of the factor 1 + β ln(1 + ⌊position / original_length⌋) of the queries, as in Llama 4 and Ministral 3.
    """

    theta: float
    kind: Literal["default", "none", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    pair_factors: tuple[float, ...] = ()
    max_length: int | None = None
    query_growth: float = 0.0
    share: float = 1.0

    def frequencies(self, rotated: int) -> list[float]:
        """Radians per position of each of the pairs of rotated dimensions."""
        unscaled = [self.theta ** (-2.0 * i / rotated) for i in range(rotated // 2)]
        if self.kind == "none":
            return [0.0] * len(unscaled)
        if self.kind == "linear":
            return [f / self.factor for f in unscaled]
        if self.kind == "proportional":
            turning = int(self.share * rotated // 2)
            return [f / self.factor if pair < turning else 0.0 for pair, f in enumerate(unscaled)]
        if self.kind == "llama3":
            return [self._llama3(f) for f in unscaled]
        if self.kind == "longrope":
            return [f / divisor for f, divisor in zip(unscaled, self.pair_factors, strict=True)]
        return self._yarn(unscaled) if self.kind == "yarn" else unscaled

    def _llama3(self, frequency: float) -> float:
        turns = self.original_length * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - blend) * frequency / self.factor + blend * frequency

    def _yarn(self, unscaled: list[float]) -> list[float]:
        rotated = 2 * len(unscaled)

        def pair_of(turns: float) -> float:
            """The pair, as a real number, that turns so often within the original length."""
            return rotated * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        high = high + 0.001 if low == high else high
        divided = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(unscaled))]
        return [f / self.factor * share + f * (1 - share) for f, share in zip(unscaled, divided, strict=True)]


class Angles(NamedTuple):
    """Tables of every rotary embedding of a model, float32.

    Attributes:
        cos, sin: [ropes, B, T, pairs], the attention factor included.
        query_scale: [ropes, B, T], a factor of the queries; None where there is none.
    """

    cos: Float[Array, "ropes B T pairs"]
    sin: Float[Array, "ropes B T pairs"]
    query_scale: Float[Array, "ropes B T"] | None

    def of_pairs(self, most: int) -> Angles:
        """The tables of the first pairs, where there are more than so many."""
        return self._replace(cos=self.cos[..., :most], sin=self.sin[..., :most])


def rope_tables(ropes: tuple[Rope, ...], rotated: int | tuple[int, ...], positions: Int[Array, "B T"]) -> Angles:
    """Computes the tables for these positions.

    Args:
        rotated: rotated dimensions of a head, of all or of each rotary embedding. Tables have the pairs of the largest number; of
            the others the first ones count.
    """
    sizes = (rotated,) * len(ropes) if isinstance(rotated, int) else rotated
    rows = [rope.frequencies(size) for rope, size in zip(ropes, sizes, strict=True)]
    pairs = max(len(row) for row in rows)
    frequencies = jnp.array([row + [0.0] * (pairs - len(row)) for row in rows], jnp.float32)
    at = positions.astype(jnp.float32)
    angles = at[None, :, :, None] * frequencies[:, None, None, :]
    factors = [rope.attention_factor for rope in ropes]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if any(factor != 1.0 for factor in factors):
        scale = jnp.array(factors, jnp.float32)[:, None, None, None]
        cos, sin = cos * scale, sin * scale
    if not any(rope.query_growth for rope in ropes):
        return Angles(cos, sin, None)
    growth = jnp.array([rope.query_growth for rope in ropes], jnp.float32)[:, None, None]
    lengths = jnp.array([rope.original_length for rope in ropes], jnp.int32)[:, None, None]
    return Angles(cos, sin, 1 + growth * jnp.log1p((positions[None] // lengths).astype(jnp.float32)))


def rotate(
    x: Float[Array, "B T K Dh"],
    cos: Float[Array, "B T pairs"],
    sin: Float[Array, "B T pairs"],
    scale: float | Float[Array, "B T"] = 1.0,
    *,
    interleaved: bool = False,
) -> Float[Array, "B T K Dh"]:
    """Rotates the first dimensions of each head, two for every angle; the others pass.

    Args:
        scale: factor of the result, in float32, so that a scaled query is rounded once.
        interleaved: the pairs are (2i, 2i + 1), and in the result (i, i + pairs): queries and keys are reordered alike, which
            leaves their products as they are. Else the pairs are (i, i + pairs), Hugging Face's order.
    """
    wide, turned = x.astype(jnp.float32), 2 * cos.shape[-1]
    if interleaved:
        first, second = wide[..., 0:turned:2], wide[..., 1:turned:2]
    else:
        first, second = jnp.split(wide[..., :turned], 2, axis=-1)
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    parts = [first * c - second * s, second * c + first * s]
    parts = parts if turned == x.shape[-1] else [*parts, wide[..., turned:]]
    rotated = jnp.concatenate(parts, axis=-1)
    if isinstance(scale, int | float):
        return (rotated if scale == 1.0 else rotated * jnp.float32(scale)).astype(x.dtype)
    return (rotated * scale[:, :, None, None]).astype(x.dtype)
