"""Sampling on meshes: the same tokens as on one device, and nothing large between devices. See `mesh_sampler.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_rollout import (
    GENERATIONS,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    PAST_BLOCKS,
    PROMPT_TOKENS,
    PROMPTS,
    assert_nothing_is_copied_at_every_token,
    assert_nothing_is_stored_twice,
    line,
    segment_memory,
)
from jax.sharding import SingleDeviceSharding
from plain_oracles import tiny_policy
from rollouts import MOST_TIES

from grpo_jax.config import ConfigError, MeshConfig, RolloutConfig
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.shapes import Sizes, choose_slots
from grpo_jax.runtime.mesh import make_layout

Results = dict[str, dict[str, Any]]

WIDTH, VOCAB, SEGMENT = 32, 288, 4
"""Of the model and settings in `mesh_sampler.py`."""


MESHES = {"8x1x1": (8, 1), "1x8x1": (8, 1), "1x1x4": (1, 4), "2x2x2": (4, 2)}
"""Row shards, and devices of each row shard."""

COMBINED = {
    "8x1x1 refill": 8,
    "8x1x1 refill greedy": 8,
    "1x8x1 all at once": 48,  # ten prompts are two for each of eight shards: three shards have no work
    "2x2x2 int8, waiting": 8,
    "2x2x2 top-p, quantised": 8,
    "2x2x2 experts, all at once, unrolled": 36,
}
"""Slots of each case. Every axis of a mesh and every feature is in one of them."""

SEPARATE = {
    **{f"{mesh} {how}": 8 for mesh in ("1x8x1", "1x1x4", "2x2x2") for how in ("refill", "refill greedy")},
    "2x2x2 all at once, unrolled": 36,
    "8x1x1 three prompts": 24,
    **{f"2x2x2 {feature}": 8 for feature in ("waiting", "int8", "top-p", "quantised", "experts")},
    **{f"2x2x2 episodes{feature}": 8 for feature in ("", ", unrolled")},
}
"""Slots of the cases that have the features one by one."""

CASES = COMBINED | SEPARATE
each_case = pytest.mark.parametrize("case", [*COMBINED, *(pytest.param(case, marks=pytest.mark.slow) for case in SEPARATE)])


def results_of(repository: Path, cases: Iterable[str]) -> Results:
    """Runs `mesh_sampler.py`; its result of each case."""
    paths = os.pathsep.join(str(repository / name) for name in (".", "kernels", "tests", "tests/support"))
    command = [sys.executable, str(repository / "tests" / "support" / "mesh_sampler.py"), *cases]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    print(run.stdout)
    return {result["case"]: result for result in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def results(repository: Path) -> Results:
    return results_of(repository, (*COMBINED, "draws", "generated"))


@pytest.fixture(scope="module")
def separate_results(repository: Path) -> Results:
    return results_of(repository, SEPARATE)


@pytest.fixture
def result(case: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The result of a case."""
    return request.getfixturevalue("results" if case in COMBINED else "separate_results")[case]


@each_case
def test_tokens_are_those_of_one_device(result: dict[str, Any], case: str) -> None:
    """With fewer slots than rows and with all, with rows of various lengths, and with shards without work."""
    assert result["differences"] == []
    assert result["near_ties"] <= MOST_TIES
    assert result["slots"] == CASES[case]
    assert result["tokens"] > 40
    assert result["reasons"] == ["length", "stop"]


@each_case
def test_devices_communicate_only_tokens_and_sums(result: dict[str, Any], case: str) -> None:
    """The compiled segments move no cache and no weight, and logits only where they are truncated."""
    shards, tensor = MESHES[case.split()[0]]
    slots = CASES[case]
    own = slots // shards
    found = result["collectives"]
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce"}
    tokens = 4 * slots * (SEGMENT + 1)  # bytes
    sums = 4 * 6 * tensor * own if tensor > 1 else 0
    logits = 4 * own * VOCAB if "top-p" in case else 0
    assert max(size for kind, size in found if kind == "all-gather") <= max(tokens, sums, logits)
    # Sums of hidden states, and whether all slots are done.
    assert max(size for kind, size in found if kind == "all-reduce") <= (4 * own * WIDTH if tensor > 1 else 1)


@each_case
def test_weights_are_gathered_over_fsdp_only_and_before_the_first_token(result: dict[str, Any]) -> None:
    assert result["weights"] == []


def test_a_policy_generates_the_same(results: Results) -> None:
    assert results["generated"]["same"]


def test_a_token_is_the_same_when_the_vocabulary_lies_on_four_devices(results: Results) -> None:
    """Both implementations of `head_sample`, 32 rows; the 297 tokens of a device are not a multiple of the block."""
    for name, found in results["draws"].items():
        if not isinstance(found, dict):
            continue
        assert found["differ"] == 0, name
        assert found["close"][1] <= 1, name
        assert found["logp"] < 1e-5, name
        assert found["entropy"] < 1e-5, name
        assert found["devices"] == 4
        if name.endswith("0.0"):
            assert found["tied"] == 7  # the first of two, on two devices


def test_slots_that_the_row_shards_do_not_divide_are_refused() -> None:
    spec, rollout = tiny_policy("qwen3").spec, RolloutConfig(num_generations=4, slots=12)
    with pytest.raises(ConfigError, match=r"rollout.slots is 12: .*multiple of 8"):
        choose_slots(spec, rollout, 16, 9, 4, None, shards=8)
    assert choose_slots(spec, rollout, 16, 9, 4, None, shards=4) == 12


def test_memory_counts_on_each_device() -> None:
    spec, rollout = tiny_policy("qwen3").spec, RolloutConfig(num_generations=4, max_completion_length=1000)
    alone = choose_slots(spec, rollout, 64, 9, 4, 2**22)
    assert 4 <= alone < 64 * 4 / 8
    assert choose_slots(spec, rollout, 64, 9, 4, 2**22, shards=8) == 8 * alone
    assert choose_slots(spec, rollout, 64, 9, 4, 2**22, tensor=2) >= 2 * alone - 4
    assert choose_slots(spec, rollout, 3, 9, 4, 2**40, shards=8) == 32


def sizes_of_shard(slots: int, prompt_slots: int) -> Sizes:
    return Sizes(
        slots=slots, prompt_slots=prompt_slots, slots_per_prompt=min(2, slots), prompt=8, segment=4, past_blocks=(8,), fixed=False
    )


@pytest.mark.parametrize(("prompts", "shards"), [(10, 4), (3, 4), (8, 2)])
def test_every_row_is_decoded_once_by_the_shard_that_has_its_prompt(prompts: int, shards: int) -> None:
    schedule = ShardedSchedule.of(sizes_of_shard(2, 2), prompts, 2, shards=shards)
    lengths = np.random.default_rng(0).integers(1, 5, prompts * 2)
    prompts_in_slots, done, left = list(schedule.prompts_in_slots), [], lengths.copy()
    assert len(prompts_in_slots) == 2 * shards
    while not schedule.finished:
        rounds, begun = schedule.admit()
        for pairs in rounds:
            assert len(pairs) == shards
            for shard, (prompt_slot, prompt) in enumerate(pairs):
                if prompt is not None:
                    prompts_in_slots[2 * shard + prompt_slot] = prompt
        rows, (prompt_slots, table) = schedule.completion_in_slot, schedule.slot_map()
        assert all(rows[slot] >= 0 for slot in begun)
        for slot in np.flatnonzero(rows >= 0):
            shard, own = divmod(int(slot), 2)
            assert prompts_in_slots[2 * shard + prompt_slots[slot]] == rows[slot] // 2
            assert table[2 * shard + prompt_slots[slot], schedule.slot_indices[slot]] == own
            left[rows[slot]] -= 1
        ended = [int(slot) for slot in np.flatnonzero(rows >= 0) if left[rows[slot]] == 0]
        done += rows[ended].tolist()
        schedule.end(ended)
    assert sorted(done) == list(range(prompts * 2))
    assert np.all(left == 0)


def test_a_chip_of_four_stores_a_quarter_of_the_kv_cache(chips: dict[str, SingleDeviceSharding]) -> None:
    """Llama-3.1-8B on a v6e 2x2: two row shards of two chips, which communicate little but sums of hidden states."""
    from jax.experimental import topologies

    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2), topologies.get_topology_desc("v6e:2x2", "tpu").devices)
    assert layout is not None
    memory = segment_memory(layout, refilled=True, implementation="mosaic_tpu", rank=16)
    print(line("four v6e, 1x2x2", memory))
    assert_nothing_is_stored_twice(memory)
    assert_nothing_is_copied_at_every_token(memory)
    assert memory.passed < 2**16
    prefix = 2 * 2 * LAYERS * PROMPTS * KV_HEADS * PROMPT_TOKENS * HEAD_DIM  # keys and values, two bytes each
    assert prefix / 4 < memory.prefix < prefix / 4 + 2**20  # and a few hidden states
    assert memory.past == prefix / 4 * GENERATIONS * sum(PAST_BLOCKS) / PROMPT_TOKENS
