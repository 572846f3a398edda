"""Model folders: values of loaded parameters, messages of refusals, downloads, and memory of the host while loading."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from goldens.folders import build_model_folder, model_tensors
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import flatten, init_params, param_specs
from grpo_jax.models.spec import ModelError
from grpo_jax.weights.finite import all_finite
from grpo_jax.weights.hf import INDEX, WEIGHTS, find_model, read_folder_spec, tensor_names
from grpo_jax.weights.loading import load_params

BROKEN_TENSOR = "model.layers.1.mlp.up_proj.weight"


def load(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    return load_params(folder, read_folder_spec(folder), jnp.dtype(dtype))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a single-file folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_every_tensor_becomes_its_parameter(tmp_path: Path, family: str) -> None:
    params = load(build_model_folder(tmp_path, family))
    tensors = model_tensors(family)
    layers = params["layers"]
    for number in range(layers["q_proj"]["kernel"].shape[0]):
        for block, names in {"self_attn": "q_proj k_proj v_proj o_proj", "mlp": "gate_proj up_proj down_proj"}.items():
            for name in names.split():
                expected = tensors[f"model.layers.{number}.{block}.{name}.weight"].T
                assert np.array_equal(layers[name]["kernel"][number], expected), name
    if family == "qwen2":
        assert np.array_equal(layers["k_proj"]["bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"])
        assert np.array_equal(layers["ffw_norm"]["scale"][1], tensors["model.layers.1.post_attention_layernorm.weight"])
    else:
        assert np.array_equal(layers["post_attn_norm"]["scale"][1], tensors["model.layers.1.post_attention_layernorm.weight"])
        assert np.array_equal(layers["ffw_norm"]["scale"][1], tensors["model.layers.1.pre_feedforward_layernorm.weight"])
    assert np.array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])


def test_names_cover_every_parameter_once(tmp_path: Path) -> None:
    spec = read_folder_spec(build_model_folder(tmp_path, "llama2"))
    names = [name for source in tensor_names(spec).values() for name in source.names]
    assert tensor_names(spec).keys() == param_specs(spec).keys()
    assert sorted(names) == sorted(model_tensors("llama2"))


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    one, several = load(build_model_folder(tmp_path / "a", "qwen3")), load(build_model_folder(tmp_path / "b", "qwen3", shards=3))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, several))


def test_bfloat16_on_disk_and_on_the_device(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    rewrite(folder, lambda tensors: tensors.update({n: t.astype(jnp.bfloat16) for n, t in tensors.items()}))
    wide, narrow = load(folder, "float32"), load(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b, np.float32)), wide, narrow))


def test_a_tied_model_may_store_its_head_and_old_constants(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "qwen2")
    plain = load(folder)
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, load(folder), plain))


def test_other_safetensors_next_to_the_model_are_ignored(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    (folder / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    load(folder)


def test_progress_is_reported_per_parameter(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    spec = read_folder_spec(folder)
    calls: list[tuple[int, int]] = []
    load_params(folder, spec, jnp.float32, on_tensor=lambda done, of: calls.append((done, of)))
    count = len(param_specs(spec))
    assert calls == [(n, count) for n in range(1, count + 1)]


def truncate(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def edit_json(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def drop_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(BROKEN_TENSOR))


def misplace(folder: Path, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][BROKEN_TENSOR] = file
    (folder / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[int, Callable[[Path], Any], str]] = {
    "a missing config": (1, lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "a config that is not JSON": (1, lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "a config that is a list": (1, lambda f: (f / "config.json").write_text("[]"), r"config\.json holds list"),
    "an unknown family": (1, lambda f: edit_json(f / "config.json", model_type="mamba"), r"config\.json: model_type 'mamba'"),
    "an unknown attribute": (
        1,
        lambda f: edit_json(f / "config.json", rms_norm_epss=1),
        "rms_norm_epss.*did you mean rms_norm_eps",
    ),
    "an unsupported rope": (
        1,
        lambda f: edit_json(f / "config.json", rope_scaling={"type": "yarn"}, rope_parameters=None),
        "'yarn'",
    ),
    "a missing file": (1, lambda f: (f / WEIGHTS).unlink(), r"needs model\.safetensors.*found \[\]"),
    "only pickles": (
        1,
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        r"only pytorch_model\.bin.*pickles are never read",
    ),
    "a truncated file": (1, lambda f: truncate(f / WEIGHTS, 0.7), r"model\.safetensors is broken.*download it again"),
    "an empty file": (1, lambda f: truncate(f / WEIGHTS, 0), r"model\.safetensors is broken"),
    "a missing tensor": (1, drop_tensor, f"tensor {BROKEN_TENSOR} is missing"),
    "an extra tensor": (1, lambda f: rewrite(f, lambda t: t.update(extra=np.ones(2, np.float32))), "1 tensors.*llama.*extra"),
    "a tensor of the wrong shape": (
        1,
        lambda f: rewrite(f, lambda t: t.update({BROKEN_TENSOR: t[BROKEN_TENSOR].T.copy()})),
        rf"tensor {BROKEN_TENSOR} has shape \(32, 48\); config.json asks for \(48, 32\)",
    ),
    "another vocabulary": (1, lambda f: edit_json(f / "config.json", vocab_size=98), r"embed_tokens.*\(97, 32\).*\(98, 32\)"),
    "a missing shard": (3, lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"00002-of-00003\.safetensors is missing"),
    "a truncated shard": (
        3,
        lambda f: truncate(f / "model-00002-of-00003.safetensors", 0.5),
        r"00002-of-00003\.safetensors is broken",
    ),
    "an index without a map": (3, lambda f: (f / INDEX).write_text("{}"), r"index\.json has no weight_map"),
    "an index that is wrong": (3, lambda f: misplace(f, "model-00001-of-00003.safetensors"), f"does not hold {BROKEN_TENSOR}"),
    "an index that leaves the folder": (3, lambda f: misplace(f, "../model.safetensors"), "another folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, case: str) -> None:
    shards, spoil, message = BROKEN[case]
    folder = build_model_folder(tmp_path, "llama2", shards=shards)
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_not_read_even_next_to_safetensors(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "unpickled")))
    load(folder)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("path", "message"), [("./nowhere", "not a folder"), ("/nowhere/at/all", "not a folder"), ("justaname", "owner/name")]
)
def test_a_path_that_is_neither_folder_nor_hub_id(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.path: '{path}'.*{message}"):
        find_model(path)


def hub_error(kind: str) -> Exception:
    """An error of huggingface_hub."""
    from huggingface_hub import errors

    response: Any = SimpleNamespace(headers={}, request=None)
    return {
        "gated": lambda: errors.GatedRepoError("Access to model owner/model is restricted", response=response),
        "missing": lambda: errors.RepositoryNotFoundError("404", response=response),
        "revision": lambda: errors.RevisionNotFoundError("404", response=response),
        "offline": lambda: errors.LocalEntryNotFoundError("no connection"),
        "timeout": lambda: OSError("timed out"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gated", "'owner/model'.*licence.*Accept it.*hf auth login.*HF_TOKEN"),
        ("missing", "no public hub repository 'owner/model'.*hf auth login"),
        ("revision", "model.revision: 'v9'.*'owner/model'"),
        ("offline", "'owner/model'.*hub could not be reached.*no connection"),
        ("timeout", "'owner/model'.*hub could not be reached.*timed out"),
    ],
)
def test_errors_of_the_hub_name_the_fix(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> Any:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        find_model("owner/model", "v9")


def test_a_hub_id_is_downloaded_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, Any]] = []

    def download(path: str, **options: Any) -> str:
        asked.append({"path": path} | options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/model", "v1") == tmp_path
    (options,) = asked
    assert (options["path"], options["revision"]) == ("owner/model", "v1")
    included = [
        "config.json",
        "model-00001-of-00002.safetensors",
        INDEX,
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    excluded = [
        "pytorch_model.bin",
        "modeling.py",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
        "consolidated.safetensors",
    ]
    patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
    assert list(filter_repo_objects(included + excluded, **patterns)) == included


def large_folder(folder: Path) -> tuple[Path, int]:
    """Writes a model of 30 MB in twelve layers; returns its folder and the bytes of its weights."""
    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    spec = read_spec(config)
    params = dict(flatten(init_params(spec, jax.random.key(0), jnp.float32)))
    tensors: dict[str, np.ndarray] = {}
    for path, source in tensor_names(spec).items():
        values = np.asarray(params[path])
        for number, name in enumerate(source.names):
            one = values[number] if source.stack else values
            tensors[name] = np.ascontiguousarray(one.T if source.transposed else one)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder, sum(t.nbytes for t in tensors.values())


def test_loading_never_has_a_second_copy_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device array is made from its own reads; NumPy's peak memory is far below the model's size."""
    folder, total = large_folder(tmp_path / "large")
    assert total > 30e6
    asked: list[tuple[int, ...]] = []
    make = jax.make_array_from_callback

    def copied(shape: Any, sharding: Any, read: Any) -> jax.Array:
        """On a CPU a device array may share NumPy's memory: it is copied, as for any other device."""
        asked.append(shape)
        return jnp.array(make(shape, sharding, read), copy=True).block_until_ready()

    monkeypatch.setattr(jax, "make_array_from_callback", copied)
    spec = read_folder_spec(folder)
    load_params(folder, spec, jnp.float32)  # compiles the copies
    asked.clear()
    tracemalloc.start()
    load_params(folder, spec, jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A stacked parameter of over 4 MiB is read layer by layer: no array of all its layers is ever on the host.
    large = {path for path, p in param_specs(spec).items() if path[0] == "layers" and 4 * math.prod(p.shape) > 2**22}
    assert large
    layers = [p.shape[1:] for path, p in param_specs(spec).items() if path in large for _ in range(spec.layers)]
    assert sorted(asked) == sorted(layers + [p.shape for path, p in param_specs(spec).items() if path not in large])
    largest = 4 * max(math.prod(shape) for shape in asked)
    assert peak < 2.5 * largest < 0.5 * total  # one that is read, one that JAX has not freed yet


def test_slices_of_a_parameter_match_the_full_one(tmp_path: Path) -> None:
    """A sharding asks for slices, here of a transposed, stacked parameter."""
    from grpo_jax.weights.hf import TensorFiles, read_slice

    folder = build_model_folder(tmp_path, "llama2")
    spec = read_folder_spec(folder)
    full = load(folder)["layers"]["up_proj"]["kernel"]
    path = ("layers", "up_proj", "kernel")
    with TensorFiles(folder) as files:
        for index in (
            (slice(None), slice(8, 16), slice(None)),
            (slice(1, 2), slice(None), slice(0, 24)),
            (slice(0, 2), slice(16, 32), slice(24, 48)),
        ):
            part = read_slice(files, tensor_names(spec)[path], index, jnp.float32)
            assert np.array_equal(part, full[index])


def test_a_folder_may_be_removed_after_loading(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    params = load(folder)
    before = np.asarray(params["embed"]["embedding"]).copy()
    shutil.rmtree(folder)
    assert np.array_equal(params["embed"]["embedding"], before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_while_reading(tmp_path: Path, dtype: str, value: float) -> None:
    folder = build_model_folder(tmp_path, "llama2")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
        tensors[BROKEN_TENSOR][3, 5] = value

    rewrite(folder, change)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {BROKEN_TENSOR} contains NaN or infinity"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_finite_values_are_told_from_others_in_every_format(dtype: str) -> None:
    """Every pattern of 16 bits, and those of the wider formats with the same first 16 bits; NumPy judges after widening."""
    size = jnp.dtype(dtype).itemsize
    patterns = np.arange(2 ** min(16, 8 * size), dtype=np.uint64) << np.uint64(8 * size - min(16, 8 * size))
    values = patterns.astype(f"uint{8 * size}").view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
        expected = np.isfinite(values.astype(np.float64)).tolist()
    assert [all_finite(values[i : i + 1]) for i in range(values.size)] == expected
    long = np.zeros(600_000, jnp.dtype(dtype))
    assert all_finite(long)
    if not all(expected):
        long[555_555] = values[expected.index(False)]
        assert not all_finite(long.reshape(600, 1000).T)
