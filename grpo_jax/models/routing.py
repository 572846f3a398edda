"""What routers have done, and what they are told: experts recorded and used again, and sums for the load-balancing loss.

A model puts these into the variable collection `router`, which is computed only where somebody asks for it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Integer

from grpo_jax.models.spec import ModelSpec

COLLECTION = "router"
"""The variable collection. A layer has `used` in it where the model records experts, and else `sums`."""


@struct.dataclass
class Routing:
    """What a router has done with some tokens.

    Attributes:
        probabilities: softmax of the router's logits over all experts, float32.
        own: the k most probable experts.
        used: the experts that were computed: `own`, or those that were given.
    """

    probabilities: Float[Array, "... E"]
    own: Int[Array, "... k"]
    used: Int[Array, "... k"]


@struct.dataclass
class RouterInputs:
    """What the routers of all layers are told. L counts the layers with experts; a layer's slice has no L.

    Attributes:
        recorded: the experts that the sampler used for each token; None where they are not known.
        weights: the weight of each token in `RouterSums`; the same in every layer.
        replays: the recorded experts are used instead of the router's own.
    """

    recorded: Integer[Array, "L B T k"] | None
    weights: Float[Array, "L B T"]
    replays: bool = struct.field(pytree_node=False, default=False)

    @property
    def given(self) -> Array | None:
        """The experts to use instead of the router's own."""
        return self.recorded if self.replays else None


@struct.dataclass
class RouterSums:
    """Weighted sums over tokens, of one layer or of all.

    Attributes:
        counts: of the tokens that used each expert.
        probabilities: of each expert, with gradient.
        differing: number of recorded experts that the router would not have selected itself.
    """

    counts: Float[Array, "E"]
    probabilities: Float[Array, "E"]
    differing: Float[Array, ""]


def sums_of(routing: Routing, inputs: RouterInputs) -> RouterSums:
    """Adds up one layer's tokens [B, T]."""
    weights, experts = inputs.weights, routing.probabilities.shape[-1]
    used = jax.nn.one_hot(routing.used, experts, dtype=jnp.float32).sum(axis=-2)
    differing = jnp.float32(0)
    if inputs.recorded is not None:
        recorded = inputs.recorded.astype(jnp.int32)
        missing = ~jnp.any(recorded[..., :, None] == routing.own[..., None, :], axis=-1)
        differing = jnp.sum(weights * jnp.sum(missing.astype(jnp.float32), axis=-1))
    # Products of elements, as a TPU would round those of matrices.
    return RouterSums(
        counts=jax.lax.stop_gradient(jnp.sum(used * weights[..., None], axis=(0, 1))),
        probabilities=jnp.sum(routing.probabilities * weights[..., None], axis=(0, 1)),
        differing=differing,
    )


def total_sums(collection: Any) -> RouterSums:
    """Adds up the layers of a model, which are stacked in one entry or have one each."""
    layers = [entry["sums"] for entry in collection.values()]

    def add(*leaves: Array) -> Array:
        return sum((jnp.sum(leaf, axis=0) if stacked else leaf for leaf in leaves), jnp.zeros((), jnp.float32))

    stacked = layers[0].differing.ndim == 1
    return jax.tree.map(add, *layers)


def expert_dtype(spec: ModelSpec) -> Any:
    """The smallest dtype that numbers the experts."""
    return jnp.uint8 if spec.experts <= 256 else jnp.uint16


def used_experts(spec: ModelSpec, collection: Any, tokens: int) -> Integer[Array, "B T L k"]:
    """The experts that each token used in every layer that has experts, [B, T, layers, k].

    An unrolled model's last layer may have computed one token of each row, as in prefill; the others do nothing there, and get that
    one's experts.
    """
    first = next(iter(collection.values()))["used"]
    if first.ndim == 4:  # stacked
        used = jnp.moveaxis(first, 0, 2)
    else:
        layers = [collection[f"layers_{number}"]["used"] for number in spec.layers_with("router")]
        used = jnp.stack([jnp.broadcast_to(own, (own.shape[0], tokens, own.shape[2])) for own in layers], axis=2)
    return used.astype(expert_dtype(spec))


def balance_loss(
    counts: Float[Array, "E"], probabilities: Float[Array, "E"], tokens: Float[Array, ""], layers: int
) -> Float[Array, ""]:
    """The load-balancing loss E · Σ_e f_e · P_e (Fedus et al. 2021, eq. 4 to 6, https://arxiv.org/abs/2101.03961).

    f_e is the share of the tokens that use expert e, P_e the mean probability that routers give it. As in transformers both are
    means over tokens and layers together, and f counts all k experts of a token: balanced experts give k.

    Args:
        counts, probabilities: sums over tokens and layers.
        tokens: number of tokens.
        layers: number of layers with experts.
    """
    pairs = jnp.maximum(tokens, jnp.float32(1)) * layers
    return counts.shape[0] * jnp.sum((counts / pairs) * (probabilities / pairs))
