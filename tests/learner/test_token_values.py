"""Entropy and KL of each token, as the update has computed them, against log-probabilities that `Policy.logprobs` computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import B, G, additions, config_of, letters

import grpo_jax as gx
from grpo_jax.config import Config
from grpo_jax.learner.learner import recorded_completions
from grpo_jax.run.callbacks import Callback, StepCompletions


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


class Keep(Callback):
    """Keeps the completions of every step."""

    def __init__(self) -> None:
        self.steps: list[StepCompletions] = []

    def on_step_end(self, trainer: Any, metrics: Any, completions: StepCompletions | None) -> None:
        assert completions is not None
        self.steps.append(completions)


def constant(completions: list[Any]) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.slow
def test_they_are_those_of_the_policy_before_the_update(tmp_path: Path) -> None:
    keep = Keep()
    settings: dict[str, Any] = {"objective": {"beta": 0.1, "kl": "k3"}}
    recorded = {"train": {"steps": 2, "record_tokens": 1}}
    gx.train(config_of(tmp_path / "two", **settings, **recorded), dataset=additions(), reward_funcs=letters, callbacks=[keep])
    before = gx.train(config_of(tmp_path / "one", **settings, train={"steps": 1}), dataset=additions(), reward_funcs=letters).policy
    base = gx.Policy.from_pretrained(before.folder, dtype="float32")
    step = keep.steps[1]
    assert {name: table.shape[0] for name, table in step.token_values.items()} == {"entropy": G, "kl": G}
    prompt = before.need_tokenizer().encode_prompt(step.prompts[0], chat=False)
    own, reference = (policy.logprobs([prompt] * G, step.ids[:G]) for policy in (before, base))
    lines = [json.loads(line) for line in (tmp_path / "two" / "completions.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["step"] == 2]
    seen = 0.0
    for row in range(G):
        difference = reference[row] - own[row]
        k3 = np.exp(difference) - difference - 1
        np.testing.assert_allclose(step.token_values["kl"][row, : len(k3)], k3, rtol=0, atol=2e-5)
        np.testing.assert_allclose(rows[row]["kl"], k3, rtol=0, atol=6e-4)  # of three decimals
        assert len(rows[row]["entropy"]) == len(rows[row]["tokens"]) == len(step.ids[row])
        seen = max(seen, float(k3.max()))
    assert seen > 1e-3
    assert not any("kl" in line for line in rows[G:])
    # The distribution of the first token of all, by asking for every token of the vocabulary.
    vocabulary = before.spec.vocab
    first = np.array(
        [float(values[0]) for values in before.logprobs([prompt] * vocabulary, [[token] for token in range(vocabulary)])]
    )
    entropy = -np.sum(np.exp(first) * first)
    np.testing.assert_allclose(step.token_values["entropy"][:, 0], entropy, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_what_the_update_did_not_compute_is_left_out(tmp_path: Path) -> None:
    keep = Keep()
    gx.train(
        config_of(tmp_path / "run", objective={"beta": 0.0}, train={"steps": 1}),
        dataset=additions(),
        reward_funcs=constant,
        callbacks=[keep],
    )
    (step,) = keep.steps
    assert step.token_values.keys() == {"entropy"}  # no reference
    assert np.isnan(step.token_values["entropy"]).all()  # no group has a spread
    (first, *_) = (json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines())
    assert "logprobs" in first
    assert not {"kl", "entropy"} & first.keys()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, G),
        ({"train": {"record_tokens": 0}}, 0),
        ({"train": {"record_tokens": 99}}, B * G),
        ({"train": {"update_generations": 2}}, 0),
        ({"train": {"updates_per_rollout": 2}}, 0),
        ({"objective": {"num_iterations": 2}}, 0),
    ],
)
def test_they_are_recorded_where_a_step_makes_one_update(settings: dict[str, Any], count: int) -> None:
    train = {"prompts_per_step": B} | settings.get("train", {})
    config = Config.from_dict({"rollout": {"num_generations": G}, **settings, "train": train})
    assert recorded_completions(config) == count
