"""A batch in micro-batches.

Enters: a `TrainBatch` and how many prompts, and completions of each, are computed at once. Leaves: the same rows with a leading
    axis of micro-batches, for `lax.scan`. The result of an update does not depend on the cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Shaped

from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import AnyArray, TrainBatch


@struct.dataclass
class Split:
    """A batch cut into M micro-batches of b prompts and g completions of each, n = b·g.

    On a mesh each micro-batch takes its prompts evenly from all row shards, so that no device waits, and no prompt moves to
    another: micro-batch m has of each shard its prompts m·b/R to (m + 1)·b/R, for R shards.

    Attributes:
        completion_ids, completion_mask, sampler_logprobs: rows of a prompt next to each other.
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
    def of(batch: TrainBatch, micro_batch: tuple[int, int], layout: Layout | None = None) -> Split:
        """Cuts a batch; the sizes must divide it, and the row shards the prompts of a micro-batch."""
        prompts, generations = batch.rewards.shape
        b, g = micro_batch
        shards = 1 if layout is None else layout.rows
        if prompts % b or generations % g or b % shards:
            raise ValueError(
                f"micro-batch of {b} prompts and {g} completions of each does not divide a batch of {prompts} and {generations} "
                f"on {shards} row shards"
            )
        split = Split(None, None, None, None, None, (prompts // b, generations // g, b, g), layout)
        return replace(
            split,
            prompt_ids=split.prompts(batch.prompt_ids),
            prompt_lengths=split.prompts(batch.prompt_lengths),
            completion_ids=split.rows(batch.completion_ids),
            completion_mask=split.rows(batch.completion_mask),
            sampler_logprobs=split.rows(batch.sampler_logprobs),
        )

    @property
    def count(self) -> int:
        """M."""
        return self.grid[0] * self.grid[1]

    @property
    def shards(self) -> int:
        """R."""
        return 1 if self.layout is None else self.layout.rows

    def prompts(self, x: Shaped[AnyArray, "B ..."]) -> Shaped[Array, "M b ..."]:
        """[B, ...] → [M, b, ...], a prompt again for each part of its completions."""
        outer, inner, b, _ = self.grid
        x = x.reshape(self.shards, outer, b // self.shards, *x.shape[1:])
        return self.placed(jnp.repeat(jnp.swapaxes(x, 0, 1).reshape(outer, b, *x.shape[3:]), inner, axis=0))

    def rows(self, x: Shaped[AnyArray, "N ..."]) -> Shaped[Array, "M n ..."]:
        """[N, ...] → [M, n, ...]."""
        outer, inner, b, g = self.grid
        x = x.reshape(self.shards, outer, b // self.shards, inner, g, *x.shape[1:])
        x = jnp.moveaxis(x, (1, 3), (0, 1))
        return self.placed(x.reshape(outer * inner, b * g, *x.shape[5:]))

    def join(self, x: Shaped[Array, "M n ..."]) -> Shaped[Array, "N ..."]:
        """The inverse of `rows`."""
        outer, inner, b, g = self.grid
        x = x.reshape(outer, inner, self.shards, b // self.shards, g, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 1), (1, 3))
        return x.reshape(outer * inner * b * g, *x.shape[5:])

    def placed(self, x: Array) -> Array:
        """Micro-batches over all row shards."""
        return x if self.layout is None else self.layout.constrain(x, None, "rows", *(None,) * (x.ndim - 2))
