"""Mixture of experts: router and products against loops over tokens in NumPy, gradients against float64, meshes of eight devices.

Every form of the products is compared with the same oracle. Log-probabilities, sampling and both spellings of config.json are
tested with those of the other families.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import LORA, array_sizes, golden_config, log_softmax, moved, quick_compiling, with_random_adapters
from safetensors.numpy import load_file, save_file

from goldens.folders import build_model_folder, read_golden
from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.models import moe
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import param_specs
from grpo_jax.models.spec import EXPERT_LINEARS, ModelError, ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.weights.hf import read_folder_spec
from grpo_jax.weights.loading import load_params
from grpo_jax.weights.lora import init_lora, load_adapter, save_adapter
from grpo_jax.weights.quantize import quantize_params
from grpo_kernels import QuantizedWeight, dequantize, quantize

MOE = ("mixtral", "qwen3_moe")
SPEC = read_spec(golden_config("qwen3_moe"))
FORMS = ("dense", "ragged", "tiled")
Leaves = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def random_layer(spec: ModelSpec, rank: int = 0, seed: int = 0) -> Leaves:
    """Random router and experts of one layer, scaled so that activations are near 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    layer: Leaves = {"router": {"kernel": 2 * normal(spec.width, spec.experts)}}
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows, columns = spec.linear_shapes()[name]
        layer[name] = {"kernel": normal(spec.experts, rows, columns)}
        if rank:
            layer[name] |= {"a": normal(spec.experts, rows, rank), "b": 0.3 * normal(spec.experts, rank, columns)}
    return layer


def output(spec: ModelSpec, x: Any, layer: Leaves, scale: float) -> jax.Array:
    """What the experts compute of some tokens [N, D]."""
    return moe.mix_experts(spec, x[None], layer, scale)[0][0]


def loop_over_tokens(spec: ModelSpec, x: np.ndarray, layer: Leaves, scale: float) -> np.ndarray:
    """The oracle: [N, D] in float64, token by token and expert by expert."""
    wide = {name: {leaf: np.asarray(w, np.float64) for leaf, w in leaves.items()} for name, leaves in layer.items()}
    out = np.zeros(x.shape)
    for token, row in enumerate(np.asarray(x, np.float64)):
        p = np.exp(log_softmax(row @ wide["router"]["kernel"]))
        selected = np.argsort(-p, kind="stable")[: spec.experts_per_token]
        total = p[selected].sum() if spec.norm_topk_prob else 1.0
        for e in selected:
            weight = {
                name: leaves["kernel"][e] + (scale * leaves["a"][e] @ leaves["b"][e] if "a" in leaves else 0.0)
                for name, leaves in wide.items()
                if name != "router"
            }
            gate = row @ weight["gate_proj"]
            out[token] += p[e] / total * ((gate / (1 + np.exp(-gate)) * (row @ weight["up_proj"])) @ weight["down_proj"])
    return out


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets one form of the products, and small blocks, so that there are several."""
    monkeypatch.setattr(moe, "choose_form", lambda *_, **__: request.param)
    monkeypatch.setattr(moe, "BLOCK_ELEMENTS", 2 * SPEC.width * SPEC.ffw)
    return request.param


def tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, SPEC.width)).astype(np.float32)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_is_the_top_k_of_a_softmax_over_all_experts(normalised: bool) -> None:
    x, router = tokens(40), random_layer(SPEC)["router"]["kernel"]
    weights, routing = moe.route(jnp.asarray(x), jnp.asarray(router), 3, normalised=normalised)
    selected = routing.used
    assert weights.dtype == jnp.float32
    p = np.exp(log_softmax(x.astype(np.float64) @ router.astype(np.float64)))
    expected = np.argsort(-p, axis=-1)[:, :3]
    np.testing.assert_array_equal(np.asarray(selected), expected)
    likely = np.take_along_axis(p, expected, axis=-1)
    likely = likely / likely.sum(axis=-1, keepdims=True) if normalised else likely
    np.testing.assert_allclose(weights, likely, rtol=1e-5)


def test_a_bfloat16_router_accumulates_in_float32() -> None:
    """In bfloat16 the logits would tie: 256 + 1 is 256."""
    x, router = np.ones((1, 257), np.float32), np.ones((257, 2), np.float32)
    router[-1] = [0.0, 1.0]
    weights, routing = moe.route(jnp.asarray(x, jnp.bfloat16), jnp.asarray(router, jnp.bfloat16), 1, normalised=False)
    selected = routing.used
    assert int(selected[0, 0]) == 1
    assert float(weights[0, 0]) == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-5)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(("count", "normalised", "rank"), [(50, True, 0), (50, False, 2), (1, True, 2)])
def test_a_layer_is_the_weighted_sum_of_each_tokens_experts(form: str, count: int, normalised: bool, rank: int) -> None:
    spec = dataclasses.replace(SPEC, norm_topk_prob=normalised)
    x, layer = tokens(count), random_layer(spec, rank)
    got = jax.jit(lambda x, layer: output(spec, x, layer, 2.0))(x, layer)
    np.testing.assert_allclose(got, loop_over_tokens(spec, x, layer, 2.0), rtol=0, atol=2e-5)


def routed_to(layer: Leaves, experts: list[int], count: int) -> tuple[Leaves, np.ndarray]:
    """Tokens, and a router that sends all of them to the same experts."""
    x = tokens(count)
    x[:, 0] = 10.0
    router = np.zeros_like(layer["router"]["kernel"])
    router[0, experts] = [3.0, 2.5, 2.0]
    return layer | {"router": {"kernel": router}}, x


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_no_token_is_dropped_where_some_experts_get_all_tokens_and_others_none(form: str) -> None:
    layer, x = routed_to(random_layer(SPEC, 2), [7, 2, 5], 45)
    got = jax.jit(lambda x, layer: output(SPEC, x, layer, 1.0))(x, layer)
    np.testing.assert_allclose(got, loop_over_tokens(SPEC, x, layer, 1.0), rtol=0, atol=2e-5 * 10)
    assert np.all(np.abs(np.asarray(got)).sum(axis=-1) > 0)


def dense_loss(spec: ModelSpec, x: Any, layer: Leaves, along: Any, scale: float) -> Any:
    """Sum of the output · along, with all experts of all tokens, in the dtype of the arguments."""
    p = jax.nn.softmax(x @ layer["router"]["kernel"], axis=-1)
    weights = jnp.where(p >= jnp.sort(p, axis=-1)[:, -spec.experts_per_token, None], p, jnp.zeros((), p.dtype))
    weights = weights / weights.sum(axis=-1, keepdims=True) if spec.norm_topk_prob else weights

    def linear(name: str, x: Any, e: int) -> Any:
        leaves = layer[name]
        return x @ leaves["kernel"][e] + scale * (x @ leaves["a"][e] @ leaves["b"][e])

    out = jnp.zeros_like(x)
    for e in range(spec.experts):
        gate = linear("gate_proj", x, e)
        out = out + weights[:, e, None] * linear("down_proj", gate * jax.nn.sigmoid(gate) * linear("up_proj", x, e), e)
    return jnp.sum(out * along)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_gradients_match_float64(form: str, routing: str) -> None:
    layer, x = random_layer(SPEC, 2), tokens(50)
    if routing == "skewed":
        layer, x = routed_to(layer, [7, 2, 5], 50)
    along = tokens(50, seed=9)

    def loss(x: Any, layer: Leaves) -> Any:
        return jnp.sum(output(SPEC, x, layer, 2.0) * along)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, layer)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, layer, along))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected = jax.jit(jax.grad(lambda x, layer: dense_loss(SPEC, x, layer, wide[2], 2.0), argnums=(0, 1)))(*wide[:2])
        expected = jax.tree.map(np.asarray, expected)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = np.linalg.norm(other)
        assert np.linalg.norm(np.asarray(one, np.float64) - other) < 2e-6 * scale + 1e-12, (jax.tree_util.keystr(path), scale)


@pytest.mark.parametrize("form", ["tiled"], indirect=True)
def test_no_array_grows_with_tokens_times_experts(form: str) -> None:
    """Forward and backward over 64 experts: no array is larger than the padded rows, which are twice the pairs here."""
    spec = dataclasses.replace(SPEC, experts=64)
    x, layer = tokens(512), random_layer(spec, 2)
    pairs = 512 * spec.experts_per_token

    def loss(x: Any, layer: Leaves) -> Any:
        return jnp.sum(output(spec, x, layer, 2.0))

    largest = array_sizes(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(x, layer).jaxpr)
    assert largest <= max(pairs + 64 * 32, 3 * pairs) * spec.width < 64 * pairs * spec.width / 10


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
def test_quantised_experts_compute_with_the_rounded_weights(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and gradients of x and of the adapters; blocks of two tiles."""
    spec = dataclasses.replace(SPEC, ffw=32)
    monkeypatch.setattr(moe, "BLOCK_ELEMENTS", 2 * spec.width * spec.ffw)
    x, layer, dense = tokens(30), random_layer(spec, 2), random_layer(spec, 2)
    for name in EXPERT_LINEARS:
        rounded = jax.jit(jax.vmap(lambda w: quantize(w, quantization)))(layer[name]["kernel"])
        layer[name]["kernel"], dense[name]["kernel"] = rounded, np.asarray(dequantize(rounded))
    along = tokens(30, seed=9)

    def loss(x: Any, adapters: Leaves, layer: Leaves) -> Any:
        return jnp.sum(output(spec, x, with_adapters(layer, adapters), 2.0) * along)

    got = jax.jit(lambda x, layer: output(spec, x, layer, 2.0))(x, layer)
    np.testing.assert_allclose(got, loop_over_tokens(spec, x, dense, 2.0), rtol=0, atol=2e-5)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    adapters = {name: {leaf: layer[name][leaf] for leaf in ("a", "b")} for name in EXPERT_LINEARS}
    for one, other in zip(*(jax.tree.leaves(gradient(x, adapters, own)) for own in (layer, dense)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def with_adapters(layer: Leaves, adapters: Leaves) -> Leaves:
    """The layer with other adapters."""
    return {name: leaves | adapters.get(name, {}) for name, leaves in layer.items()}


@pytest.mark.parametrize("family", MOE)
def test_loading_quantises_the_experts_and_not_the_router(family: str, tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, family)
    spec = read_folder_spec(folder)
    dense, read = load_params(folder, spec, jnp.float32), load_params(folder, spec, jnp.float32, quantization="int8")
    again = jax.jit(lambda params: quantize_params(spec, params, "int8"))(dense)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, read))
    for name in EXPERT_LINEARS:
        assert isinstance(read["layers"][name]["kernel"], QuantizedWeight)
        assert read["layers"][name]["kernel"].shape == param_specs(spec)["layers", name, "kernel"].shape
    assert np.array_equal(read["layers"]["router"]["kernel"], dense["layers"]["router"]["kernel"])


@pytest.mark.parametrize("quantization", ["int8"])
def test_sampled_and_scored_log_probabilities_of_a_quantised_mixture_match(quantization: str, tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "qwen3_moe")
    policy = with_random_adapters(Policy.from_pretrained(folder, lora=LORA, quantization=quantization))
    ((first, second),) = policy.generate([[7, 30, 9]], num_generations=2, max_completion_length=12, seed=3)
    scored = policy.logprobs([[7, 30, 9]] * 2, [first.ids, second.ids])
    for ours, theirs in zip((first.logprobs, second.logprobs), scored, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", MOE)
def test_every_expert_has_adapters_and_the_router_none(family: str, tmp_path: Path) -> None:
    """One pair of tensors per expert with PEFT's names for modules; reading gives back what was saved."""
    spec = read_spec(golden_config(family))
    adapters = moved(init_lora(spec, LORA, jax.random.key(0)), 1, 0.3)
    assert set(adapters["layers"]) == set(spec.linear_shapes())
    assert adapters["layers"]["down_proj"]["a"].shape == (2, spec.experts, spec.ffw, 4)
    bound = spec.ffw**-0.5
    fresh = np.abs(np.asarray(init_lora(spec, LORA, jax.random.key(0))["layers"]["down_proj"]["a"]))
    assert 0.9 * bound < fresh.max() <= bound
    save_adapter(tmp_path / "adapter", spec, adapters, LORA, "owner/base")
    again, read = load_adapter(tmp_path / "adapter", spec)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapters))
    assert set(read.target_names) == set(adapters["layers"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    experts = ["w1", "w2", "w3"] if family == "mixtral" else ["down_proj", "gate_proj", "up_proj"]
    assert sorted(config["target_modules"]) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", *experts])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    at = "block_sparse_moe.experts.3.w3" if family == "mixtral" else "mlp.experts.3.up_proj"
    name = f"base_model.model.model.layers.1.{at}.lora_B.weight"
    assert np.array_equal(tensors[name], np.asarray(adapters["layers"]["up_proj"]["b"][1, 3]).T)
    assert not any("gate.lora" in name for name in tensors)


def test_expert_adapters_that_peft_would_change_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.rslora is true.*twice the rank.*use false"):
        init_lora(SPEC, LoraConfig(rank=2, rslora=True), jax.random.key(0))
    init_lora(SPEC, LoraConfig(rank=2, rslora=True, targets=["q_proj", "down_proj"]), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"lora.targets is \['q_proj', 'up_proj'\].*name both or neither"):
        init_lora(SPEC, LoraConfig(rank=2, targets=["q_proj", "up_proj"]), jax.random.key(0))
    init_lora(read_spec(golden_config("qwen3")), LoraConfig(rank=2, targets=["q_proj", "up_proj"]), jax.random.key(0))


@pytest.mark.parametrize("family", MOE)
def test_merging_adds_each_experts_adapter_to_its_own_tensor(family: str, tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, family, shards=3)
    policy = with_random_adapters(Policy.from_pretrained(folder, lora=LORA, dtype="float32"))
    policy.save_merged(tmp_path / "merged")
    ids, _ = read_golden(family)
    rows = [[int(token) for token in row] for row in ids]
    before = policy.logprobs([row[:5] for row in rows], [row[5:] for row in rows])
    merged = Policy.from_pretrained(tmp_path / "merged", dtype="float32")
    after = merged.logprobs([row[:5] for row in rows], [row[5:] for row in rows])
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-4)
    files = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == files | {"digests.json"}


def fused_folder(folder: Path, family: str) -> tuple[Path, Path]:
    """Writes a tiny model with one tensor per expert, and as transformers 5 has it in memory, with all of a layer in one."""
    single, fused = build_model_folder(folder / "single", family), build_model_folder(folder / "fused", family)
    tensors = load_file(single / "model.safetensors")
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = 4 if family == "mixtral" else SPEC.experts
    stored = {name.replace(f"{block}.gate", "mlp.gate"): x for name, x in tensors.items() if f"{block}.experts" not in name}
    for layer in range(2):
        at = f"model.layers.{layer}.{block}.experts"
        pairs = [np.concatenate([tensors[f"{at}.{e}.{name}.weight"] for name in (gate, up)]) for e in range(experts)]
        stored[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack(pairs)
        downs = [tensors[f"{at}.{e}.{down}.weight"] for e in range(experts)]
        stored[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack(downs)
    save_file(stored, fused / "model.safetensors")
    return single, fused


@pytest.mark.parametrize("family", MOE)
def test_experts_in_one_tensor_are_the_same_model_and_are_exported_so(family: str, tmp_path: Path) -> None:
    single, fused = fused_folder(tmp_path, family)
    policy, expected = (Policy.from_pretrained(folder, dtype="float32", lora=LORA) for folder in (fused, single))
    jax.tree.map(np.testing.assert_array_equal, policy.params, expected.params)
    read = [load_params(folder, policy.spec, jnp.float32, quantization="int8") for folder in (fused, single)]
    jax.tree.map(np.testing.assert_array_equal, *read)
    before = load_file(fused / "model.safetensors")
    policy.save_merged(tmp_path / "merged")  # new adapters change nothing
    after = load_file(tmp_path / "merged" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, after, before)
    changed = with_random_adapters(policy)
    assert changed.adapters is not None
    changed.save_merged(tmp_path / "changed")
    merged = Policy.from_pretrained(tmp_path / "changed", dtype="float32")
    for name in EXPERT_LINEARS:
        w, own = np.asarray(expected.params["layers"][name]["kernel"]), changed.adapters["layers"][name]
        low = np.einsum("leir,lero->leio", own["a"], own["b"])
        np.testing.assert_allclose(merged.params["layers"][name]["kernel"], w + LORA.scale * low, rtol=0, atol=1e-5)


def test_experts_in_both_spellings_are_refused(tmp_path: Path) -> None:
    single, fused = fused_folder(tmp_path, "qwen3_moe")
    both = load_file(single / "model.safetensors") | load_file(fused / "model.safetensors")
    save_file(both, fused / "model.safetensors")
    with pytest.raises(ModelError, match=r"48 tensors are not part of the qwen3_moe model"):
        load_params(fused, read_folder_spec(fused), jnp.float32)


@pytest.fixture(scope="module")
def on_eight_devices(repository: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of `support/expert_mesh.py`, by case and mesh."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(repository / part) for part in ("", "kernels", "tests", "tests/support"))
    }
    program = [sys.executable, str(repository / "tests" / "support" / "expert_mesh.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print("\n".join(map(str, found)))
    return {(row["case"], row["mesh"]): row for row in found}


MEAN_TERM = 0.3
"""A little below the mean absolute term of the loss, as in `test_mesh_update.py`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [("lora", "8x1x1"), ("lora", "1x8x1"), ("lora", "1x1x4"), ("lora", "2x2x2")]
    + [(name, "2x2x2") for name in ("again, int8", "full")],
)
def test_experts_on_a_mesh_give_the_loss_and_the_gradients_of_one_device(
    on_eight_devices: dict[tuple[str, str], Any], case: tuple[str, str]
) -> None:
    """Tolerances: 1e-6 of the mean term, 1e-5 of the norm; float32 sums in another order."""
    found = on_eight_devices[case]
    assert found["loss"] <= 1e-6 * MEAN_TERM
    assert found["gradient"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1x4", "2x2x2"])
@pytest.mark.parametrize("choice", ["many", "one choice"])
@pytest.mark.parametrize("weights", ["none", "int8"])
def test_a_decoding_step_on_a_mesh_matches_one_device(
    on_eight_devices: dict[tuple[str, str], Any], weights: str, choice: str, mesh: str
) -> None:
    """Also where all slots select experts of one device. Float32 has seven digits."""
    assert on_eight_devices[f"step, {weights}, {choice}", mesh]["hidden"] < 1e-6


@pytest.mark.slow
def test_an_indivisible_number_of_experts_is_refused(on_eight_devices: dict[tuple[str, str], Any]) -> None:
    message = on_eight_devices["refused", "1x1x4"]["error"]
    assert message.startswith("mesh.tensor is 4: the model's experts are 6")
