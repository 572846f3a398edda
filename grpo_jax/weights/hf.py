"""Reads Hugging Face model folders: finds or downloads the folder, maps tensor names to parameters, reads parts of parameters.

`tensor_names` is the only table of names; loading uses it in one direction and `export.py` in the other. Only safetensors are read,
no pickles. `loading.py` puts what is read onto devices.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.checks import show
from grpo_jax.models.families import read_spec
from grpo_jax.models.spec import EXPERT_LINEARS, ModelError, ModelSpec, param_specs
from grpo_jax.runtime.untrusted_json import JsonError, located, read_json_file
from grpo_jax.weights.finite import all_finite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[\w.+=@ -]{1,200}\.safetensors")
FLOATING = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights may have; others are quantised values, whose scales are elsewhere."""
# Names of constants that old checkpoints store next to the weights; they are computed from config.json instead.
CONSTANTS = ("rotary_emb.inv_freq", "self_attn.masked_bias")

LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffw_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MIXTRAL_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FUSED_EXPERTS = "experts.gate_up_proj"


def module_path(spec: ModelSpec, part: str, expert: int = 0) -> str:
    """Hugging Face's path of a module inside a layer: `q_proj` → `self_attn.q_proj`.

    Args:
        expert: index of the expert, where `part` is a linear layer of experts.
    """
    norms = GEMMA_NORMS if spec.sandwich else LLAMA_NORMS
    if part in norms:
        return norms[part]
    block, names = ("block_sparse_moe", MIXTRAL_EXPERTS) if spec.family == "mixtral" else ("mlp", {})
    if part == "router":
        return f"{block}.gate"
    if part not in EXPERT_LINEARS:
        return f"self_attn.{part}"
    return f"{block}.experts.{expert}.{names.get(part, part)}" if spec.experts else f"{block}.{part}"


def module_paths(spec: ModelSpec, part: str) -> list[str]:
    """Paths from the model's root of all modules of one kind, layer by layer and, within a layer, expert by expert."""
    experts = spec.experts if part in EXPERT_LINEARS and spec.experts else 1
    return [f"model.layers.{i}.{module_path(spec, part, expert)}" for i in range(spec.layers) for expert in range(experts)]


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint that make up one parameter.

    Attributes:
        names: tensor names: one, or one per layer, or one per layer and expert in that order.
        transposed: True where Hugging Face stores (out, in) and this model (in, out).
        stack: leading dimensions of the parameter over which its tensors are stacked: (), (L,) or (L, E).
    """

    names: tuple[str, ...]
    transposed: bool
    stack: tuple[int, ...]

    def entries(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name and its index in the stack."""
        return zip(self.names, np.ndindex(self.stack), strict=True)


def tensor_names(spec: ModelSpec) -> dict[tuple[str, ...], TensorSource]:
    """The table of names: path of a parameter → its tensors."""
    top = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    table: dict[tuple[str, ...], TensorSource] = {}
    for path in param_specs(spec):
        if path[0] == "layers":
            leaf = "bias" if path[2] == "bias" else "weight"
            names = tuple(f"{module}.{leaf}" for module in module_paths(spec, path[1]))
            table[path] = TensorSource(names, path[2] == "kernel", spec.stack_dims(path[1])[0])
        else:
            table[path] = TensorSource((top[path[0]],), False, ())
    return table


def find_model(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Finds the local folder of a model; a hub id is downloaded (safetensors, JSON and tokenizer files, nothing else).

    Args:
        path: a folder, or a hub id `owner/name`.
        revision: branch, tag or commit on the hub.
        weights: False leaves out the safetensors.

    Raises:
        ModelError: no such folder, no such repository, or one whose licence has to be accepted first.
    """
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*.safetensors"] if weights else [])
    return find_folder(path, "model.path", patterns, revision)


def find_folder(path: str, field: str, patterns: list[str], revision: str | None = None) -> Path:
    """Finds a local folder, or downloads those files of a hub repository that match `patterns`.

    Args:
        field: the setting that holds the path, for messages.

    Raises:
        ModelError: as `find_model`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"{field}: {path!r} is not a folder, and not a hub id of the form owner/name")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{field}: {path!r} asks for its licence to be accepted. Accept it on the model's page of the hub, then run "
            "`hf auth login` (or set HF_TOKEN) with the same account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{field}: there is no folder and no public hub repository {path!r}; if it is private, run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision: {revision!r} is not a branch, tag or commit of {path!r}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{field}: {path!r} is not a folder, and no hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"{field}: {path!r} is not a local folder, and the hub could not be reached: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file's object; ModelError where it is missing or broken."""
    if not file.is_file():
        raise ModelError(f"{file} is missing; a model folder needs {file.name}")
    try:
        content = read_json_file(file)
    except JsonError as error:
        raise ModelError(f"{file} is not valid JSON: {located(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds {type(content).__name__}, not an object")
    return content


def read_folder_spec(folder: Path) -> ModelSpec:
    """Reads the `ModelSpec` of a model folder."""
    return read_spec(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index where the checkpoint is sharded."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelError(f"{folder / INDEX} has no weight_map")
        for tensor, name in mapping.items():
            if not isinstance(name, str):
                raise ModelError(f"{folder / INDEX}: the file of {show(tensor)} is {show(name)}: use a file name")
        for name in sorted(set(mapping.values())):
            if Path(name).name != name or "\\" in name:
                raise ModelError(f"{folder / INDEX} names a file in another folder: {show(name)}")
            if not SHARD_NAME.fullmatch(name):
                raise ModelError(f"{folder / INDEX} names {show(name)}, which is no name of a safetensors file")
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
    """Opens a safetensors file, memory-mapped; ModelError where it is broken."""
    from safetensors import SafetensorError

    try:
        opened = safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is broken ({error}); download it again") from error
    try:
        with opened as shard:
            yield shard
    except SafetensorError as error:
        raise ModelError(f"{file} is broken ({error}); download it again") from error


def shape_of(file: Path, shard: Any, name: str) -> tuple[int, ...]:
    """A tensor's shape, from the header; ModelError where its values have another format than `FLOATING`."""
    part = shard.get_slice(name)
    if part.get_dtype() not in FLOATING:
        raise ModelError(f"{file}: tensor {name} has values of type {part.get_dtype()}; weights are one of {', '.join(FLOATING)}")
    return tuple(part.get_shape())


def require_finite(file: Path, name: str, values: np.ndarray) -> None:
    """Raises ModelError where a tensor of a file contains NaN or infinity."""
    if not all_finite(values):
        raise ModelError(
            f"{file}: tensor {name} contains NaN or infinity, and so would every result; download the file again, or take weights "
            "from before the training that broke them"
        )


class TensorFiles:
    """The open safetensors files of a folder, read by slices.

    Raises:
        ModelError: a shard is missing or broken, or does not contain a tensor that the index names.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder, self.files = folder, weight_map(folder)
        self._stack = contextlib.ExitStack()
        self._shards = {
            name: self._stack.enter_context(open_shard(folder / name, safe_open)) for name in sorted(set(self.files.values()))
        }
        held = {file: set(shard.keys()) for file, shard in self._shards.items()}
        for name, file in self.files.items():
            if name not in held[file]:
                self._stack.close()
                raise ModelError(f"{folder / file} does not hold {name}, though {INDEX} says so; download the folder again")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; ModelError where it is no tensor of floating-point numbers."""
        return shape_of(self.folder / self.files[name], self._shards[self.files[name]], name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads part of a tensor, or all of it; ModelError where it contains NaN or infinity."""
        index = tuple(slice(None) for _ in self.shape(name)) if index is None else index
        values = self._shards[self.files[name]].get_slice(name)[index]
        require_finite(self.folder / self.files[name], name, values)
        return values


def check_tensors(folder: Path, spec: ModelSpec, files: TensorFiles) -> None:
    """Raises ModelError unless the tensors of the files, with their shapes, are exactly those of the model's parameters."""
    unused = set(files.files)
    fused = next((name for name in unused if name.endswith(FUSED_EXPERTS)), None)
    if fused is not None:
        raise ModelError(
            f"{folder}: tensor {fused} holds all experts in one; only one tensor per expert is supported: load the folder in "
            "transformers and save it with save_pretrained(..., save_original_format=True)"
        )
    specs = param_specs(spec)
    for path, source in tensor_names(spec).items():
        expected = specs[path].shape[len(source.stack) :]
        expected = expected[::-1] if source.transposed else expected
        for name in source.names:
            if name not in unused:
                raise ModelError(f"{folder}: tensor {name} is missing")
            unused.discard(name)
            if files.shape(name) != expected:
                raise ModelError(f"{folder}: tensor {name} has shape {files.shape(name)}; config.json asks for {expected}")
    if spec.tied:
        unused.discard("lm_head.weight")
    left = sorted(name for name in unused if not name.endswith(CONSTANTS))
    if left:
        raise ModelError(
            f"{folder}: {len(left)} tensors are not part of the {spec.family} model in config.json: {', '.join(left[:5])}"
        )


def read_slice(files: TensorFiles, source: TensorSource, index: tuple[slice, ...], dtype: Any = None) -> np.ndarray:
    """Reads a slice of a parameter, such as the part of one device.

    Args:
        index: one slice per dimension of the parameter.
        dtype: of the result; None is the file's dtype.
    """
    lead = len(source.stack)
    inner = index[lead:][::-1] if source.transposed else index[lead:]
    if not lead:
        part = np.ascontiguousarray(files.read(source.names[0], inner))
        return part if dtype is None else part.astype(jnp.dtype(dtype), copy=False)
    names = np.array(source.names, object).reshape(source.stack)[index[:lead]]
    stack = None
    for at in np.ndindex(names.shape):
        tensor = files.read(str(names[at]), inner)
        tensor = tensor.T if source.transposed else tensor
        if stack is None:
            stack = np.empty((*names.shape, *tensor.shape), tensor.dtype if dtype is None else jnp.dtype(dtype))
        stack[at] = tensor
    assert stack is not None, index
    return stack


def read_tensor(files: TensorFiles, source: TensorSource, number: int) -> np.ndarray:
    """Reads one tensor of a parameter in this model's (in, out) order and the file's dtype; `number` counts `source.names`."""
    tensor = files.read(source.names[number])
    return np.ascontiguousarray(tensor.T if source.transposed else tensor)
