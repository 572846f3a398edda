"""Where the states of a packed row's tokens come from: chunk by chunk, from two states that pass along the row.

A row is cut into chunks at fixed places, so a chunk may have parts of several sequences. A token's state depends on the tokens
before it in its own sequence and in its prompt: those of its chunk one by one, and all before the chunk through one state. That is
the state at the last token before the chunk, or, for a completion that begins in the chunk, the state at the end of its prompt. So
two states pass from chunk to chunk, and the prompt is computed once for all sequences that continue it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.gated_delta_rule.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_attention.key_ranges import KeyRanges
from grpo_kernels.target import platform, resolve_implementation

CARRIED, OF_PROMPT, NOTHING = 0, 1, 2
"""Where a token's state comes from, before the tokens of its chunk: the last token before the chunk, its prompt's end, or zero."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bounds", "sources", "ends"),
    meta_fields=("tokens", "prompts", "implementation", "blocks"),
)
@dataclass(frozen=True)
class DeltaPlan:
    """What all layers share; made by `plan_delta_rule`. On a mesh the first axis of every array is sharded as rows are.

    Attributes:
        bounds: [B, 4, U], the tokens that each token depends on (`KeyRanges`), and itself; U is T rounded up to whole blocks.
        sources: [B, U], `CARRIED`, `OF_PROMPT` or `NOTHING`.
        ends: [B, U / chunk, 2], index in each chunk of the last token that is not padding, and of the last one that ends a sequence
            without a prompt; -1 for none.
        tokens: T.
        prompts: rows have sequences that continue a prompt.
        implementation: "reference", "xla" or "mosaic_tpu".
        blocks: block sizes.
    """

    bounds: Int[Array, "B 4 U"]
    sources: Int[Array, "B U"]
    ends: Int[Array, "B N 2"]
    tokens: int
    prompts: bool
    implementation: str
    blocks: BlockSizes


def plan_delta_rule(
    ranges: KeyRanges, *, prompts: bool, implementation: str | None = None, block_sizes: BlockSizes | None = None
) -> DeltaPlan:
    """Prepares `gated_delta_rule`, once for all layers: where each token's state comes from.

    Args:
        ranges: of each token of B rows, int32 [B, T], as `plan_attention` takes them. A sequence that continues a prompt stands
            behind it, before the next sequence without a prompt. Tokens that see nothing are padding, anywhere in a row.
        prompts: whether a sequence may continue a prompt of its row; without, there is one state to pass along, not two.
        implementation: "reference" (token by token), "xla" (plain JAX in chunks; runs anywhere), "mosaic_tpu" (Pallas), or None:
            "mosaic_tpu" on a TPU, else "xla".
        block_sizes: None = `choose_block_sizes`.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.

    Example:
        plan = plan_delta_rule(rows.ranges, prompts=rows.limits.prompts > 0)
        plan = plan_delta_rule(prompt_ranges(lengths, width), prompts=False)
    """
    shape = ranges.own_end.shape
    if len(shape) != 2 or any(x.shape != shape for x in ranges) or not shape[1]:
        raise ValueError(f"plan_delta_rule: ranges have shapes {[x.shape for x in ranges]}; all are [B, T], a row and its tokens")
    default = "mosaic_tpu" if platform() == "tpu" else "xla"
    named = resolve_implementation("gated_delta_rule", implementation, default)
    tokens = shape[1]
    blocks = block_sizes or choose_block_sizes(tokens, named)
    padding = round_up(tokens, blocks.tokens) - tokens
    padded = KeyRanges(*(jnp.pad(jnp.asarray(x), ((0, 0), (0, padding))) for x in ranges))
    bounds = jnp.stack([jnp.asarray(x) for x in padded], axis=1)
    return DeltaPlan(bounds, sources_of(padded, blocks.chunk), ends_of(padded, blocks.chunk), tokens, prompts, named, blocks)


def sources_of(ranges: KeyRanges, chunk: int) -> Int[Array, "B U"]:
    """Where each token's state comes from.

    A row's first sequence begins at the state that is carried: nothing has changed the initial one before it.
    """
    prompt_start, prompt_end, own_start, own_end = map(jnp.asarray, ranges)
    real, continues = own_end > own_start, prompt_end > prompt_start
    at = jnp.arange(own_end.shape[1], dtype=jnp.int32)[None, :]
    start = at - at % chunk
    first = jnp.min(jnp.where(real, own_start, own_end.shape[1]), axis=1, keepdims=True)
    root = jnp.where(continues, prompt_start, own_start)
    carried = jnp.where(root == first, jnp.int32(CARRIED), jnp.int32(NOTHING))
    carried = jnp.where((own_start < start) | (root < start), jnp.int32(CARRIED), carried)
    behind = continues & (prompt_end <= start) & (own_start >= start)
    return jnp.where(real, jnp.where(behind, jnp.int32(OF_PROMPT), carried), jnp.int32(NOTHING))


def ends_of(ranges: KeyRanges, chunk: int) -> Int[Array, "B N 2"]:
    """Index in each chunk of the last token that is not padding, and of the last one that ends a sequence without a prompt."""
    prompt_start, prompt_end, own_start, own_end = map(jnp.asarray, ranges)
    real = own_end > own_start
    same = (own_start[:, 1:] == own_start[:, :-1]) & real[:, 1:]
    last = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    flags = jnp.stack([real, real & last & (prompt_end == prompt_start)], axis=-1)
    flags = flags.reshape(flags.shape[0], -1, chunk, 2)
    at = jnp.arange(chunk, dtype=jnp.int32)[None, None, :, None]
    return jnp.max(jnp.where(flags, at, jnp.int32(-1)), axis=2)
