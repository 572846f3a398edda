"""Writes models and adapters as GGUF files, tensor by tensor.

Matrices have the format that is asked for, and what has one dimension is float32, as llama.cpp expects. A row that is no
multiple of a format's block of 32 values is stored in float16, which no published model has. With q4_1 the matrix that gives
the logits is q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.parameters import param_specs
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.files import replacing
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import ratios_of
from grpo_jax.weights.export import ReadTensor
from grpo_jax.weights.gguf.architecture import (
    Architecture,
    add_settings,
    architecture_of,
    converted,
    import_gguf,
    rope_factors,
)
from grpo_jax.weights.gguf.vocabulary import add_vocabulary
from grpo_jax.weights.hf import tensor_names
from grpo_jax.weights.lora import plain_adapters
from grpo_jax.weights.names import module_paths

GGUF_TYPES = ("f16", "bf16", "q8_0", "q4_1")
LARGEST_FLOAT16 = 65504.0
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        path: of the parameter in the model.
        index: of the layer in the parameter; () where it is no layer's.
        shape: [out, in], or [out].
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]


def write_model(
    file: Path,
    spec: ModelSpec,
    read: ReadTensor,
    folder: Path,
    tokenizer: Tokenizer | None,
    gguf_type: str = "f16",
    name: str = "model",
    writes: bool = True,
) -> list[str]:
    """Writes a whole model.

    Args:
        file: replaced when the new one is complete.
        read: gives each tensor; see `merged_weights`.
        folder: the model's, for config.json.
        tokenizer: None writes a file without one.
        name: of the model, shown by llama.cpp.
        writes: False only calls `read`, in the same order: for all processes but one.

    Returns:
        Notes for the user on what is different in llama.cpp.

    Raises:
        ModelError: llama.cpp cannot compute this model or its tokenizer, or a value is beyond float16.
    """
    gguf, architecture = import_gguf(), architecture_of(spec)
    plan = planned(spec, architecture)
    if not writes:
        for tensor in plan:
            read(tensor.path, tensor.index)
        return []
    with replacing(file) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture.name)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            notes = add_settings(writer, spec, architecture, folder)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                add_vocabulary(writer, tokenizer, spec.vocab)
            factors = rope_factors(spec)
            formats = [format_of(spec, tensor, gguf_type) for tensor in plan]
            if factors is not None:
                add_info(writer, ROPE_FACTORS, factors.shape, "F32")
            for tensor, kind in zip(plan, formats, strict=True):
                add_info(writer, tensor.name, tensor.shape, kind)
            open_for_tensors(writer)
            if factors is not None:
                writer.write_tensor_data(factors)
            for tensor, kind in zip(plan, formats, strict=True):
                values = read(tensor.path, tensor.index)
                values = np.ascontiguousarray(values.T if tensor.path[-1] == "kernel" else values)
                writer.write_tensor_data(encoded(tensor.name, converted(spec, architecture, part_of(tensor.path), values), kind))
        finally:
            writer.close()
    return notes


def write_adapter(file: Path, spec: ModelSpec, adapters: Params, lora: LoraConfig, name: str = "adapter") -> None:
    """Writes adapters as a GGUF LoRA, float32; llama.cpp adds alpha / r · B A to the matrices of any GGUF file of the base.

    Args:
        adapters: the `lora` collection, on the host.

    Raises:
        ModelError: as `write_model`; or the adapters are DoRA's, which llama.cpp's LoRA does not have.
    """
    if lora.use_dora:
        raise ModelError("GGUF: llama.cpp's LoRA has no DoRA (lora.use_dora): use --format gguf, with the adapters multiplied in")
    gguf, architecture, ratios = import_gguf(), architecture_of(spec), dict(ratios_of(spec, lora))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], spec.layers)
    pairs = plain_adapters(adapters)["layers"]
    with replacing(file) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture.name)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(name)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scale * lora.rank)  # of rslora too: it is divided by r
            matrices: list[tuple[str, np.ndarray]] = []
            for part, pair in pairs.items():
                # llama.cpp divides alpha by the rank of each matrix; a scale of its own goes into B.
                more = np.array(ratios.get(part, (1.0,) * spec.layers)) * (pair["a"].shape[-1] / lora.rank)
                for layer, module in enumerate(module_paths(spec, part)):
                    a, b = pair["a"][layer].T, pair["b"][layer].T
                    if not np.any(a):
                        continue  # no adapter
                    b = b if more[layer] == 1 else b * np.float32(more[layer])
                    matrices.append((f"{names.get_name(module)}.weight.lora_a", np.ascontiguousarray(a)))
                    rows = converted(spec, architecture, part, b)
                    matrices.append((f"{names.get_name(module)}.weight.lora_b", np.ascontiguousarray(rows)))
            for tensor, values in matrices:
                add_info(writer, tensor, values.shape, "F32")
            open_for_tensors(writer)
            for _, values in matrices:
                writer.write_tensor_data(values)
        finally:
            writer.close()


def planned(spec: ModelSpec, architecture: Architecture) -> list[PlannedTensor]:
    """The tensors of a model's file, by gguf's own tables of names."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], spec.layers)
    plan: list[PlannedTensor] = []
    for path, source in tensor_names(spec).items():
        shape = param_specs(spec)[path].shape[len(source.stack) :]
        for name, index in source.entries():
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            plan.append(PlannedTensor(found, path, index, shape[::-1] if source.transposed else shape))
    return plan


def part_of(path: tuple[str, ...]) -> str:
    """The module of a parameter: `q_proj`, `attn_norm`, `final_norm`, `embed`."""
    return path[-2]


def format_of(spec: ModelSpec, tensor: PlannedTensor, gguf_type: str) -> str:
    """The format of a tensor, by its name in gguf's `GGMLQuantizationType`."""
    if len(tensor.shape) == 1:
        return "F32"
    head = "embed" if spec.tied else "head"
    kind = "q8_0" if gguf_type == "q4_1" and part_of(tensor.path) == head else gguf_type
    block, _ = import_gguf().GGML_QUANT_SIZES[import_gguf().GGMLQuantizationType[kind.upper()]]
    return "F16" if tensor.shape[-1] % block else kind.upper()


def add_info(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announces a tensor: its name, shape and format."""
    gguf = import_gguf()
    code = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[code]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=code)


def open_for_tensors(writer: Any) -> None:
    """Writes everything that stands before the tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def encoded(name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Values in a format of GGUF; ModelError where float16 cannot hold them."""
    gguf = import_gguf()
    largest = float(np.abs(values).max(initial=0.0))
    if kind != "F32" and kind != "BF16" and largest > LARGEST_FLOAT16:
        raise ModelError(f"GGUF: {name} has a value of size {largest:g}, beyond float16: use --gguf_type bf16")
    return gguf.quantize(np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType[kind])
