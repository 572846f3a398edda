"""Runs the layers of a model that has several kinds of layers: one loop for each run of a repeated unit (`layer_kinds`).

Parameters are stacked by part over the layers that have it. A loop's iteration takes the layers of one unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from grpo_jax.models.layer_kinds import Kind, Run, repeated_units
from grpo_jax.models.spec import ModelSpec
from grpo_jax.types import Params

__all__ = ["LayerCaches", "run_mixed_layers"]

ApplyLayer = Callable[[Kind, Params, tuple[Array, Any], dict[str, Any]], tuple[tuple[Array, Any], Any]]
"""(kind, variables of a layer, (hidden states, cache), what the layer is told) → (hidden states, cache) and the layer's output."""


@struct.dataclass
class LayerCaches:
    """What the layers of a model with several kinds carry from layer to layer, or return.

    Attributes:
        attention: of the layers with attention: what their `attend` takes as `cache`; or their outputs, stacked.
        states: `RecurrentState` of the recurrent layers, stacked; None where they have none.
    """

    attention: Any = None
    states: Any = None


def run_mixed_layers(
    spec: ModelSpec,
    variables: dict[str, Params],
    apply_layer: Callable[[Run], ApplyLayer],
    x: Array,
    cache: LayerCaches,
    per_layer: Any,
    windows: Array,
    dropout_keys: Array | None = None,
    *,
    frozen: bool,
) -> tuple[Array, LayerCaches, LayerCaches]:
    """Runs all layers.

    Args:
        variables: collection → stacked parts of the layers.
        apply_layer: makes the function of one layer of a run.
        cache: carried from layer to layer.
        per_layer: passed to each layer with attention: a pytree with a leading axis of these layers.
        windows: [L], of each layer.
        dropout_keys: [L, B, T], of the adapters' dropout; None is no dropout.
        frozen: whether `params` have no gradient. They are read where they are then; of others a loop gets its part, whose gradient
            is as small.

    Returns:
        The hidden states, the cache, and the layers' outputs, stacked by kind.
    """
    fixed = {"params"} if frozen else set[str]()
    outputs: dict[bool, list[Any]] = {True: [], False: []}
    for run in repeated_units(spec.layer_kinds):
        apply = apply_layer(run)
        own = {name: parts_of_run(spec, run, tree) for name, tree in variables.items() if name not in fixed}

        def body(
            carry: tuple[Array, LayerCaches], given: tuple[Array, Any], run: Run = run, apply: ApplyLayer = apply
        ) -> tuple[tuple[Array, LayerCaches], Any]:
            (x, cache), (iteration, own) = carry, given
            new: dict[bool, list[Any]] = {True: [], False: []}
            for place, kind in enumerate(run.unit):
                number = jnp.int32(run.first + place) + iteration * jnp.int32(len(run.unit))
                attention = kind == "attention"
                index = index_of_kind(spec, run, place, iteration)
                layer = {
                    "number": index,
                    "window": windows[number],
                    "rope": jnp.array(spec.rope_of_layer, jnp.int32)[number],
                    "per_layer": at(per_layer, index) if attention else None,
                    "dropout": at(dropout_keys, number),
                }
                chosen = {
                    name: layer_of(spec, run, place, iteration, tree if name in fixed else own[name], whole=name in fixed)
                    for name, tree in variables.items()
                }
                held = cache.attention if attention else at(cache.states, index)
                (x, held), output = apply(kind, chosen, (x, held), layer)
                states = cache.states if attention else put(cache.states, index, held)
                cache = LayerCaches(held if attention else cache.attention, states)
                new[attention].append(output)
            return (x, cache), {kind: jax.tree.map(lambda *each: jnp.stack(each), *found) for kind, found in new.items() if found}

        (x, cache), made = jax.lax.scan(body, (x, cache), (jnp.arange(run.count, dtype=jnp.int32), own), length=run.count)
        for kind, found in made.items():
            outputs[kind].append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found))
    stacked = {kind: jax.tree.map(lambda *each: jnp.concatenate(each), *found) for kind, found in outputs.items() if found}
    return x, cache, LayerCaches(stacked.get(True), stacked.get(False))


def at(tree: Any, index: Array) -> Any:
    """One entry of stacked arrays."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def put(tree: Any, index: Array, entry: Any) -> Any:
    """Stacked arrays with another entry."""
    return jax.tree.map(lambda leaf, own: jax.lax.dynamic_update_index_in_dim(leaf, own.astype(leaf.dtype), index, 0), tree, entry)


def index_of_kind(spec: ModelSpec, run: Run, place: int, iteration: Array) -> Array:
    """A layer's index among all layers with attention, or among all recurrent ones.

    Args:
        place: the layer's place in the unit.
    """
    alike = [(kind == "attention") == (run.unit[place] == "attention") for kind in spec.layer_kinds]
    each = sum(alike[run.first : run.first + len(run.unit)])
    return jnp.int32(sum(alike[: run.first + place])) + iteration * jnp.int32(each)


def places(spec: ModelSpec, run: Run, part: str) -> tuple[int, list[int]]:
    """How many layers before a run have a part, and the places of the layers in its unit that have it."""
    numbers = spec.layers_with(part)
    return sum(number < run.first for number in numbers), [i for i in range(len(run.unit)) if run.first + i in numbers]


def parts_of_run(spec: ModelSpec, run: Run, parts: Params) -> Params:
    """The layers of a run: [count, layers of the unit that have the part, ...] of each stacked array."""
    found = {}
    for part, leaves in parts.items():
        first, own = places(spec, run, part)
        if own:
            end = first + run.count * len(own)
            found[part] = jax.tree.map(lambda x, a=first, b=end: x[a:b].reshape(run.count, -1, *x.shape[1:]), leaves)
    return found


def layer_of(spec: ModelSpec, run: Run, place: int, iteration: Array, parts: Params, *, whole: bool) -> Params:
    """The variables of one layer.

    Args:
        parts: of all layers if `whole`, else of one iteration of the run.
    """
    found = {}
    for part, leaves in parts.items():
        first, own = places(spec, run, part)
        if place not in own:
            continue
        if whole:
            found[part] = at(leaves, jnp.int32(first + own.index(place)) + iteration * jnp.int32(len(own)))
        else:
            number = own.index(place)
            found[part] = jax.tree.map(lambda x, number=number: x[number], leaves)
    return found
