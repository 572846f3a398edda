"""Splits a batch into micro-batches, stacked along a leading axis for `lax.scan`. An update does not depend on the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Shaped

from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import AnyArray, TrainBatch


@struct.dataclass
class MicroBatches:
    """A batch as M micro-batches of b prompts and g completions of each, n = b·g rows.

    On a mesh each micro-batch takes the same number of prompts from every row shard, so that no device waits and no prompt moves to
    another device: of R shards, micro-batch m has each shard's prompts m·b/R to (m + 1)·b/R.

    Attributes:
        prompt_ids, prompt_lengths: [M, b, ...], a prompt repeated for each part of its completions.
        completion_ids, completion_mask, sampler_logprobs: [M, n, C], the rows of a prompt next to each other.
        grid: (B/b, G/g, b, g).
        layout: None is one device.
    """

    prompt_ids: Any
    prompt_lengths: Any
    completion_ids: Any
    completion_mask: Any
    sampler_logprobs: Any
    grid: tuple[int, int, int, int] = struct.field(pytree_node=False)
    layout: Layout | None = struct.field(pytree_node=False, default=None)

    @staticmethod
    def of(batch: TrainBatch, micro_batch: tuple[int, int], layout: Layout | None = None) -> MicroBatches:
        """Splits a batch into micro-batches.

        Args:
            batch: B prompts with G completions each.
            micro_batch: (b, g); b divides B, g divides G.
            layout: None is one device; else its row shards divide b.

        Raises:
            ValueError: the sizes do not divide.
        """
        prompts, generations = batch.rewards.shape
        b, g = micro_batch
        shards = 1 if layout is None else layout.rows
        if prompts % b or generations % g or b % shards:
            raise ValueError(
                f"micro-batch of {b} prompts and {g} completions of each does not divide a batch of {prompts} and {generations} "
                f"on {shards} row shards"
            )
        empty = MicroBatches(None, None, None, None, None, (prompts // b, generations // g, b, g), layout)
        return replace(
            empty,
            prompt_ids=empty.prompts(batch.prompt_ids),
            prompt_lengths=empty.prompts(batch.prompt_lengths),
            completion_ids=empty.rows(batch.completion_ids),
            completion_mask=empty.rows(batch.completion_mask),
            sampler_logprobs=empty.rows(batch.sampler_logprobs),
        )

    @property
    def count(self) -> int:
        """M, the number of micro-batches."""
        return self.grid[0] * self.grid[1]

    @property
    def shards(self) -> int:
        """R, the number of row shards."""
        return 1 if self.layout is None else self.layout.rows

    def prompts(self, x: Shaped[AnyArray, "B ..."]) -> Shaped[Array, "M b ..."]:
        """Splits one entry per prompt: [B, ...] → [M, b, ...], repeated for each part of a prompt's completions."""
        outer, inner, b, _ = self.grid
        x = x.reshape(self.shards, outer, b // self.shards, *x.shape[1:])
        return self.constrain(jnp.repeat(jnp.swapaxes(x, 0, 1).reshape(outer, b, *x.shape[3:]), inner, axis=0))

    def rows(self, x: Shaped[AnyArray, "N ..."]) -> Shaped[Array, "M n ..."]:
        """Splits one entry per completion: [N, ...] → [M, n, ...]."""
        outer, inner, b, g = self.grid
        x = x.reshape(self.shards, outer, b // self.shards, inner, g, *x.shape[1:])
        x = jnp.moveaxis(x, (1, 3), (0, 1))
        return self.constrain(x.reshape(outer * inner, b * g, *x.shape[5:]))

    def join(self, x: Shaped[Array, "M n ..."]) -> Shaped[Array, "N ..."]:
        """Joins what `rows` has split: [M, n, ...] → [N, ...]."""
        outer, inner, b, g = self.grid
        x = x.reshape(outer, inner, self.shards, b // self.shards, g, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 1), (1, 3))
        return x.reshape(outer * inner * b * g, *x.shape[5:])

    def constrain(self, x: Array) -> Array:
        """Shards the rows of every micro-batch over all row shards."""
        return x if self.layout is None else self.layout.constrain(x, None, "rows", *(None,) * (x.ndim - 2))
