"""The memory of a rollout of episodes: their past is longer by a segment, and that of waiting ones is parked next to the slots'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import CompiledMemory
from grpo_jax.fit.micro_batch import longest_lengths, row_tokens, sizes_of_rows
from grpo_jax.fit.phases import RunShapes, rollout_memory
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.tools.plan import machine_of
from grpo_jax.tools.quickstart import MODEL
from grpo_jax.weights.hf import read_folder_spec

LAYERS, WIDTH, SLOTS, LONGEST, SEGMENT = 2, 96, 4, 40, 8


def suffix_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> tuple[int, Any]:
    """Bytes of the past blocks that count as live, and the sizes; nothing is compiled."""

    def only_live(self: CompiledMemory, program: Any, arguments: Any, static: Any, live: dict[str, int], **_: Any) -> None:
        self.record(live)

    monkeypatch.setattr(CompiledMemory, "compile", only_live)
    (folder / "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": 128}))
    rollout = {"num_generations": 4, "max_prompt_length": 16, "max_completion_length": LONGEST, "slots": SLOTS, "segment": SEGMENT}
    given = {"model": {"path": str(folder), "dtype": "float32"}, "rollout": rollout, "train": {"prompts_per_step": 2}}
    config = Config.from_dict(given | sections)
    machine, spec = machine_of("cpu"), read_folder_spec(folder)
    placement = placement_of(config, spec, machine)
    policy, lengths = abstract_policy(config, folder, spec, placement), longest_lengths(config)
    sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
    learner, _ = grpo_learner(config, policy, sizes[0].tokens)
    found = rollout_memory(RunShapes.of(config, policy, placement, learner, sizes, no_announcement), None)
    return found.use.components["suffix_kv"], found.sizes


def test_the_past_of_parked_episodes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    token = LAYERS * 2 * WIDTH * 4  # a key and a value in float32; as many key as query heads
    single, sizes = suffix_bytes(tmp_path, monkeypatch)
    assert sizes.parked == 0
    assert single == SLOTS * sum(sizes.past_blocks) * token
    for environment in ({"name": "number_guessing"}, {"tools": ["calculator"]}):
        episodes, sizes = suffix_bytes(tmp_path, monkeypatch, environment=environment)
        assert sizes.parked == SLOTS
        assert sum(sizes.past_blocks) >= LONGEST
        assert episodes == 2 * SLOTS * sum(sizes.past_blocks) * token
        assert episodes > 2 * single
