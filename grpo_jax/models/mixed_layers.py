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

from grpo_jax.models.layer_kinds import Kind, Run, has_keys, is_global, is_recurrent, repeated_units
from grpo_jax.models.layers import LayerOutput
from grpo_jax.models.routing import RouterInputs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.stacked_weights import LayerWeight
from grpo_jax.types import Params

__all__ = ["LayerCaches", "run_mixed_layers"]

ApplyLayer = Callable[[Kind, Params, tuple[Array, Any], dict[str, Any]], tuple[tuple[Array, Any], Any, Any]]
"""(kind, variables of a layer, (hidden states, cache), what the layer is told) → (hidden states, cache), the layer's output, and
what its router reports (`routing.py`), None where nobody asks."""


@struct.dataclass
class LayerCaches:
    """What the layers of a model with several kinds carry from layer to layer, or return.

    Attributes:
        attention: of the layers with attention: what their `attend` takes as `cache`; or their outputs, stacked, with attention of
            several shapes a tuple with one stack each (`ModelSpec.key_stacks`).
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
    inputs: tuple[Any, Array | None],
    windows: Array,
    dropout_keys: Array | None = None,
    routers: RouterInputs | None = None,
    *,
    frozen: bool,
    in_place: Callable[[Any], bool],
) -> tuple[Array, LayerCaches, LayerCaches, Any]:
    """Runs all layers.

    Args:
        variables: collection → stacked parts of the layers.
        apply_layer: makes the function of one layer of a run.
        cache: carried from layer to layer.
        inputs: what is passed to each layer with attention, a pytree with a leading axis of these layers; and [L, ...], passed to
            each layer.
        windows: [L], of each layer.
        dropout_keys: [L, B, T], of the adapters' dropout; None is no dropout.
        routers: what the routers of all layers are told.
        frozen: whether `params` have no gradient. They are read where they are then; of others a loop gets its part, whose gradient
            is as small.
        in_place: whether a layer gets a weight as its stack and the index in it (`stacked_weights.py`).

    Returns:
        The hidden states, the cache, the layers' outputs, stacked by kind, and what routers report, stacked over the layers that
        have one.
    """
    fixed, (per_layer, embeddings) = {"params"} if frozen else set[str](), inputs
    outputs: dict[int, list[Any]] = {}
    keys = empty_keys(spec, x) if spec.shares_keys else {}
    for run in repeated_units(spec.layer_kinds):
        apply = apply_layer(run)
        own = {name: parts_of_run(spec, run, tree) for name, tree in variables.items() if name not in fixed}
        own_embeddings = None if embeddings is None else layers_of_run(run, embeddings)
        # Keys that a run only reads are not carried, so that a backward pass does not save them at every iteration.
        read_only = {} if any(has_keys(kind) for kind in run.unit) else keys

        def body(
            carry: tuple[Array, LayerCaches, Any],
            given: tuple[Array, Any, Any],
            run: Run = run,
            apply: ApplyLayer = apply,
            read_only: Any = read_only,
        ) -> tuple[tuple[Array, LayerCaches, Any], Any]:
            (x, cache, keys), (iteration, own, embeddings) = carry, given
            new: dict[int, list[Any]] = {}
            for place, kind in enumerate(run.unit):
                number = jnp.int32(run.first + place) + iteration * jnp.int32(len(run.unit))
                attention, stack = not is_recurrent(kind), stack_of(kind)
                index = index_of_kind(spec, run, place, iteration)
                layer = {
                    "embedding": None if embeddings is None else embeddings[place],
                    "shared_keys": {**keys, **read_only}.get(stack),
                    "number": index,
                    "window": windows[number],
                    "rope": jnp.array(spec.rope_of_layer, jnp.int32)[number],
                    "per_layer": at(per_layer, index) if attention else None,
                    "dropout": at(dropout_keys, number),
                    "router": at(routers, index_of_part(spec, run, place, iteration, "router")),
                }
                chosen = {
                    name: layer_of(spec, run, place, iteration, tree, in_place)
                    if name in fixed
                    else layer_of_run(spec, run, place, own[name])
                    for name, tree in variables.items()
                }
                held = cache.attention if attention else at(cache.states, index)
                (x, held), output, report = apply(kind, chosen, (x, held), layer)
                if report is not None:
                    new.setdefault(REPORTS, []).append(report)
                states = cache.states if attention else put(cache.states, index, held)
                cache = LayerCaches(held if attention else cache.attention, states)
                if isinstance(output, LayerOutput):
                    keys = keys | {stack: output.keys} if has_keys(kind) else keys
                    output = output.stacked
                if not attention or has_keys(kind):
                    new.setdefault(stack, []).append(output)
            return (x, cache, keys), {stack: jax.tree.map(lambda *each: jnp.stack(each), *found) for stack, found in new.items()}

        given = jnp.arange(run.count, dtype=jnp.int32), own, own_embeddings
        (x, cache, carried), made = jax.lax.scan(body, (x, cache, {} if read_only else keys), given, length=run.count)
        keys = carried or keys
        for stack, found in made.items():
            outputs.setdefault(stack, []).append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found))
    stacked = {stack: jax.tree.map(lambda *each: jnp.concatenate(each), *found) for stack, found in outputs.items()}
    of_attention = [stacked.get(stack) for stack in range(len(spec.key_stacks))]
    made = LayerCaches(tuple(of_attention) if len(of_attention) > 1 else of_attention[0], stacked.get(STATES))
    return x, cache, made, stacked.get(REPORTS)


STATES, REPORTS = -1, -2
"""The stacks of recurrent layers and of what routers report; layers with attention have `ModelSpec.key_stacks`."""


def stack_of(kind: Kind) -> int:
    """The stack of a layer's KV cache or recurrent state."""
    return STATES if is_recurrent(kind) else int(is_global(kind))


def empty_keys(spec: ModelSpec, x: Array) -> dict[int, tuple[Array, Array]]:
    """Keys and values of zeros for each of the key stacks, which a loop carries before there are any."""
    shapes = [(*x.shape[:2], kv_heads, head_dim) for _, kv_heads, head_dim in spec.key_shapes]
    return {stack: (jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)) for stack, shape in enumerate(shapes)}


def layers_of_run(run: Run, x: Array) -> Array:
    """The layers of a run: [count, layers of the unit, ...] of [L, ...]."""
    size = len(run.unit)
    return x[run.first : run.first + run.count * size].reshape(run.count, size, *x.shape[1:])


def at(tree: Any, index: Array | None) -> Any:
    """One entry of stacked arrays; None where there is no index."""
    return None if index is None else jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def put(tree: Any, index: Array, entry: Any) -> Any:
    """Stacked arrays with another entry."""
    return jax.tree.map(lambda leaf, own: jax.lax.dynamic_update_index_in_dim(leaf, own.astype(leaf.dtype), index, 0), tree, entry)


def index_of_kind(spec: ModelSpec, run: Run, place: int, iteration: Array) -> Array:
    """A layer's index in its stack: of the recurrent layers, or of those with keys of one shape, where it may be an earlier one's.

    Args:
        place: the layer's place in the unit.
    """
    kind = run.unit[place]
    if not is_recurrent(kind) and not has_keys(kind):
        return jnp.int32(spec.key_stacks[stack_of(kind)].index(spec.key_source(run.first + place)))
    alike = [stack_of(other) == stack_of(kind) and (is_recurrent(other) or has_keys(other)) for other in spec.layer_kinds]
    each = sum(alike[run.first : run.first + len(run.unit)])
    return jnp.int32(sum(alike[: run.first + place])) + iteration * jnp.int32(each)


def places(spec: ModelSpec, run: Run, part: str) -> tuple[int, list[int]]:
    """How many layers before a run have a part, and the places of the layers in its unit that have it."""
    numbers = spec.layers_with(part)
    return sum(number < run.first for number in numbers), [i for i in range(len(run.unit)) if run.first + i in numbers]


def index_of_part(spec: ModelSpec, run: Run, place: int, iteration: Array, part: str) -> Array | None:
    """A layer's index among those that have a part; None where it has none."""
    first, own = places(spec, run, part)
    if place not in own:
        return None
    return jnp.int32(first + own.index(place)) + iteration * jnp.int32(len(own))


def parts_of_run(spec: ModelSpec, run: Run, parts: Params) -> Params:
    """The layers of a run: [count, layers of the unit that have the part, ...] of each stacked array."""
    found = {}
    for part, leaves in parts.items():
        first, own = places(spec, run, part)
        if own:
            end = first + run.count * len(own)
            found[part] = jax.tree.map(lambda x, a=first, b=end: x[a:b].reshape(run.count, -1, *x.shape[1:]), leaves)
    return found


def layer_of(spec: ModelSpec, run: Run, place: int, iteration: Array, parts: Params, in_place: Callable[[Any], bool]) -> Params:
    """The variables of one layer, of those of all layers."""
    found = {}
    for part, leaves in parts.items():
        index = index_of_part(spec, run, place, iteration, part)
        if index is not None:
            found[part] = {name: LayerWeight(x, index) if in_place(x) else at(x, index) for name, x in leaves.items()}
    return found


def layer_of_run(spec: ModelSpec, run: Run, place: int, parts: Params) -> Params:
    """The variables of one layer, of those of one iteration of the run."""
    found = {}
    for part, leaves in parts.items():
        _, own = places(spec, run, part)
        if place in own:
            number = own.index(place)
            found[part] = jax.tree.map(lambda x, number=number: x[number], leaves)
    return found
