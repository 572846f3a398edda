"""Hugging Face folders: weights in, weights out.

Enters: a folder or a hub id. Leaves: the folder, the `ModelSpec`, and parameters on their devices. `tensor_names` is the one
    table of names: reading is the table forwards, exporting (`export.py`) is it backwards. Each device asks for its part of a
    parameter and gets it from the files, so that the host holds one stacked parameter at a time and never a second copy of the
    model; where a model is quantised, one matrix at a time (`quantize.py`). Only safetensors are read: a pickle never is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from grpo_jax.models.families import read_spec
from grpo_jax.models.quantize import quantized_specs, quantized_stack
from grpo_jax.models.spec import ModelError, ModelSpec, ParamSpec, nest, param_specs
from grpo_jax.types import Params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Tensors that old checkpoints carry beside the weights: constants that are computed from config.json.
CONSTANTS = ("rotary_emb.inv_freq", "self_attn.masked_bias")

LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffw_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def module_path(spec: ModelSpec, part: str) -> str:
    """Path of a module inside a layer, as Hugging Face names it: `q_proj` → `self_attn.q_proj`."""
    norms = GEMMA_NORMS if spec.sandwich else LLAMA_NORMS
    if part in norms:
        return norms[part]
    return f"mlp.{part}" if part in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{part}"


@dataclass(frozen=True)
class Source:
    """Where a parameter is in a checkpoint.

    Attributes:
        names: tensor names; one per layer for a stacked parameter, else one.
        transposed: Hugging Face keeps (out, in), this model (in, out).
    """

    names: tuple[str, ...]
    transposed: bool
    stacked: bool


def tensor_names(spec: ModelSpec) -> dict[tuple[str, ...], Source]:
    """The table: path of a parameter → its tensors."""
    table: dict[tuple[str, ...], Source] = {}
    for path in param_specs(spec):
        if path[0] == "layers":
            leaf = "bias" if path[2] == "bias" else "weight"
            names = tuple(f"model.layers.{i}.{module_path(spec, path[1])}.{leaf}" for i in range(spec.layers))
            table[path] = Source(names, path[2] == "kernel", True)
        else:
            top = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
            table[path] = Source((top[path[0]],), False, False)
    return table


def find_model(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model; a hub id is downloaded (safetensors, JSON and tokenizer files, nothing else).

    Raises:
        ModelError: no such folder, no such repository, or one that asks for a licence to be accepted.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path: {path!r} is not a folder, and not a hub id of the form owner/name")
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model.path: {path!r} asks for its licence to be accepted. Accept it on the model's page of the hub, then run "
            "`hf auth login` (or set HF_TOKEN) with the same account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model.path: there is no folder and no public hub repository {path!r}; if it is private, run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision: {revision!r} is not a branch, tag or commit of {path!r}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"model.path: {path!r} is no folder here, and the hub could not be reached: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object; ModelError where it is missing or broken."""
    if not file.is_file():
        raise ModelError(f"{file} is missing; a model folder needs {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds {type(content).__name__}, not an object")
    return content


def read_folder_spec(folder: Path) -> ModelSpec:
    """`ModelSpec` of a model folder."""
    return read_spec(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file name; from the index where the checkpoint is sharded."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelError(f"{folder / INDEX} has no weight_map")
        for name in sorted(set(mapping.values())):
            if Path(name).name != name:
                raise ModelError(f"{folder / INDEX} names a file in another folder: {name!r}")
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing, though {INDEX} names it; download the folder again")
        return mapping
    if not (folder / WEIGHTS).is_file():
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        pickles = [file.name for file in folder.glob("*.bin")]
        why = (
            f"it has only {', '.join(pickles)}, and pickles are never read; convert to safetensors"
            if pickles and not files
            else f"found {files}"
        )
        raise ModelError(f"{folder}: needs {WEIGHTS}, or shards with {INDEX}; {why}")
    with open_shard(folder / WEIGHTS, safe_open) as shard:
        return dict.fromkeys(shard.keys(), WEIGHTS)


@contextlib.contextmanager
def open_shard(file: Path, safe_open: Any) -> Iterator[Any]:
    """A safetensors file, mapped into memory; ModelError where it is broken."""
    from safetensors import SafetensorError

    try:
        with safe_open(str(file), framework="numpy") as shard:
            yield shard
    except SafetensorError as error:
        raise ModelError(f"{file} is broken ({error}); download it again") from error


class TensorFiles:
    """The tensors of a folder, read by slices.

    Raises:
        ModelError: a shard is missing or broken, a tensor is in no shard, or the shapes do not fit.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder, self.files = folder, weight_map(folder)
        self._stack = contextlib.ExitStack()
        self._shards = {
            name: self._stack.enter_context(open_shard(folder / name, safe_open)) for name in sorted(set(self.files.values()))
        }
        for name, file in self.files.items():
            if name not in self._shards[file].keys():  # noqa: SIM118 - not a dict
                raise ModelError(f"{folder / file} does not hold {name}, though {INDEX} says so; download the folder again")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._shards[self.files[name]].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor."""
        return self._shards[self.files[name]].get_slice(name)[index]


def check_tensors(folder: Path, spec: ModelSpec, files: TensorFiles) -> None:
    """Every parameter has its tensors, in the right shape, and every tensor its parameter."""
    unused = set(files.files)
    for path, source in tensor_names(spec).items():
        shape = param_specs(spec)[path].shape
        want = shape[1:] if source.stacked else shape
        want = want[::-1] if source.transposed else want
        for name in source.names:
            if name not in unused:
                raise ModelError(f"{folder}: tensor {name} is missing")
            unused.discard(name)
            if files.shape(name) != want:
                raise ModelError(f"{folder}: tensor {name} has shape {files.shape(name)}; config.json asks for {want}")
    if spec.tied:
        unused.discard("lm_head.weight")
    left = sorted(name for name in unused if not name.endswith(CONSTANTS))
    if left:
        raise ModelError(
            f"{folder}: {len(left)} tensors are not part of a {spec.family} model as config.json has it: {', '.join(left[:5])}"
        )


def load_params(
    folder: Path,
    spec: ModelSpec,
    dtype: Any,
    sharding_of: Callable[[tuple[str, ...], ParamSpec], Sharding] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    quantization: str = "none",
) -> Params:
    """Reads the weights of a folder onto their devices.

    Args:
        folder: a model folder.
        spec: the model, from `read_folder_spec`.
        dtype: number format on the device.
        sharding_of: where each parameter lives; the default device where None.
        on_tensor: called with (parameters read, parameters in all), for a progress bar.
        quantization: `none`, or the format of the layers' matrices: `int8`, `int4` or `nf4`, rounded from the files' own numbers.

    Raises:
        ModelError: a shard is missing or broken, the tensors do not fit the config, or a matrix does not fit the format.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    specs = param_specs(spec)
    quantized = quantized_specs(specs, quantization)
    if quantized and sharding_of is not None:
        raise ModelError(f"model.quantization: {quantization}; a quantised model lives on one device as yet; use none")
    default = SingleDeviceSharding(jax.local_devices()[0])
    with TensorFiles(folder) as files:
        check_tensors(folder, spec, files)
        for number, (path, source) in enumerate(tensor_names(spec).items()):
            shape = specs[path].shape
            sharding = default if sharding_of is None else sharding_of(path, specs[path])

            def read(index: Any, source: Source = source, shape: tuple[int, ...] = shape) -> np.ndarray:
                return read_slice(files, source, shape, index, dtype)

            if path in quantized:
                names = source.names

                def matrix(layer: int, names: tuple[str, ...] = names) -> np.ndarray:
                    return files.read(names[layer], (slice(None), slice(None)))

                leaves[path] = quantized_stack(quantized[path], quantization, matrix, source.transposed)
            else:
                # Waiting for each: reading ahead of the transfers would pile the model up on the host.
                leaves[path] = jax.make_array_from_callback(shape, sharding, read).block_until_ready()
            if on_tensor is not None:
                on_tensor(number + 1, len(specs))
    return nest(leaves)


def read_slice(files: TensorFiles, source: Source, shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part of a parameter that one device asks for."""
    inner = index[1:] if source.stacked else index
    inner = inner[::-1] if source.transposed else inner
    if not source.stacked:
        return np.ascontiguousarray(files.read(source.names[0], inner)).astype(jnp.dtype(dtype), copy=False)
    names = source.names[index[0]]
    part = None
    for number, name in enumerate(names):
        tensor = files.read(name, inner)
        tensor = tensor.T if source.transposed else tensor
        if part is None:
            part = np.empty((len(names), *tensor.shape), jnp.dtype(dtype))
        part[number] = tensor
    assert part is not None, shape
    return part
