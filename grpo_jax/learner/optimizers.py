"""The optimisers by name (`optim.name`), composed of Optax's transformations: what becomes of gradients that are clipped already.

Weight decay is decoupled and multiplied by the learning rate in all of them, and acts on matrices (`decay_mask`). Layers are
stacked in one array; where an optimiser looks at a whole matrix, it is given each layer's by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from grpo_jax.config import OptimConfig
from grpo_jax.learner.eight_bit import in_eight_bits

NOT_DECAYED = ("scale", "bias", "logit", "magnitude", "a0", "b0")
"""Endings of the names of vectors (of a norm, of a linear layer, of DoRA), which may have more axes because layers are stacked, and
of PiSSA's start, which does not change."""

MUON_RMS = 0.2
"""Root mean square of Muon's updates in units of the learning rate: that of AdamW's (https://arxiv.org/abs/2502.16982, 2.2)."""


def transformation_of(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the optimiser of the settings; its state is float32, but for what `optim.moments` says of moments."""
    dtype: Any = jnp.bfloat16 if optim.moments == "bfloat16" else jnp.float32
    decay, rate = optax.add_decayed_weights(optim.weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)
    options: dict[str, Any] = {"weight_decay": optim.weight_decay, "mask": decay_mask, "mu_dtype": dtype}
    if optim.moments == "int8":
        return optax.chain(in_eight_bits(direction_of(optim), decay_mask), decay, rate)
    if optim.name == "adamw" and optim.moments != "factored":
        return optax.adamw(schedule, b1=optim.b1, b2=optim.b2 or 0.0, eps=optim.eps or 0.0, **options)
    if optim.name == "lion":
        return optax.lion(schedule, b1=optim.b1, b2=optim.b2 or 0.0, **options)
    if optim.name == "muon":
        # Optax's chain ends with the learning rate and its sign, which come after the weight decay here.
        direction = muon(
            1.0,
            beta=optim.b1,
            eps=optim.eps or 0.0,
            mu_dtype=dtype,
            adam_b2=optim.b2 or 0.0,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=MUON_RMS,
        )
        return optax.chain(direction, optax.scale(-1.0), decay, rate)
    momentum = [optax.trace(optim.b1, accumulator_dtype=dtype)] if optim.b1 else []
    if optim.name == "sgd":
        return optax.chain(*momentum, decay, rate)
    mean = [optax.ema(optim.b1, debias=optim.name == "adamw", accumulator_dtype=dtype)] if optim.b1 else []
    if optim.name == "adamw":
        second = optax.scale_by_factored_rms(decay_rate=optim.b2 or 0.0, epsilon=optim.eps or 0.0, decay_rate_fn=debiased_decay)
        return optax.chain(per_matrix(second), *mean, decay, rate)
    second = optax.scale_by_factored_rms(epsilon=optim.eps or 0.0)
    return optax.chain(per_matrix(optax.chain(second, optax.clip_by_block_rms(1.0))), *mean, decay, rate)


def direction_of(optim: OptimConfig) -> optax.GradientTransformation:
    """The direction of the optimisers whose moments may have 8 bits, without weight decay and learning rate."""
    if optim.name == "adamw":
        return optax.scale_by_adam(optim.b1, optim.b2 or 0.0, optim.eps or 0.0)
    return optax.scale_by_lion(optim.b1, optim.b2 or 0.0) if optim.name == "lion" else optax.trace(optim.b1)


def debiased_decay(step: Any, decay: Any) -> Any:
    """The decay by which a running mean of earlier values is Adam's with its bias corrected: b (1 − b^k) / (1 − b^(k+1))."""
    k = jnp.asarray(step, jnp.float32)
    return decay * (1 - decay**k) / (1 - decay ** (k + 1))


def per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to each matrix, or vector, of stacked layers by itself."""
    return optax.GradientTransformation(functools.partial(init_stacks, inner), functools.partial(update_stacks, inner))


def init_stacks(inner: optax.GradientTransformation, params: Any) -> Any:
    """The state of `per_matrix`."""
    return by_stack(inner, params).init(params)


def update_stacks(inner: optax.GradientTransformation, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    """The update of `per_matrix`."""
    return by_stack(inner, updates).update(updates, state, params)


def by_stack(inner: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """A transformation of parameters of these shapes, which treats stacks of one shape together."""
    labels = jax.tree_util.tree_map_with_path(lambda path, leaf: str(stack_shape(path, leaf)), params)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        str(shape): optax.GradientTransformation(over_stack(inner.init, len(shape)), over_stack(inner.update, len(shape)))
        for shape in stack_shapes(params)
    }
    return optax.partition(transforms, labels)


def over_stack(function: Any, count: int) -> Any:
    """A function of trees whose leaves have `count` leading dimensions that it does not see."""
    for _ in range(count):
        function = jax.vmap(function)
    return function


def stack_shapes(params: Any) -> list[tuple[int, ...]]:
    """The different leading dimensions of parameters, in which layers (and experts) are stacked."""
    return sorted({stack_shape(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)})


def stack_shape(path: tuple[Any, ...], leaf: Any) -> tuple[int, ...]:
    """The leading dimensions of a parameter in which layers (and experts) are stacked."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if "layers" not in names:
        return ()
    own = 1 if is_vector(names[-1]) else 2
    return tuple(leaf.shape[: max(leaf.ndim - own, 0)])


def matrix_axes(params: Any) -> Any:
    """The axes (in, out) of the matrices that Muon orthogonalises, which are the layers'; None leaves a parameter to Adam."""

    def of(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        stacked = "layers" in jax.tree_util.keystr(path) and is_decayed(_leaf_name(path), leaf.ndim)
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if stacked else None

    return jax.tree_util.tree_map_with_path(of, params)


def times_in_b(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of the adapters' B: their learning rate is `ratio` times the others' (LoRA+)."""
    larger = functools.partial(times_of_b, ratio)
    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(larger, updates))


def times_of_b(ratio: float, path: tuple[Any, ...], leaf: Any) -> Any:
    """The ratio times an array whose path ends with B's name; others are unchanged."""
    return leaf * jnp.asarray(ratio, leaf.dtype) if _leaf_name(path) == "b" else leaf


def decay_mask(params: optax.Params) -> Any:
    """Returns True for every leaf of a nested dict that is a matrix, which weight decay acts on.

    The name decides, because layers are stacked: a norm's scale is [L, D] there, a matrix [L, in, out]. A leaf with fewer than two
    axes is not a matrix either.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: is_decayed(_leaf_name(path), jnp.ndim(leaf)), params)


def is_decayed(name: str, dims: int) -> bool:
    """Tells whether weight decay acts on a parameter: not if its name is a vector's or a start's, nor with fewer than two axes."""
    return dims >= 2 and not name.endswith(NOT_DECAYED)


def is_vector(name: str) -> bool:
    """Whether a parameter of a layer is a vector, by its name."""
    return name.endswith(("scale", "bias", "logit", "magnitude"))


def _leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True) if path else ""
