"""Loads weights from files onto devices, shard by shard.

A process reads only what its own devices hold, and a large stacked parameter one layer at a time. So besides the devices' copy the
host holds at most one layer of one parameter, or one embedding, or 4 MiB. Without a layout everything goes to one device. Names
and files are in `hf.py`, the choice of quantised weights in `quantize.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int

from grpo_jax.models.parameters import ParamSpec, nest, param_specs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.hf import TensorFiles, check_tensors, read_slice, read_tensor
from grpo_jax.weights.names import TensorSource, tensor_names
from grpo_jax.weights.quantize import quantized_specs
from grpo_kernels import QuantizedWeight, quantize

Index = tuple[slice, ...]

SMALL_STACK_BYTES = 2**22
"""Stacked parameters of up to this size are read at once: programs that write layers would take longer to compile."""


def load_params(
    folder: Path,
    spec: ModelSpec,
    dtype: Any,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: str = "none",
    layout: Layout | None = None,
    others: Collection[str] = (),
) -> Params:
    """Loads the weights of a model folder onto their devices.

    Args:
        folder: a model folder; with several processes, one that each of them can read.
        spec: the model, from `read_folder_spec`.
        dtype: dtype on the device.
        on_tensor: called with (parameters read, parameters in all), for a progress bar.
        quantization: `none`, or the format of the layers' matrices: `int8`, `int4` or `nf4`, or `mxfp4` of experts.
        layout: sharding of each parameter; None loads onto the default device.
        others: names of tensors in the files that are not loaded.

    Raises:
        ModelError: a shard is missing or broken, the tensors do not fit the config, or a matrix does not fit the format.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    specs = param_specs(spec)
    quantized = quantized_specs(specs, quantization)
    device = SingleDeviceSharding(jax.local_devices()[0])
    with TensorFiles(folder) as files:
        check_tensors(folder, spec, files, others)
        for number, (path, source) in enumerate(tensor_names(spec, files.files).items()):
            p = specs[path]
            if path in quantized and layout is not None:
                leaves[path] = load_quantized_sharded(files, source, quantized[path], quantization, p.axes, layout)
            elif path in quantized:
                leaves[path] = load_quantized(files, source, quantized[path], quantization)
            else:
                load = load_stacked if source.stack else load_array
                leaves[path] = load(files, source, p.shape, device if layout is None else sharding_of(layout, path, p), dtype)
            if on_tensor is not None:
                on_tensor(number + 1, len(specs))
    return nest(leaves)


def sharding_of(layout: Layout, path: tuple[str, ...], p: ParamSpec) -> NamedSharding:
    """Sharding of a parameter; ShardingError where the mesh does not divide a dimension."""
    return layout.checked("/".join(path), p.shape, layout.sharding(p.axes))


def load_array(files: TensorFiles, source: TensorSource, shape: tuple[int, ...], sharding: Sharding, dtype: Any) -> Array:
    """Loads a parameter that is not stacked."""
    read = shared_reads(shape, lambda index: read_slice(files, source, index, dtype))
    # Waiting for each parameter: reading ahead of the transfers would collect the whole model on the host.
    return jax.make_array_from_callback(shape, sharding, read).block_until_ready()


def load_stacked(files: TensorFiles, source: TensorSource, shape: tuple[int, ...], sharding: Sharding, dtype: Any) -> Array:
    """Loads a stacked parameter [L, ...]: a small one at once, a larger one layer by layer into zeros on the devices."""
    if math.prod(shape) * jnp.dtype(dtype).itemsize <= SMALL_STACK_BYTES:
        return load_array(files, source, shape, sharding, dtype)
    stack = device_zeros(shape, jnp.dtype(dtype), sharding)
    for layer in range(shape[0]):
        part = load_layer(files, source, shape, layer, sharding, dtype)
        stack = write_layer(stack, part, np.int32(layer), sharding).block_until_ready()
    return stack


def load_layer(
    files: TensorFiles, source: TensorSource, shape: tuple[int, ...], layer: int, sharding: Sharding, dtype: Any
) -> Array:
    """Loads one layer of a stacked parameter, sharded as the stack is; in the file's dtype where dtype is None."""
    read = shared_reads(shape[1:], lambda index: read_slice(files, source, (slice(layer, layer + 1), *index), dtype)[0])
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.make_array_from_callback(shape[1:], sharding, read)


def shared_reads(shape: tuple[int, ...], read: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Caches `read` by the bounds of the slices, so that devices with the same part of an array read it once."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def cached(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts[bounds] = read(tuple(slice(*pair) for pair in bounds))
        return parts[bounds]

    return cached


def load_quantized(files: TensorFiles, source: TensorSource, shapes: QuantizedWeight, quantization: str) -> QuantizedWeight:
    """Loads and quantises a stack [L, I, O] or [L, E, I, O] on one device, with one dense matrix at a time on host and device."""
    stack: QuantizedWeight = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for number in range(math.prod(shapes.shape[:-2])):
        matrix = jax.device_put(read_tensor(files, source, number))
        # Waiting for each matrix: reading ahead would collect dense matrices.
        stack = jax.block_until_ready(write_quantized_matrix(stack, matrix, jax.device_put(np.int32(number)), quantization))
    return stack


def load_quantized_sharded(
    files: TensorFiles,
    source: TensorSource,
    shapes: QuantizedWeight,
    quantization: str,
    axes: tuple[str | None, ...],
    layout: Layout,
) -> QuantizedWeight:
    """Loads and quantises a stack on a mesh, layer by layer.

    Each device quantises its own part. If a scale's group of inputs is split over devices, XLA takes the maximum across them, so
    the result is the same as on one device.
    """
    shardings = layout.quantized(shapes, axes)
    stack: Any = jax.tree.map(lambda leaf, sharding: device_zeros(leaf.shape, leaf.dtype, sharding), shapes, shardings)
    for layer in range(shapes.shape[0]):
        part = load_layer(files, source, shapes.shape, layer, shardings.values, None)
        stack = jax.block_until_ready(write_quantized_layer(stack, part, np.int32(layer), quantization, shardings))
    return stack


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def device_zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Array:
    """Zeros made on the devices, without an array of that size on the host."""
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def write_layer(stack: Array, part: Array, layer: Int[Array, ""], sharding: Sharding) -> Array:
    """Writes one layer into a stack, which is donated."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0), sharding)


@functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def write_quantized_matrix(stack: QuantizedWeight, matrix: Array, number: Int[Array, ""], quantization: str) -> QuantizedWeight:
    """Quantises one matrix and writes it into a stack, which is donated; `number` counts over [L] or [L, E]."""
    index = [i.astype(jnp.int32) for i in jnp.unravel_index(number, stack.shape[:-2])]

    def write(whole: Array, part: Array) -> Array:
        start = (*index, jnp.int32(0), jnp.int32(0))
        return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * len(index) + part.shape), start)

    return jax.tree.map(write, stack, quantize(matrix, quantization))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0,))
def write_quantized_layer(
    stack: QuantizedWeight, part: Array, layer: Int[Array, ""], quantization: str, shardings: QuantizedWeight
) -> QuantizedWeight:
    """Quantises one layer's matrix, or those of its experts, and writes it into a stack, which is donated."""
    convert = functools.partial(quantize, format=quantization)
    for _ in range(part.ndim - 2):
        convert = jax.vmap(convert)
    written = jax.tree.map(lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, layer, 0), stack, convert(part))
    return jax.lax.with_sharding_constraint(written, shardings)
