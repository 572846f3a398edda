"""Hugging Face folders: weights in, weights out.

Enters: a folder or a hub id. Leaves: the folder, the `ModelSpec`, and any part of any parameter. `tensor_names` is the one
    table of names: reading is the table forwards, exporting (`export.py`) is it backwards. Only safetensors are read: a pickle
    never is. How the parts come onto devices is `loading.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.models.families import read_spec
from grpo_jax.models.spec import EXPERT_LINEARS, ModelError, ModelSpec, param_specs

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


MIXTRAL_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FUSED_EXPERTS = "experts.gate_up_proj"


def module_path(spec: ModelSpec, part: str, expert: int = 0) -> str:
    """Path of a module inside a layer, as Hugging Face names it: `q_proj` → `self_attn.q_proj`.

    Args:
        expert: which one, where `part` is a linear layer of experts.
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
    """Paths of all modules of that kind from the model's root, layer by layer and in a layer expert by expert."""
    experts = spec.experts if part in EXPERT_LINEARS and spec.experts else 1
    return [f"model.layers.{i}.{module_path(spec, part, expert)}" for i in range(spec.layers) for expert in range(experts)]


@dataclass(frozen=True)
class Source:
    """Where a parameter is in a checkpoint.

    Attributes:
        names: tensor names; one per layer for a stacked parameter, else one; one per layer and expert, in that order, for experts.
        transposed: Hugging Face keeps (out, in), this model (in, out).
        stack: leading dimensions of the parameter over which its tensors are stacked: (), (L,) or (L, E).
    """

    names: tuple[str, ...]
    transposed: bool
    stack: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the parameter is that of several layers."""
        return bool(self.stack)

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name, and where in the parameter it goes."""
        return zip(self.names, np.ndindex(self.stack), strict=True)


def tensor_names(spec: ModelSpec) -> dict[tuple[str, ...], Source]:
    """The table: path of a parameter → its tensors."""
    table: dict[tuple[str, ...], Source] = {}
    for path in param_specs(spec):
        if path[0] == "layers":
            leaf = "bias" if path[2] == "bias" else "weight"
            names = tuple(f"{module}.{leaf}" for module in module_paths(spec, path[1]))
            table[path] = Source(names, path[2] == "kernel", spec.stack(path[1])[0])
        else:
            top = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
            table[path] = Source((top[path[0]],), False, ())
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
    fused = next((name for name in unused if name.endswith(FUSED_EXPERTS)), None)
    if fused is not None:
        raise ModelError(
            f"{folder}: tensor {fused} holds all experts in one; only one tensor an expert is read: load the folder in "
            "transformers and save it with save_pretrained(..., save_original_format=True)"
        )
    specs = param_specs(spec)
    for path, source in tensor_names(spec).items():
        want = specs[path].shape[len(source.stack) :]
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


def read_slice(
    files: TensorFiles, source: Source, shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any = None
) -> np.ndarray:
    """The part of a parameter that one device asks for.

    Args:
        shape: of the parameter.
        index: of the part, one slice a dimension.
        dtype: of the result; None is the file's own.
    """
    lead = len(source.stack)
    inner = index[lead:][::-1] if source.transposed else index[lead:]
    if not lead:
        whole = np.ascontiguousarray(files.read(source.names[0], inner))
        return whole if dtype is None else whole.astype(jnp.dtype(dtype), copy=False)
    names = np.array(source.names, object).reshape(source.stack)[index[:lead]]
    part = None
    for place in np.ndindex(names.shape):
        tensor = files.read(str(names[place]), inner)
        tensor = tensor.T if source.transposed else tensor
        if part is None:
            part = np.empty((*names.shape, *tensor.shape), tensor.dtype if dtype is None else jnp.dtype(dtype))
        part[place] = tensor
    assert part is not None, shape
    return part
