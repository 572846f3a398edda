"""Models with recurrent layers: states in rollouts with any slots and segments, prompts shared in training, loops over layers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import golden_config, quick_compiling, tiny_policy
from rollouts import PROMPTS, Task, assert_same, engine, plain

from goldens.folders import build_model_folder
from grpo_jax.config import ConfigError, LoraConfig, RolloutConfig
from grpo_jax.learner.logprobs import row_logprobs
from grpo_jax.learner.packing import Lengths, pack, row_sizes
from grpo_jax.models.families import read_spec
from grpo_jax.models.layer_kinds import repeated_units
from grpo_jax.models.parameters import flatten
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.rollout import shapes
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.types import Params
from grpo_jax.weights.lora import init_lora, load_adapter
from grpo_jax.weights.quantize import quantize_params
from grpo_kernels import KeyRanges, QuantizedWeight

C = 14
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=C, temperature=0.7)
STOPS = (2, 5, 20, 40, 60)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def task_of(family: str, **settings: Any) -> Task:
    return Task(family, SETTINGS, stops=STOPS).but(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stacked", "slots", "segment"),
    [
        ("lfm2", False, 2, 3),
        pytest.param("lfm2", True, 5, 4, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", True, 2, 5, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", False, None, 6, marks=pytest.mark.slow),
    ],
)
def test_slots_that_are_refilled_begin_with_the_state_of_their_prompt(
    family: str, stacked: bool, slots: int | None, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sampler without states that computes whole texts, token by token. Prompt slots are overwritten meanwhile."""
    monkeypatch.setattr(shapes, "SPARE_PROMPT_SLOTS", 0)
    task = dataclasses.replace(task_of(family, slots=slots, segment=segment), prompts=(*PROMPTS, (90, 3)))
    for temperature in (0.7, 0.0):
        own = task.but(temperature=temperature)
        assert_same(own, engine(own, stacked=stacked), plain(own))


def test_layers_of_a_few_kinds_are_loops_over_units_with_few_layers() -> None:
    def units(kinds: str) -> list[tuple[str, int]]:
        names: dict[str, Any] = {"a": "attention", "c": "conv", "d": "delta"}
        return [("".join(kind[0] for kind in run.unit), run.count) for run in repeated_units([names[kind] for kind in kinds])]

    assert units("dddadddadddaddda") == [("ddda", 4)]
    assert units("ccaccaccacacacac") == [("cca", 3), ("ca", 3), ("c", 1)]  # LFM2-1.2B
    assert units("aaaa") == [("a", 4)]


B, G = 3, 4
LENGTHS = Lengths(3, 9, 8)


def texts(vocabulary: int) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Ragged prompts and completions, some of one token, and the weight of each token in a loss [N, 8]."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(6, vocabulary, size).tolist() for size in (3, 9, 5)]
    lengths = [8, 1, 5, 2, 7, 3, 1, 4, 6, 8, 2, 5]
    completions = [rng.integers(6, vocabulary, size).tolist() for size in lengths]
    weights = rng.normal(size=(B * G, 8)) * (np.arange(8)[None, :] < np.array(lengths)[:, None])
    return prompts, completions, weights.astype(np.float32)


def without_prompts(ranges: KeyRanges) -> KeyRanges:
    """Ranges in which a prompt and the one completion behind it are a single sequence."""
    start = jnp.where(ranges.prompt_end > ranges.prompt_start, ranges.prompt_start, ranges.own_start)
    none = jnp.zeros_like(start)
    return KeyRanges(none, none, start, ranges.own_end)


def loss_and_gradient(family: str, tokens: int, generations: int, *, unroll: bool) -> tuple[float, Params]:
    """The weighted mean of log-probabilities, and its gradient of every weight, summed over micro-batches of rows of some tokens.

    Args:
        generations: completions that share a prompt; with 1 each is one sequence with a copy of its prompt.
    """
    policy = tiny_policy(family)
    model = policy.model.clone(unroll=unroll, remat="none" if unroll else "layer")
    prompts, completions, weights = texts(policy.spec.vocab)
    prompts = [prompts[row // G] for row in range(0, B * G, generations)]
    sizes = row_sizes(LENGTHS, len(prompts), generations, tokens)[:1]  # each size is a program
    total, gradient = 0.0, jax.tree.map(lambda x: np.zeros(x.shape), policy.params)
    for part in pack(prompts, completions, [True] * (B * G), sizes, width=8):

        @jax.jit
        def run(params: Params, rows: Any, counts: Any) -> Any:
            def loss(params: Params) -> Any:
                logps, _, _ = row_logprobs(model, {"params": params}, rows, head_trainable=True)
                return jnp.sum(logps * counts) / jnp.float32(B * G)

            return jax.value_and_grad(loss)(params)

        table = np.concatenate([weights, np.zeros((1, 8), np.float32)])
        for number in range(len(part.completions)):
            rows = jax.tree.map(lambda x, number=number: jnp.asarray(x[number]), part.rows)
            rows = rows if generations > 1 else dataclasses.replace(rows, ranges=without_prompts(rows.ranges))
            if not np.any(part.completions[number] < B * G):
                continue
            value, own = run(policy.params, rows, jnp.asarray(table[part.completions[number], part.rows.columns[number]]))
            total, gradient = total + float(value), jax.tree.map(np.add, gradient, own)
    return total, gradient


@pytest.mark.slow
@pytest.mark.parametrize(("family", "unroll"), [("lfm2", True), ("qwen3_5_text", False), ("qwen3_next_dense", False)])
def test_a_shared_prompt_is_copies_of_it_where_groups_are_cut_into_several_rows(family: str, unroll: bool) -> None:
    """Full training: rows of 24 tokens cut every group of four, against a row for each completion with a prompt of its own."""
    shared, gradient = loss_and_gradient(family, 24, G, unroll=unroll)
    copied, own_gradient = loss_and_gradient(family, 17, 1, unroll=unroll)
    assert shared == pytest.approx(copied, rel=1e-6, abs=1e-6)
    for path, leaf in flatten(gradient):
        expected = dict(flatten(own_gradient))[path]
        assert np.linalg.norm(leaf - expected) <= 1e-5 * np.linalg.norm(expected), path
        assert np.any(expected), path


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("lfm2", {"layer_types": ["conv"] * 5}, "layer_types has no full_attention: at least one layer needs attention"),
        ("lfm2", {"layer_types": ["mamba"] * 5}, "layer_types is .*use a list of 5 names from conv, full_attention"),
        ("lfm2", {"conv_dim": 64}, "conv_dim = 64 is not supported"),
        ("lfm2", {"conv_L_cache": 1}, "conv_L_cache is 1: use a whole number from 2"),
        ("lfm2", {"conv_gate": "tanh"}, "attribute conv_gate = .*is not known for model_type"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate = false is not supported"),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "linear_num_value_heads = 3 is not a multiple of linear_num_key_heads = 2"),
        ("qwen3_5_text", {"linear_allow_neg_eigval": True}, "attribute linear_allow_neg_eigval = true is not known"),
        ("qwen3_next", {"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\]: use a list of numbers of layers from 0 to 2"),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 2}, "attribute decoder_sparse_step = 2 is not known"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported \(transformers has experts"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(golden_config(family) | change)


def test_episodes_are_refused_before_anything_is_compiled() -> None:
    policy = tiny_policy("lfm2")
    sampler = Sampler.build(policy.model, (), announce=lambda name: pytest.fail(f"compiles {name}"))
    with pytest.raises(ConfigError, match=r"environment: lfm2 has 3 recurrent layers.*no episodes of several turns"):
        sampler.shapes_for(SETTINGS, 2, (8,), None, episodes=True)


def test_targets_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.targets.*a qwen3_5_text model has no in_proj: choose from q_proj"):
        init_lora(tiny_policy("qwen3_5_text").spec, LoraConfig(rank=2, targets=["q_proj", "in_proj"]), jax.random.key(0))


@pytest.mark.parametrize(("targets", "expected"), [(["o_proj"], False), (["in_proj", "out_proj", "o_proj"], True)])
def test_an_adapter_of_one_out_proj_is_not_one_of_the_other(tmp_path: Path, targets: list[str], expected: bool) -> None:
    """LFM2's files call both attention's and a convolution's output `out_proj`, so PEFT gets a pattern of paths."""
    lora, plain = LoraConfig(rank=2, targets=targets), tiny_policy("lfm2")
    policy = dataclasses.replace(plain, lora=lora, adapters=init_lora(plain.spec, lora, jax.random.key(0)))
    config = json.loads((Path(policy.save_adapter(tmp_path)) / "adapter_config.json").read_text())["target_modules"]

    def adapted(path: str) -> bool:
        return re.fullmatch(config, path) is not None if isinstance(config, str) else path.rsplit(".", 1)[-1] in config

    assert adapted("model.layers.1.self_attn.out_proj")
    assert adapted("model.layers.0.conv.out_proj") == expected
    adapters, read = load_adapter(tmp_path, policy.spec)
    assert set(read.targets) == set(targets)
    jax.tree.map(np.testing.assert_array_equal, adapters, policy.adapters)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_a_quantised_base_is_the_rounded_dense_one(tmp_path: Path, family: str) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, family), quantization="int8", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, policy.params, quantize_params(policy.spec, tiny_policy(family).params, "int8"))
    quantised = {path[1] for path, leaf in flatten(policy.params) if path[-1] == "kernel" and isinstance(leaf, QuantizedWeight)}
    assert quantised == set(policy.spec.linear_shapes())
