"""The decoder: embedding, scanned layers, final norm.

Enters: token ids and positions [B, T]. Leaves: hidden states [B, T, D] after the final norm. The vocabulary is not met here:
    `logprobs.py` and `sampler.py` multiply with the head in their own way, without a [tokens, vocabulary] array.

`model.apply({"params": base, "lora": adapters}, ...)` is the policy; without `"lora"` it is the base.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.layers import LAYER_INPUT, Attend, Block, RMSNorm, Wanted, rope_tables
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import GATHERED, Layout
from grpo_jax.types import Params

NO_WINDOW = 2**30
"""Window of a layer that sees every position."""

UNROLLED_LAYERS = 16
"""On a CPU, models of up to this many layers run without a loop over them; compiling takes longer with each."""


class Transformer(nn.Module):
    """A model family's decoder.

    Attributes:
        spec: the model.
        dtype: number format of the computation; weights are cast to it where they are used.
        lora_scale: factor of the adapters' product.
        remat: `layer` keeps only each layer's input for the backward pass and computes its inside again; `offload` keeps it in the
            host's memory.
        unroll: `forward` runs the layers without a loop over them, unless they are computed again.
        implementation: of the kernels (`grpo_kernels`), "reference", "tpu" or "gpu"; None goes by the device.
        layout: where weights and hidden states live; None is one device.
    """

    spec: ModelSpec
    dtype: Any
    lora_scale: float = 1.0
    remat: Literal["none", "layer", "offload"] = "none"
    unroll: bool = False
    implementation: str | None = None
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, cache: Any = None, per_layer: Any = None
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Runs the layers.

        Args:
            ids: token ids.
            positions: position of each token in its own text, from 0.
            attend: which keys a query sees; see `layers.Attend`.
            cache: carried through the layers.
            per_layer: pytree whose leaves have a leading L axis; each layer's `attend` gets its slice.

        Returns:
            Hidden states after the final norm, the cache, and what the layers returned, stacked on a leading L axis.
        """
        spec = self.spec
        x = Embedding(self.layout, name="embed")(ids).astype(self.dtype)
        x = x * jnp.asarray(spec.embed_scale, self.dtype)
        gathers = self.layout is not None and self.layout.mesh.shape["fsdp"] > 1
        keeps_all = self.remat == "none" and not gathers
        block = Block if keeps_all else nn.remat(Block, prevent_cse=False, policy=kept_by(self.remat))
        per_layer_then_all: Any = (0, nn.broadcast)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=per_layer_then_all,
            length=spec.layers,
        )(spec, attend, self.lora_scale, self.implementation, self.layout, name="layers")
        layer = {
            "number": jnp.arange(spec.layers, dtype=jnp.int32),
            "window": jnp.array([NO_WINDOW if w is None else w for w in spec.windows], jnp.int32),
            "rope": jnp.array(spec.rope_of_layer, jnp.int32),
            "per_layer": per_layer,
        }
        (x, cache), stacked = layers((x, cache), layer, rope_tables(spec, positions))
        return RMSNorm(spec.norm_eps, spec.norm_offset, self.layout, name="final_norm")(x), cache, stacked


def forward(
    model: Transformer,
    variables: Params,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    cache: Any = None,
    per_layer: Any = None,
    wanted: Wanted | None = None,
) -> tuple[Float[Array, "B W D"], Any, Any]:
    """`model.apply`, or the same without a loop over the layers: where the model says so, or `split_layers` took them apart.

    In the second case `cache` and `per_layer` are tuples of L, and so is the last result; and of tokens that are not wanted the
    last layer computes keys and values only.

    Args:
        wanted: picks the tokens whose hidden states are returned; None returns all.
    """
    split = not isinstance(variables["params"]["layers"], dict)
    if model.unroll and model.remat == "none" and not split and cache is None:
        variables, split = split_layers(variables), True
    if not split:
        out: Any = model.apply(variables, ids, positions, attend, cache, per_layer)
        return out if wanted is None else (wanted(out[0]), *out[1:])
    spec, params = model.spec, variables["params"]
    x = embed(params["embed"]["embedding"], ids, model.layout).astype(model.dtype) * jnp.asarray(spec.embed_scale, model.dtype)
    rope = rope_tables(spec, positions)
    caches, stacked = [], []
    for number, weights in enumerate(params["layers"]):
        own = {"params": weights} | ({"lora": variables["lora"]["layers"][number]} if "lora" in variables else {})
        window = spec.windows[number]
        layer = {
            "number": jnp.int32(0),
            "window": jnp.int32(NO_WINDOW if window is None else window),
            "rope": spec.rope_of_layer[number],
            "per_layer": None if per_layer is None else per_layer[number],
        }
        before = (x, None if cache is None else cache[number])
        out = Block(spec, attend, model.lora_scale, model.implementation, model.layout).apply(
            own, before, layer, rope, wanted if number == spec.layers - 1 else None
        )
        (x, after), kept = out
        caches.append(after)
        stacked.append(kept)
    norm: Any = RMSNorm(spec.norm_eps, spec.norm_offset, model.layout).apply({"params": params["final_norm"]}, x)
    return norm, tuple(caches), tuple(stacked)


def split_layers(variables: Params) -> Params:
    """The stacked layers as a tuple of single ones.

    On a CPU a loop over stacked layers copies the weights at every turn, and in training everything that the backward pass needs.
    """

    def split(layers: Params) -> tuple[Params, ...]:
        leaves, tree = jax.tree.flatten(layers)
        # The transpose of a split is one concatenation, that of indexing a sum of padded arrays.
        parts = [[jnp.squeeze(part, 0) for part in jnp.split(leaf, leaf.shape[0])] for leaf in leaves]
        return tuple(jax.tree.unflatten(tree, own) for own in zip(*parts, strict=True))

    return {name: tree | {"layers": split(tree["layers"])} for name, tree in variables.items()}


def kept_by(remat: str) -> Any:
    """What `jax.checkpoint` keeps of a layer beside its inputs: nothing, or its input, on the host instead of the device.

    With `none` all but the gathered weights, which kept would be the whole model on each device.
    """
    if remat == "none":
        return jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
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
