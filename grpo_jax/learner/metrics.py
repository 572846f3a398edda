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
        values: one value per name, then the N advantages, then what the update computed of each token of the first n completions.
        names: the metrics' names.
        token_names: `entropy` of the distribution before the token and `kl` (k3) from the reference, nats, NaN where it computed
            none; () where nothing is recorded.
        token_shape: (n, C).
    """

    values: Float[Array, "M"]
    names: tuple[str, ...] = struct.field(pytree_node=False)
    token_names: tuple[str, ...] = struct.field(pytree_node=False, default=())
    token_shape: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))

    def fetch(self) -> tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]:
        """The metrics, the advantages [N] and the values of tokens, [n, C] by name, on the host, by one transfer."""
        values = np.asarray(jax.device_get(self.values))
        rest, count = values[len(self.names) :], len(self.token_names) * self.token_shape[0] * self.token_shape[1]
        tables = rest[len(rest) - count :].reshape(len(self.token_names), *self.token_shape)
        metrics = dict(zip(self.names, values.tolist(), strict=False))
        return metrics, rest[: len(rest) - count], dict(zip(self.token_names, tables, strict=True))

    def to_host(self) -> tuple[dict[str, float], np.ndarray]:
        """The metrics and the advantages [N] on the host, by one transfer."""
        return self.fetch()[:2]

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
    tables = tokens or {}
    values = jnp.concatenate([scalars, advantages.reshape(-1), *(table.reshape(-1) for table in tables.values())])
    values = values if layout is None else layout.constrain(values, None)
    shape = next((table.shape for table in tables.values()), (0, 0))
    return PackedMetrics(values, tuple(metrics), tuple(tables), (shape[0], shape[1]))


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
