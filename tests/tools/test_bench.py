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
from grpo_jax.tools.bench import MEDIANS, BenchOptions
from grpo_jax.tools.bench.inputs import RandomPrompts, bench_policy
from grpo_jax.tools.bench.lengths import StepLengths
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


def test_prompts_are_the_same_for_the_same_step_and_differ_between_steps() -> None:
    source = RandomPrompts(read_folder_spec(tiny_model()), StepLengths(np.array([6]), rows=3))
    first, again, next_one = source.batch(4), source.batch(4), source.batch(5)
    assert first.prompt_ids == again.prompt_ids != next_one.prompt_ids
    assert [len(ids) for ids in first.prompt_ids] == [6, 6, 6]
    assert list(first.indices) == [12, 13, 14]
    assert not set(first.indices) & set(next_one.indices)


def counted_by_token(spec: Any, prompt_lengths: list[int], lengths: list[int]) -> tuple[float, float]:
    """Counts the operations of the update and the bytes of the rollout token by token, in float32."""
    matrices = spec.layers * sum(a * b for a, b in spec.linear_shapes().values())
    head, group = spec.vocab * spec.width, len(lengths) // len(prompt_lengths)
    forward = backward = 0.0
    for p in prompt_lengths:
        forward += 2 * matrices * p + sum(4 * spec.layers * spec.heads * spec.head_dim * (t + 0.5) for t in range(p))
        backward += 2 * matrices * p + sum(8 * spec.layers * spec.heads * spec.head_dim * (t + 0.5) for t in range(p))
    for row, length in enumerate(lengths):
        p = prompt_lengths[row // group]
        for t in range(length):
            attention = 4 * spec.layers * spec.heads * spec.head_dim * (p + t + 0.5)
            forward += 2 * matrices + 2 * head + attention
            backward += 2 * matrices + 2 * head + 2 * attention
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    traffic = 0.0
    for t in range(max(lengths)):
        traffic += 4 * (matrices + head) + token_bytes * sum(prompt_lengths)
        traffic += sum(token_bytes * (t + 0.5) for length in lengths if t < length)
    return 2 * forward + backward, traffic


@pytest.mark.parametrize(("prompts", "completions"), [([6, 6], [9] * 4), ([2, 6], [9, 4, 1, 7])])
def test_the_cost_of_a_step_is_counted_from_the_lengths(prompts: list[int], completions: list[int], tmp_path: Path) -> None:
    for name, values in (("prompts", prompts), ("completions", completions)):
        (tmp_path / name).write_text(json.dumps(values))
    options = BenchOptions(
        model=str(tiny_model()),
        prompts=2,
        num_generations=2,
        prompt_length=6,
        completion_length=9,
        lengths=str(tmp_path / "completions"),
        prompt_lengths=str(tmp_path / "prompts"),
    )
    policy, _ = bench_policy(options.config())
    cost = options.cost(policy, step=0)
    flops, traffic = counted_by_token(policy.spec, prompts, completions)
    assert cost.update_tokens == sum(prompts) + sum(completions)
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
    assert step["completion_lengths"] == [7] * 6
    assert step["prompt_lengths"] == [5] * 2
    assert 0 <= result["host_gap_seconds"] < result["rollout_seconds"]
    assert result["host_gap_share"] == result["host_gap_seconds"] / result["rollout_seconds"]
    # Weights, prompts, past blocks, a segment of 7 tokens: one call of each at least.
    assert result["rollout_calls"] >= 3
    assert 0 <= result["padding"] < 1
    assert result["programs_compiled"] + result["programs_from_cache"] >= 2
    assert result["programs_after_warmup"] == 0
    assert (result["kernels"] is None) == (result["kernels_not_measured"] is not None)


@pytest.mark.slow
def test_steps_have_the_lengths_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measured steps begin with the first lengths; after the last ones the first follow."""
    completions, prompts = [3, 7, 1, 5, 2, 4, 6, 6, 1, 7], [5, 2, 4]
    (tmp_path / "completions.txt").write_text("".join(f"{length}\n" for length in completions))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    files = ["--lengths", str(tmp_path / "completions.txt"), "--prompt_lengths", str(tmp_path / "prompts.json")]
    assert main(["bench", "--model", str(tiny_model()), *WORDS, *files, "--steps", "2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert first["completion_lengths"] == [3, 7, 1, 5, 2, 4]
    assert second["completion_lengths"] == [6, 6, 1, 7, 3, 7]
    assert (first["prompt_lengths"], second["prompt_lengths"]) == ([5, 2], [4, 5])
    for step in (first, second):
        rollout_tokens = sum(step["completion_lengths"])
        np.testing.assert_allclose(step["rollout_tokens_per_second"] * step["rollout_seconds"], rollout_tokens, rtol=1e-6)
        tokens = rollout_tokens + sum(step["prompt_lengths"])
        np.testing.assert_allclose(step["update_tokens_per_second"] * step["update_seconds"], tokens, rtol=1e-6)


@pytest.mark.slow
def test_the_default_output_is_a_table_and_missing_weights_are_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["bench", "--model", str(tmp_path), *WORDS, "--ragged", "--slots", "2"]) == 0
    out = capsys.readouterr().out
    assert "weights: random" in out
    assert "rollout:" in out
    assert "update against matmuls:" in out
    for label in ("lengths: prompts 5; completions 1 to 7, mean", "padding:", "host gaps:", "kernels a token:", "programs:"):
        assert label in out


def test_stop_tokens_are_ignored_and_lengths_are_as_requested() -> None:
    options = BenchOptions(model=str(tiny_model()), prompts=2, num_generations=2, completion_length=10, capacity=80)
    policy, random_weights = bench_policy(options.config())
    assert policy.stop_ids == ()
    assert not random_weights
    assert options.config().rollout.max_completion_length == 80
    limits = options.limits(0)
    assert limits is not None
    assert limits.tolist() == [10] * 4
    with pytest.raises(ConfigError, match=r"capacity: 5; use at least completion_length .10."):
        BenchOptions(model="m", completion_length=10, capacity=5).config()


def test_ragged_and_a_file_of_lengths_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"lengths: a\.txt; leave out ragged"):
        BenchOptions(model="m", ragged=True, lengths="a.txt").config()


def test_a_wrong_file_of_lengths_ends_before_the_model_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths").write_text("3\n8\n9\n")
    for option, limit in (("lengths", "completion_length"), ("prompt_lengths", "prompt_length")):
        words = ["--model", "nowhere", f"--{limit}", "7", f"--{option}", str(tmp_path / "lengths")]
        assert main(["bench", *words]) == 2
        seen = capsys.readouterr()
        assert f"{option}: {tmp_path}/lengths has 2 of 3 lengths above {limit} (7); use --{limit} 9" in seen.err
        assert seen.out == ""
