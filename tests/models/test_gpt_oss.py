"""What only gpt-oss has: attention sinks, experts with biases and a clamped SwiGLU, MXFP4 checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from newer_configs import PUBLISHED
from plain_oracles import LORA, golden_config, quick_compiling, tiny_policy
from safetensors.numpy import load_file, save_file

from goldens.folders import build_model_folder, read_golden
from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.models import moe
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import flatten
from grpo_jax.models.spec import EXPERT_LINEARS, ModelError
from grpo_jax.policy import Policy
from grpo_jax.weights.hf import INDEX, TensorFiles
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.mxfp4 import dequantize_mxfp4
from grpo_jax.weights.quantize import params_bytes, quantize_params
from grpo_kernels import (
    NO_WINDOW,
    KVCache,
    Limits,
    QuantizedWeight,
    decode_attention,
    dequantize,
    group_attention,
    plan_attention,
    prompt_ranges,
)

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def with_sinks(q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """The oracle: softmax over the seen keys and the sink, whose weight is dropped. q [N, K, R, Dh], k and v [T, K, Dh]."""
    scores = jnp.einsum("nkrd,tkd->krnt", q, k)
    n, t = scores.shape[-2:]
    scores = jnp.where(np.arange(t)[None, :] <= np.arange(n)[:, None] + t - n, scores, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("krnt,tkd->nkrd", weights, v)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sinks_have_the_values_and_gradients_of_one_more_key(implementation: str) -> None:
    rng = np.random.default_rng(0)
    t, kv, r, width = 19, 2, 3, 8
    q, out = (jnp.asarray(rng.normal(size=(1, t, kv, r, width)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(1, t, kv, width)), jnp.float32) for _ in range(2))
    sinks = jnp.asarray(rng.normal(size=(kv, r)) + 1, jnp.float32)
    ranges, limits = prompt_ranges(jnp.array([t], jnp.int32), t), Limits(prompts=0, prompt=0, own=t)
    options: dict[str, Any] = {"keys": t, "kv_heads": kv, "heads_of_key": r, "window": NO_WINDOW, "sinks": True}
    plan = plan_attention(ranges, limits, **options, implementation=implementation)
    ours = jax.jit(lambda *x: group_attention(*x[:3], plan, sinks=x[3]))(q, k, v, sinks)
    with jax.numpy_rank_promotion("allow"):
        expected, pull = jax.vjp(lambda q, k, v, s: with_sinks(q[0], k[0], v[0], s)[None], q, k, v, sinks)
        gradients = pull(out)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    _, pull = jax.vjp(lambda q, k, v, s: group_attention(q, k, v, plan, sinks=s), q, k, v, sinks)
    for got, wanted in zip(pull(out), gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sinks_in_decoding(implementation: str) -> None:
    """One slot: a prompt of 5, 4 past tokens and the third of a segment."""
    rng = np.random.default_rng(1)
    kv, r, width, total = 2, 2, 8, 12
    q = jnp.asarray(rng.normal(size=(1, kv, r, width)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(total, kv, width)), jnp.float32) for _ in range(2))
    sinks = jnp.asarray(rng.normal(size=(kv, r)) + 1, jnp.float32)
    parts = [KVCache(*(jnp.moveaxis(x[part], 0, 1)[None] for x in (k, v))) for part in (slice(0, 5), slice(5, 9), slice(9, 12))]
    prefix, past, segment = parts
    lengths, base = jnp.array([5], jnp.int32), jnp.array([4], jnp.int32)
    options: dict[str, Any] = {"sinks": sinks, "implementation": implementation}
    got = decode_attention(q, prefix, lengths, [past], segment, base, jnp.int32(2), **options)
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(got, with_sinks(q, k, v, sinks), rtol=0, atol=1e-6)


def test_kernels_without_sinks_refuse_them_by_name() -> None:
    ranges, options = (
        prompt_ranges(jnp.array([4], jnp.int32), 4),
        {"keys": 4, "kv_heads": 1, "heads_of_key": 1, "window": NO_WINDOW},
    )
    with pytest.raises(ValueError, match="'mosaic_tpu' has no attention sinks; use 'xla'"):
        plan_attention(ranges, Limits(0, 0, 4), **options, sinks=True, implementation="mosaic_tpu")  # type: ignore[arg-type] - options by name


@pytest.mark.parametrize("form", ["dense", "ragged", "tiled"])
def test_experts_with_biases_and_the_clamp_equal_a_loop_over_tokens(form: moe.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(tiny_policy("gpt_oss").spec, swiglu_limit=1.0)
    monkeypatch.setattr(moe, "choose_form", lambda *_, **__: form)
    layer = jax.tree.map(
        lambda x: x[0],
        {name: tiny_policy("gpt_oss").params["layers"][name] for name in ("router", "gate_proj", "up_proj", "down_proj")},
    )
    x = np.random.default_rng(2).normal(size=(1, 10, spec.width)).astype(np.float32)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer)
    expected = np.zeros(x.shape[1:])
    for number, row in enumerate(np.asarray(x[0], np.float64)):
        logits = row @ wide["router"]["kernel"] + wide["router"]["bias"]
        chosen = np.argsort(-logits)[: spec.experts_per_token]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for share, e in zip(shares, chosen, strict=True):
            gate, up = (row @ wide[name]["kernel"][e] + wide[name]["bias"][e] for name in ("gate_proj", "up_proj"))
            gate, up = np.minimum(gate, 1.0), np.clip(up, -1.0, 1.0)
            active = gate / (1 + np.exp(-spec.swiglu_alpha * gate)) * (up + 1)
            expected[number] += share * (active @ wide["down_proj"]["kernel"][e] + wide["down_proj"]["bias"][e])
    got = jax.jit(lambda x, layer: moe.mix_experts(spec, x, layer, 1.0)[0])(x, layer)
    np.testing.assert_allclose(got[0], expected, rtol=0, atol=2e-5)


def test_the_bits_of_mxfp4() -> None:
    """Byte 0x52: the lower four bits, 2, are 1; the upper, 5, are 3. Bit 8 is the sign: 0x9c is -2, -0.5. A scale of 128 is 2."""
    blocks, scales = np.zeros((1, 2, 16), np.uint8), np.array([[127, 128]], np.uint8)
    blocks[0, 0, :2], blocks[0, 1, 15] = (0x52, 0x9C), 0x7F
    row = dequantize_mxfp4(blocks, scales).astype(np.float32)[0]
    assert row.shape == (64,)
    assert row[:4].tolist() == [1.0, 3.0, -2.0, -0.5]
    assert row[62:].tolist() == [-12.0, 12.0]
    assert np.count_nonzero(row) == 6


def packed_folder(folder: Path) -> tuple[Path, Path]:
    """Writes the tiny model with experts in MXFP4, and the same model with them dense, as bfloat16."""
    dense, packed = build_model_folder(folder / "dense", "gpt_oss"), build_model_folder(folder / "packed", "gpt_oss")
    tensors, rng = load_file(dense / "model.safetensors"), np.random.default_rng(3)
    stored: dict[str, np.ndarray] = {}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensors[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        experts, rows, outputs = tensor.shape
        bits = rng.integers(0, 16, (experts, outputs, rows))
        scales = rng.integers(122, 126, (experts, outputs, rows // 32))
        exact = values[bits] * np.repeat(2.0 ** (scales - 127), 32, axis=-1)
        tensors[name] = np.ascontiguousarray(np.swapaxes(exact, 1, 2)).astype(ml_dtypes.bfloat16)
        stored[f"{name}_blocks"] = (bits[..., 0::2] | (bits[..., 1::2] << 4)).astype(np.uint8).reshape(experts, outputs, -1, 16)
        stored[f"{name}_scales"] = scales.astype(np.uint8)
    save_file(tensors, dense / "model.safetensors")
    (packed / "model.safetensors").unlink()
    shards = {name: "a.safetensors" if "layers.0" in name else "b.safetensors" for name in stored}
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in stored.items() if shards[name] == shard}, packed / shard)
    (packed / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config = golden_config("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, dense


def test_an_mxfp4_checkpoint_is_its_dequantised_model_and_is_exported_dense(tmp_path: Path) -> None:
    packed, dense = packed_folder(tmp_path)
    policy, expected = (Policy.from_pretrained(folder, dtype="bfloat16") for folder in (packed, dense))
    jax.tree.map(np.testing.assert_array_equal, policy.params, expected.params)
    rounded = [Policy.from_pretrained(folder, dtype="bfloat16", quantization="int8").params for folder in (packed, dense)]
    jax.tree.map(np.testing.assert_array_equal, *rounded)
    merged = Path(policy.save_merged(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    with TensorFiles(merged) as files, TensorFiles(dense) as original:
        assert files.files.keys() == original.files.keys()
        assert not files.packed
        for name in original.files:
            np.testing.assert_array_equal(files.read(name), original.read(name))
    jax.tree.map(np.testing.assert_array_equal, Policy.from_pretrained(merged, dtype="bfloat16").params, expected.params)


def test_experts_stay_in_mxfp4_exactly_as_they_are(tmp_path: Path) -> None:
    """Whatever scales the file has; and all other matrices stay in bfloat16."""
    packed, dense = packed_folder(tmp_path)
    kept = Policy.from_pretrained(packed, dtype="bfloat16", quantization="mxfp4", lora=LORA).params
    expected = Policy.from_pretrained(dense, dtype="bfloat16").params
    leaves = dict(flatten(kept))
    for path, leaf in flatten(expected):
        own = leaves[path]
        assert isinstance(own, QuantizedWeight) == (path[1] in EXPERT_LINEARS and path[-1] == "kernel"), path
        values = np.asarray(own.astype(leaf.dtype)) if isinstance(own, QuantizedWeight) else np.asarray(own)
        np.testing.assert_array_equal(values, np.asarray(leaf))
    assert params_bytes(kept) < params_bytes(expected)


@pytest.mark.slow
def test_experts_in_mxfp4_compute_exactly_what_dense_ones_do(tmp_path: Path) -> None:
    """nf4, of as many bits, changes log-probabilities. In bfloat16 and float32."""
    packed, dense = packed_folder(tmp_path)
    ids, _ = read_golden("gpt_oss")
    rows = [[int(token) for token in row] for row in ids]
    prompts, completions = [row[:5] for row in rows], [row[5:20] for row in rows]
    logps: dict[tuple[str, str], np.ndarray] = {}
    for dtype in ("bfloat16", "float32"):
        kept = Policy.from_pretrained(packed, dtype=dtype, quantization="mxfp4", lora=LORA)
        expected = Policy.from_pretrained(dense, dtype=dtype, lora=LORA)
        for name, policy in (("mxfp4", kept), ("dense", expected)):
            logps[name, dtype] = np.concatenate(policy.logprobs(prompts, completions))
    rounded = Policy.from_pretrained(packed, dtype="float32", quantization="nf4", lora=LORA)
    change = np.abs(np.concatenate(rounded.logprobs(prompts, completions)) - logps["dense", "float32"]).max()
    exact = {dtype: float(np.abs(logps["mxfp4", dtype] - logps["dense", dtype]).max()) for dtype in ("bfloat16", "float32")}
    print({"largest change of a log-probability": exact, "nf4": float(change)})
    assert exact["float32"] < 1e-5  # sums in another order: dense experts of few tokens are not sorted
    assert exact["bfloat16"] < 0.1
    assert change > 0.05


def test_mxfp4_is_for_experts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.quantization: mxfp4 is for experts, and this model has none: use nf4"):
        Policy.from_pretrained(build_model_folder(tmp_path, "qwen3"), quantization="mxfp4", lora=LORA)


def test_part_of_an_mxfp4_weight_is_read_alone(tmp_path: Path) -> None:
    packed, dense = packed_folder(tmp_path)
    index = (slice(1, 3), slice(8, 24), slice(1, 40, 2))
    with TensorFiles(packed) as files, TensorFiles(dense) as original:
        np.testing.assert_array_equal(files.read(f"{EXPERTS}.gate_up_proj", index), original.read(f"{EXPERTS}.gate_up_proj", index))


def test_mxfp4_without_its_scales_is_refused(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path)
    tensors = load_file(packed / "a.safetensors")
    del tensors[f"{EXPERTS}.down_proj_scales"]
    save_file(tensors, packed / "a.safetensors")
    index = json.loads((packed / INDEX).read_text())
    del index["weight_map"][f"{EXPERTS}.down_proj_scales"]
    (packed / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"down_proj_scales is missing"):
        Policy.from_pretrained(packed)


def test_other_quantised_checkpoints_are_still_refused() -> None:
    with pytest.raises(ModelError, match=r"quantised \(fp8\)"):
        read_spec(golden_config("gpt_oss") | {"quantization_config": {"quant_method": "fp8"}})


def test_all_linear_is_attention_and_experts_are_refused_by_name() -> None:
    spec = tiny_policy("gpt_oss").spec
    adapters = init_lora(spec, LoraConfig(rank=4), jax.random.key(0))
    assert set(adapters["layers"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ConfigError, match=r"lora\.targets.*all experts of a layer in one tensor"):
        init_lora(spec, LoraConfig(rank=4, targets=["q_proj", "gate_proj", "up_proj"]), jax.random.key(0))


def test_the_published_config_is_read_into_the_right_fields() -> None:
    spec = read_spec(PUBLISHED["gpt-oss-20b"][0])
    assert (spec.windows[:2], spec.experts, spec.experts_per_token, spec.sinks, spec.mlp_bias) == ((128, None), 32, 4, True, True)
    assert (spec.swiglu_alpha, spec.swiglu_limit, spec.qkv_bias, spec.output_bias) == (1.702, 7.0, True, True)
    rope = spec.ropes[0]
    assert (rope.kind, rope.factor, rope.truncate, rope.original_length) == ("yarn", 32.0, False, 4096)
    assert rope.attention_factor == pytest.approx(0.1 * np.log(32) + 1)


@pytest.mark.slow
def test_a_quantised_base_has_the_values_of_the_rounded_weights() -> None:
    """int8 experts with biases, against the float32 ones: rounding moves log-probabilities, by little."""
    ids, expected = read_golden("gpt_oss")
    policy = tiny_policy("gpt_oss")
    rounded = quantize_params(policy.spec, policy.params, "int8")
    dense = jax.tree.map(
        lambda x: dequantize(x) if isinstance(x, QuantizedWeight) else x, rounded, is_leaf=lambda x: isinstance(x, QuantizedWeight)
    )
    texts = ids[:, :9].tolist(), ids[:, 9:].tolist()
    got, same = (dataclasses.replace(policy, params=params, _scorer=[]).logprobs(*texts) for params in (rounded, dense))
    np.testing.assert_allclose(np.stack(got), np.stack(same), rtol=0, atol=1e-4)
    assert 1e-4 < np.abs(np.stack(got) - expected[:, 8:]).mean() < 0.3
