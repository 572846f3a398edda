"""Which weights of a model are quantised, and a stack of them filled matrix by matrix.

Enters: `model.quantization` and dense matrices one at a time. Leaves: `QuantizedWeight` stacks in the place of the layers'
    kernels, experts' included. Embedding, head, norms, biases and routers stay as they are. The formats are
    `grpo_kernels.ops.quantized_matmul`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grpo_jax.models.spec import ModelError, ModelSpec, ParamSpec, flatten, nest, param_specs
from grpo_jax.types import Params
from grpo_kernels.ops.quantized_matmul import QuantizedWeight, quantize, quantized_shapes, weight_bytes


def is_quantized(path: tuple[str, ...], quantization: str) -> bool:
    """Whether a parameter is one of the layers' matrices, and those are quantised."""
    return quantization != "none" and path[0] == "layers" and path[-1] == "kernel" and path[1] != "router"


def quantized_specs(specs: dict[tuple[str, ...], ParamSpec], quantization: str) -> dict[tuple[str, ...], QuantizedWeight]:
    """Shapes and dtypes of the quantised parameters among `specs`.

    Raises:
        ModelError: an unknown format, or a matrix whose width it has no groups for; the message names it.
    """
    try:
        return {
            path: quantized_shapes(quantization, p.shape, "/".join(path))
            for path, p in specs.items()
            if is_quantized(path, quantization)
        }
    except ValueError as error:
        raise ModelError(f"model.quantization: {error}") from error


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0,))
def store(stack: QuantizedWeight, tensor: Array, number: Int[Array, ""], quantization: str, transposed: bool) -> QuantizedWeight:
    """Quantises one matrix into its place in the stack, which is overwritten; number counts through [L] or [L, E]."""
    one = quantize(tensor.T if transposed else tensor, quantization)
    place = jnp.unravel_index(number, stack.shape[:-2])

    def write(whole: Array, part: Array) -> Array:
        start = (*(at.astype(jnp.int32) for at in place), jnp.int32(0), jnp.int32(0))
        return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * len(place) + part.shape), start)

    return jax.tree.map(write, stack, one)


def quantized_stack(
    shapes: QuantizedWeight, quantization: str, read: Callable[[int], np.ndarray], transposed: bool, device: Any = None
) -> QuantizedWeight:
    """A stack [L, I, O] or [L, E, I, O] of which one matrix at a time is dense, on the host and on the device.

    Args:
        shapes: of the stack.
        read: number of a matrix, expert by expert and layer by layer → it in any float format.
        transposed: `read` gives [O, I].
        device: where the stack lives; the default device where None.
    """
    stack: QuantizedWeight = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=device), shapes)
    for number in range(math.prod(shapes.values.shape[:-2])):
        tensor = jax.device_put(np.ascontiguousarray(read(number)), device)
        # Waiting for each: reading ahead would pile dense matrices up.
        stack = jax.block_until_ready(store(stack, tensor, jax.device_put(np.int32(number), device), quantization, transposed))
    return stack


def quantize_params(spec: ModelSpec, params: Params, quantization: str) -> Params:
    """A dense model with its layers' matrices quantised, one at a time. For random weights: files are read by `hf.py`.

    Raises:
        ModelError: as `quantized_specs`.
    """
    quantized = quantized_specs(param_specs(spec), quantization)

    def each(stack: Array) -> QuantizedWeight:
        return quantize(stack, quantization) if stack.ndim == 2 else jax.lax.map(each, stack)

    def convert(path: tuple[str, ...], leaf: Any) -> Any:
        return each(leaf) if path in quantized else leaf

    return nest({path: convert(path, leaf) for path, leaf in flatten(params)})


def quantization_of(params: Params) -> str:
    """The format of a model's layers, or `none`."""
    kernel = params["layers"]["q_proj"]["kernel"]
    return kernel.format if isinstance(kernel, QuantizedWeight) else "none"


def params_bytes(params: Params) -> int:
    """Bytes of a model's weights on an accelerator, where two 4-bit numbers share one."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    return sum(weight_bytes(leaf) if isinstance(leaf, QuantizedWeight) else leaf.size * leaf.dtype.itemsize for leaf in leaves)
