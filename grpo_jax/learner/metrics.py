"""Metrics of an update: packed into one array, so that one transfer brings them to the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import TrainBatch


@struct.dataclass
class PackedMetrics:
    """A step's metrics in one array.

    Attributes:
        values: one value per name, then the N advantages.
        names: the metrics' names.
        tokens: what the update computed of each token of the first n completions, [n, C] by name: `entropy` of the distribution
            before the token and `kl` (k3) from the reference, nats, NaN where it computed none; {} where nothing is recorded.
    """

    values: Float[Array, "M"]
    names: tuple[str, ...] = struct.field(pytree_node=False)
    tokens: dict[str, Float[Array, "n C"]] = struct.field(default_factory=dict)

    def to_host(self) -> tuple[dict[str, float], np.ndarray]:
        """The metrics and the advantages [N] on the host, by one transfer."""
        values = np.asarray(jax.device_get(self.values))
        return dict(zip(self.names, values.tolist(), strict=False)), values[len(self.names) :]

    def tokens_to_host(self) -> dict[str, np.ndarray]:
        """`tokens` on the host, by one transfer."""
        return {name: np.asarray(values) for name, values in jax.device_get(self.tokens).items()}

    def to_dict(self) -> dict[str, float]:
        """The metrics alone, by one transfer."""
        return self.to_host()[0]


def pack(
    metrics: dict[str, Array],
    advantages: Float[Array, "B G"],
    layout: Layout | None = None,
    tokens: dict[str, Float[Array, "n C"]] | None = None,
) -> PackedMetrics:
    """Packs scalars and advantages, and values of tokens; on a mesh every device has them all."""
    scalars = jnp.stack([value.astype(jnp.float32) for value in metrics.values()])
    values = jnp.concatenate([scalars, advantages.reshape(-1)])
    tokens = tokens or {}
    if layout is not None:
        values = layout.constrain(values, None)
        tokens = {name: layout.constrain(table, None, None) for name, table in tokens.items()}
    return PackedMetrics(values, tuple(metrics), tokens)


def batch_metrics(batch: TrainBatch, advantages: Float[Array, "B G"]) -> dict[str, Array]:
    """Reward statistics of a batch. `reward/std` is over all valid rows of the step (ddof 1)."""
    valid, rewards = batch.valid, jnp.where(batch.valid, batch.rewards, jnp.float32(0))
    count = jnp.maximum(jnp.sum(valid.astype(jnp.float32)), jnp.float32(1))
    mean = jnp.sum(rewards) / count
    spread = jnp.where(valid, rewards - mean, jnp.float32(0))
    variance = jnp.sum(jnp.square(spread)) / jnp.maximum(count - 1, jnp.float32(1))
    same = jnp.all(advantages == 0, axis=1)
    return {
        "reward/mean": mean,
        "reward/std": jnp.sqrt(variance),
        "reward/frac_zero_std": jnp.mean(same.astype(jnp.float32)),
    }
