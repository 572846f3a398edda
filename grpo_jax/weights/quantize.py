"""Which weights of a model are quantised: the layers' matrices, those of experts included.

Embedding, head, norms, biases and routers are not quantised, and with mxfp4 nothing but experts. The formats are in
`grpo_kernels.ops.quantized_matmul`.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from grpo_jax.models.parameters import ParamSpec, abstract_params, flatten, nest, param_specs
from grpo_jax.models.spec import EXPERT_LINEARS, ROUTERS, ModelError, ModelSpec
from grpo_jax.types import Params
from grpo_kernels import QuantizedWeight, quantize, quantized_shapes, weight_bytes


def quantized_specs(specs: dict[tuple[str, ...], ParamSpec], quantization: str) -> dict[tuple[str, ...], QuantizedWeight]:
    """Shapes and dtypes of the quantised parameters among `specs`; none where `quantization` is `none`.

    Raises:
        ModelError: an unknown format, a matrix with an input width that has no groups in it, which the message names, or mxfp4 for
            a model without experts.
    """
    if quantization == "mxfp4" and ("layers", "router", "kernel") not in specs:
        raise ModelError("model.quantization: mxfp4 is for experts, and this model has none: use nf4, int4 or int8")

    def is_quantized(path: tuple[str, ...]) -> bool:
        if quantization == "none" or path[0] != "layers" or path[-1] != "kernel":
            return False
        return path[1] in EXPERT_LINEARS if quantization == "mxfp4" else path[1] not in ROUTERS

    try:
        return {path: quantized_shapes(quantization, p.shape, "/".join(path)) for path, p in specs.items() if is_quantized(path)}
    except ValueError as error:
        raise ModelError(f"model.quantization: {error}") from error


def abstract_weights(spec: ModelSpec, dtype: Any, quantization: str) -> Params:
    """The tree of a model's weights as shapes and dtypes; ModelError as `quantized_specs`."""
    quantized = quantized_specs(param_specs(spec), quantization)
    return nest({path: quantized.get(path, leaf) for path, leaf in flatten(abstract_params(spec, dtype))})


def quantize_params(spec: ModelSpec, params: Params, quantization: str) -> Params:
    """Quantises the layers' matrices of a dense model, one at a time. For random weights: files are read by `loading.py`.

    Raises:
        ModelError: as `quantized_specs`.
    """
    quantized = quantized_specs(param_specs(spec), quantization)

    def convert(stack: Array) -> QuantizedWeight:
        return quantize(stack, quantization) if stack.ndim == 2 else jax.lax.map(convert, stack)

    return nest({path: convert(leaf) if path in quantized else leaf for path, leaf in flatten(params)})


def quantization_of(params: Params) -> str:
    """The format of a model's layers, or `none`."""
    kernel = params["layers"]["down_proj"]["kernel"]
    return kernel.format if isinstance(kernel, QuantizedWeight) else "none"


def params_bytes(params: Params) -> int:
    """Bytes of a model's weights on an accelerator, where two 4-bit values share a byte."""

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedWeight)

    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return sum(weight_bytes(leaf) if is_quantized(leaf) else leaf.size * leaf.dtype.itemsize for leaf in leaves)
