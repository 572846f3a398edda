"""DoRA, PiSSA, and ranks and layers by pattern: against their formulas in NumPy, in layers, merged weights and PEFT's files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import golden_config, moved
from safetensors.numpy import load_file

from goldens.folders import build_adapter_folder, build_model_folder
from grpo_jax.config import ConfigError, LoraConfig, RolloutConfig
from grpo_jax.models.adapters import computed_adapters
from grpo_jax.models.families import read_spec
from grpo_jax.models.linear import join_adapters, linear_product
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import ranks_of, ratios_of
from grpo_jax.weights.export import merged_weights
from grpo_jax.weights.gguf.files import write_adapter
from grpo_jax.weights.lora import init_lora, load_adapter, save_adapter
from grpo_jax.weights.lora_start import largest_singular, starts_as_base, with_start
from grpo_jax.weights.pretrained import read_pretrained
from grpo_kernels import quantize

PATTERNS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "targets": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {r".*\.layers\.0\..*": 16},
}


def spec_of(family: str) -> ModelSpec:
    return read_spec(golden_config(family))


def started(spec: ModelSpec, lora: LoraConfig, params: Params) -> Params:
    return with_start(spec, lora, params, init_lora(spec, lora, jax.random.key(0)), jax.device_get)


def nudged(spec: ModelSpec, lora: LoraConfig, adapters: Params, size: float = 0.2) -> Params:
    """The adapters with noise where training would change them: within each module's rank, and not PiSSA's start."""
    rng, layers = np.random.default_rng(5), {}
    for name, pair in adapters["layers"].items():
        ranks = ranks_of(spec, lora, name)[:, None]
        inside = np.arange(pair["a"].shape[-1]) < ranks
        masks = {"a": inside[:, None, :], "b": inside[:, :, None], "magnitude": ranks > 0}
        layers[name] = {leaf: np.array(x) for leaf, x in pair.items()}
        for leaf in masks.keys() & pair.keys():
            layers[name][leaf] += (size * rng.standard_normal(pair[leaf].shape) * masks[leaf]).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"layers": layers})


@pytest.fixture(scope="module")
def weights() -> tuple[ModelSpec, Params]:
    """Random weights of a tiny model."""
    spec = spec_of("qwen2")
    return spec, init_params(spec, jax.random.key(3), jnp.float32)


def test_doras_layer_and_its_gradients_written_out() -> None:
    """m / ‖W + s A B‖ (W + s A B) x, the norm without gradient; with dropout as in PEFT, where z is what the adapter sees of x."""
    rng = np.random.default_rng(0)
    w, a, b = rng.normal(size=(6, 5)), rng.normal(size=(6, 2)), rng.normal(size=(2, 5))
    m, bias, x, dy = 1 + rng.random(5), rng.normal(size=5), rng.normal(size=(3, 6)), rng.normal(size=(3, 5))
    z = x * (rng.random(x.shape) < 0.7) / 0.7
    leaves = [jnp.asarray(array[None], jnp.float32) for array in (a, b, m)]
    base = {"layers": {"q_proj": {"kernel": jnp.asarray(w[None], jnp.float32)}}}

    def layer(a: Any, b: Any, m: Any, seen: Any) -> Any:
        pair = computed_adapters(base, {"layers": {"q_proj": {"a": a, "b": b, "magnitude": m}}}, 0.5)["layers"]["q_proj"]
        own = {"kernel": base["layers"]["q_proj"]["kernel"][0], "bias": jnp.asarray(bias, jnp.float32)}
        own |= {name: leaf[0] for name, leaf in pair.items()}
        return linear_product(jnp.asarray(x[None], jnp.float32), own, ("embed", "heads"), 0.5, None, None, seen)[0]

    factor = m / np.sqrt(((w + 0.5 * a @ b) ** 2).sum(axis=0))
    for seen, plain in ((None, x), (jnp.asarray(z[None], jnp.float32), z)):
        expected = x @ w + (factor - 1) * (plain @ w) + factor * 0.5 * (plain @ a @ b) + bias
        got, backward = jax.vjp(lambda *pair, seen=seen: layer(pair[0], pair[1], pair[2], seen), *leaves)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        da, db, dm = (np.asarray(gradient[0]) for gradient in backward(jnp.asarray(dy, jnp.float32)))
        scaled = 0.5 * factor * dy
        np.testing.assert_allclose(da, plain.T @ scaled @ b.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(db, (plain @ a).T @ scaled, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dm, (dy * (plain @ (w + 0.5 * a @ b)) * factor / m).sum(axis=0), rtol=1e-4, atol=1e-4)


def test_a_layer_without_an_adapter_has_doras_factor_one_and_no_gradient() -> None:
    base = {"layers": {"q_proj": {"kernel": jnp.ones((2, 3, 4))}}}
    pair = {"a": jnp.ones((2, 3, 1)), "b": jnp.zeros((2, 1, 4)), "magnitude": jnp.asarray([[1.0, 2, 3, 4], [0, 0, 0, 0]])}

    def total(pair: Any) -> Any:
        return computed_adapters(base, {"layers": {"q_proj": pair}}, 1.0)["layers"]["q_proj"]["factor"]

    np.testing.assert_allclose(total(pair), np.array([[1, 2, 3, 4], [3**0.5] * 4]) / 3**0.5, rtol=1e-6)
    gradient = jax.grad(lambda pair: jnp.sum(total(pair)))(pair)["magnitude"]
    assert np.all(np.asarray(gradient[0]) > 0)
    assert not np.any(gradient[1])


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_pissa_starts_with_the_largest_singular_values_as_the_base(weights: tuple[ModelSpec, Params], scale: float) -> None:
    spec, params = weights
    lora = LoraConfig(rank=4, alpha=4 * scale, targets=["v_proj", "down_proj"], init="pissa")
    adapters = started(spec, lora, params)
    assert starts_as_base(adapters, np.asarray)
    for name, pair in adapters["layers"].items():
        w = np.asarray(params["layers"][name]["kernel"], np.float64)
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
        np.testing.assert_allclose(scale * np.asarray(pair["a"]) @ np.asarray(pair["b"]), best, rtol=0, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(pair["a"], axis=-2), np.linalg.norm(pair["b"], axis=-1), rtol=1e-4)
        np.testing.assert_array_equal(pair["a"], pair["a0"])
    computed = computed_adapters(params, adapters, lora.scale)["layers"]["v_proj"]
    assert np.abs(np.asarray(computed["a"]) @ np.asarray(computed["b"])).max() < 1e-6
    other = moved(adapters, 1, 0.1)
    assert not starts_as_base(other, np.asarray)

    def total(pair: Any) -> Any:
        return jnp.sum(computed_adapters(params, {"layers": {"v_proj": pair}}, 1.0)["layers"]["v_proj"]["a"])

    gradient = jax.grad(total)(other["layers"]["v_proj"])
    assert np.all(gradient["a"] == 1)
    assert not np.any(gradient["a0"])


def test_pissas_quick_method_is_near_the_exact_one_and_fixed_by_the_seed() -> None:
    rng = np.random.default_rng(0)
    w = ((rng.normal(size=(40, 20)) * 0.5 ** np.arange(20)) @ rng.normal(size=(20, 30))).astype(np.float32)
    exact, quick, again = (
        largest_singular(w, 5, method, np.random.default_rng(1)) for method in ("pissa", "pissa_niter_8", "pissa_niter_8")
    )
    np.testing.assert_allclose(quick[1], exact[1], rtol=1e-4)
    np.testing.assert_allclose((quick[0] * quick[1]) @ quick[2], (exact[0] * exact[1]) @ exact[2], rtol=0, atol=1e-3)
    assert all(np.array_equal(one, other) for one, other in zip(quick, again, strict=True))


@pytest.mark.slow
def test_pissa_of_a_quantised_base_starts_as_that_base() -> None:
    spec = spec_of("qwen2")
    dense = init_params(spec, jax.random.key(3), jnp.float32)
    kernel = jnp.stack([quantize(w, "int8").astype(jnp.float32) for w in dense["layers"]["q_proj"]["kernel"]])
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[quantize(w, "int8") for w in dense["layers"]["q_proj"]["kernel"]])
    lora = LoraConfig(rank=3, targets=["q_proj"], init="pissa")
    one, other = (started(spec, lora, {"layers": {"q_proj": {"kernel": own}}})["layers"]["q_proj"]["a"] for own in (stack, kernel))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [{"init": "pissa"}, {"init": "pissa", "rslora": True}, {"use_dora": True}, {}], ids=str)
def test_files_and_merged_weights_of_each_kind_are_pefts_sums(
    weights: tuple[ModelSpec, Params], tmp_path: Path, kind: dict[str, Any]
) -> None:
    """PEFT's W + alpha / r · B A (with DoRA m / ‖·‖ of it) of the files is what merging here gives; with patterns, layers."""
    spec, params = weights
    lora = LoraConfig(**PATTERNS | kind, layers_to_transform=None if kind else [1])
    adapters = nudged(spec, lora, started(spec, lora, params))
    save_adapter(tmp_path, spec, adapters, lora, "owner/base")
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    assert config.get("init_lora_weights", True) is True
    read = merged_weights(spec, params, adapters, lora)
    seen = 0
    for name in lora.target_names:
        for layer in range(spec.layers):
            path = f"model.layers.{layer}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
            expected = np.asarray(params["layers"][name]["kernel"][layer], np.float64).T
            if lora.layers_to_transform is None or layer in lora.layers_to_transform:
                a, b = (tensors.pop(f"base_model.model.{path}.lora_{leaf}.weight").astype(np.float64) for leaf in "AB")
                more = 2 if lora.pissa else 1
                rank = more * {("v_proj", 0): 2, ("v_proj", 1): 2, ("down_proj", 1): 6}.get((name, layer), 4)
                assert a.shape[0] == b.shape[1] == rank
                alpha = (16 if layer == 0 else 8) * (more**0.5 if lora.rslora else more)
                expected = expected + alpha / (rank**0.5 if lora.rslora else rank) * (b @ a)
                if lora.use_dora:
                    m = tensors.pop(f"base_model.model.{path}.lora_magnitude_vector")
                    expected = expected * (m / np.linalg.norm(expected, axis=1))[:, None]
                seen += 1
            np.testing.assert_allclose(read(("layers", name, "kernel"), (layer,)).T, expected, rtol=0, atol=5e-6)
    assert not tensors
    assert seen == (3 if lora.layers_to_transform else 6)
    assert config["r"] == (8 if lora.pissa else 4)
    again, found = load_adapter(tmp_path, spec)
    assert found.use_dora == lora.use_dora
    read_again = merged_weights(spec, params, again, found)
    path, index = ("layers", "v_proj", "kernel"), (1,)
    np.testing.assert_allclose(read_again(path, index), read(path, index), rtol=0, atol=1e-6)


def test_smaller_ranks_and_other_layers_are_zeros_in_a_stack(weights: tuple[ModelSpec, Params]) -> None:
    spec, _ = weights
    lora = LoraConfig(**PATTERNS, layers_to_transform=[1])
    pair = init_lora(spec, lora, jax.random.key(0))["layers"]["down_proj"]
    assert pair["a"].shape == (2, 48, 6)
    assert not np.any(pair["a"][0])
    assert np.all(np.asarray(pair["a"][1]) != 0)
    small = init_lora(spec, LoraConfig(**PATTERNS), jax.random.key(0))["layers"]["down_proj"]["a"]
    assert np.all(np.asarray(small[0, :, :4]) != 0)
    assert not np.any(small[0, :, 4:])
    assert dict(ratios_of(spec, LoraConfig(**PATTERNS))) == {"q_proj": (2, 1), "v_proj": (4, 2), "down_proj": (2, 2 / 3)}


def test_joined_factors_have_ones_for_linear_layers_without_dora() -> None:
    pair = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 3)), "factor": jnp.full(3, 2.0)}
    joined = join_adapters({"q_proj": 2, "k_proj": 3}, {"k_proj": pair})
    np.testing.assert_array_equal(joined["factor"], [1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("qwen3_moe", {"use_dora": True}, r"lora\.use_dora is true: use false, which experts \(gate_proj, up_proj, down_proj\)"),
        ("qwen3_moe", {"dropout": 0.1}, r"lora\.dropout is 0\.1: use 0, which experts"),
        ("qwen3_moe", {"init": "pissa"}, r"lora\.init is 'pissa': use default, which experts"),
        ("qwen3_moe", {"rank_pattern": {"down_proj": 2}}, r"lora\.rank_pattern is .*experts have lora\.rank and lora\.alpha"),
        ("phi3", {"rank_pattern": {"o_proj": 2}}, r"lora\.rank_pattern is .*several linear layers in one tensor"),
        ("qwen2", {"layers_to_transform": [2]}, r"lora\.layers_to_transform is \[2\]: this model has the layers 0 to 1"),
        ("qwen2", {"alpha_pattern": {"layers.7.mlp": 2}}, r"lora\.alpha_pattern\.layers\.7\.mlp is 2\.0: no adapted module"),
    ],
)
def test_what_a_model_cannot_have_is_refused_by_name(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        init_lora(spec_of(family), LoraConfig(**given), jax.random.key(0))


def test_attention_of_a_mixture_of_experts_may_have_every_kind() -> None:
    lora = LoraConfig(targets=["q_proj", "o_proj"], use_dora=True, dropout=0.1, rank=2, rank_pattern={"q_proj": 3})
    assert init_lora(spec_of("qwen3_moe"), lora, jax.random.key(0))["layers"]["q_proj"]["magnitude"].shape[0] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": "pissa", "dropout": 0.1}, r"lora\.dropout is 0\.1: use 0 with lora\.init pissa"),
        ({"init": "pissa", "adapter": "x"}, r"lora\.init is 'pissa': an adapter that is read has its own values"),
        ({"init": "olora"}, r"lora\.init is 'olora': use default, pissa, or pissa_niter_"),
        ({"rank": 0, "plus_ratio": 16}, r"lora\.plus_ratio is 16\.0: with lora\.rank 0 there are no adapters"),
        ({"dropout": 1}, r"lora\.dropout is 1\.0: use a share"),
        ({"layers_to_transform": []}, r"lora\.layers_to_transform is \[\]: use different numbers"),
        ({"rank_pattern": {"(q_proj|v_proj)+": 2}}, r"lora\.rank_pattern is '\(q_proj\|v_proj\)\+': name the end"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**given)


def test_what_only_training_reads_is_the_runs_own_and_not_the_adapters(tmp_path: Path) -> None:
    folder, adapter = build_model_folder(tmp_path, "qwen2"), build_adapter_folder(tmp_path, "qwen2_dora_patterns")
    lora = LoraConfig(dropout=0.1, plus_ratio=4.0)
    options: dict[str, Any] = {"dtype": "float32", "quantization": "none", "revision": None, "seed": 0, "mesh": None}
    found = read_pretrained(folder, lora=lora, adapter=str(adapter), **options).lora
    assert found is not None
    assert (found.dropout, found.plus_ratio, found.use_dora, found.rank_pattern) == (
        0.1, 4.0, True, {"v_proj": 2, "layers.1.mlp.down_proj": 6},
    )  # fmt: skip


def test_gguf_has_no_dora(weights: tuple[ModelSpec, Params], tmp_path: Path) -> None:
    spec, params = weights
    lora = LoraConfig(rank=2, use_dora=True)
    with pytest.raises(ModelError, match="has no DoRA"):
        write_adapter(tmp_path / "x.gguf", spec, started(spec, lora, params), lora)


KINDS = {
    "dora": LoraConfig(rank=4, alpha=8.0, use_dora=True),
    "pissa": LoraConfig(rank=4, alpha=8.0, init="pissa"),
    "dora of pissa": LoraConfig(rank=4, alpha=8.0, init="pissa_niter_4", use_dora=True),
    "patterns": LoraConfig(**PATTERNS),
    "dora in one layer": LoraConfig(**PATTERNS, use_dora=True, layers_to_transform=[1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sampler_trainer_and_merged_model_agree(tmp_path: Path, kind: str) -> None:
    """The sampled tokens' log-probabilities are the trainer's, in float32 to 1e-4; and those of the merged folder."""
    folder = build_model_folder(tmp_path, "qwen2")
    policy = Policy.from_pretrained(folder, lora=KINDS[kind], dtype="float32")
    prompts = [[5, 6, 7, 8], [9, 10]]
    bare = Policy.from_pretrained(folder, dtype="float32")
    for ours, theirs in zip(policy.logprobs(prompts, prompts), bare.logprobs(prompts, prompts), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # it starts as the base
    assert policy.adapters is not None
    policy = policy.with_trained(nudged(policy.spec, KINDS[kind], policy.adapters, 0.1))
    rows = [row for rows in policy.generate(prompts, num_generations=2, max_completion_length=6, seed=1) for row in rows]
    asked = [prompt for prompt in prompts for _ in range(2)], [row.ids for row in rows]
    trainer = policy.logprobs(*asked)
    for row, logps, before in zip(rows, trainer, bare.logprobs(*asked), strict=True):
        np.testing.assert_allclose(row.logprobs, logps, rtol=0, atol=1e-4)
        assert np.abs(logps - before).max() > 1e-2
    merged = Policy.from_pretrained(policy.save_merged(tmp_path / "merged"), dtype="float32")
    read = Policy.from_pretrained(folder, adapter=policy.save_adapter(tmp_path / "adapter"), dtype="float32")
    for other in (merged, read):
        for ours, theirs in zip(trainer, other.logprobs(*asked), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_bfloat16_the_sampler_has_doras_factors_and_scales_of_layers(tmp_path: Path, quantization: str) -> None:
    """With joined and with separate weights, and an adapter that is not merged."""
    policy = Policy.from_pretrained(
        build_model_folder(tmp_path, "qwen2"), lora=KINDS["dora in one layer"], dtype="bfloat16", quantization=quantization
    )
    assert policy.adapters is not None
    policy = policy.with_trained(nudged(policy.spec, KINDS["dora in one layer"], policy.adapters, 0.1))
    settings = RolloutConfig(num_generations=2, max_completion_length=6, max_prompt_length=4)
    for joins in (True, False):
        sampler = dataclasses.replace(policy.sampler, joins=[joins])
        rollout = sampler.sample(policy.variables, [[5, 6, 7, 8], [9, 10]], settings, seed=1)
        asked = [[5, 6, 7, 8]] * 2 + [[9, 10]] * 2, rollout.completion_ids
        for ours, theirs in zip(rollout.logprobs, policy.logprobs(*asked), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.1)  # logits of this size are 2^-6 apart in bfloat16
