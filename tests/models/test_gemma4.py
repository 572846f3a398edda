"""Gemma 4: layers in loops against one after the other, gradients, refusals, tensors that are not used, a mesh.

Values against transformers, sampling, adapters and exports: `test_newer_families.py`.
"""

from __future__ import annotations

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
from newer_configs import PUBLISHED
from plain_oracles import LORA, golden_config, quick_compiling, tiny_policy, with_random_adapters
from safetensors.numpy import load_file, save_file

import grpo_jax.policy
from goldens.folders import build_model_folder, read_golden, read_greedy
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.models.families import read_spec
from grpo_jax.models.layer_kinds import repeated_units
from grpo_jax.models.parameters import flatten
from grpo_jax.models.rope import Rope
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.weights.quantize import quantize_params

PROMPT, COMPLETION = 9, 12
MOE = {"enable_moe_block": True, "use_double_wide_mlp": False, "num_experts": 2}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def value_and_gradients(family: str, model: Any, variables: Any, collection: str) -> tuple[float, dict[tuple[str, ...], Any]]:
    """The mean log-probability of the golden's tokens behind a prompt, and its gradient."""
    ids, _ = read_golden(family)
    prompts, completions = (jnp.asarray(x, jnp.int32) for x in (ids[:, :PROMPT], ids[:, PROMPT : PROMPT + COMPLETION]))

    def mean(own: Any, others: Any, temperature: Any) -> jax.Array:
        rows = (prompts, jnp.full((2,), PROMPT, jnp.int32), completions)
        trainable = {"head_trainable": collection == "params"}
        return jnp.mean(completion_logprobs(model, others | {collection: own}, *rows, temperature, **trainable)[0])

    others = {name: tree for name, tree in variables.items() if name != collection}
    value, gradients = jax.jit(jax.value_and_grad(mean))(variables[collection], others, jnp.float32(1))
    return float(value), {path: np.asarray(leaf) for path, leaf in flatten(gradients)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "collection", "remat"),
    [
        ("gemma4", "lora", "none"),
        ("gemma4", "params", "layer"),
        ("gemma4_moe", "lora", "layer"),
        ("qwen3_moe_dense", "params", "layer"),
    ],
)
def test_layers_in_loops_compute_what_they_do_one_after_the_other(family: str, collection: str, remat: Any) -> None:
    """Keys of earlier layers, embeddings for each layer and their gradients pass through the loops, recomputed or not."""
    policy = with_random_adapters(tiny_policy(family, LORA)) if collection == "lora" else tiny_policy(family)
    expected, gradients = value_and_gradients(family, policy.model.clone(unroll=True), policy.variables, collection)
    value, own = value_and_gradients(family, policy.model.clone(unroll=False, remat=remat), policy.variables, collection)
    assert value == pytest.approx(expected, abs=1e-5)
    assert own.keys() == gradients.keys()
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradients.values()))
    for path, leaf in gradients.items():
        assert np.linalg.norm(own[path] - leaf) <= 3e-5 * total, path  # float32 sums in another order
        assert (np.linalg.norm(leaf) == 0) == (path[-1] == "fixed_scale"), path


@pytest.mark.slow
def test_greedy_tokens_of_layers_in_loops_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two KV caches of different shapes, of which later layers read what earlier ones have written."""
    monkeypatch.setattr(grpo_jax.policy, "UNROLLED_LAYERS", 0)
    policy = tiny_policy("gemma4")
    assert not policy.model.unrolled
    ids, expected = read_golden("gemma4")[0], read_greedy("gemma4")
    options: dict[str, Any] = {"max_completion_length": expected.shape[1], "segment": 8, "slots": 1, "temperature": 0.0}
    rows = Policy(**{**vars(policy), "stop_ids": ()}).generate(ids[:, :PROMPT].tolist(), **options)
    assert [row[0].ids for row in rows] == expected.tolist()


def test_published_configs_are_read_into_the_right_fields() -> None:
    small = read_spec(PUBLISHED["gemma-4-E2B, without its towers"][0])
    assert small.layer_kinds[13:21] == ("attention", "global", *["shared"] * 4, "shared_global", "shared")
    assert [small.key_source(number) for number in (13, 14, 15, 19, 34)] == [13, 14, 13, 14, 14]
    assert [(run.first, len(run.unit), run.count) for run in repeated_units(small.layer_kinds)] == [(0, 5, 3), (15, 5, 4)]
    assert small.key_shapes == ((12, 1, 256), (3, 1, 512))
    assert (small.per_layer_width, small.wide_ffw, small.final_softcap, small.query_scale) == (256, 12288, 30.0, 1.0)
    large = read_spec(PUBLISHED["gemma-4-31B, without its tower"][0])
    assert (large.key_shapes, large.per_layer_width, large.shares_keys) == (((50, 16, 256), (10, 4, 512)), 0, False)
    assert "global_v_proj" not in large.linear_shapes()
    assert large.ropes == (Rope(1e6, "proportional", share=0.25), Rope(1e4))
    assert large.rotated_by_rope == (512, 256)
    mixture = read_spec(PUBLISHED["gemma-4-26B-A4B, without its tower"][0])
    assert (mixture.experts, mixture.experts_per_token, mixture.ffw, mixture.dense_ffw) == (128, 8, 704, 2112)
    assert (mixture.dense_and_experts, mixture.expert_layers, mixture.norm_topk_prob) == (True, 30, True)


def test_proportional_frequencies_worked_by_hand() -> None:
    """A quarter of 8 pairs turns, at the rates that 16 rotated dimensions have."""
    frequencies = Rope(256.0, "proportional", factor=2.0, share=0.25).frequencies(16)
    assert frequencies == pytest.approx([0.5, 0.25, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "use_double_wide_mlp = true is not supported .with enable_moe_block"),
        ({"enable_moe_block": True, "use_double_wide_mlp": False}, "attribute num_experts is missing"),
        (MOE | {"top_k_experts": 3}, "top_k_experts = 3 is not within 1 to the 2 experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not supported"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types has no sliding_attention"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6: the 1 layers before them have no keys for one of their types"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is .* for every layer with full_attention"),
        ({"per_layer_config": None, "global_head_dim": 7}, "global_head_dim is 7: .* must be even"),
        ({"per_layer_config": None, "attention_k_eq_v": True, "num_global_key_value_heads": 3}, "not a multiple of num_global_key"),
        ({"vocab_size_per_layer_input": 100}, r"vocab_size_per_layer_input is 100: use at least vocab_size \(113\)"),
        ({"new_thing": 1}, "attribute new_thing = 1 is not known"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(golden_config("gemma4") | change)


def test_keys_of_layers_that_use_earlier_ones_are_left_alone(tmp_path: Path) -> None:
    """Files on the hub have them, transformers ignores them; in a layer with keys of its own nothing may be left over."""
    folder = build_model_folder(tmp_path, "gemma4")
    tensors = load_file(folder / "model.safetensors")
    unused = {"model.layers.5.self_attn.k_proj.weight": np.ones((24, 32), np.float32)}
    save_file(tensors | unused, folder / "model.safetensors")
    merged = Policy.from_pretrained(folder, dtype="float32").save_merged(tmp_path / "merged")
    after = load_file(Path(merged) / "model.safetensors")
    assert after.keys() == (tensors | unused).keys()
    for name, values in (tensors | unused).items():
        np.testing.assert_array_equal(after[name], values)
    save_file(tensors | {"model.layers.0.self_attn.v_norm.weight": np.ones(12, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.v_norm"):
        Policy.from_pretrained(folder)


@pytest.mark.slow
def test_a_quantised_base_is_the_rounded_dense_one(tmp_path: Path) -> None:
    loaded = Policy.from_pretrained(build_model_folder(tmp_path, "gemma4"), quantization="int8", dtype="float32").params
    rounded = quantize_params(tiny_policy("gemma4").spec, tiny_policy("gemma4").params, "int8")
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.slow
def test_a_mesh_computes_the_same(tmp_path: Path, repository: Path) -> None:
    """Four devices, fsdp 2 and tensor 2: two key/value heads in both shapes of attention."""
    code = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
from plain_oracles import quick_compiling
from goldens.folders import build_model_folder
from grpo_jax.config import MeshConfig
from grpo_jax.policy import Policy
ids = np.random.default_rng(0).integers(6, 96, (2, 24))
folder = build_model_folder(Path(sys.argv[1]), "gemma4")
config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
tensors = {name: np.ascontiguousarray(x[:112]) if len(x) == 113 else x for name, x in tensors.items()}
(folder / "config.json").write_text(json.dumps(config | {"vocab_size": 112}))
save_file(tensors, folder / "model.safetensors")
with quick_compiling():
    one, four = (Policy.from_pretrained(folder, dtype="float32", mesh=mesh) for mesh in (None, MeshConfig(fsdp=2, tensor=2)))
    texts = ids[:, :9].tolist(), ids[:, 9:].tolist()
    np.testing.assert_allclose(four.logprobs(*texts), one.logprobs(*texts), rtol=0, atol=1e-4)
    rows = [row[0] for row in four.generate(texts[0], max_completion_length=6)]
    again = one.logprobs(texts[0], [row.ids for row in rows])
    for row, theirs in zip(rows, again, strict=True):
        np.testing.assert_allclose(row.logprobs, theirs, rtol=0, atol=1e-4)
"""
    paths = os.pathsep.join(str(repository / part) for part in (".", "kernels", "tests", "tests/support"))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, **flags}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
