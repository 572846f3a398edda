"""The families of `NEWER_FAMILIES`: values and greedy tokens of transformers, adapters, exports, quantised bases, meshes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from newer_configs import PUBLISHED
from plain_oracles import LORA, golden_config, quick_compiling, tiny_policy, with_random_adapters
from safetensors.numpy import load_file, save_file

from goldens.folders import NEWER_FAMILIES, build_model_folder, read_golden, read_greedy, read_shapes
from grpo_jax.config import Config, ConfigError, LoraConfig
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import count_parameters, flatten, nest
from grpo_jax.models.rope import Rope, rope_tables, rotate
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.weights.lora import init_lora, load_adapter
from grpo_jax.weights.quantize import quantize_params

TOLERANCE_NATS = 1e-4  # float32 sums in another order
PROMPT = 9
WITH_VISION = ("gemma3_vision", "gemma4_vision", "mistral3_vision")
FUSED = {"phi3": ("qkv_proj", "gate_up_proj"), "glm4": ("gate_up_proj",)}
"""Modules of the files that are several linear layers here, by family."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def logprobs(policy: Policy, ids: np.ndarray, prompt: int = 1) -> np.ndarray:
    """Returns the log-probabilities of all ids behind a prompt of that length."""
    return np.stack(policy.logprobs(ids[:, :prompt].tolist(), ids[:, prompt:].tolist()))


SLOW = ("qwen3_5_moe_text", "qwen3_5_vision", "qwen3_5_moe_vision", "gemma4_moe_vision", "qwen3_next_dense")
"""Families each part of which another one has."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NEWER_FAMILIES]
)
def test_log_probabilities_match_transformers(family: str) -> None:
    """`test_families.py` compares the two spellings of config.json."""
    ids, expected = read_golden(family)
    np.testing.assert_allclose(logprobs(tiny_policy(family), ids), expected, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(model: str) -> None:
    config, parameters = PUBLISHED[model]
    assert count_parameters(read_spec(config)) == parameters


def test_published_configs_are_read_into_the_right_fields() -> None:
    smollm3 = read_spec(PUBLISHED["SmolLM3-3B"][0])
    assert (smollm3.tied, smollm3.rope_of_layer[:4]) == (True, (0, 0, 0, 1))
    assert smollm3.ropes == (Rope(5e6), Rope(1.0, "none"))
    olmo3 = read_spec(PUBLISHED["Olmo-3-7B"][0])
    assert (olmo3.windows[:4], olmo3.rope_of_layer[:4]) == ((4096, 4096, 4096, None), (1, 1, 1, 0))
    assert [(rope.kind, rope.theta, rope.attention_factor) for rope in olmo3.ropes] == [
        ("yarn", 5e5, 1.2079441541679836),
        ("default", 5e5, 1.0),
    ]
    granite = read_spec(PUBLISHED["granite-3.0-2b"][0])
    factors = (granite.embed_scale, granite.query_scale, granite.residual_scale, granite.logit_scale)
    assert factors == (12.0, 0.015625, 0.22, 0.125)
    glm4 = read_spec(PUBLISHED["GLM-4-9B-0414"][0])
    assert (glm4.rotated, glm4.interleaved_rope, glm4.qkv_bias, glm4.output_bias, glm4.sandwich) == (64, True, True, False, True)
    assert (read_spec(PUBLISHED["Phi-3-mini-4k"][0]).windows[0], read_spec(PUBLISHED["Phi-3-mini-4k"][0]).max_length) == (
        2047,
        None,
    )
    phi4 = read_spec(PUBLISHED["Phi-4-mini"][0])
    assert (phi4.rotated, phi4.max_length, phi4.ropes[0].attention_factor) == (
        96,
        4096,
        pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER_FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_samples_have_the_trainers_log_probabilities(family: str) -> None:
    """Two rows in one slot each, segments of 8: 33 tokens, several times as long as the windows."""
    policy = dataclasses.replace(tiny_policy(family), stop_ids=())
    prompts, expected = read_golden(family)[0][:, :PROMPT].tolist(), read_greedy(family)
    options: dict[str, Any] = {"max_completion_length": expected.shape[1], "segment": 8, "slots": 1}
    greedy = policy.generate(prompts, temperature=0.0, **options)
    assert [rows[0].ids for rows in greedy] == expected.tolist()
    drawn = [rows[0] for rows in policy.generate(prompts, temperature=0.7, **options)]
    trained = policy.logprobs(prompts, [row.ids for row in drawn], temperature=0.7)
    for row, theirs in zip(drawn, trained, strict=True):
        np.testing.assert_allclose(row.logprobs, theirs, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER_FAMILIES)
def test_adapters_and_merged_folders_load_back(tmp_path: Path, family: str) -> None:
    folder, (ids, _) = build_model_folder(tmp_path, family), read_golden(family)
    policy = with_random_adapters(Policy.from_pretrained(folder, lora=LORA, dtype="float32"))
    ours = logprobs(policy, ids)
    adapter = policy.save_adapter(tmp_path / "adapter")
    again = Policy.from_pretrained(folder, adapter=adapter, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.adapters, policy.adapters)
    merged = policy.save_merged(tmp_path / "merged")
    np.testing.assert_allclose(logprobs(Policy.from_pretrained(merged, dtype="float32"), ids), ours, rtol=0, atol=TOLERANCE_NATS)
    before, after = load_file(folder / "model.safetensors"), load_file(Path(merged) / "model.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {name: (x.shape, x.dtype) for name, x in after.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "olmo3", "granite", "gemma4_moe"])
def test_gradients_of_every_weight_are_the_slopes_of_the_log_probabilities(family: str) -> None:
    """Full training: along a random direction of each parameter that is trained, against central differences of 5e-4 nats."""
    policy, (ids, _) = tiny_policy(family), read_golden(family)
    prompts, completions = jnp.asarray(ids[:, :9], jnp.int32), jnp.asarray(ids[:, 9:21], jnp.int32)

    @jax.jit
    def total(params: Any, temperature: Any) -> jax.Array:
        rows = (prompts, jnp.array([9, 9], jnp.int32), completions)
        logps, _ = completion_logprobs(policy.model, {"params": params}, *rows, temperature, head_trainable=True)
        return jnp.mean(logps)

    gradients = dict(flatten(jax.jit(jax.grad(total))(policy.params, jnp.float32(1))))
    leaves, rng = dict(flatten(policy.params)), np.random.default_rng(0)
    assert gradients.keys() == leaves.keys()
    for path, leaf in leaves.items():
        direction = jnp.asarray(np.sign(np.asarray(gradients[path])) * rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        slope = float(jnp.sum(gradients[path] * direction))
        if path[-1] == "fixed_scale":
            assert slope == 0
            continue
        assert slope > 0, path
        step = jnp.float32(2.5e-4 / slope)
        moved = [nest(leaves | {path: leaf + sign * step * direction}) for sign in (jnp.float32(1), jnp.float32(-1))]
        up, down = (total(params, jnp.float32(1)) for params in moved)
        assert float(up - down) == pytest.approx(5e-4, rel=0.03), path


@pytest.mark.parametrize(
    "family",
    [
        *FUSED,
        "gpt_oss",
        *WITH_VISION,
        "gemma4_moe_vision",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_next", "qwen3_5_vision", "qwen3_5_moe_vision", "qwen3_moe_dense")
        ),
    ],
)
def test_an_untouched_export_is_the_original(tmp_path: Path, family: str) -> None:
    folder = build_model_folder(tmp_path, family)
    merged = Policy.from_pretrained(folder, dtype="float32").save_merged(tmp_path / "merged")
    before, after = load_file(folder / "model.safetensors"), load_file(Path(merged) / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_a_fused_adapter_has_a_block_for_each_part(tmp_path: Path) -> None:
    """Of rank 4: qkv_proj of rank 12, whose B is zero outside of q's, k's and v's own block, scaled like the others."""
    policy = tiny_policy("phi3", LORA)
    folder = Path(policy.save_adapter(tmp_path / "adapter"))
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == (
        {"qkv_proj": 12, "gate_up_proj": 8},
        {"qkv_proj": 24.0, "gate_up_proj": 16.0},
    )
    name = "base_model.model.model.layers.1.self_attn.qkv_proj"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    assert policy.adapters is not None
    layers = policy.adapters["layers"]
    products = [np.asarray(layers[part]["a"][1] @ layers[part]["b"][1]).T for part in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_allclose(b @ a, np.concatenate(products), rtol=0, atol=1e-6)
    assert np.count_nonzero(b[:32, 4:]) == np.count_nonzero(b[32:48, :4]) == np.count_nonzero(b[48:, :8]) == 0


def test_an_adapter_of_a_fused_module_starts_all_its_parts(tmp_path: Path) -> None:
    """As PEFT trains it: one A for q, k and v. With a rank of its own, B has to be block-diagonal."""
    policy = tiny_policy("phi3", LORA)
    folder = Path(policy.save_adapter(tmp_path / "adapter"))
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config, ours = json.loads(settings.read_text()), load_file(weights)
    save_file({name: np.ones_like(x) for name, x in ours.items()}, weights)
    (folder / "digests.json").unlink()
    with pytest.raises(ModelError, match="q_proj has a rank of its own and is not block-diagonal"):
        load_adapter(folder, policy.spec)
    settings.write_text(json.dumps(config | {"rank_pattern": {"qkv_proj": 8}}))
    with pytest.raises(ModelError, match=r"rank_pattern = .*is not supported"):
        load_adapter(folder, policy.spec)

    rng = np.random.default_rng(0)
    shapes = {name: (4, x.shape[1]) if "lora_A" in name else (x.shape[0], 4) for name, x in ours.items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    settings.write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}}))
    save_file(tensors, weights)
    adapters, _ = load_adapter(folder, policy.spec)
    name = "base_model.model.model.layers.0.self_attn.qkv_proj"
    whole = (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]).T
    parts = [adapters["layers"][part] for part in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_allclose(
        np.concatenate([np.asarray(p["a"][0] @ p["b"][0]) for p in parts], axis=-1), whole, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", [*WITH_VISION, "gemma4_moe_vision"])
def test_a_vision_tower_is_left_alone(tmp_path: Path, family: str) -> None:
    """Adapters are for the text part alone: PEFT finds modules by their paths, since the tower has a `q_proj` too."""
    policy = tiny_policy(family, LORA)
    config = json.loads((Path(policy.save_adapter(tmp_path / "adapter")) / "adapter_config.json").read_text())
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    paths = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in names}
    assert all(re.fullmatch(config["target_modules"], path) for path in paths)
    tower = [name.removesuffix(".weight") for name in read_shapes(family) if "vision_tower" in name]
    assert any("q_proj" in name for name in tower)
    assert not any(re.fullmatch(config["target_modules"], path) for name in tower for path in (name, f"model.{name}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config of a gemma3 model is null"),
        ({"text_config": {"model_type": "llama"}}, "use an object with model_type gemma3_text"),
        ({"new_thing": 1}, "attribute new_thing = 1 is not known"),
    ],
)
def test_what_is_not_known_next_to_the_text_part_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(golden_config("gemma3_vision") | change)


def test_what_is_not_known_in_the_text_part_is_refused() -> None:
    config = golden_config("gemma3_vision")
    config["text_config"] |= {"new_thing": 1}
    with pytest.raises(ModelError, match=r"config.json: text_config: attribute new_thing = 1 is not known"):
        read_spec(config)


def test_a_head_of_its_own_is_not_taken_for_the_embedding(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "granite")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    Policy.from_pretrained(folder)
    head[3, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight has other values.*tie_word_embeddings: false"):
        Policy.from_pretrained(folder)


def test_parts_of_a_fused_module_are_adapted_together_or_not_at_all() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets.*in one tensor, qkv_proj.*name all or none"):
        init_lora(tiny_policy("phi3").spec, LoraConfig(rank=4, targets=["q_proj", "v_proj"]), jax.random.key(0))


@pytest.mark.parametrize(
    "family", ["phi3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4", "olmo3", "gemma4_moe", "qwen3_moe_dense"))]
)
def test_a_quantised_base_is_the_rounded_dense_one(tmp_path: Path, family: str) -> None:
    folder = build_model_folder(tmp_path, family)
    loaded = Policy.from_pretrained(folder, quantization="int8", dtype="float32").params
    rounded = quantize_params(tiny_policy(family).spec, tiny_policy(family).params, "int8")
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.slow
def test_families_with_something_of_their_own_compute_the_same_on_a_mesh(tmp_path: Path, repository: Path) -> None:
    """Joint norms of sharded heads, fused tensors, sinks, biases of experts, dense layers: on four devices, fsdp 2 and tensor 2."""
    code = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
from plain_oracles import quick_compiling
from goldens.folders import build_model_folder
from grpo_jax.config import MeshConfig
from grpo_jax.policy import Policy
ids = np.random.default_rng(0).integers(6, 96, (2, 30))

def compare(family):
    folder = build_model_folder(Path(sys.argv[1]), family)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tensors = {name: np.ascontiguousarray(x[:96]) if len(x) == config["vocab_size"] else x for name, x in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    save_file(tensors, folder / "model.safetensors")
    one, four = (Policy.from_pretrained(folder, dtype="float32", mesh=mesh) for mesh in (None, MeshConfig(fsdp=2, tensor=2)))
    texts = ids[:, :9].tolist(), ids[:, 9:].tolist()
    np.testing.assert_allclose(four.logprobs(*texts), one.logprobs(*texts), rtol=0, atol=1e-4, err_msg=family)
    rows = [row[0] for row in four.generate(texts[0], max_completion_length=6)]
    again = one.logprobs(texts[0], [row.ids for row in rows])
    for row, theirs in zip(rows, again, strict=True):
        np.testing.assert_allclose(row.logprobs, theirs, rtol=0, atol=1e-4, err_msg=family)

with quick_compiling():
    for family in sys.argv[2:]:
        compare(family)
"""
    paths = os.pathsep.join(str(repository / part) for part in (".", "kernels", "tests", "tests/support"))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(tmp_path),
            "olmo3",
            "phi3",
            "gpt_oss",
            "lfm2",
            "qwen3_next",
            "qwen3_next_dense",
            "gemma4_moe",
        ],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_yarn_frequencies_worked_by_hand() -> None:
    """Of 8 dimensions at theta 10000 the pairs turn 10.2, 1.02, 0.102 and 0.0102 times in the original 64 positions."""
    rope = Rope(10000.0, "yarn", factor=4.0, original_length=64, beta_fast=8.0, beta_slow=0.5)
    # A pair further the turns are a tenth: 8 turns are at log10(10.186 / 8) = 0.105, half a turn is at 1.309. Whole pairs: 0 to 2.
    assert rope.frequencies(8) == pytest.approx([1.0, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4])
    low, high = np.log10(64 / (2 * np.pi) / np.array([8.0, 0.5]))
    share = (1 - low) / (high - low)
    exact = dataclasses.replace(rope, truncate=False).frequencies(8)
    assert exact == pytest.approx([1.0, 0.1 * (1 - share + share / 4), 0.01 / 4, 0.001 / 4])


def test_queries_grow_by_the_logarithm_of_their_block() -> None:
    tables = rope_tables((Rope(100.0, query_growth=0.1, original_length=4),), 2, jnp.array([[0, 3, 4, 11, 12]], jnp.int32))
    assert tables.query_scale is not None
    np.testing.assert_allclose(tables.query_scale[0, 0], 1 + 0.1 * np.log([1, 1, 2, 3, 4]), rtol=1e-6)


def test_a_reordered_pair_keeps_products_and_other_dimensions_pass() -> None:
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, 1, 6)), jnp.float32) for _ in range(2))
    tables = rope_tables((Rope(100.0),), 4, jnp.arange(5, dtype=jnp.int32)[None])
    turned = [np.asarray(rotate(x, tables.cos[0], tables.sin[0], interleaved=True)) for x in (q, k)]
    angles = np.arange(5)[:, None] * np.array([1.0, 0.1])
    complex_q, complex_k = (
        (np.asarray(x)[0, :, 0, 0:4:2] + 1j * np.asarray(x)[0, :, 0, 1:4:2]) * np.exp(1j * angles) for x in (q, k)
    )
    rest = np.asarray(q)[0, :, 0, 4:] @ np.asarray(k)[0, :, 0, 4:].T
    np.testing.assert_allclose(
        turned[0][0, :, 0] @ turned[1][0, :, 0].T, (complex_q @ complex_k.conj().T).real + rest, rtol=0, atol=1e-5
    )


LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_a_rotary_embedding_that_depends_on_the_length_is_refused_beyond_it(kind: str) -> None:
    """Up to it, transformers' frequencies are those of short sequences: of `dynamic`, unscaled ones."""
    spec = read_spec(golden_config("llama2") | {"rope_parameters": LENGTH_DEPENDENT[kind]})
    assert spec.max_length == 64
    assert spec.ropes[0].frequencies(8) == Rope(10000.0).frequencies(8)
    policy = dataclasses.replace(tiny_policy("llama2"), spec=spec)
    with pytest.raises(ConfigError, match=r"prompt_ids and completion_ids: a sequence may have 65 tokens.*exact for up to 64"):
        policy.logprobs([[1] * 60], [[1] * 5])
    with pytest.raises(ConfigError, match=r"rollout.max_completion_length: a sequence may have 70 tokens"):
        policy.generate([[1] * 60], max_completion_length=10)
    rollout = Config.from_dict({"rollout": {"max_prompt_length": 60, "max_completion_length": 8}}).rollout
    with pytest.raises(ConfigError, match=r"rollout.max_prompt_length \+ rollout.max_completion_length: a sequence may have 68"):
        spec.check_rollout(rollout)
