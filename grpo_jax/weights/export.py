"""Weights out: merged safetensors in the layout of the original folder, and the export of a finished run.

Enters: parameters and adapters, or a run folder. Leaves: a folder that transformers and vLLM load: the same tensor names,
    number formats and shards as the original, its config, generation config and tokenizer. Adapter folders are
    `models/lora.py`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.models.spec import ModelError, ModelSpec, flatten
from grpo_jax.types import Params
from grpo_jax.weights.hf import INDEX, TensorFiles, read_slice, tensor_names
from grpo_kernels.ops.quantized_matmul import QuantizedWeight

# Files of a model folder that are not carried over: weights in whatever format, and what the hub keeps beside them.
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md", ".gitattributes", ".index.json")

ReadTensor = Callable[[tuple[str, ...], tuple[int, ...]], np.ndarray]
"""(path of a parameter, which layer of it, or which layer and expert) → its values, float32, laid out as this model keeps them."""


def merged_weights(
    spec: ModelSpec,
    params: Params,
    adapters: Params | None,
    lora: LoraConfig | None,
    original: Path | None = None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> ReadTensor:
    """Reads one tensor at a time with its adapter added, W + scale · A B, in float32.

    Args:
        original: folder that the model was read from; where `params` are quantised, W is that folder's, which is not rounded.
        fetch: brings an array to the host whole.

    Raises:
        ModelError: by what is returned, where the original is gone.
    """
    leaves, sources = dict(flatten(params)), tensor_names(spec)
    low = {} if adapters is None else dict(flatten(adapters))
    scale = 0.0 if lora is None else lora.scale

    def read_original(path: tuple[str, ...], place: tuple[int, ...]) -> np.ndarray:
        assert original is not None, path
        with TensorFiles(original) as files:
            index = (*(slice(at, at + 1) for at in place), slice(None), slice(None))
            return read_slice(files, sources[path], leaves[path].shape, index, np.float32)[(0,) * len(place)]

    def read(path: tuple[str, ...], place: tuple[int, ...]) -> np.ndarray:
        if isinstance(leaves[path], QuantizedWeight):
            values = read_original(path, place)
        else:
            values = np.asarray(fetch(leaves[path][place])).astype(np.float32)
        if (*path[:2], "a") in low and path[-1] == "kernel":
            a, b = (np.asarray(fetch(low[(*path[:2], leaf)][place]), np.float32) for leaf in ("a", "b"))
            values = values + np.float32(scale) * (a @ b)
        return values

    return read


def save_merged(out: Path, original: Path, spec: ModelSpec, read: ReadTensor, writes: bool = True) -> None:
    """Writes a model folder.

    Args:
        out: made where it is not there; must not be the original.
        original: the folder that the model was read from: its shards, number formats, config and tokenizer are kept.
        read: gives each tensor; see `merged_weights`.
        writes: False only reads, in the same order: for all processes but one, where arrays lie in several.

    Raises:
        ModelError: out is the original, or holds weights of another model; or the original is gone.
    """
    from safetensors.numpy import save_file

    if out.resolve() == original.resolve():
        raise ModelError(f"{out} is the folder that the model was read from; choose another, so that the original stays")
    if writes:
        out.mkdir(parents=True, exist_ok=True)
    places = {
        name: (path, place, source.transposed) for path, source in tensor_names(spec).items() for name, place in source.places()
    }
    if spec.tied:
        places["lm_head.weight"] = (("embed", "embedding"), (), False)
    with TensorFiles(original) as files:
        shards = sorted(set(files.files.values()))
        if writes:
            refuse_other_weights(out, {*shards, INDEX} if (original / INDEX).is_file() else set(shards))
        for shard in shards:
            tensors: dict[str, np.ndarray] = {}
            for name in (n for n, file in files.files.items() if file == shard):
                if not writes:
                    if name in places:
                        read(*places[name][:2])
                    continue
                dtype = files.read(name, tuple(slice(0, 0) for _ in files.shape(name))).dtype
                if name not in places:
                    tensors[name] = files.read(name, tuple(slice(None) for _ in files.shape(name)))
                    continue
                path, place, transposed = places[name]
                values = read(path, place)
                tensors[name] = np.ascontiguousarray(values.T if transposed else values).astype(jnp.dtype(dtype))
            if writes:
                save_file(tensors, out / shard, metadata={"format": "pt"})
    if not writes:
        return
    if (original / INDEX).is_file():
        shutil.copy(original / INDEX, out / INDEX)
    for file in original.iterdir():
        if file.is_file() and not file.name.endswith(LEFT_BEHIND):
            shutil.copy(file, out / file.name)


def refuse_other_weights(out: Path, wanted: set[str]) -> None:
    """A folder with weights of another export would be two models in one; ModelError names them."""
    weights = {file.name for file in out.iterdir() if file.name.endswith((".safetensors", ".index.json"))}
    others = sorted(weights - wanted)
    if others:
        raise ModelError(f"{out} holds other weights ({', '.join(others[:3])}); choose an empty folder")
