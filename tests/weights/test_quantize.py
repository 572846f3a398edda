"""Quantised base weights: formats against NumPy, loading, memory, training, sampling, export."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from jax.sharding import SingleDeviceSharding
from padded_batches import shapes_of
from plain_oracles import quick_compiling, with_random_adapters
from safetensors.numpy import load_file

from grpo_jax.config import Config, ConfigError, LoraConfig, ObjectiveConfig, OptimConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.models.linear import join_linears
from grpo_jax.models.parameters import abstract_params, flatten, nest, param_specs
from grpo_jax.models.spec import ModelError, ModelSpec, Rope
from grpo_jax.models.transformer import Transformer, split_layers
from grpo_jax.policy import Policy
from grpo_jax.run.given_policy import config_with_policy
from grpo_jax.run.saved import load_run
from grpo_jax.types import Frozen, Params
from grpo_jax.weights.hf import read_folder_spec
from grpo_jax.weights.loading import load_params
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import params_bytes, quantization_of, quantize_params, quantized_specs
from grpo_kernels import QuantizedWeight, dequantize, quantize, quantized_shapes, weight_bytes
from grpo_kernels.ops.quantized_matmul.formats import NF4, group_size

FORMATS = ["int8", "int4", "nf4"]
LORA = LoraConfig(rank=4, alpha=8.0)

rounding = jax.jit(quantize, static_argnums=1)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def bfloat16(x: Any) -> np.ndarray:
    """x rounded to bfloat16, as float32."""
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)


def rounded(w: np.ndarray, form: str, group: int) -> np.ndarray:
    """The nearest matrix of a format, by a search over all values that each group has."""
    out = np.empty_like(w)
    for start in range(0, len(w), group):
        block = w[start : start + group]
        top = np.take_along_axis(block, np.abs(block).argmax(axis=0)[None], axis=0)
        if form == "int8":
            numbers = np.arange(-127, 128)[:, None] * (np.abs(top) / np.float32(127))
        elif form == "int4":
            numbers = np.arange(-8, 8)[:, None] * bfloat16(top / -8)
        else:
            numbers = np.array(NF4, np.float32)[:, None] * bfloat16(np.abs(top))
        nearest = np.abs(block[None] - numbers[:, None]).argmin(axis=0)
        out[start : start + group] = np.take_along_axis(numbers, nearest, axis=0)
    return out


def test_the_codebook_is_that_of_qlora() -> None:
    """Appendix E: quantiles of the normal distribution, evenly spaced in probability, zero among them, largest 1."""
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4, want / want.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_quantising_rounds_to_the_nearest_value(form: str) -> None:
    """Groups of 128 and 64, one of zeros; widths that 64 does not divide; and the relative error in the docstring."""
    rng = np.random.default_rng(0)
    for inputs, group in [(256, {"int8": 256, "int4": 128, "nf4": 64}), (172, {"int8": 172, "int4": 86, "nf4": 43})]:
        w = rng.normal(size=(inputs, 40)).astype(np.float32)
        w[:, 3] = 0
        q = rounding(w, form)
        assert (q.format, q.group, q.shape) == (form, group[form], (inputs, 40))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), q) == jax.tree.map(
            lambda x: (x.shape, x.dtype), quantized_shapes(form, (inputs, 40))
        )
        # A tie between two values may go either way, with the same error.
        got, want = np.asarray(dequantize(q)), rounded(w, form, group[form])
        np.testing.assert_allclose(np.abs(got - w), np.abs(want - w), rtol=0, atol=1e-6)
        assert np.all(got[:, 3] == 0)
        error = np.sqrt(np.mean(np.square(got - w))) / np.std(w)
        assert error < {"int8": 0.008, "int4": 0.107, "nf4": 0.1}[form]


def test_qwix_dequantises_to_the_same_values() -> None:
    """Its struct has the same parts; compared where it is installed."""
    qwix = pytest.importorskip("qwix")
    w = jnp.asarray(np.random.default_rng(1).normal(size=(128, 6)), jnp.float32)
    for form in FORMATS:
        q = rounding(w, form)
        theirs = qwix.QArray(q.values, q.scale.astype(jnp.float32), None, "nf4" if form == "nf4" else q.values.dtype)
        np.testing.assert_array_equal(np.asarray(qwix.dequantize(theirs)), np.asarray(dequantize(q)))


def test_a_width_without_groups_is_refused_by_name(tmp_path: Path) -> None:
    assert [group_size("int4", width) for width in (14336, 896, 192, 172, 48)] == [128, 128, 64, 86, 48]
    assert [group_size("nf4", width) for width in (14336, 172, 48)] == [64, 43, 48]
    with pytest.raises(ValueError, match="weight: no number from 16 to 64 divides its input width 131"):
        group_size("nf4", 131)
    with pytest.raises(ValueError, match="int3"):
        group_size("int3", 64)
    folder = tiny_runs.tiny_model()
    spec = dataclasses.replace(read_folder_spec(folder), ffw=131)
    with pytest.raises(ModelError, match=r"layers/down_proj/kernel: no number.*131.*use int8"):
        load_params(folder, spec, jnp.float32, quantization="int4")


@functools.cache
def policy_of(form: str, dtype: str = "float32") -> Policy:
    """The tiny model in a format, with random adapters."""
    return with_random_adapters(Policy.from_pretrained(tiny_runs.tiny_model(), lora=LORA, dtype=dtype, quantization=form))


@pytest.mark.parametrize("form", FORMATS)
def test_loading_quantises_only_the_layers_matrices(form: str) -> None:
    """Each as `quantize` gives it; all other parameters are unchanged bit for bit."""
    dense = dict(flatten(policy_of("none").params))
    loaded = policy_of(form).params
    assert (quantization_of(loaded), quantization_of(policy_of("none").params)) == (form, "none")
    for path, leaf in flatten(loaded):
        if path[-1] != "kernel":
            np.testing.assert_array_equal(leaf, dense[path])
            continue
        assert isinstance(leaf, QuantizedWeight)
        for layer, matrix in enumerate(dense[path]):
            tiny_runs.assert_same_arrays(jax.tree.map(lambda x, n=layer: x[n], leaf), rounding(matrix, form))
    again = jax.jit(lambda params: quantize_params(policy_of(form).spec, params, form))(policy_of("none").params)
    tiny_runs.assert_same_arrays(again, loaded)


def test_bytes_of_a_quantised_base() -> None:
    """A feed-forward matrix of Llama-3.1-8B: 4 bits per value and 16 per group of 128; and the tiny model."""
    assert weight_bytes(quantized_shapes("int4", (4096, 14336))) == 4096 * 14336 // 2 + 32 * 14336 * 2
    assert weight_bytes(quantized_shapes("nf4", (4096, 14336))) == 4096 * 14336 // 2 + 64 * 14336 * 2
    assert weight_bytes(quantized_shapes("int8", (4096, 14336))) == 4096 * 14336 + 4 * 14336
    sizes = {form: params_bytes(policy_of(form).params) for form in ("none", *FORMATS)}
    matrices, outputs = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48), 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    rest = 4 * (261 * 32 + 5 * 32)
    assert sizes["none"] == 4 * matrices + rest
    assert sizes["int8"] == matrices + 4 * outputs + rest
    assert sizes["int4"] == sizes["nf4"] == matrices // 2 + 2 * outputs + rest  # one group: no width is above 48


def test_one_dense_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While loading, no array put on the device is larger than one matrix or the embedding, in the file's dtype."""
    sizes: list[int] = []
    put = jax.device_put

    def watched(x: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(np.asarray(x).size)
        return put(x, *rest, **named)

    monkeypatch.setattr(jax, "device_put", watched)
    folder = tiny_runs.tiny_model()
    load_params(folder, read_folder_spec(folder), jnp.float32, quantization="int4")
    assert sizes.count(32 * 48) == 6  # gate, up and down of two layers
    assert max(sizes) == 32 * 48


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_log_probabilities_match_a_dense_model_of_the_rounded_weights(form: str) -> None:
    """Both with adapters."""
    quantized = policy_of(form)
    weights = {
        path: leaf.astype(jnp.float32) if isinstance(leaf, QuantizedWeight) else leaf for path, leaf in flatten(quantized.params)
    }
    dense = dataclasses.replace(quantized, params=nest(weights), _scorer=[])
    prompts, completions = [[5, 9, 17], [40, 7]], [[3, 88, 61, 12], [200, 4]]
    for one, other in zip(quantized.logprobs(prompts, completions), dense.logprobs(prompts, completions), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # sums in another order


def test_split_and_joined_layers_have_the_same_weights() -> None:
    """As in decoding on a CPU: the joined weight is the concatenation of the single ones."""
    layer = split_layers(policy_of("nf4").spec, {"params": policy_of("nf4").params})["params"]["layers_1"]
    joined = join_linears(layer)[0]["qkv_proj"]["kernel"]
    parts = [np.asarray(dequantize(layer[name]["kernel"])) for name in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_array_equal(np.asarray(dequantize(joined)), np.concatenate(parts, axis=1))


@pytest.mark.slow
def test_a_saved_run_loads_with_the_same_weights(tmp_path: Path) -> None:
    """In bfloat16, where the sampler does not merge adapters; and a policy without adapters is refused."""
    model = {"quantization": "nf4", "dtype": "bfloat16"}
    config = tiny_runs.config_of(tmp_path / "run", model=model, train={"save_every": 1, "steps": 1})
    result = tiny_runs.run(config).result
    assert (
        result.history[0]["sampling/logp_difference/max"] < 0.2
    )  # bfloat16 values are 0.03 apart at the size of this model's logits
    again = load_run(tmp_path / "run")[1]
    tiny_runs.assert_same_arrays(again.variables, result.policy.variables)
    with pytest.raises(ConfigError, match=r"model.quantization is 'nf4'.*lora.rank"):
        config_with_policy(Config(), dataclasses.replace(again, adapters=None, lora=None))


def test_merging_adds_the_adapters_to_the_original(tmp_path: Path) -> None:
    """Not to the rounded weights; and the adapter folder does not depend on the format."""
    own, dense = policy_of("int4"), policy_of("none")
    merged = load_file(own.save_merged(tmp_path / "int4") / "model.safetensors")
    for name, tensor in load_file(dense.save_merged(tmp_path / "none") / "model.safetensors").items():
        np.testing.assert_array_equal(merged[name], tensor)
    again = Policy.from_pretrained(tiny_runs.tiny_model(), adapter=own.save_adapter(tmp_path / "adapter"), quantization="int4")
    tiny_runs.assert_same_arrays(again.variables, own.variables)


def test_a_quantised_base_needs_adapters() -> None:
    assert Config.from_dict({"model": {"quantization": "nf4"}}).model.quantization == "nf4"
    with pytest.raises(ConfigError, match=r"model.quantization is 'int4': .*lora.rank"):
        Config.from_dict({"model": {"quantization": "int4"}, "lora": {"rank": 0}})
    with pytest.raises(ConfigError, match="did you mean int4"):
        Config.from_dict({"model": {"quantization": "int-4"}})
    with pytest.raises(ConfigError, match="quantization is 'fp8'"):
        Policy.from_pretrained(tiny_runs.tiny_model(), quantization="fp8")


TRAINED = ["int4", "nf4"]


@functools.cache
def trained(form: str) -> tiny_runs.Finished:
    """Trains two steps on a quantised base with a KL term."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = tiny_runs.config_of(folder / "run", model={"quantization": form}, objective={"beta": 0.1})
    return tiny_runs.run(config)


@pytest.mark.slow
@pytest.mark.parametrize("form", TRAINED)
def test_training_changes_only_the_adapters(form: str) -> None:
    """The base stays at the rounded weights; the reference is that base, so the divergence starts at zero."""
    result = trained(form).result
    fresh = Policy.from_pretrained(tiny_runs.tiny_model(), lora=LORA, quantization=form)
    tiny_runs.assert_same_arrays(result.policy.params, fresh.params)
    assert all(np.any(np.asarray(pair["b"])) for pair in (result.policy.adapters or {})["layers"].values())
    first, second = result.history
    assert abs(first["kl_divergence"]) < 1e-6 < second["kl_divergence"]


@pytest.mark.parametrize("form", ["int4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_sampler_and_trainer_agree(form: str) -> None:
    """In float32, where the sampler merges the adapters into dense weights once per rollout and the trainer never does."""
    for metrics in trained(form).result.history:
        assert metrics["sampling/logp_difference/max"] < 1e-4


STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big,
red ball. She wanted to play with it, but it was too high. Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't
know what to do. She said, "I want to play with your ball, but I can't find it." Lily was sad."""


@pytest.mark.slow
def test_the_effect_on_a_story_models_log_probabilities(shared_data: Path) -> None:
    """Mean |difference| in nats per token of the 260K-parameter Llama; its widths of 64 and 172 give groups of 64, 86 and 43."""
    folder = shared_data / "stories260k"
    if not (folder / "config.json").is_file():
        pytest.skip("needs shared/data/stories260k")
    dense = Policy.from_pretrained(folder, dtype="float32")
    ids = dense.need_tokenizer().encode_prompt(STORY, chat=False, template_arguments={})

    def logprobs(params: Params) -> np.ndarray:
        return dataclasses.replace(dense, params=params).logprobs([ids[:1]], [ids[1:]])[0]

    def changed(change: Callable[[jax.Array], jax.Array]) -> Params:
        return nest({path: jax.lax.map(change, x) if path[-1] == "kernel" else x for path, x in flatten(dense.params)})

    want, effect, noise = logprobs(dense.params), {}, {}
    for form in FORMATS:
        effect[form] = np.abs(logprobs(changed(lambda w, f=form: dequantize(quantize(w, f)))) - want).mean()
        # Random errors of the same size: a format must not be much worse.
        error = lambda w, f=form: jnp.std(dequantize(quantize(w, f)) - w)  # noqa: E731
        blur = lambda w, e=error: w + e(w) * jax.random.normal(jax.random.key(0), w.shape)  # noqa: E731
        noise[form] = np.abs(logprobs(changed(blur)) - want).mean()
    print(
        f"mean |difference| of log-probabilities over {len(want)} tokens, nats:", {form: f"{x:.3f}" for form, x in effect.items()}
    )
    for form in FORMATS:
        assert effect[form] < 1.25 * noise[form]


LAYERS = 8
WIDE = ModelSpec(
    family="llama",
    vocab=512,
    layers=LAYERS,
    width=512,
    ffw=1024,
    heads=4,
    kv_heads=4,
    head_dim=128,
    norm_eps=1e-5,
    tied=True,
    windows=(None,) * LAYERS,
    ropes=(Rope(1e4),),
    rope_of_layer=(0,) * LAYERS,
    query_scale=128**-0.5,
)
"""As wide as the blocks of the kernels; everything else is small."""


@pytest.mark.slow
def test_an_update_stores_no_dense_weight(chips: dict[str, SingleDeviceSharding]) -> None:
    """Compiled for a v6e with eight layers: all temporaries together are below two layers' matrices in bfloat16."""

    def on(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chips["v6e"]), tree)

    b, g, length = 1, 4, 16
    base = dict(flatten(abstract_params(WIDE, jnp.bfloat16))) | quantized_specs(param_specs(WIDE), "int4")
    adapters = jax.eval_shape(lambda: init_lora(WIDE, LORA, jax.random.key(0)))
    model = Transformer(WIDE, jnp.dtype("bfloat16"), LORA.scale, "layer", implementation="mosaic_tpu")
    optim = OptimConfig()
    rate = functools.partial(learning_rate_at, optim, 10)
    learner = Learner(model, ObjectiveConfig(), make_optimizer(optim, 10), rate, False, 1.0, length)
    batch = shapes_of(b, g, length, length, (b, g), one_size=True)
    arguments = on((jax.eval_shape(learner.init, adapters), batch, Frozen(nest(base), {})))
    memory: Any = jax.jit(functools.partial(train_step, learner), donate_argnums=0).lower(*arguments).compile().memory_analysis()
    print(f"v6e, int4: temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    layer = 2 * (4 * WIDE.width**2 + 3 * WIDE.width * WIDE.ffw)
    assert memory.temp_size_in_bytes < 2 * layer
    assert memory.argument_size_in_bytes < LAYERS * layer / 2
