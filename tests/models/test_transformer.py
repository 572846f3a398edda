"""The decoder: the plain forward pass of these tests against transformers, initial values, ropes, windows, remat, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import LORA, golden_config, log_softmax, plain_model, quick_compiling, tiny_policy

from goldens.folders import FAMILIES, model_tensors, read_golden
from grpo_jax.models import transformer
from grpo_jax.models.attention import prefill_attend
from grpo_jax.models.families import read_spec
from grpo_jax.models.layers import parts_of
from grpo_jax.models.parameters import abstract_params, count_parameters, flatten, init_params, nest, param_specs
from grpo_jax.models.rope import rotate
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.transformer import Transformer, forward
from grpo_jax.types import Params
from grpo_jax.weights.lora import init_lora

STORIES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def hidden_states(model: Transformer, variables: Params, ids: np.ndarray) -> np.ndarray:
    """Hidden states [B, T, D] of texts without padding."""
    b, t = ids.shape
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))

    @jax.jit
    def run(variables: Params, ids: jax.Array, positions: jax.Array) -> jax.Array:
        attend = prefill_attend(model, jnp.full((b,), t, jnp.int32), t)
        hidden, _, _ = forward(model, variables, ids, positions, attend)  # type: ignore[misc] - Flax returns a union
        return hidden

    return np.asarray(run(variables, jnp.asarray(ids, jnp.int32), jnp.asarray(positions)).astype(jnp.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_forward_pass_of_the_tests_matches_transformers(family: str) -> None:
    ids, expected = read_golden(family)
    logps = log_softmax(plain_model(family)(jnp.asarray(ids, jnp.int32)))[:, :-1]
    picked = np.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(picked, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_as_many_elements_as_the_tensors(family: str) -> None:
    spec = read_spec(golden_config(family))
    assert count_parameters(spec) == sum(array.size for array in model_tensors(family).values())
    assert hash(spec) == hash(dataclasses.replace(spec))


def test_initial_values_have_the_described_distribution() -> None:
    spec = read_spec(STORIES | {"initializer_range": 0.05, "attention_bias": True})
    params = init_params(spec, jax.random.key(0), jnp.bfloat16)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(spec, "bfloat16"))
    kernel = np.asarray(params["layers"]["gate_proj"]["kernel"], np.float32)
    assert abs(kernel.std() / 0.05 - 1) < 0.02
    assert abs(kernel.mean()) < 0.001
    assert not np.array_equal(kernel[0], kernel[1])
    assert np.all(np.asarray(params["final_norm"]["scale"], np.float32) == 1)
    assert np.all(np.asarray(params["layers"]["q_proj"]["bias"], np.float32) == 0)
    again = init_params(spec, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, again))


def test_norms_that_add_one_start_at_zero() -> None:
    params = init_params(read_spec(golden_config("gemma3")), jax.random.key(0), jnp.float32)
    for part in ("attn_norm", "post_attn_norm", "ffw_norm", "post_ffw_norm", "q_norm", "k_norm"):
        assert np.all(np.asarray(params["layers"][part]["scale"]) == 0), part


def test_every_dimension_of_a_parameter_has_an_axis() -> None:
    for family in FAMILIES:
        for path, p in param_specs(read_spec(golden_config(family))).items():
            assert len(p.axes) == len(p.shape), path


def test_nesting_and_flattening_are_inverse() -> None:
    leaves = {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert nest(leaves) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert dict(flatten(nest(leaves))) == leaves


def test_number_of_parameters_of_the_stories_model() -> None:
    assert count_parameters(read_spec(STORIES)) == 260_032


def test_rotary_frequencies() -> None:
    # theta 10000, head_dim 4: 1 and 10000^(-1/2).
    assert Rope(10000.0).frequencies(4) == pytest.approx([1.0, 0.01])
    assert Rope(10000.0, "linear", factor=4.0).frequencies(4) == pytest.approx([0.25, 0.0025])
    # Llama 3.1, worked by hand: 8192 positions are 8192/2π = 1303.8 turns of the first pair (> 4: unchanged) and 0.0032 of the last
    # (< 1: divided by 8). The 32nd of 64 turns by 500000^(-31·2/128) = 0.0017360, 2.26345 times in 8192: blended by 1.26345/3.
    scaled = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192).frequencies(128)
    assert scaled[0] == 1.0
    assert scaled[63] == pytest.approx(500000.0 ** (-126 / 128) / 8)
    turned = 500000.0 ** (-62 / 128)
    assert scaled[31] == pytest.approx(turned * (0.42115 + (1 - 0.42115) / 8), rel=1e-4)


def test_a_sliding_window_passes_information_over_layers_times_its_width() -> None:
    policy = tiny_policy("mistral")  # two layers, window 7: a token has an effect up to 2 · 6 positions later
    ids = np.random.default_rng(1).integers(6, policy.spec.vocab, (1, 24))
    other = ids.copy()
    other[0, 4] = 3 + (ids[0, 4] % 50)
    assert other[0, 4] != ids[0, 4]
    difference = np.abs(
        hidden_states(policy.model, policy.variables, ids) - hidden_states(policy.model, policy.variables, other)
    ).max(axis=-1)[0]
    assert np.all(difference[:4] == 0)
    assert np.all(difference[4:17] > 1e-6)
    assert np.all(difference[17:] == 0)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_rematerialised_layers_give_the_same_hidden_states(family: str) -> None:
    policy = tiny_policy(family, LORA)
    ids = np.random.default_rng(2).integers(6, policy.spec.vocab, (2, 9))
    scanned, again = (Transformer(policy.spec, policy.dtype, LORA.scale, remat) for remat in ("none", "layer"))
    np.testing.assert_allclose(
        hidden_states(again, policy.variables, ids), hidden_states(scanned, policy.variables, ids), rtol=0, atol=1e-6
    )


def test_parts_are_equal() -> None:
    assert [parts_of(20_480, least) for least in (1, 3, 7)] == [1, 4, 8]
    assert parts_of(20_479, 3) == 1


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_feed_forward_in_parts_gives_the_same_and_has_only_parts_of_its_wide_arrays(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 12 tokens in three parts of 8 tokens, forward and backward."""
    policy, ids = tiny_policy(family, LORA), np.arange(24, dtype=np.int32).reshape(2, 12)
    positions = jnp.asarray(np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)))

    def result() -> tuple[Params, str]:
        model = Transformer(policy.spec, policy.dtype, LORA.scale, "layer")

        def loss(adapters: Params) -> jax.Array:
            attend = prefill_attend(model, jnp.full((2,), 12, jnp.int32), 12)
            variables = policy.variables | {"lora": adapters}
            return jnp.sum(jnp.sin(forward(model, variables, jnp.asarray(ids), positions, attend)[0]))

        gradient = jax.value_and_grad(loss)
        return jax.jit(gradient)(policy.adapters), str(jax.make_jaxpr(gradient)(policy.adapters))

    expected, program = result()
    wide = [f"f32[{tokens},{policy.spec.ffw}]" for tokens in (24, 8)]
    assert policy.spec.experts or [text in program for text in wide] == [True, False]
    monkeypatch.setattr(transformer, "FEED_TOKENS", 8)
    got, program = result()
    assert policy.spec.experts or [text in program for text in wide] == [False, True]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, expected)


def test_initial_adapters_change_nothing_and_trained_ones_do() -> None:
    policy = tiny_policy("qwen3")
    model = Transformer(policy.spec, policy.dtype, LORA.scale)
    ids = np.random.default_rng(3).integers(6, policy.spec.vocab, (1, 9))
    base = hidden_states(model, {"params": policy.params}, ids)
    started = {"params": policy.params, "lora": init_lora(policy.spec, LORA, jax.random.key(0))}
    np.testing.assert_array_equal(hidden_states(model, started, ids), base)
    assert np.abs(hidden_states(model, tiny_policy("qwen3", LORA).variables, ids) - base).max() > 0.01


def test_bfloat16_hidden_states_are_near_those_of_float32() -> None:
    policy = tiny_policy("llama2")
    wide = hidden_states(policy.model, policy.variables, np.arange(6, 20)[None])
    model = Transformer(policy.spec, jnp.dtype("bfloat16"))

    def run(variables: Params) -> jax.Array:
        ids = jnp.arange(6, 20, dtype=jnp.int32)[None]
        attend = prefill_attend(model, jnp.array([14], jnp.int32), 14)
        return forward(model, variables, ids, jnp.arange(14, dtype=jnp.int32)[None], attend)[0]  # type: ignore[index] - Flax returns a union

    narrow = jax.jit(run)(policy.variables)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(np.asarray(narrow, np.float32) - wide).mean() < 0.05  # 8 bits of mantissa, values around 1


def test_compile_time_does_not_grow_with_depth() -> None:
    def lines(layers: int) -> int:
        spec: ModelSpec = read_spec(STORIES | {"num_hidden_layers": layers})
        model = Transformer(spec, jnp.dtype("float32"))
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)

        def run(variables: Params, ids: jax.Array, positions: jax.Array) -> jax.Array:
            attend = prefill_attend(model, jnp.array([4], jnp.int32), 4)
            return forward(model, variables, ids, positions, attend)[0]

        lowered = jax.jit(run).lower({"params": abstract_params(spec, "float32")}, ids, ids)
        return lowered.as_text().count("\n")

    assert lines(40) == lines(4)


def test_a_bfloat16_query_is_rounded_once() -> None:
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.bfloat16)
    angles = rng.uniform(0, 6, (1, 5, 4))
    scale = 24**-0.5  # not a power of two
    got = rotate(x, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), scale)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    c, s = np.cos(angles)[:, :, None, :], np.sin(angles)[:, :, None, :]
    exact = scale * np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    assert got.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: rounding once is off by at most 2**-8 of the number; rounding twice gives 0.0053 here, above 0.0039.
    assert np.max(np.abs(np.asarray(got, np.float64) / exact - 1)) < 2**-8 * 1.01
