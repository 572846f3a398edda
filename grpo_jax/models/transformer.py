"""The decoder: embedding, layers, final norm. The same module trains, computes prompts and decodes.

`model.apply({"params": base, "lora": adapters}, ...)` is the policy; without `"lora"` it is the base. The head is not part of it:
log-probabilities and sampling multiply with `head_matrix` without building a [tokens, vocabulary] array.

Flax gives names, `nn.scan` and `nn.remat`; it does not initialise. `spec.param_specs` declares each parameter's shape, axes and
initial values once, because loading, sharding and quantised storage need them without running the network. Modules therefore read
variables (`get_variable`) and declare none.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from grpo_jax.models.adapters import Ratios, computed_adapters
from grpo_jax.models.dropout import layer_keys
from grpo_jax.models.embedding import Embedding
from grpo_jax.models.layer_kinds import Kind, Run, has_keys, is_recurrent
from grpo_jax.models.layers import LAYER_INPUT, LAYER_MIDDLE, Attend, Block, LayerOutput, SelectTokens
from grpo_jax.models.linear import Linear
from grpo_jax.models.mixed_layers import ApplyLayer, LayerCaches, run_mixed_layers
from grpo_jax.models.norm import RMSNorm
from grpo_jax.models.recurrent import Recurrence
from grpo_jax.models.rope import rope_tables
from grpo_jax.models.routing import COLLECTION, RouterInputs, RouterSums, total_sums, used_experts
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.stacked_weights import STACKS, read_in_place, split_stacks
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
        lora_ratios: what the scale of some layers is multiplied by; see `adapters.computed_adapters`, which `forward` calls.
        lora_dropout: share of their input that adapters do not see, where `dropout_keys` are given.
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
    lora_ratios: Ratios = ()
    lora_dropout: float = 0.0
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
        recurrence: Recurrence | None = None,
        dropout_keys: Key[Array, "B T"] | None = None,
        inference: bool = False,
        routers: RouterInputs | None = None,
    ) -> tuple[Float[Array, "B W D"], Any, Any]:
        """Runs the decoder.

        Args:
            ids: token ids.
            positions: position of each token in its own sequence, from 0.
            attend: attention of one layer, which decides what a query sees; see `layers.Attend`.
            cache: carried from layer to layer; where unrolled, a tuple with an entry for each layer with keys or a recurrent state
                of its own. With recurrent layers that are not unrolled, `LayerCaches`.
            per_layer: passed to each layer's `attend`: a pytree with a leading axis of the layers with attention, or where
                unrolled a tuple like `cache`. None with attention of several shapes that is not unrolled.
            select: picks the W tokens whose hidden states are returned; None returns all T.
            recurrence: the mixing of tokens in recurrent layers; None where the model has none.
            dropout_keys: of the adapters' dropout, one a token; None is no dropout.
            inference: no gradient is wanted, so that loops read weights where they are. It is implied where there is a cache.
            routers: of a mixture of experts; needs all T in every layer, so no `select`.

        Returns:
            Hidden states after the final norm, the cache, and the layers' outputs, stacked or as tuples where unrolled. With
            recurrent layers the stacks are those of `LayerCaches`. Layers that use the keys of others have no output.
        """
        x = Embedding(self.layout, name="embed")(ids).astype(self.dtype)
        x = x * jnp.asarray(self.spec.embed_scale, self.dtype)
        embeddings = self.layer_embeddings(ids, x) if self.spec.per_layer_width else None
        rope = rope_tables(self.spec.ropes, self.spec.rotated_by_rope, positions)
        # Logits are linear in the norm's result, so their factor is the norm's.
        norm = RMSNorm(self.spec.norm_eps, self.spec.norm_offset, self.layout, factor=self.spec.logit_scale, name="final_norm")
        keys, inputs = layer_keys(dropout_keys, self.spec.layers), (per_layer, embeddings)
        if self.unrolled and keys is None:
            x, cache, outputs = self.run_unrolled(x, rope, (attend, recurrence), cache, inputs, select, routers=routers)
            return norm(x), cache, outputs
        if self.unrolled:
            x, cache, outputs = self.run_unrolled(x, rope, (attend, recurrence), cache, inputs, None, keys, routers)
        elif self.spec.one_scan:
            x, cache, outputs = self.run_scanned(x, rope, attend, cache, per_layer, keys, routers)
        else:
            frozen = inference or cache is not None
            x, cache, outputs = self.run_mixed(x, rope, (attend, recurrence), cache, inputs, frozen, keys, routers)
        x = norm(x)
        return x if select is None else select(x), cache, outputs

    def layer_embeddings(self, ids: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "L B T E"]:
        """Computes the embedding of each token for each layer: half of its own, half projected from the hidden states."""
        spec = self.spec
        own = Embedding(self.layout, name="per_layer_embed")(ids).astype(self.dtype)
        own = own * jnp.asarray(spec.per_layer_width**0.5, self.dtype)
        linear = Linear(self.lora_scale, self.implementation, self.layout, ("embed", None), name="per_layer_model_proj")
        projected = linear(x) * jnp.asarray(spec.width**-0.5, self.dtype)
        shape = (*ids.shape, spec.layers, spec.per_layer_width)
        norm = RMSNorm(spec.norm_eps, spec.norm_offset, self.layout, "head_dim", name="per_layer_input_norm")
        both = norm(projected.reshape(shape)) + own.reshape(shape)
        return jnp.moveaxis(both * jnp.asarray(2.0**-0.5, self.dtype), 2, 0)

    @nn.nowrap
    def block(self, module: Any, attend: Attend, **others: Any) -> Any:
        """Instantiates `Block`, or `Block` under scan or remat."""
        rows = 1 if self.layout is None else self.layout.rows
        feed_tokens = None if self.remat == "none" else FEED_TOKENS * rows
        sizes = (self.implementation, self.layout, feed_tokens, self.lora_dropout)
        return module(self.spec, attend, self.lora_scale, *sizes, **others)

    @property
    def saves_all(self) -> bool:
        """Whether the backward pass recomputes nothing: with fsdp it gathers weights again."""
        return self.remat == "none" and not (self.layout is not None and self.layout.mesh.shape["fsdp"] > 1)

    def run_scanned(
        self,
        x: Array,
        rope: Any,
        attend: Attend,
        cache: Any,
        per_layer: Any,
        dropout_keys: Array | None,
        routers: RouterInputs | None,
    ) -> tuple[Array, Any, Any]:
        """All layers as one scan over stacked variables: compile time does not grow with depth."""
        spec = self.spec
        block = Block if self.saves_all else nn.remat(Block, prevent_cse=False, policy=remat_policy(self.remat))
        per_layer_then_all: Any = (0, nn.broadcast)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, COLLECTION: 0},
            variable_broadcast=STACKS,
            split_rngs={"params": True},
            in_axes=per_layer_then_all,
            length=spec.layers,
        )
        layer = {
            "number": jnp.arange(spec.layers, dtype=jnp.int32),
            "window": self.windows,
            "rope": jnp.array(spec.rope_of_layer, jnp.int32),
            "per_layer": per_layer,
            "dropout": dropout_keys,
            "router": routers,
        }
        (x, cache), outputs = self.block(scanned, attend, name="layers")((x, cache), layer, rope)
        return x, cache, outputs

    @property
    def windows(self) -> Int[Array, "L"]:
        """The window of each layer."""
        return jnp.array([NO_WINDOW if window is None else window for window in self.spec.windows], jnp.int32)

    def run_mixed(
        self,
        x: Array,
        rope: Any,
        mixers: tuple[Attend, Recurrence | None],
        cache: Any,
        inputs: tuple[Any, Array | None],
        frozen: bool,
        dropout_keys: Array | None,
        routers: RouterInputs | None,
    ) -> tuple[Array, Any, Any]:
        """All layers of a model with several kinds of them, as a few loops; see `run_mixed_layers`.

        Args:
            inputs: `per_layer`, and the tokens' embeddings for each layer.
            frozen: whether the weights have no gradient, even without adapters.
        """
        names = [name for name in ("params", "lora") if self.has_variable(name, "layers")]
        variables = {name: dict(self.get_variable(name, "layers")) for name in names}
        attend, recurrence = mixers
        reports = [COLLECTION] if self.is_mutable_collection(COLLECTION) else []

        def apply_layer(run: Run) -> ApplyLayer:
            def apply(kind: Kind, own: Params, carry: tuple[Array, Any], layer: dict[str, Any]) -> Any:
                block = self.block(Block, attend, kind=kind, recurrence=recurrence, parent=None)

                def of_layer(own: Params, carry: tuple[Array, Any], layer: dict[str, Any], rope: Any) -> Any:
                    (carry, output), state = block.apply(own, carry, layer, rope, mutable=reports)
                    return carry, output, state.get(COLLECTION)

                if not self.saves_all:
                    # A loop of one iteration may become none, in which recomputing needs a barrier.
                    of_layer = jax.checkpoint(of_layer, prevent_cse=run.count == 1, policy=remat_policy(self.remat))
                return of_layer(own, carry, layer, rope)

            return apply

        caches = cache if isinstance(cache, LayerCaches) else LayerCaches(cache)
        frozen = frozen or "lora" in variables or (recurrence is not None and recurrence.inference)
        each = (inputs, self.windows, dropout_keys, routers)
        in_place = functools.partial(read_in_place, implementation=self.implementation, layout=self.layout)
        x, caches, outputs, reported = run_mixed_layers(
            self.spec, variables, apply_layer, x, caches, *each, frozen=frozen, in_place=in_place
        )
        if reported is not None:
            self.put_variable(COLLECTION, "layers", reported)
        # Without recurrent layers, caches and outputs are those of attention alone.
        return (x, caches, outputs) if self.spec.recurrent_layers else (x, caches.attention, outputs.attention)

    def run_unrolled(
        self,
        x: Array,
        rope: Any,
        mixers: tuple[Attend, Recurrence | None],
        cache: Any,
        inputs: tuple[Any, Array | None],
        select: SelectTokens | None,
        dropout_keys: Array | None = None,
        routers: RouterInputs | None = None,
    ) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
        """Runs the layers in a Python loop. In the last layer, tokens that are not in `select` give only keys and values.

        For CPUs, where a scan copies each layer's weights and, in training, its saved activations.

        Args:
            inputs: `per_layer`, and the tokens' embeddings for each layer.
        """
        spec, (attend, recurrence), (per_layer, embeddings) = self.spec, mixers, inputs
        storing = [number for number, kind in enumerate(spec.layer_kinds) if is_recurrent(kind) or has_keys(kind)]
        caches: list[Any] = [None] * len(storing) if cache is None else list(cache)
        outputs: list[Any] = [None] * len(storing)
        keys: dict[int, Any] = {}
        router_of = {layer: jax.tree.map(lambda x, at=at: x[at], routers) for at, layer in enumerate(spec.layers_with("router"))}
        for number, kind in enumerate(spec.layer_kinds):
            window = spec.windows[number]
            source = number if is_recurrent(kind) else spec.key_source(number)
            stored = storing.index(source)
            layer = {
                "number": jnp.int32(0),  # each layer has a cache of its own, in which its index is 0
                "window": jnp.int32(NO_WINDOW if window is None else window),
                "rope": spec.rope_of_layer[number],
                "per_layer": None if per_layer is None else per_layer[stored],
                "embedding": None if embeddings is None else embeddings[number],
                "shared_keys": keys.get(source),
                "dropout": None if dropout_keys is None else dropout_keys[number],
                "router": router_of.get(number),
            }
            last = number == spec.layers - 1
            block = self.block(Block, attend, kind=kind, recurrence=recurrence, name=f"layers_{number}")
            (x, caches[stored]), output = block((x, caches[stored]), layer, rope, select if last else None)
            if isinstance(output, LayerOutput):
                output, keys[number] = output
            if source == number:
                outputs[stored] = output
        return x, tuple(caches), tuple(outputs)


def applied(model: Transformer, variables: Params, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` to variables in either form: stacked layers are split first where the model runs unrolled.

    Adapters are those that are trained, or already computed (`adapters.computed_adapters`).
    """
    variables = with_computed_adapters(model, variables)
    if model.unrolled and "layers" in variables["params"]:
        variables = split_layers(model.spec, variables)
    elif not model.unrolled and model.spec.one_scan:
        variables = split_stacks(variables, model.implementation, model.layout)
    return model.apply(variables, *args, **kwargs)


def forward(model: Transformer, variables: Params, *args: Any, **kwargs: Any) -> tuple[Float[Array, "B W D"], Any, Any]:
    """Runs the decoder; see `Transformer.__call__` and `applied`."""
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
    model: Transformer, variables: Params, *args: Any, routers: RouterInputs, **kwargs: Any
) -> tuple[Float[Array, "B T D"], RouterSums]:
    """Hidden states of all tokens, and what the routers of all layers have done with them."""
    (hidden, _, _), state = applied(model, variables, *args, routers=routers, mutable=[COLLECTION], **kwargs)
    return hidden, total_sums(state[COLLECTION])


def with_computed_adapters(model: Transformer, variables: Params) -> Params:
    """The variables with the adapters as linear layers read them; variables of split layers have them already."""
    if "layers" not in variables.get("lora", {}):
        return variables
    adapters = computed_adapters(variables["params"], variables["lora"], model.lora_scale, model.lora_ratios)
    return {**variables, "lora": adapters}


def split_layers(spec: ModelSpec, variables: Params) -> Params:
    """Stacked `layers` as one entry a layer: `layers_0`, `layers_1`, ..., which is how an unrolled model names its layers."""

    def split(layers: Params) -> list[Params]:
        entries: list[Params] = [{} for _ in range(spec.layers)]
        for part, own in layers.items():
            leaves, tree = jax.tree.flatten(own)
            # Split, not indexed: the gradient of a split is one concatenation, that of indexing a sum of L padded arrays.
            parts = [[jnp.squeeze(piece, 0) for piece in jnp.split(leaf, leaf.shape[0])] for leaf in leaves]
            for number, pieces in zip(spec.layers_with(part), zip(*parts, strict=True), strict=True):
                entries[number][part] = jax.tree.unflatten(tree, pieces)
        return entries

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
