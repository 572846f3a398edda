"""Weights onto their devices, shard by shard.

Enters: a model folder and a `Layout`. Leaves: parameters, each built where it lives. A process asks the files for what its own
    devices hold and for nothing else, a stacked parameter one layer at a time: beside the devices' copy the host never holds more
    than one layer of one parameter, or one whole embedding. Without a layout everything goes to one device. Names and files are
    `hf.py`'s, the formats of few bits `quantize.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int

from grpo_jax.models.spec import ModelSpec, ParamSpec, nest, param_specs
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.hf import Source, TensorFiles, check_tensors, read_slice, tensor_names
from grpo_jax.weights.quantize import quantized_specs, quantized_stack
from grpo_kernels.ops.quantized_matmul import QuantizedWeight, quantize

Index = tuple[slice, ...]


def load_params(
    folder: Path,
    spec: ModelSpec,
    dtype: Any,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: str = "none",
    layout: Layout | None = None,
) -> Params:
    """Reads the weights of a folder onto their devices.

    Args:
        folder: a model folder; with several processes, one that each of them can read.
        spec: the model, from `read_folder_spec`.
        dtype: number format on the device.
        on_tensor: called with (parameters read, parameters in all), for a progress bar.
        quantization: `none`, or the format of the layers' matrices: `int8`, `int4` or `nf4`, rounded from the files' own numbers.
        layout: where each parameter lives; the default device where None.

    Raises:
        ModelError: a shard is missing or broken, the tensors do not fit the config, or a matrix does not fit the format.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    specs = param_specs(spec)
    quantized = quantized_specs(specs, quantization)
    with TensorFiles(folder) as files:
        check_tensors(folder, spec, files)
        for number, (path, source) in enumerate(tensor_names(spec).items()):
            p = specs[path]
            if path in quantized:
                leaves[path] = load_quantized(files, source, quantized[path], quantization, p.axes, layout)
            elif layout is None or not source.stacked:
                sharding = SingleDeviceSharding(jax.local_devices()[0]) if layout is None else sharding_of(layout, path, p)
                leaves[path] = whole_array(files, source, p.shape, sharding, dtype)
            else:
                leaves[path] = stacked_array(files, source, p.shape, sharding_of(layout, path, p), dtype)
            if on_tensor is not None:
                on_tensor(number + 1, len(specs))
    return nest(leaves)


def sharding_of(layout: Layout, path: tuple[str, ...], p: ParamSpec) -> NamedSharding:
    """Where a parameter lives; ShardingError where a dimension does not divide."""
    return layout.checked("/".join(path), p.shape, layout.sharding(p.axes))


def whole_array(files: TensorFiles, source: Source, shape: tuple[int, ...], sharding: Sharding, dtype: Any) -> Array:
    """A parameter in one go: each device's part is read once, also where several hold the same."""

    @by_bounds(shape)
    def read(index: Index) -> np.ndarray:
        return read_slice(files, source, shape, index, dtype)

    # Waiting for each: reading ahead of the transfers would pile the model up on the host.
    return jax.make_array_from_callback(shape, sharding, read).block_until_ready()


def stacked_array(files: TensorFiles, source: Source, shape: tuple[int, ...], sharding: NamedSharding, dtype: Any) -> Array:
    """A stacked parameter, [L, ...]: empty on its devices first, then one layer after another."""
    stack = zeros(shape, jnp.dtype(dtype), sharding)
    for layer in range(shape[0]):
        part = layer_array(files, source, shape, layer, sharding, dtype)
        stack = place(stack, part, np.int32(layer), sharding).block_until_ready()
    return stack


def layer_array(
    files: TensorFiles, source: Source, shape: tuple[int, ...], layer: int, sharding: NamedSharding, dtype: Any
) -> Array:
    """One layer of a stacked parameter, cut as the stack is; in the file's own format where dtype is None."""

    @by_bounds(shape[1:])
    def read(index: Index) -> np.ndarray:
        return read_slice(files, source, shape, (slice(layer, layer + 1), *index), dtype)[0]

    inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.make_array_from_callback(shape[1:], inner, read)


def by_bounds(shape: tuple[int, ...]) -> Callable[[Callable[[Index], np.ndarray]], Callable[[Any], np.ndarray]]:
    """Keeps what was read for as long as one array is being built: devices that hold the same part share one reading."""

    def wrap(read: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
        kept: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def once(index: Any) -> np.ndarray:
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            if bounds not in kept:
                kept[bounds] = read(tuple(slice(*pair) for pair in bounds))
            return kept[bounds]

        return once

    return wrap


def load_quantized(
    files: TensorFiles,
    source: Source,
    shapes: QuantizedWeight,
    quantization: str,
    axes: tuple[str | None, ...],
    layout: Layout | None,
) -> QuantizedWeight:
    """A stack of matrices, rounded while it is read.

    Each device rounds its own part; where a scale's group of inputs lies on several, XLA has them agree on the largest number,
    so that the numbers are those of one device.
    """
    if layout is None:
        shape = shapes.values.shape

        def matrix(number: int) -> np.ndarray:
            place = tuple(slice(int(at), int(at) + 1) for at in np.unravel_index(number, shape[:-2]))
            return read_slice(files, source, shape, (*place, slice(None), slice(None)), None).reshape(shape[-2:])

        return quantized_stack(shapes, quantization, matrix, False)
    shardings = layout.quantized(shapes, axes)
    stack: Any = jax.tree.map(lambda leaf, sharding: zeros(leaf.shape, leaf.dtype, sharding), shapes, shardings)
    for layer in range(shapes.values.shape[0]):
        part = layer_array(files, source, shapes.values.shape, layer, shardings.values, None)
        stack = jax.block_until_ready(place_quantized(stack, part, np.int32(layer), quantization, shardings))
    return stack


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Array:
    """Made on the devices: nothing of that size is on the host."""
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def place(stack: Array, part: Array, layer: Int[Array, ""], sharding: Sharding) -> Array:
    """One layer into its place in the stack, which is overwritten."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0), sharding)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0,))
def place_quantized(
    stack: QuantizedWeight, part: Array, layer: Int[Array, ""], quantization: str, shardings: QuantizedWeight
) -> QuantizedWeight:
    """One layer's dense matrix, or those of its experts, rounded, into its place in the stack, which is overwritten."""
    convert = functools.partial(quantize, format=quantization)
    for _ in range(part.ndim - 2):
        convert = jax.vmap(convert)
    stored = jax.tree.map(lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, layer, 0), stack, convert(part))
    return jax.lax.with_sharding_constraint(stored, shardings)
