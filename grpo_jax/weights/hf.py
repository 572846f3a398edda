"""Reads Hugging Face model folders: finds or downloads the folder, maps tensor names to parameters, reads parts of parameters.

`tensor_names` is the only table of names; loading uses it in one direction and `export.py` in the other. Only safetensors are read,
no pickles. `loading.py` puts what is read onto devices.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.checks import show
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import param_specs
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.untrusted_json import JsonError, located, read_json_file
from grpo_jax.weights.finite import all_finite
from grpo_jax.weights.mxfp4 import BLOCKS, SCALES, dequantize_mxfp4
from grpo_jax.weights.names import TensorSource, not_loaded, present_name, tensor_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[\w.+=@ -]{1,200}\.safetensors")
TIED_ROWS = 64
"""Rows that are compared of an embedding and a head that should be the same."""
FLOATING = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights may have; others are quantised values, whose scales are elsewhere."""
# Names of constants that old checkpoints store next to the weights; they are computed from config.json instead.
CONSTANTS = ("rotary_emb.inv_freq", "self_attn.masked_bias")


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
    """The open safetensors files of a folder, read by slices. Weights in MXFP4 are read like dense ones.

    Attributes:
        files: tensor name → file name; an MXFP4 weight has one name.
        names: the name in the files of each tensor, which may be an older one (`names.present_name`).
        stored: the files of what MXFP4 weights are stored as.
        packed: names of the MXFP4 weights.

    Raises:
        ModelError: a shard is missing or broken, or does not contain a tensor that the index names.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder, self.files = folder, weight_map(folder)
        self.stored: dict[str, str] = self.files
        self._stack = contextlib.ExitStack()
        self._shards = {
            name: self._stack.enter_context(open_shard(folder / name, safe_open)) for name in sorted(set(self.files.values()))
        }
        held = {file: set(shard.keys()) for file, shard in self._shards.items()}
        for name, file in self.files.items():
            if name not in held[file]:
                self._stack.close()
                raise ModelError(f"{folder / file} does not hold {name}, though {INDEX} says so; download the folder again")

        self.names = {present_name(name): name for name in self.files}
        self.files = {present_name(name): file for name, file in self.files.items()}
        self.packed = {name.removesuffix(BLOCKS) for name in self.files if name.endswith(BLOCKS)}
        for name in self.packed:
            self.check_packed(name)
            self.files[name] = self.files[f"{name}{BLOCKS}"]
        self.stored = self.files
        hidden = {f"{name}{ending}" for name in self.packed for ending in (BLOCKS, SCALES)}
        self.files = {name: file for name, file in self.files.items() if name not in hidden}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; ModelError where it is no tensor of floating-point numbers."""
        if name in self.packed:
            experts, outputs, groups, pairs = self.part(name, BLOCKS).get_shape()
            return (experts, 2 * groups * pairs, outputs)
        return shape_of(self.folder / self.files[name], self._shards[self.files[name]], self.names[name])

    def part(self, name: str, ending: str) -> Any:
        """The slice of one of the two tensors of an MXFP4 weight."""
        return self._shards[self.stored[f"{name}{ending}"]].get_slice(f"{name}{ending}")

    def check_packed(self, name: str) -> None:
        """Raises ModelError unless blocks and scales of an MXFP4 weight are there and fit."""
        if f"{name}{SCALES}" not in self.stored:
            raise ModelError(f"{self.folder}: tensor {name}{SCALES} is missing, the scales of {name}{BLOCKS}")
        blocks, scales = self.part(name, BLOCKS), self.part(name, SCALES)
        shapes = list(blocks.get_shape()), list(scales.get_shape())
        if (
            len(shapes[0]) != 4
            or shapes[0][:3] != shapes[1]
            or shapes[0][3] != 16
            or (blocks.get_dtype(), scales.get_dtype()) != ("U8", "U8")
        ):
            raise ModelError(
                f"{self.folder}: {name}{BLOCKS} {shapes[0]} and {name}{SCALES} {shapes[1]} are not MXFP4: [E, O, I/32, 16] bytes"
            )

    def read_packed(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads part of an MXFP4 weight [E, I, O], dequantised to bfloat16, one expert after the other."""
        experts, rows, outputs = (part.indices(size) for part, size in zip(index, self.shape(name), strict=True))
        first, end, step = outputs
        parts = []
        for expert in range(*experts):
            blocks, scales = (self.part(name, ending)[expert : expert + 1, first:end][0] for ending in (BLOCKS, SCALES))
            parts.append(dequantize_mxfp4(blocks[::step], scales[::step])[:, slice(*rows)].T)
        empty = np.zeros((0, len(range(*rows)), len(range(*outputs))), jnp.bfloat16)
        return np.stack(parts) if parts else empty

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads part of a tensor, or all of it; ModelError where it contains NaN or infinity."""
        index = tuple(slice(None) for _ in self.shape(name)) if index is None else index
        if name in self.packed:
            return self.read_packed(name, index)
        # safetensors reads slices without steps.
        values = self._shards[self.files[name]].get_slice(self.names[name])[tuple(slice(part.start, part.stop) for part in index)]
        values = values[tuple(slice(None, None, part.step) for part in index)]
        require_finite(self.folder / self.files[name], name, values)
        return values


def check_tensors(folder: Path, spec: ModelSpec, files: TensorFiles, others: Collection[str] = ()) -> None:
    """Raises ModelError unless the tensors of the files, with their shapes, are exactly those of the model's parameters.

    Args:
        others: names of tensors that are allowed in addition.
    """
    unused, used = set(files.files) - set(others), set[str]()
    specs = param_specs(spec)
    for path, source in tensor_names(spec, files.files).items():
        expected = source.shape_of(specs[path].shape)
        for name in source.names:
            if name not in unused | used:
                raise ModelError(f"{folder}: tensor {name} is missing")
            unused.discard(name)
            used.add(name)
            if files.shape(name) != expected:
                raise ModelError(f"{folder}: tensor {name} has shape {files.shape(name)}; config.json asks for {expected}")
    if spec.tied and "lm_head.weight" in unused:
        unused.discard("lm_head.weight")
        check_tied(folder, spec, files)
    left = sorted(name for name in unused if not name.endswith(CONSTANTS) and not not_loaded(spec, name))
    if left:
        raise ModelError(
            f"{folder}: {len(left)} tensors are not part of the {spec.family} model in config.json: {', '.join(left[:5])}"
        )


def check_tied(folder: Path, spec: ModelSpec, files: TensorFiles) -> None:
    """Raises ModelError where the files have a head of its own, though config.json says that it is the embedding."""
    (embedding,), first = tensor_names(spec)["embed", "embedding"].names, (slice(0, TIED_ROWS), slice(None))
    if files.shape(embedding) != files.shape("lm_head.weight") or not np.array_equal(
        files.read(embedding, first), files.read("lm_head.weight", first)
    ):
        raise ModelError(
            f"{folder}: by tie_word_embeddings the head is the embedding, but lm_head.weight has other values; if the "
            "model was trained with a head of its own, write tie_word_embeddings: false into config.json"
        )


def read_slice(files: TensorFiles, source: TensorSource, index: tuple[slice, ...], dtype: Any = None) -> np.ndarray:
    """Reads a slice of a parameter, such as the part of one device.

    Args:
        index: one slice per dimension of the parameter.
        dtype: of the result; None is the file's dtype.
    """
    lead = len(source.named)

    def part(name: str) -> np.ndarray:
        values = files.read(name, source.index_of(index[lead:]))
        return np.swapaxes(values, -1, -2) if source.transposed else values

    if not lead:
        values = np.ascontiguousarray(part(source.names[0]))
        return values if dtype is None else values.astype(jnp.dtype(dtype), copy=False)
    names = np.array(source.names, object).reshape(source.named)[index[:lead]]
    stack = None
    for at in np.ndindex(names.shape):
        tensor = part(str(names[at]))
        if stack is None:
            stack = np.empty((*names.shape, *tensor.shape), tensor.dtype if dtype is None else jnp.dtype(dtype))
        stack[at] = tensor
    assert stack is not None, index
    return stack


def read_tensor(files: TensorFiles, source: TensorSource, number: int) -> np.ndarray:
    """Reads one matrix or vector of a parameter, as (in, out) and in the file's dtype; `number` counts over the stack."""
    index = tuple(slice(i, i + 1) for i in np.unravel_index(number, source.stack)) if source.stack else ()
    name = source.names[
        int(np.ravel_multi_index([i.start for i in index[: len(source.named)]], source.named)) if source.named else 0
    ]
    held = index[len(source.named) :]
    tensor = files.read(name, source.index_of((*held, *(slice(None) for _ in files.shape(name)[len(held) :]))))
    tensor = tensor.reshape(tensor.shape[len(held) :])
    return np.ascontiguousarray(tensor.T if source.transposed else tensor)
