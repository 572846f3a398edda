"""How many programs a run compiles: prompts and completions of many lengths, evaluations, and none after the second step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import pytest
from plain_oracles import quick_compiling
from tiny_runs import config_of, run

import grpo_jax as gx
from grpo_jax.rollout import programs as rollout_programs
from grpo_jax.rollout.decode import decode_segment
from grpo_jax.rollout.kv_cache import write_segment

WORDS = ["a", "bb", "ccc", "dd", "e", "ffff"]


def prompts(lengths: list[int]) -> list[dict[str, str]]:
    """Prompts of these numbers of tokens, one a byte."""
    return [{"prompt": (" ".join(WORDS * 9)[number:])[:length]} for number, length in enumerate(lengths)]


class Compilations(gx.Callback):
    """Records how many programs of the rollout there are after each step and evaluation."""

    def __init__(self) -> None:
        self.counts: list[tuple[str, int, int]] = []

    def note(self, what: str, trainer: Any) -> None:
        rollout = sum(program.compilations for program in trainer.programs if program.name.startswith("rollout"))
        self.counts.append((what, trainer.steps_done, rollout))

    def on_step_end(self, trainer: Any, metrics: Any, completions: Any) -> None:
        self.note("step", trainer)

    def on_evaluate(self, trainer: Any, metrics: Any) -> None:
        self.note("evaluation", trainer)


@pytest.mark.parametrize(
    ("slots", "problems", "most", "decoding"),
    [
        pytest.param(None, 5, 5, 1, marks=pytest.mark.slow),  # weights, prompts, segments, writing, empty past
        pytest.param(3, 5, 7, 1, marks=pytest.mark.slow),  # and one prompt, inserted
        pytest.param(None, 20, 7, 2, marks=pytest.mark.slow),  # an evaluation in shapes of its own: other prompts and segments
        (3, 20, 10, 2),  # 7 as with few slots, and prompts, segments and writing in the evaluation's shapes
    ],
)
def test_a_run_compiles_a_handful_of_programs_and_none_after_the_second_step(
    slots: int | None, problems: int, most: int, decoding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chex.clear_trace_counter()
    monkeypatch.setattr(rollout_programs, "decode_segment", chex.assert_max_traces(decode_segment, n=decoding))
    monkeypatch.setattr(rollout_programs, "write_segment", chex.assert_max_traces(write_segment, n=decoding))
    recorder = Compilations()
    sections: dict[str, dict[str, Any]] = {
        "rollout": {"max_prompt_length": 40, "max_completion_length": 40, "num_generations": 2, "slots": slots},
        "train": {"steps": 5, "eval_every": 2, "eval_kl": True},
        "data": {"eval_size": problems},
    }
    with quick_compiling():
        done = run(
            config_of(tmp_path, **sections),
            dataset=prompts([3 + 7 * number % 38 for number in range(12 + problems)]),
            callbacks=[recorder],
        )
    lengths = [record["completions/max_length"] for record in done.result.history]
    assert len(set(lengths)) > 1
    counts = recorder.counts
    assert [what for what, _, _ in counts] == ["evaluation", *["step", "step", "evaluation"] * 2, "step", "evaluation"]
    assert counts[-1][2] <= most
    assert {count for _, step, count in counts if step >= 2} == {counts[-1][2]}
    assert "first step after" in done.printed
    assert "rollout.dispatch_ahead: auto resolved to never" in done.printed
    summary = done.result.summary
    assert 0 < summary["seconds_to_first_rewards"] < summary["seconds_to_first_step"]
    assert summary["programs_compiled"] + summary["programs_from_cache"] > 0
