"""Recurrent layers: what a token takes from the tokens before it through a state of fixed size.

A gated short convolution (LFM2, https://arxiv.org/abs/2511.23404) mixes each channel of a token with those of the K - 1 tokens
before it. In a packed row these are tokens of its own sequence and, before the sequence's first token, the last ones of its prompt:
the prompt is computed once for its completions, and its gradient is the sum of theirs. Decoding has the K - 1 tokens as a state,
which prefill computes once for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_jax.runtime.sharding import Layout
from grpo_kernels import KeyRanges

__all__ = ["PackedRecurrence", "Recurrence", "RecurrentState", "TokenRecurrence", "packed_recurrence", "short_conv"]


@struct.dataclass
class RecurrentState:
    """What a recurrent layer remembers of a sequence, or several layers with one more axis in front.

    Attributes:
        inputs: [..., B, K - 1, C], the last inputs of the short convolution, the newest last; 0 before the first token.
    """

    inputs: Array


class Recurrence(Protocol):
    """How the tokens of recurrent layers see the tokens before them; the counterpart of `layers.Attend`."""

    @property
    def inference(self) -> bool:
        """Whether no gradient is wanted."""
        ...

    def convolve(
        self, x: Float[Array, "B T C"], taps: Float[Array, "C K"], state: RecurrentState | None
    ) -> tuple[Float[Array, "B T C"], Array | None]:
        """Computes sum over j of taps[:, j] · x[t - K + 1 + j], in float32, and the inputs of the next state, if it is needed."""
        ...


@dataclass(frozen=True)
class PackedRecurrence:
    """Recurrence of packed rows in training, and of prompts in prefill.

    Attributes:
        before: [B, T, K - 1], the tokens before each token, the nearest last; -1 for none. Planned once for all layers.
        last: [B, K - 1], the last tokens of each row, whose inputs are the state; None where none is needed.
        layout: None is one device.
    """

    before: Int[Array, "B T J"]
    last: Int[Array, "B J"] | None = None
    layout: Layout | None = None

    @property
    def inference(self) -> bool:
        """Whether it is prefill."""
        return self.last is not None

    def convolve(self, x: Array, taps: Array, state: RecurrentState | None) -> tuple[Array, Array | None]:
        """Gathers the tokens before each token; see `Recurrence`."""
        wide = taps.astype(jnp.float32)
        y = x.astype(jnp.float32) * wide[None, None, :, -1]
        for j in range(taps.shape[1] - 1):
            y = y + self.take(x, self.before[:, :, j]).astype(jnp.float32) * wide[None, None, :, j]
        return y.astype(x.dtype), None if self.last is None else self.take(x, self.last)

    def take(self, x: Float[Array, "B T C"], index: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        """x[b, index[b, n]], and 0 where the index is -1."""
        if self.layout is None:
            return take_or_zero(x, index)
        rows = self.layout.spec("rows")
        return self.layout.local(take_or_zero, (rows, rows), rows)(x, index)


def take_or_zero(x: Float[Array, "B T C"], index: Int[Array, "B N"]) -> Float[Array, "B N C"]:
    """See `PackedRecurrence.take`."""
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, :, None], axis=1)
    return jnp.where((index >= 0)[:, :, None], taken, jnp.zeros((), x.dtype))


@dataclass(frozen=True)
class TokenRecurrence:
    """Recurrence of one new token a slot, T = 1, in decoding."""

    inference: bool = True

    def convolve(self, x: Array, taps: Array, state: RecurrentState | None) -> tuple[Array, Array | None]:
        """Continues the stored inputs; see `Recurrence`."""
        assert state is not None
        inputs = jnp.concatenate([state.inputs.astype(x.dtype), x], axis=1)
        y = jnp.sum(inputs.astype(jnp.float32) * taps.T.astype(jnp.float32)[None], axis=1, keepdims=True)
        return y.astype(x.dtype), inputs[:, 1:]


def tokens_before(ranges: KeyRanges, count: int) -> Int[Array, "B T J"]:
    """Returns the indices of the `count` tokens before each token of packed rows, the nearest last; -1 for none.

    Before the first token of a completion stands the last one of its prompt, which may be anywhere before it in the row.

    Args:
        ranges: [B, T], the keys that each token sees, itself last.
    """
    prompt_start, prompt_end, own_start, own_end = (jnp.asarray(x)[:, :, None] for x in ranges)
    back = jnp.arange(count, 0, -1, dtype=jnp.int32)[None, None, :]
    own = own_end - 1 - back
    of_prompt = prompt_end - (own_start - own)
    return jnp.where(own >= own_start, own, jnp.where(of_prompt >= prompt_start, of_prompt, jnp.int32(-1)))


def packed_recurrence(
    conv_kernel: int, ranges: KeyRanges, layout: Layout | None, lengths: Int[Array, "B"] | None = None
) -> PackedRecurrence | None:
    """Plans the recurrence of packed rows; None where the model has no recurrent layers.

    Args:
        conv_kernel: `ModelSpec.conv_kernel`.
        ranges: [B, T], the keys that each token sees.
        layout: None is one device.
        lengths: in prefill the tokens of each row, behind which the state is wanted; None in training.
    """
    if not conv_kernel:
        return None
    last = None
    if lengths is not None:
        last = jnp.maximum(lengths[:, None] - jnp.arange(conv_kernel - 1, 0, -1, dtype=jnp.int32)[None, :], jnp.int32(-1))
    return PackedRecurrence(tokens_before(ranges, conv_kernel - 1), last, layout)


def short_conv(
    recurrence: Recurrence,
    linear: Callable[[str, Array], Array],
    weights: dict[str, Any],
    x: Float[Array, "B T D"],
    state: RecurrentState | None,
    select: Callable[[Array], Array] | None,
) -> tuple[Float[Array, "B W D"], RecurrentState | None]:
    """Computes a gated short convolution: out_proj(C · conv(B · x)), where B, C and x are parts of in_proj.

    Args:
        linear: computes the layer's linear layer of that name.
        weights: `taps` [D, 1, K], and `bias` [D] where the model has it.
        state: of the tokens before, in decoding.
        select: picks the tokens that the result is needed of.

    Returns:
        The result, and the state behind the last token where it is needed.
    """
    before, gate, own = jnp.split(linear("in_proj", x), 3, axis=-1)
    mixed, inputs = recurrence.convolve(before * own, weights["taps"][:, 0], state)
    if "bias" in weights:
        mixed = mixed + weights["bias"].astype(mixed.dtype)[None, None, :]
    y = gate * mixed
    y = y if select is None else select(y)
    return linear("out_proj", y), None if inputs is None else RecurrentState(inputs)
