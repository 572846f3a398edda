"""LoRA adapters: initial values, and reading and writing PEFT's folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import golden_config, moved
from safetensors.numpy import load_file, save_file

from goldens.folders import ADAPTERS, build_adapter_folder, read_shapes
from goldens.weights import tensor
from grpo_jax.config import LoraConfig
from grpo_jax.models.families import read_spec
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.weights.lora import init_lora, load_adapter, save_adapter

ADAPTER = "llama3_all_linear"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def spec_of(family: str, **change: Any) -> ModelSpec:
    return read_spec(golden_config(family) | change)


def test_initial_adapters_have_pefts_distribution() -> None:
    """A uniform within ±1/√in, B zero: the policy starts as the base."""
    spec = spec_of("qwen3")
    adapters = init_lora(spec, LoraConfig(rank=64), jax.random.key(0))["layers"]
    assert set(adapters) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, (rows, columns) in spec.linear_shapes().items():
        a, b = np.asarray(adapters[name]["a"]), np.asarray(adapters[name]["b"])
        assert (a.shape, b.shape) == ((2, rows, 64), (2, 64, columns))
        assert (a.dtype, b.dtype) == (np.float32, np.float32)
        assert np.all(b == 0)
        bound = rows**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(adapters["gate_proj"]["a"], adapters["up_proj"]["a"])


def test_the_key_fixes_initial_adapters() -> None:
    spec, lora = spec_of("qwen3"), LoraConfig(rank=2, targets=["q_proj"])
    one, same, other = (init_lora(spec, lora, jax.random.key(seed)) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(one["layers"]["q_proj"]["a"], other["layers"]["q_proj"]["a"])


def test_only_the_targets_get_adapters() -> None:
    adapters = init_lora(spec_of("qwen3"), LoraConfig(rank=2, targets=["v_proj", "down_proj"]), jax.random.key(0))
    assert set(adapters["layers"]) == {"v_proj", "down_proj"}


@pytest.mark.parametrize(
    "lora", [LoraConfig(rank=4, alpha=8.0), LoraConfig(rank=3, alpha=8.5, rslora=True, targets=["v_proj", "o_proj"])]
)
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_loading_returns_what_was_saved(tmp_path: Path, family: str, lora: LoraConfig) -> None:
    spec = spec_of(family)
    adapters = moved(init_lora(spec, lora, jax.random.key(0)), 1, 0.3)
    save_adapter(tmp_path / "new" / "adapter", spec, adapters, lora, "owner/base")
    again, read = load_adapter(tmp_path / "new" / "adapter", spec)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapters))
    assert (read.rank, read.alpha, read.rslora, set(read.target_names)) == (
        lora.rank,
        lora.alpha,
        lora.rslora,
        set(adapters["layers"]),
    )
    assert read.scale == lora.scale
    assert read.adapter == str(tmp_path / "new" / "adapter")


def test_the_saved_folder_has_pefts_settings_and_names(tmp_path: Path) -> None:
    spec, lora = spec_of("qwen2"), LoraConfig(rank=4, alpha=8.0, targets=["v_proj", "down_proj"])
    save_adapter(tmp_path, spec, init_lora(spec, lora, jax.random.key(0)), lora, "owner/base")
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "digests.json"]
    config = json.loads((tmp_path / CONFIG).read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "r": 4, "lora_alpha": 8,
        "use_rslora": False, "target_modules": ["down_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0,
        "modules_to_save": None, "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    assert config == expected
    shapes = {name: array.shape for name, array in load_file(tmp_path / WEIGHTS).items()}
    at = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    assert shapes == {
        at.format(layer, module, leaf): shape
        for layer in range(2)
        for module, rows, columns in (("self_attn.v_proj", 32, 16), ("mlp.down_proj", 48, 32))
        for leaf, shape in (("A", (4, rows)), ("B", (columns, 4)))
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loading_and_saving_a_peft_adapter_changes_nothing(tmp_path: Path, adapter: str) -> None:
    """Names and shapes are those that PEFT wrote."""
    folder, spec = build_adapter_folder(tmp_path, adapter), spec_of(ADAPTERS[adapter])
    adapters, lora = load_adapter(folder, spec)
    save_adapter(tmp_path / "out", spec, adapters, lora, "")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {name: array.shape for name, array in written.items()} == read_shapes(f"adapters/{adapter}")
    for name, array in written.items():
        assert np.array_equal(array, tensor(name, array.shape)), name
    theirs, ours = (json.loads((where / CONFIG).read_text()) for where in (folder, tmp_path / "out"))
    for name in ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out"):
        assert ours[name] == theirs[name], name
    assert set(ours["target_modules"]) == {name.split(".")[-3] for name in written}


def test_a_bfloat16_adapter_is_trained_in_float32(tmp_path: Path) -> None:
    folder = build_adapter_folder(tmp_path, ADAPTER)
    tensors = {name: array.astype(jnp.bfloat16) for name, array in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    adapters, _ = load_adapter(folder, spec_of("llama3_scaled"))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert np.array_equal(adapters["layers"]["q_proj"]["a"][0], tensors[FIRST].astype(np.float32).T)


def edit(folder: Path, **change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS)


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "DoRA": (lambda f: edit(f, use_dora=True), {}, "use_dora = true is not supported"),
    "trained biases": (lambda f: edit(f, bias="all"), {}, "bias = 'all' is not supported"),
    "ranks by layer": (lambda f: edit(f, rank_pattern={"q_proj": 8}), {}, "rank_pattern"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), {}, r"modules_to_save = \['lm_head'\]"),
    "another method": (lambda f: edit(f, peft_type="IA3"), {}, "peft_type 'IA3' is not supported; supported: 'LORA'"),
    "an initialisation that changed the base": (
        lambda f: edit(f, init_lora_weights="pissa_niter_4"),
        {},
        "'pissa_niter_4' changed the base",
    ),
    "no rank": (lambda f: edit(f, r=None), {}, "r is null: use a whole number from 1 to 65,536"),
    "no alpha": (lambda f: edit(f, lora_alpha="big"), {}, "lora_alpha is 'big': use a number"),
    "another rank": (lambda f: edit(f, r=8), {}, r"q_proj\.lora_A\.weight has shape \(4, 32\).*rank 8 ask for \(8, 32\)"),
    "no config": (lambda f: (f / CONFIG).unlink(), {}, "adapter_config.json is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), {}, "adapter_model.safetensors is missing"),
    "only a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), {}, "adapter_model.safetensors is missing"),
    "broken weights": (lambda f: (f / WEIGHTS).write_bytes(b"\x00" * 40), {}, r"adapter_model\.safetensors is broken"),
    "a missing tensor": (lambda f: drop(f, FIRST), {}, f"tensor {FIRST} is missing"),
    "no adapter": (lambda f: save_file({}, f / WEIGHTS), {}, "holds no adapter"),
    "a deeper model": (lambda f: None, {"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj.*3-layer model"),
    "a shallower model": (lambda f: None, {"num_hidden_layers": 1}, r"14 tensors do not belong.*layers\.1\."),
    "a wider model": (lambda f: None, {"hidden_size": 64, "head_dim": 8}, r"q_proj\.lora_A\.weight has shape \(4, 32\).*\(4, 64\)"),
    "adapted embeddings": (
        lambda f: save_file(
            load_file(f / WEIGHTS) | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}, f / WEIGHTS
        ),
        {},
        r"1 tensors do not belong to this llama model: base_model\.model\.lm_head\.lora_A\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, change, message = REFUSED[case]
    folder = build_adapter_folder(tmp_path, ADAPTER)
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_adapter(folder, spec_of("llama3_scaled", **change))


def test_initialisations_that_do_not_change_the_base_are_accepted(tmp_path: Path) -> None:
    for method in (True, False, "gaussian", "eva", "orthogonal"):
        folder = build_adapter_folder(tmp_path / str(method), ADAPTER)
        edit(folder, init_lora_weights=method, lora_dropout=0.1, some_new_setting_of_peft=None)
        load_adapter(folder, spec_of("llama3_scaled"))


def test_an_adapter_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, spec = build_adapter_folder(tmp_path, ADAPTER), spec_of(ADAPTERS[ADAPTER])
    asked: list[tuple[str, Any]] = []

    def download(path: str, **options: Any) -> str:
        asked.append((path, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapters, lora = load_adapter("owner/adapter", spec)
    assert asked == [("owner/adapter", ["adapter_config.json", "adapter_model.safetensors", "digests.json"])]
    assert lora.adapter == "owner/adapter"
    local, _ = load_adapter(folder, spec)
    jax.tree.map(np.testing.assert_array_equal, adapters, local)
    with pytest.raises(ModelError, match=r"lora\.adapter: './nothing' is not a folder"):
        load_adapter("./nothing", spec)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_and_infinity_in_an_adapter_are_found_while_reading(tmp_path: Path, value: float) -> None:
    folder = build_adapter_folder(tmp_path, ADAPTER)
    tensors = load_file(folder / WEIGHTS)
    tensors[FIRST][1, 1] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: tensor {FIRST} contains NaN or infinity"):
        load_adapter(folder, spec_of("llama3_scaled"))
