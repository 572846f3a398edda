"""The benchmark: its counts, its output, and that it runs the training loop's own step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from tiny_runs import CONFIG, tiny_model

from grpo_jax.cli import main
from grpo_jax.config import ConfigError
from grpo_jax.tools.bench import MEDIANS, BenchOptions, RandomPrompts, bench_policy, heavy_tail
from grpo_jax.weights.hf import read_folder_spec

WORDS = [
    "--prompts",
    "2",
    "--num_generations",
    "3",
    "--prompt_length",
    "5",
    "--completion_length",
    "7",
    "--steps",
    "1",
    "--lora_rank",
    "2",
]


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compiling():
        yield


def test_lengths_have_a_heavy_tail_with_the_mean_and_the_end_they_should() -> None:
    for rows, longest in ((32, 128), (64, 1024), (8, 16)):
        lengths = heavy_tail(rows, longest)
        assert np.array_equal(lengths, heavy_tail(rows, longest))
        assert lengths.min() >= 1
        assert lengths.max() == longest
        assert abs(lengths.mean() / longest - 0.25) < 1 / rows + 0.02  # the longest is put to the end afterwards
        assert np.median(lengths) < lengths.mean()


def test_prompts_are_the_same_for_the_same_step_and_differ_between_steps() -> None:
    source = RandomPrompts(read_folder_spec(tiny_model()), 3, 6)
    first, again, next_one = source.batch(4), source.batch(4), source.batch(5)
    assert first.prompt_ids == again.prompt_ids != next_one.prompt_ids
    assert [len(ids) for ids in first.prompt_ids] == [6, 6, 6]
    assert list(first.indices) == [12, 13, 14]
    assert not set(first.indices) & set(next_one.indices)


def counted_by_token(spec: Any, options: BenchOptions, lengths: list[int]) -> tuple[float, float]:
    """Counts the operations of the update and the bytes of the rollout token by token, in float32."""
    matrices = spec.layers * sum(a * b for a, b in spec.linear_shapes().values())
    head, p = spec.vocab * spec.width, options.prompt_length
    forward = backward = 0.0
    for _ in range(options.prompts):
        forward += 2 * matrices * p + sum(4 * spec.layers * spec.heads * spec.head_dim * (t + 0.5) for t in range(p))
        backward += 2 * matrices * p + sum(8 * spec.layers * spec.heads * spec.head_dim * (t + 0.5) for t in range(p))
    for length in lengths:
        for t in range(length):
            attention = 4 * spec.layers * spec.heads * spec.head_dim * (p + t + 0.5)
            forward += 2 * matrices + 2 * head + attention
            backward += 2 * matrices + 2 * head + 2 * attention
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    traffic = 0.0
    for t in range(max(lengths)):
        traffic += 4 * (matrices + head) + token_bytes * options.prompts * p
        traffic += sum(token_bytes * (t + 0.5) for length in lengths if t < length)
    return 2 * forward + backward, traffic


def test_the_cost_of_a_step_is_counted_from_the_shapes() -> None:
    options = BenchOptions(model=str(tiny_model()), prompts=2, num_generations=2, prompt_length=6, completion_length=9)
    policy, _ = bench_policy(options.config())
    cost = options.cost(policy)
    flops, traffic = counted_by_token(policy.spec, options, [9] * 4)
    assert cost.update_tokens == 2 * 6 + 4 * 9
    np.testing.assert_allclose(cost.update_flops, flops, rtol=1e-9)
    np.testing.assert_allclose(cost.rollout_bytes, traffic, rtol=1e-9)


def test_one_line_of_json_is_the_last_that_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(tiny_model()), *WORDS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in MEDIANS:
        assert result[name] > 0
        assert [step[name] for step in result["steps"]] == [result[name]]
    step = result["steps"][0]
    assert result["step_seconds"] >= step["rollout_seconds"] + step["update_seconds"]
    cost = result["computed_from"]
    np.testing.assert_allclose(result["rollout_tokens_per_second"] * result["rollout_seconds"], 2 * 3 * 7, rtol=1e-6)
    np.testing.assert_allclose(result["update_tokens_per_second"] * result["update_seconds"], 2 * 5 + 2 * 3 * 7, rtol=1e-6)
    assert result["mfu"] == cost["update_flops"] / result["update_seconds"] / result["matmul_flops_per_second"]
    assert result["mbu"] == cost["rollout_bytes"] / result["rollout_seconds"] / result["memory_bytes_per_second"]
    assert result["compile_seconds"] > 0
    assert result["logp_difference_max"] < 1e-4
    assert not result["random_weights"]


def test_the_default_output_is_a_table_and_missing_weights_are_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["bench", "--model", str(tmp_path), *WORDS, "--ragged", "--slots", "2"]) == 0
    out = capsys.readouterr().out
    assert "weights: random" in out
    assert "rollout:" in out
    assert "update against matmuls:" in out


def test_stop_tokens_are_ignored_and_lengths_are_as_requested() -> None:
    options = BenchOptions(model=str(tiny_model()), prompts=2, num_generations=2, completion_length=10, capacity=80)
    policy, random_weights = bench_policy(options.config())
    assert policy.stop_ids == ()
    assert not random_weights
    assert options.config().rollout.max_completion_length == 80
    limits = options.limits()
    assert limits is not None
    assert limits.tolist() == [10] * 4
    with pytest.raises(ConfigError, match=r"capacity: 5; use at least completion_length .10."):
        BenchOptions(model="m", completion_length=10, capacity=5).config()
