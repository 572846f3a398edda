"""The decoder: embedding, layers, final norm. The same module trains, computes prompts and decodes.

`model.apply({"params": base, "lora": adapters}, ...)` is the policy; without `"lora"` it is the base. The head is not part of it:
log-probabilities and sampling multiply with `head_matrix` without building a [tokens, vocabulary] array.

Flax gives names, `nn.scan` and `nn.remat`; it does not initialise. `spec.param_specs` declares each parameter's shape, axes and
initial values once, because loading, sharding and quantised storage need them without running the network. Modules therefore read
variables (`get_variable`) and declare none.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from grpo_jax.models.layers import LAYER_INPUT, LAYER_MIDDLE, Attend, Block, RMSNorm, SelectTokens
from grpo_jax.models.rope import rope_tables
from grpo_jax.models.routing import COLLECTION, RouterInputs, RouterSums, total_sums, used_experts
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import GATHERED, Layout
from grpo_jax.types import Params
from grpo_kernels import ATTENTION_RESULT

NO_WINDOW = 2**30
"""Window of a layer that sees every position."""

FEED_TOKENS = 8192
"""With remat the feed-forward computes at most that many tokens of a device at once: enough to read weights seldom."""

UNROLLED_LAYERS = 16
"""On a CPU, models of up to this many layers run without a loop over layers. Compile time grows with each layer."""


class Transformer(nn.Module):
    """A decoder-only transformer of any supported family.

    Attributes:
        spec: sizes and switches of the model.
        dtype: dtype of the computation; weights are cast to it where they are used.
        lora_scale: factor of the adapters' product.
        remat: `layer` saves only each layer's input for the backward pass and recomputes the rest; `selective` also saves
            attention's result and the hidden states behind it, so that neither attention nor its output's product runs again;
            `offload` is `layer` with the input in the host's memory.
        unroll: run the layers one after the other instead of in a scan; ignored with remat.
        implementation: of the kernels (`grpo_kernels`): "reference", "xla", "mosaic_tpu", or None for the device's.
        layout: sharding of weights and hidden states; None is one device.
        records_experts: `forward_with_experts` returns the experts of every token.
    """

    spec: ModelSpec
    dtype: Any
    lora_scale: float = 1.0
    remat: Literal["none", "selective", "layer", "offload"] = "none"
    unroll: bool = False
    implementation: str | None = None
    layout: Layout | None = None
    records_experts: bool = False

    @property
    def unrolled(self) -> bool:
        """Whether variables have one entry a layer (`split_layers`) instead of stacked layers."""
        return self.unroll and self.remat == "none"

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        cache: Any = None,
        per_layer: Any = None,
        select: SelectTokens | None = None,
        routers: RouterInputs | None = None,
    ) -> tuple[Float[Array, "B W D"], Any, Any]:
        """Runs the decoder.

        Args:
            ids: token ids.
            positions: position of each token in its own sequence, from 0.
            attend: attention of one layer, which decides what a query sees; see `layers.Attend`.
            cache: carried from layer to layer; where unrolled, a tuple with each layer's own.
            per_layer: passed to each layer's `attend`: a pytree with a leading L axis, or a tuple of L where unrolled.
            select: picks the W tokens whose hidden states are returned; None returns all T.
            routers: of a mixture of experts; needs all T in every layer, so no `select`.

        Returns:
            Hidden states after the final norm, the cache, and the layers' outputs, stacked or as tuples where unrolled.
        """
        x = Embedding(self.layout, name="embed")(ids).astype(self.dtype)
        x = x * jnp.asarray(self.spec.embed_scale, self.dtype)
        rope = rope_tables(self.spec.ropes, self.spec.rotated, positions)
        # Logits are linear in the norm's result, so their factor is the norm's.
        norm = RMSNorm(self.spec.norm_eps, self.spec.norm_offset, self.layout, factor=self.spec.logit_scale, name="final_norm")
        if self.unrolled:
            x, cache, outputs = self.run_unrolled(x, rope, attend, cache, per_layer, select, routers)
            return norm(x), cache, outputs
        x, cache, outputs = self.run_scanned(x, rope, attend, cache, per_layer, routers)
        x = norm(x)
        return x if select is None else select(x), cache, outputs

    def block(self, kind: Any, attend: Attend, name: str) -> Any:
        """Instantiates `Block`, or `Block` under scan or remat."""
        rows = 1 if self.layout is None else self.layout.rows
        feed_tokens = None if self.remat == "none" else FEED_TOKENS * rows
        return kind(self.spec, attend, self.lora_scale, self.implementation, self.layout, feed_tokens, name=name)

    def run_scanned(
        self, x: Array, rope: Any, attend: Attend, cache: Any, per_layer: Any, routers: RouterInputs | None
    ) -> tuple[Array, Any, Any]:
        """All layers as one scan over stacked variables: compile time does not grow with depth."""
        spec = self.spec
        gathers = self.layout is not None and self.layout.mesh.shape["fsdp"] > 1
        saves_all = self.remat == "none" and not gathers
        block = Block if saves_all else nn.remat(Block, prevent_cse=False, policy=remat_policy(self.remat))
        per_layer_then_all: Any = (0, nn.broadcast)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=per_layer_then_all,
            length=spec.layers,
        )
        layer = {
            "number": jnp.arange(spec.layers, dtype=jnp.int32),
            "window": jnp.array([NO_WINDOW if w is None else w for w in spec.windows], jnp.int32),
            "rope": jnp.array(spec.rope_of_layer, jnp.int32),
            "per_layer": per_layer,
            "router": routers,
        }
        (x, cache), outputs = self.block(scanned, attend, "layers")((x, cache), layer, rope)
        return x, cache, outputs

    def run_unrolled(
        self,
        x: Array,
        rope: Any,
        attend: Attend,
        cache: Any,
        per_layer: Any,
        select: SelectTokens | None,
        routers: RouterInputs | None,
    ) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
        """Runs the layers in a Python loop. In the last layer, tokens that are not in `select` give only keys and values.

        For CPUs, where a scan copies each layer's weights and, in training, its saved activations.
        """
        spec = self.spec
        caches, outputs = [], []
        for number in range(spec.layers):
            window = spec.windows[number]
            layer = {
                "number": jnp.int32(0),  # each layer has a cache of its own, in which its index is 0
                "window": jnp.int32(NO_WINDOW if window is None else window),
                "rope": spec.rope_of_layer[number],
                "per_layer": None if per_layer is None else per_layer[number],
                "router": jax.tree.map(lambda x, number=number: x[number], routers),
            }
            carry = (x, None if cache is None else cache[number])
            last = number == spec.layers - 1
            (x, own), output = self.block(Block, attend, f"layers_{number}")(carry, layer, rope, select if last else None)
            caches.append(own)
            outputs.append(output)
        return x, tuple(caches), tuple(outputs)


def applied(model: Transformer, variables: Params, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` to variables in either form: stacked layers are split first where the model runs unrolled."""
    if model.unrolled and "layers" in variables["params"]:
        variables = split_layers(variables)
    return model.apply(variables, *args, **kwargs)


def forward(model: Transformer, variables: Params, *args: Any, **kwargs: Any) -> tuple[Float[Array, "B W D"], Any, Any]:
    """Runs the decoder; see `Transformer.__call__`. Layers may be stacked or split."""
    out: tuple[Array, Any, Any] = applied(model, variables, *args, **kwargs)
    return out


def forward_with_experts(
    model: Transformer, variables: Params, ids: Int[Array, "B T"], *args: Any, **kwargs: Any
) -> tuple[tuple[Float[Array, "B W D"], Any, Any], Integer[Array, "B T L k"] | None]:
    """`forward`, and the experts that each token used in every layer; None where the model does not record them."""
    if not model.records_experts:
        return forward(model, variables, ids, *args, **kwargs), None
    out, state = applied(model, variables, ids, *args, mutable=[COLLECTION], **kwargs)
    return out, used_experts(model.spec, state[COLLECTION], ids.shape[1])


def forward_with_routers(
    model: Transformer, variables: Params, *args: Any, routers: RouterInputs
) -> tuple[Float[Array, "B T D"], RouterSums]:
    """Hidden states of all tokens, and what the routers of all layers have done with them."""
    (hidden, _, _), state = applied(model, variables, *args, routers=routers, mutable=[COLLECTION])
    return hidden, total_sums(state[COLLECTION])


def split_layers(variables: Params) -> Params:
    """Stacked `layers` as one entry a layer: `layers_0`, `layers_1`, ..., which is how an unrolled model names its layers."""

    def split(layers: Params) -> list[Params]:
        leaves, tree = jax.tree.flatten(layers)
        # Split, not indexed: the gradient of a split is one concatenation, that of indexing a sum of L padded arrays.
        parts = [[jnp.squeeze(part, 0) for part in jnp.split(leaf, leaf.shape[0])] for leaf in leaves]
        return [jax.tree.unflatten(tree, own) for own in zip(*parts, strict=True)]

    return {
        name: {key: value for key, value in tree.items() if key != "layers"}
        | {f"layers_{number}": layer for number, layer in enumerate(split(tree["layers"]))}
        for name, tree in variables.items()
    }


def remat_policy(remat: str) -> Any:
    """What `jax.checkpoint` saves of a layer next to its inputs.

    With `layer` nothing, with `selective` what has a name, with `offload` its input, on the host. With `none` all but the gathered
    weights, which would be the whole model on each device.
    """
    if remat == "none":
        return jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    if remat == "selective":
        return jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT, LAYER_MIDDLE)
    if remat != "offload":
        return None
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


class Embedding(nn.Module):
    """Rows of the embedding matrix."""

    layout: Layout | None = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        return embed(self.get_variable("params", "embedding"), ids, self.layout)


def embed(table: Float[Array, "V D"], ids: Int[Array, "B T"], layout: Layout | None) -> Float[Array, "B T D"]:
    """Rows of the embedding matrix; on a mesh each device looks up what it has of the vocabulary, gathered over fsdp."""
    if layout is None:
        return jnp.take(table, ids, axis=0)

    def local(table: Array, ids: Array) -> Array:
        if layout.tensor == 1:
            return jnp.take(table, ids, axis=0)
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, jnp.where(here, own, 0), axis=0)
        return jax.lax.psum(jnp.where(here[:, :, None], rows, jnp.zeros((), rows.dtype)), "tensor")

    inputs = (layout.decoding.spec("vocab", "embed"), layout.spec("rows", "tokens"))
    return layout.local(local, inputs, layout.spec("rows", "tokens", None))(table, ids)


def head_matrix(spec: ModelSpec, params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params["embed" if spec.tied else "head"]["embedding"]
