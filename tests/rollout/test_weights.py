"""Weights of decoding: joined, merged and scaled ones against NumPy, and a rollout with each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from plain_oracles import LORA, quick_compiling, tiny_policy
from rollouts import PROMPTS, SETTINGS

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grpo_jax.models.linear import join_linears
from grpo_jax.models.parameters import flatten
from grpo_jax.policy import Policy
from grpo_jax.rollout import weights
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.weights import can_join, new_weights, prepare_weights, prepared_shapes, with_unchanged
from grpo_jax.runtime.mesh import make_layout
from grpo_kernels import QuantizedWeight, quantize
from grpo_kernels.ops.quantized_matmul.formats import NF4

ATTENTION, FFW = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def layer_of(rng: np.random.Generator, adapted: tuple[str, ...], stack: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """Makes random weights and adapters of rank 3 for linear layers of 8 inputs."""
    columns = {"q_proj": 12, "k_proj": 4, "v_proj": 4, "gate_proj": 10, "up_proj": 10, "o_proj": 8}

    def matrix(*size: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*stack, *size)), jnp.float32)

    layer = {name: {"kernel": matrix(8, size)} for name, size in columns.items()}
    return layer, {name: {"a": matrix(8, 3), "b": matrix(3, columns[name])} for name in adapted}


@pytest.mark.parametrize(
    "adapted", [(*ATTENTION, *FFW, "o_proj"), ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("o_proj",)], ids=str
)
@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_one_product_of_joined_weights_is_the_products_of_the_parts(adapted: tuple[str, ...], stack: tuple[int, ...]) -> None:
    """With adapters of some of the parts; those of a layer whose input is its own stay as they are."""
    rng = np.random.default_rng(len(adapted))
    layer, adapters = layer_of(rng, adapted, stack)
    joined, pairs = join_linears(layer, adapters)
    assert pairs is not None
    assert set(joined) == {"qkv_proj", "gate_up_proj", "o_proj"}
    assert ("o_proj" in pairs) == ("o_proj" in adapted)
    x = rng.normal(size=(*stack, 5, 8))
    for name, parts in (("qkv_proj", ATTENTION), ("gate_up_proj", FFW)):
        assert (name in pairs) == any(part in adapted for part in parts)
        expected = []
        for part in parts:
            y = x @ np.asarray(layer[part]["kernel"], np.float64)
            if part in adapted:
                y = y + x @ np.asarray(adapters[part]["a"], np.float64) @ np.asarray(adapters[part]["b"], np.float64)
            expected.append(y)
        got = x @ np.asarray(joined[name]["kernel"], np.float64)
        if name in pairs:
            assert pairs[name]["a"].shape[-1] == 3 * sum(part in adapted for part in parts)
            got = got + x @ np.asarray(pairs[name]["a"], np.float64) @ np.asarray(pairs[name]["b"], np.float64)
        np.testing.assert_allclose(got, np.concatenate(expected, axis=-1), rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize(
    "targets",
    [["k_proj", "up_proj", "down_proj"], pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow)],
    ids=str,
)
def test_in_bfloat16_joined_and_separate_weights_give_the_same_rollout(targets: list[str]) -> None:
    """Every column of a joined product is the same sum of the same values."""
    policy = tiny_policy.__wrapped__("qwen2", LoraConfig(rank=4, alpha=8.0, targets=targets), "bfloat16")  # a list has no hash
    made = []
    with quick_compiling():
        for joins in (True, False):
            sampler = dataclasses.replace(Sampler.build(policy.model.clone(unroll=False), ()), joins=[joins])
            prepared = sampler.decoding_weights(policy.variables, SETTINGS)
            assert ("qkv_proj" in prepared["params"]["layers"]) == joins
            made.append(sampler.sample(policy.variables, PROMPTS, SETTINGS, seed=0))
    one, other = made
    same = sum(a == b for a, b in zip(one.completion_ids, other.completion_ids, strict=True))
    assert same >= len(one.completion_ids) - one.near_ties - other.near_ties
    for ours, theirs, a, b in zip(one.logprobs, other.logprobs, one.completion_ids, other.completion_ids, strict=True):
        if a == b:
            # Logits of this size are 2^-6 apart in bfloat16, and a product may be summed in another order.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-5)


def test_merged_adapters_are_the_float64_sum_rounded_once() -> None:
    policy = tiny_policy("llama2", LORA, "bfloat16")
    got = prepare_weights(policy.model, policy.variables, unroll=False, join=False, merge=True)
    assert set(got) == {"params"}
    adapters = policy.variables["lora"]["layers"]
    for name, pair in adapters.items():
        a, b = (np.asarray(pair[leaf], np.float64) for leaf in ("a", "b"))
        kernel = policy.params["layers"][name]["kernel"]
        exact = np.asarray(kernel, np.float64) + LORA.scale * (a @ b)
        rounded = np.asarray(got["params"]["layers"][name]["kernel"], np.float64)
        assert got["params"]["layers"][name]["kernel"].dtype == jnp.bfloat16
        # Half a step of bfloat16, 8 bits; and what float32 rounds before.
        np.testing.assert_allclose(rounded, exact, rtol=2**-8 * 1.0001, atol=1e-6)


def test_unmerged_adapters_have_their_scale_in_b() -> None:
    """The product of bfloat16 values that the trainer computes at every token, bit for bit."""
    policy = tiny_policy("llama2", LoraConfig(rank=3, alpha=5.0), "bfloat16")
    got = prepare_weights(policy.model, policy.variables, unroll=False, join=False)["lora"]["layers"]
    for name, pair in policy.variables["lora"]["layers"].items():
        expected = jnp.asarray(pair["b"], jnp.bfloat16) * jnp.bfloat16(5 / 3)
        np.testing.assert_array_equal(np.asarray(got[name]["b"], np.float32), np.asarray(expected, np.float32))


def test_a_rollout_with_merged_adapters_is_that_of_the_merged_model() -> None:
    policy = tiny_policy("llama2", LORA, "bfloat16")
    settings = dataclasses.replace(SETTINGS, merge_adapters=True)
    params = dict(policy.params) | {"layers": dict(policy.params["layers"])}
    for name, pair in policy.variables["lora"]["layers"].items():
        a, b = (np.asarray(pair[leaf], np.float64) for leaf in ("a", "b"))
        kernel = np.asarray(params["layers"][name]["kernel"], np.float64) + LORA.scale * (a @ b)
        params["layers"][name] = params["layers"][name] | {"kernel": jnp.asarray(kernel, jnp.bfloat16)}
    with quick_compiling():
        sampler = Sampler.build(policy.model, ())
        got = sampler.sample(policy.variables, PROMPTS, settings, seed=0)
        expected = sampler.sample({"params": params}, PROMPTS, SETTINGS, seed=0)
        apart = sampler.sample(policy.variables, PROMPTS, SETTINGS, seed=0)
    assert got.completion_ids == expected.completion_ids
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-5)
    assert any(np.any(a != b) for a, b in zip(got.logprobs, apart.logprobs, strict=True))


@pytest.mark.slow
def test_merged_adapters_train_with_a_capped_importance_weight(tmp_path: Path) -> None:
    """The difference between sampler and trainer is in the metrics, and larger than without merging."""
    differences = {}
    for merge in (False, True):
        config = tiny_runs.config_of(
            tmp_path / str(merge),
            model={"dtype": "bfloat16"},
            lora={"rank": 4, "alpha": 64.0},
            rollout={"merge_adapters": merge},
            objective={"importance_cap": 2.0},
            optim={"learning_rate": 0.02},
            train={"steps": 3},
        )
        history = tiny_runs.run(config).result.history
        assert all(np.isfinite(row["loss"]) for row in history)
        differences[merge] = history[-1]["sampling/logp_difference/mean"]
    assert 0 < differences[True] < 0.2


def test_a_quantised_base_refuses_merged_adapters() -> None:
    with pytest.raises(ConfigError, match=r"rollout.merge_adapters is true: .*int4"):
        Config.from_dict({"model": {"quantization": "int4"}, "rollout": {"merge_adapters": True}})
    assert Config.from_dict({"rollout": {"merge_adapters": True}}).rollout.merge_adapters


@pytest.mark.parametrize("form", ["int4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_dense_copy_of_four_bits(form: str) -> None:
    """Its values are steps or entries of the codebook times their group's scale, and a rollout is that of the few bits."""
    policy = Policy.from_pretrained(tiny_runs.tiny_model(), quantization=form, dtype="float32")
    model = policy.model.clone(unroll=False)
    copied = prepare_weights(model, policy.variables, unroll=False, join=False, dense=True)["params"]["layers"]
    for name in (*ATTENTION, *FFW, "o_proj", "down_proj"):
        kernel: Any = policy.params["layers"][name]["kernel"]
        values, scale = np.asarray(kernel.values).astype(np.int64), np.asarray(kernel.scale).astype(np.float64)
        steps = np.asarray(NF4)[values] if form == "nf4" else values
        expected = steps * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
        assert copied[name]["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(copied[name]["kernel"], expected, rtol=1e-6)
    few = prepare_weights(model, policy.variables, unroll=False, join=False)["params"]["layers"]
    assert isinstance(few["o_proj"]["kernel"], QuantizedWeight)
    with quick_compiling():
        sampler = Sampler.build(model, (), quantization=form)
        ours, theirs = (
            sampler.sample(policy.variables, PROMPTS, dataclasses.replace(SETTINGS, dense_base=dense), seed=0)
            for dense in (True, False)
        )
    assert ours.completion_ids == theirs.completion_ids
    for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_only_four_bits_have_a_dense_copy() -> None:
    for quantization in ("none", "int8"):
        with pytest.raises(ConfigError, match=rf"rollout.dense_base is true: model.quantization is {quantization}, .* int4 or nf4"):
            Config.from_dict({"model": {"quantization": quantization}, "rollout": {"dense_base": True}})
    assert Config.from_dict({"model": {"quantization": "nf4"}, "rollout": {"dense_base": True}}).rollout.dense_base


def test_weights_that_do_not_change_are_not_copied() -> None:
    policy = tiny_policy("llama2", LORA, "bfloat16")
    settings = {"unroll": False, "join": True, "merge": False}
    new = jax.jit(lambda x: new_weights(policy.model, x, **settings))(policy.variables)
    names = {path[:3] for path, _ in flatten(new)}
    adapted = {("lora", "layers", name) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    assert names == {("params", "layers", name) for name in ("qkv_proj", "gate_up_proj", "norms")} | adapted
    shapes = prepared_shapes(policy.model, policy.variables, **settings)
    complete = with_unchanged(shapes, policy.variables, new)
    assert complete["params"]["embed"]["embedding"] is policy.params["embed"]["embedding"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), complete) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_weights_are_joined_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of q, k, v, gate and up may take a quarter of the free memory; a quantised one only on a GPU."""
    policy = tiny_policy("llama2", LORA, "bfloat16")
    layers = policy.params["layers"]
    needed = 2 * sum(layers[name]["kernel"].size for name in (*ATTENTION, *FFW))
    assert can_join(policy.model, policy.params, 4 * needed)
    assert not can_join(policy.model, policy.params, 4 * needed - 4)
    assert can_join(policy.model, policy.params, None)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    assert layout is None or can_join(policy.model.clone(layout=layout), policy.params, None)
    int8 = {"layers": {name: {"kernel": quantize(layers[name]["kernel"][0], "int8")} for name in (*ATTENTION, *FFW)}}
    assert not can_join(policy.model, int8, None)
    monkeypatch.setattr(weights, "platform", lambda: "gpu")
    assert can_join(policy.model, int8, None)
