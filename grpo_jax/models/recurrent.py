"""Recurrent layers: what a token takes from the tokens before it through a state of fixed size.

A short convolution mixes each channel of a token with those of the K - 1 tokens before it. A gated one is a layer of LFM2
(https://arxiv.org/abs/2511.23404). In Qwen3-Next and Qwen3.5 one stands before linear attention by the gated delta rule
(https://arxiv.org/abs/2412.06464), whose state is a matrix for each head.

In a packed row the tokens before a token are those of its own sequence and, before the sequence's first one, those of its prompt:
the prompt is computed once for its completions, and its gradient is the sum of theirs. Decoding has the last K - 1 inputs of the
convolution and the matrices as a state, which prefill computes once for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import DeltaPlan, KeyRanges, gated_delta_rule, gated_delta_step, plan_delta_rule

__all__ = [
    "PackedRecurrence",
    "Recurrence",
    "RecurrentState",
    "TokenRecurrence",
    "linear_attention",
    "packed_recurrence",
    "short_conv",
]

NORM_EPS = 1e-6
"""Added to the squared norm of queries and keys of linear attention."""


@struct.dataclass
class RecurrentState:
    """What a recurrent layer remembers of a sequence, or several layers with one more axis in front.

    Attributes:
        inputs: [..., B, K - 1, C], the last inputs of the short convolution, the newest last; 0 before the first token.
        memory: [..., B, H, Dk, Dv], float32, of linear attention; None where the layer has none.
    """

    inputs: Array
    memory: Array | None = None


DeltaTokens = tuple[Array, Array, Array, Array, Array]
"""q, k, v, log decays and β of tokens."""


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

    def apply_delta_rule(self, tokens: DeltaTokens, state: RecurrentState | None) -> tuple[Float[Array, "B T H Dv"], Array]:
        """Computes the gated delta rule of q, k [B, T, K, Dk], v [B, T, H, Dv], log decays and β [B, T, H], and the next memory."""
        ...


@dataclass(frozen=True)
class PackedRecurrence:
    """Recurrence of packed rows in training, and of prompts in prefill.

    Attributes:
        before: [B, T, K - 1], the tokens before each token, the nearest last; -1 for none. Planned once for all layers.
        plan: of the gated delta rule; None where the model has none.
        last: [B, K - 1], the last tokens of each row, whose inputs are the state; None where none is needed.
        layout: None is one device.
    """

    before: Int[Array, "B T J"]
    plan: DeltaPlan | None = None
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

    def apply_delta_rule(self, tokens: DeltaTokens, state: RecurrentState | None) -> tuple[Array, Array]:
        """Computes the chunked form; see `Recurrence`. Where a row has several sequences, the memory is that of the last one."""
        assert self.plan is not None

        def run(tokens: DeltaTokens, plan: DeltaPlan) -> tuple[Array, Array]:
            return gated_delta_rule(*tokens, plan)

        if self.layout is None:
            return run(tokens, self.plan)
        rows = self.layout.spec("rows")
        return self.layout.local(run, (rows, rows), rows)(tokens, self.plan)


def take_or_zero(x: Float[Array, "B T C"], index: Int[Array, "B N"]) -> Float[Array, "B N C"]:
    """See `PackedRecurrence.take`."""
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, :, None], axis=1)
    return jnp.where((index >= 0)[:, :, None], taken, jnp.zeros((), x.dtype))


@dataclass(frozen=True)
class TokenRecurrence:
    """Recurrence of one new token a slot, T = 1, in decoding. Each device computes its own slots."""

    layout: Layout | None = None

    @property
    def inference(self) -> bool:
        """Always."""
        return True

    def convolve(self, x: Array, taps: Array, state: RecurrentState | None) -> tuple[Array, Array | None]:
        """Continues the stored inputs; see `Recurrence`."""
        assert state is not None
        inputs = jnp.concatenate([state.inputs.astype(x.dtype), x], axis=1)
        y = jnp.sum(inputs.astype(jnp.float32) * taps.T.astype(jnp.float32)[None], axis=1, keepdims=True)
        return y.astype(x.dtype), inputs[:, 1:]

    def apply_delta_rule(self, tokens: DeltaTokens, state: RecurrentState | None) -> tuple[Array, Array]:
        """Computes one token; see `Recurrence`."""
        assert state is not None and state.memory is not None
        step: Any = gated_delta_step
        if self.layout is not None:
            rows = self.layout.spec("slots")
            step = self.layout.local(gated_delta_step, (rows,) * 6, rows)
        y, memory = step(*(x[:, 0] for x in tokens), state.memory)
        return y[:, None], memory


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
    spec: ModelSpec,
    ranges: KeyRanges,
    *,
    prompts: bool,
    layout: Layout | None,
    implementation: str | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> PackedRecurrence | None:
    """Plans the recurrence of packed rows; None where the model has no recurrent layers.

    Args:
        ranges: [B, T], the keys that each token sees.
        prompts: whether a sequence may continue a prompt of its row.
        layout: None is one device.
        implementation: of the gated delta rule.
        lengths: in prefill the tokens of each row, behind which the state is wanted; None in training.
    """
    if not spec.recurrent_layers:
        return None
    count, last, plan = spec.conv_kernel - 1, None, None
    if lengths is not None:
        last = jnp.maximum(lengths[:, None] - jnp.arange(count, 0, -1, dtype=jnp.int32)[None, :], jnp.int32(-1))
    if spec.delta_heads:
        local: Callable[[KeyRanges], DeltaPlan] = lambda own: plan_delta_rule(own, prompts=prompts, implementation=implementation)  # noqa: E731
        plan = local(ranges) if layout is None else layout.local(local, (layout.spec("rows"),), layout.spec("rows"))(ranges)
    return PackedRecurrence(tokens_before(ranges, count), plan, last, layout)


LinearLayer = Callable[[str, Array], Array]
"""(name, x) → the layer's linear layer of that name."""

SelectTokens = Callable[[Array], Array]
"""As in `layers.py`."""


def short_conv(
    recurrence: Recurrence,
    linear: LinearLayer,
    weights: dict[str, Any],
    x: Float[Array, "B T D"],
    state: RecurrentState | None,
    select: SelectTokens | None,
) -> tuple[Float[Array, "B W D"], RecurrentState | None]:
    """Computes a gated short convolution: out_proj(C · conv(B · x)), where B, C and x are parts of in_proj.

    Args:
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


def linear_attention(
    spec: ModelSpec,
    recurrence: Recurrence,
    linear: LinearLayer,
    norm: Callable[[Array], Array],
    weights: dict[str, Any],
    x: Float[Array, "B T D"],
    state: RecurrentState | None,
    select: SelectTokens | None,
) -> tuple[Float[Array, "B W D"], RecurrentState | None]:
    """Computes linear attention by the gated delta rule: out_proj(norm(rule(conv(q, k, v), decay, β)) · silu(z)).

    Queries and keys have norm 1, queries are divided by √Dk; the log decay is -exp(rate) · softplus(a + offset), β = sigmoid(b).

    Args:
        norm: RMSNorm of a head's result.
        weights: `taps` [C, 1, K], `rate` [H] and `offset` [H].
        state: of the tokens before, in decoding.
        select: picks the tokens that the result is needed of.

    Returns:
        As `short_conv`.
    """
    inputs, gate, b, a = delta_inputs(spec, linear, x)
    mixed, last = recurrence.convolve(inputs, weights["taps"][:, 0], state)
    q, k, v = jnp.split(jax.nn.silu(mixed), [spec.delta_keys, 2 * spec.delta_keys], axis=-1)
    q, k = (unit_heads(y.reshape(*y.shape[:2], spec.delta_key_heads, spec.delta_key_dim)) for y in (q, k))
    q = (q * jnp.float32(spec.delta_key_dim**-0.5)).astype(x.dtype)
    v = v.reshape(*v.shape[:2], spec.delta_heads, spec.delta_value_dim)
    rate, offset = (jnp.asarray(weights[name]).astype(jnp.float32)[None, None, :] for name in ("rate", "offset"))
    log_decay = -jnp.exp(rate) * jax.nn.softplus(a.astype(jnp.float32) + offset)
    beta = jax.nn.sigmoid(b.astype(jnp.float32))
    y, memory = recurrence.apply_delta_rule((q, k.astype(x.dtype), v, log_decay, beta), state)
    gate = gate.reshape(*gate.shape[:2], spec.delta_heads, spec.delta_value_dim)
    y, gate = (y, gate) if select is None else (select(y), select(gate))
    y = (norm(y).astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
    return linear("out_proj", y.reshape(*y.shape[:2], spec.delta_values)), None if last is None else RecurrentState(last, memory)


def unit_heads(x: Float[Array, "B T K Dk"]) -> Float[Array, "B T K Dk"]:
    """Divides each head by its norm, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(NORM_EPS))


def delta_inputs(spec: ModelSpec, linear: LinearLayer, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array, Array]:
    """The inputs of linear attention: queries, keys and values next to each other, the gate z, and b and a of each head."""
    if not spec.delta_fused:
        inputs, gate, b, a = (linear(name, x) for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
        return inputs, gate, b, a

    def by_head(name: str, sizes: list[int]) -> list[Array]:
        """Splits the outputs that stand together for each head of keys."""
        y = linear(name, x)
        parts = jnp.split(y.reshape(*y.shape[:2], spec.delta_key_heads, -1), sizes, axis=-1)
        return [part.reshape(*y.shape[:2], -1) for part in parts]

    repeats, d = spec.delta_heads // spec.delta_key_heads, spec.delta_key_dim
    values = repeats * spec.delta_value_dim
    q, k, v, gate = by_head("in_proj_qkvz", [d, 2 * d, 2 * d + values])
    b, a = by_head("in_proj_ba", [repeats])
    return jnp.concatenate([q, k, v], axis=-1), gate, b, a
