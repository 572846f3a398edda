"""Writes merged models: a folder that transformers and vLLM load, in the layout of the original folder.

Tensor names, dtypes and shards are those of the original, as are config, generation config and tokenizer. Only MXFP4 becomes
bfloat16. `digests.json` has the digest of every file, for `grpo-jax verify`. Adapter folders are written by `weights/lora.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import OTHER_FILES, VOCABULARY_FILES
from grpo_jax.models.parameters import flatten
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.digests import DIGESTS, write_digests
from grpo_jax.runtime.files import explains_write_errors, replacing
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import ratios_of
from grpo_jax.weights.hf import INDEX, TensorFiles, read_json, read_tensor
from grpo_jax.weights.names import TensorSource, tensor_names
from grpo_kernels import QuantizedWeight

# Endings of files that are not copied: weights in any format, files of the hub's page, and digests of the original's files.
NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".md",
    ".gitattributes",
    ".index.json",
    DIGESTS,
)

ReadTensor = Callable[[tuple[str, ...], tuple[int, ...]], np.ndarray]
"""(path of a parameter, index of the layer, or of layer and expert) → that tensor, float32, with a matrix as (in, out)."""


def merged_weights(
    spec: ModelSpec,
    params: Params,
    adapters: Params | None,
    lora: LoraConfig | None,
    original: Path | None = None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> ReadTensor:
    """Makes a function that reads one tensor with its adapter merged (`with_adapter`), in float32.

    Args:
        original: folder that the model was read from. Where `params` are quantised, W comes from there, unrounded.
        fetch: copies an array to the host, all shards of it.

    Returns:
        The function. It raises ModelError where the original is needed and gone.
    """
    leaves = dict(flatten(params))
    pairs = {} if adapters is None else adapters["layers"]
    ratios = {} if lora is None else dict(ratios_of(spec, lora))
    scale = 0.0 if lora is None else lora.scale

    def read_original(path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
        assert original is not None, path
        with TensorFiles(original) as files:
            # Of a tensor with all experts, the index is that of the layer.
            source = tensor_names(spec, files.files)[path]
            stack = source.stack
            rest = np.ndindex(stack[len(index) :])
            parts = [read_tensor(files, source, int(np.ravel_multi_index((*index, *other), stack))) for other in rest]
            return np.stack(parts).reshape(*stack[len(index) :], *parts[0].shape)

    def read(path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
        quantized = isinstance(leaves[path], QuantizedWeight)
        values = read_original(path, index) if quantized else np.asarray(fetch(leaves[path][index]))
        values = values.astype(np.float32)
        if path[-1] != "kernel" or path[1] not in pairs:
            return values
        pair = {leaf: np.asarray(fetch(stack[index]), np.float32) for leaf, stack in pairs[path[1]].items()}
        return with_adapter(values, pair, scale * (ratios[path[1]][index[0]] if path[1] in ratios else 1.0))

    return read


def with_adapter(w: np.ndarray, pair: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """W + scale · A B of one matrix (in, out), with PiSSA's start subtracted and DoRA's magnitudes; see `models.adapters`."""
    low = pair["a"] @ pair["b"]
    if "a0" in pair:
        low = low - pair["a0"] @ pair["b0"]
    merged = w + np.float32(scale) * low
    if "magnitude" not in pair or not np.any(pair["magnitude"]):
        return merged
    norms = np.linalg.norm(merged, axis=0)
    return merged * (pair["magnitude"] / np.where(norms == 0, np.float32(1), norms))


@explains_write_errors
def save_merged(
    out: Path, original: Path, spec: ModelSpec, read: ReadTensor, writes: bool = True, tokenizer: Tokenizer | None = None
) -> None:
    """Writes a model folder.

    Args:
        out: created where it does not exist; must not be the original.
        original: the folder that the model was read from; shards, dtypes, config and tokenizer are taken from it.
        read: gives each tensor; see `merged_weights`.
        writes: False only calls `read`, in the same order: for all processes but one, where arrays are sharded over processes.
        tokenizer: written with its chat template, instead of the original's files.

    Raises:
        ModelError: out is the original, or has weights of another model; or the original is gone.
    """
    from safetensors.numpy import save_file

    if out.resolve() == original.resolve():
        raise ModelError(f"{out} is the folder that the model was read from; choose another, so that the original stays")
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        (out / DIGESTS).unlink(missing_ok=True)  # those of files that are about to be replaced
    sizes = dict[str, int]()
    with TensorFiles(original) as files:
        pieces = tensor_pieces(spec, files.files)
        shards = sorted(set(files.files.values()))
        if writes:
            refuse_other_weights(out, {*shards, INDEX} if (original / INDEX).is_file() else set(shards))
        for shard in shards:
            tensors: dict[str, np.ndarray] = {}
            for name in (n for n, file in files.files.items() if file == shard):
                values = [(source, read(path, index)) for source, path, index in pieces.get(name, ())]
                if writes:
                    tensors[files.names.get(name, name)] = joined_pieces(files, name, values) if values else files.read(name)
            sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
            if writes:
                with replacing(out / shard) as unfinished:
                    save_file(tensors, unfinished, metadata={"format": "pt"})
    if writes:
        others = copy_other_files(original, out, without=() if tokenizer is None else (*VOCABULARY_FILES, *OTHER_FILES))
        if files.packed:
            describe_dense(out, files.files, sum(sizes.values()))
        write_digests(out, sorted([*shards, *others, *([] if tokenizer is None else tokenizer.save(out))]))


def describe_dense(out: Path, files: dict[str, str], total_bytes: int) -> None:
    """Changes the index and config.json of a folder whose weights were in MXFP4 and are not any more.

    Args:
        files: tensor name → file name.
    """
    if (out / INDEX).is_file():
        content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
        (out / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = {name: value for name, value in read_json(out / "config.json").items() if name != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_pieces(
    spec: ModelSpec, stored: Collection[str]
) -> dict[str, list[tuple[TensorSource, tuple[str, ...], tuple[int, ...]]]]:
    """The tensors of the model's files, each with the parameters that are in it: source, path and index in the stack."""
    pieces: dict[str, list[tuple[TensorSource, tuple[str, ...], tuple[int, ...]]]] = {}
    for path, source in tensor_names(spec, stored).items():
        for name, index in source.entries():
            pieces.setdefault(name, []).append((source, path, index))
    if spec.tied:
        pieces["lm_head.weight"] = [(TensorSource(("lm_head.weight",), False, ()), ("embed", "embedding"), ())]
    return pieces


def joined_pieces(files: TensorFiles, name: str, pieces: list[tuple[TensorSource, np.ndarray]]) -> np.ndarray:
    """One tensor of the files, in their format, from the values of each parameter that is in it, matrices as (in, out)."""
    shape = files.shape(name)
    dtype = files.read(name, tuple(slice(0, 0) for _ in shape)).dtype
    tensor = np.empty(shape, jnp.dtype(dtype))
    for source, values in pieces:
        index = source.index_of((slice(None),) * len(shape))
        tensor[index] = (np.swapaxes(values, -1, -2) if source.transposed else values).astype(tensor.dtype)
    return tensor


def copy_other_files(original: Path, out: Path, without: Collection[str] = ()) -> list[str]:
    """Copies the index of the shards and every file that has no weights: config, generation config, tokenizer.

    Args:
        without: names that are left out.

    Returns:
        The names of these files.
    """
    names = [file.name for file in original.iterdir() if file.is_file() and file.name not in without]
    copied = [name for name in names if name == INDEX or not name.endswith(NOT_COPIED)]
    for name in copied:
        shutil.copy(original / name, out / name)
    return copied


def refuse_other_weights(out: Path, own: set[str]) -> None:
    """Raises ModelError where a folder has weight files besides `own`: it would be two models in one."""
    weights = {file.name for file in out.iterdir() if file.name.endswith((".safetensors", ".index.json", DIGESTS))}
    others = sorted(weights - own)
    if others:
        raise ModelError(f"{out} holds other weights ({', '.join(others[:3])}); choose an empty folder")
