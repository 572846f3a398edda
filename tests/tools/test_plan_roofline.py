"""The roofline of `grpo-jax plan`: what each format of the base moves on a device, and the advice between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_runs import LLAMA, settings

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import COMPONENTS, MemoryUse
from grpo_jax.fit.micro_batch import longest_lengths, row_tokens, sizes_of_rows
from grpo_jax.fit.phases import RolloutMemory, RunShapes
from grpo_jax.fit.targets import GPUS, Chip
from grpo_jax.rollout.shapes import sizes_of
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.tools.plan import advice_lines, json_of, machine_of, make_plan, rows_of
from grpo_jax.tools.plan.roofline import rooflines
from grpo_jax.weights.hf import read_folder_spec
from grpo_kernels.target import Target, tracing_for

MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
CHANNELS = 2 * (64 + 2 * 32 + 64 + 2 * 128 + 64)
"""Outputs of all matrices, each with one group of inputs: they have 64 inputs, or 128."""
HEAD_BYTES = 2 * 512 * 64
PAST_BYTES = (32 * 24**2 / 2 + 24 * 8 * 16) * 2 * (2 * 2 * 16) * 2
"""A triangle for each of 32 completions of 24 tokens, at each token 8 prompts of 16; keys and values, 2 layers, 2 heads of 16."""
HOPPER = Target("gpu", compute_capability=(9, 0), stand_ins=True)


@pytest.mark.parametrize(
    ("target", "moved"),
    [
        (HOPPER, {"none": 2 * MATRICES, "int8": MATRICES + 4 * CHANNELS, "int4": 4.5 * MATRICES + 2 * CHANNELS}),
        (
            Target("tpu", 128 * 2**20, 6),
            {"none": 2 * MATRICES, "int8": MATRICES + 4 * CHANNELS, "int4": 0.5 * MATRICES + 2 * CHANNELS},
        ),
    ],
    ids=["h200", "v6e"],
)
def test_the_roofline_counts_what_the_device_moves(target: Target, moved: dict[str, float], folder: Path) -> None:
    """By hand, for a chip whose products take no time and whose memory moves a byte a second."""
    with tracing_for(target):
        run = planned_run(settings(folder, model={"remat": "layer"}, objective={"beta": 0.0}))
        lines = rooflines(run, Chip(2**30, 1e40, 1.0), slots=32, remat="layer")
    for name, layers in moved.items():
        assert lines[name].weight_bytes == pytest.approx(layers / MATRICES)
        assert lines[name].rollout_seconds == pytest.approx(24 * (layers + HEAD_BYTES) + PAST_BYTES)
        # Forward, forward again and backward, for each micro-batch.
        assert lines[name].update_seconds == pytest.approx(run.sizes[0].count * 3 * (layers + HEAD_BYTES))
    # A copy of four bits in rollouts is what unquantised weights are; the update moves what it did.
    with tracing_for(target):
        model = {"remat": "layer", "quantization": "int4"}
        copied = planned_run(settings(folder, model=model, objective={"beta": 0.0}, rollout={"dense_base": True}))
        dense = rooflines(copied, Chip(2**30, 1e40, 1.0), slots=32, remat="layer")
    assert dense["int4"].rollout_seconds == lines["none"].rollout_seconds
    assert dense["int4"].update_seconds == lines["int4"].update_seconds
    other = dense["int4 with rollout.dense_base: false"]
    assert (other.rollout_seconds, other.changes) == (lines["int4"].rollout_seconds, {"rollout.dense_base": False})
    assert dense["int8"].changes == {"model.quantization": "int8", "rollout.dense_base": False}
    # A base that is trained is not quantised.
    with tracing_for(target):
        whole = planned_run(settings(folder, lora={"rank": 0}))
        assert list(rooflines(whole, None, slots=32, remat="layer")) == ["none"]


def test_keys_in_int8_are_written_out_on_a_gpu(folder: Path) -> None:
    with tracing_for(HOPPER):
        run = planned_run(settings(folder, rollout={"kv_dtype": "int8"}))
        line = rooflines(run, Chip(2**30, 1e40, 1.0), slots=32, remat="layer")["none"]
    keys, scales = PAST_BYTES / 2 * (1 + 2 + 2), PAST_BYTES / 16  # a scale has the bytes of an element, and a head has 16 elements
    assert line.rollout_seconds == pytest.approx(24 * (2 * MATRICES + HEAD_BYTES) + keys + scales)


def planned_run(config: Config) -> RunShapes:
    """The shapes of a run on one device, with nothing compiled."""
    folder = Path(str(config.model.path))
    spec, machine = read_folder_spec(folder), machine_of("cpu")
    placement = placement_of(config, spec, machine)
    policy = abstract_policy(config, folder, spec, placement)
    lengths = longest_lengths(config)
    sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
    learner, _ = grpo_learner(config, policy, sizes[0].tokens)
    return RunShapes.of(config, policy, placement, learner, sizes, no_announcement)


@pytest.mark.parametrize(
    ("quantization", "limit", "faster"),
    [("int4", 2000, "int8"), ("int4", 1500, None), ("int8", 2000, None), ("nf4", 2500, "int8"), ("none", 2000, None)],
)
def test_few_bits_that_are_slower_are_advised_against(
    quantization: str, limit: int, faster: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200, with made-up memory: int8 is the fastest, then bfloat16, then four bits."""

    def rollout(run: Any, _: int) -> RolloutMemory:
        weights = {"none": 4000, "int8": 2000, "int4": 1000, "nf4": 1000}[run.config.model.quantization]
        weights += 4000 * run.config.rollout.dense_base
        memory = MemoryUse(dict.fromkeys(COMPONENTS, 0) | {"base": weights}, 0.0)
        return RolloutMemory(memory, 32, sizes_of(run.config.rollout, 8, 16, 32))

    monkeypatch.setattr("grpo_jax.tools.plan.verdict.update_memory", lambda run: MemoryUse(dict.fromkeys(COMPONENTS, 0), 0.0))
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.rollout_memory", rollout)
    gpu = GPUS["h200"]
    chip = Chip(gpu.memory_bytes, gpu.flops_per_second, gpu.bytes_per_second)
    machine = replace(machine_of("cpu"), chip=chip, limit_bytes=4000 if quantization == "none" else limit, target=HOPPER)
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: machine)
    made = make_plan(settings(folder, model={"quantization": quantization}, train={"micro_batch_prompts": 8}), "h200")
    said, shown = json_of(made), dict(rows_of(made))
    assert said["fits"]
    assert said["advice"] == {}
    assert said["faster"] == (None if faster is None else {"model.quantization": faster})
    seconds = said["step_seconds_at_least"]
    assert seconds["int8"] < seconds["none"] < seconds["int4"]
    assert advice_lines(made)[1:] == ([] if faster is None else [f"model: {{quantization: {faster}}}"])
    if quantization in ("int4", "nf4"):
        assert f"{quantization} moves 4.5" in shown["model.quantization"]
        assert f"; slower than int8, none, {quantization} with rollout.dense_base: true" in shown["model.quantization"]
        assert seconds[f"{quantization} with rollout.dense_base: true"] == pytest.approx(seconds["none"])


@pytest.mark.parametrize(("head_dim", "says"), [(64, "mosaic_gpu, which needs tokamax there"), (16, "xla")])
def test_the_attention_that_the_absent_gpu_would_run_is_named(
    head_dim: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels take heads of 64, and tokamax need not be installed here."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": head_dim}))
    nothing = MemoryUse(dict.fromkeys(COMPONENTS, 0), 0.0)
    monkeypatch.setattr("grpo_jax.tools.plan.verdict.update_memory", lambda run: nothing)
    monkeypatch.setattr(
        "grpo_jax.tools.plan.verdict.rollout_memory",
        lambda run, _: RolloutMemory(nothing, 32, sizes_of(run.config.rollout, 8, 16, 32)),
    )
    machine = replace(machine_of("cpu"), target=HOPPER)
    monkeypatch.setattr("grpo_jax.tools.plan.machine_of", lambda name: machine)
    made = make_plan(settings(tmp_path, train={"micro_batch_prompts": 8}), "h200")
    assert dict(rows_of(made))["attention of the update"].startswith(says)
    assert json_of(made)["attention"] == says.partition(",")[0]
