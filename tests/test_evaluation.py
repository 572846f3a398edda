"""Accuracy on the held-out part: hand-made completions in, shares of problems out; and the command's own checks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import G, additions, config_of, records, tiny_model

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.config import Config, ConfigError, EvalConfig, RolloutConfig
from grpo_jax.data import PromptSource
from grpo_jax.data.evaluation_sets import evaluation_sets, main_rows
from grpo_jax.data.table import DataError
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.evaluation import evaluate, evaluate_held_out, reward_columns
from grpo_jax.rewards import RewardError, resolve_functions
from grpo_jax.rewards.protocol import TextReward
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.evaluations import Evaluation, check_evaluation, metric_names
from grpo_jax.types import Rollout

EVAL = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]


@dataclass(frozen=True)
class Canned(Sampler):
    """A sampler that says what it was told to, and remembers what it was asked for."""

    texts: list[str] = field(default_factory=list)
    asked: list[tuple[RolloutConfig, int, list[int]]] = field(default_factory=list)

    def sample(
        self,
        variables: Any,
        prompt_ids: Any,
        rollout: RolloutConfig,
        *,
        seed: int,
        step: int = 0,
        indices: Any = None,
        limits: Any = None,
        shapes: Any = None,
        turns: Any = None,
    ) -> Rollout:
        assert turns is None
        self.asked.append((rollout, seed, list(indices)))
        assert len(self.texts) == len(prompt_ids) * rollout.num_generations
        ids = [tokenizer().encode_text(text) for text in self.texts]
        return Rollout(ids, [np.zeros(len(row), np.float32) for row in ids], ["length"] * len(ids))


def tokenizer() -> Tokenizer:
    known = Tokenizer.from_folder(tiny_model())
    assert known is not None
    return known


def evaluate_texts(
    texts: list[str], config: Config, samples: int | None = None, functions: Any = ("exact_match",)
) -> tuple[Evaluation, Canned]:
    sampler = Canned(**vars(gx.Policy.from_pretrained(tiny_model()).sampler), texts=texts)
    source = PromptSource.build(config, tokenizer(), additions(), EVAL)
    found = evaluate_held_out(sampler, {}, source, resolve_functions(functions), tokenizer(), config, samples=samples)
    assert found is not None
    return found, sampler


def test_greedy_accuracy_is_the_share_of_right_answers(tmp_path: Path):
    config = config_of(tmp_path)
    found, sampler = evaluate_texts(["1", "2", "7", "4 "], config)
    assert found == Evaluation(accuracy=0.75, problems=4, reward_mean=0.75, pass_at_k=None)
    ((rollout, seed, indices),) = sampler.asked
    assert (rollout.num_generations, rollout.temperature, seed) == (1, 0.0, config.train.seed)
    assert rollout.max_completion_length == config.rollout.max_completion_length
    assert indices == [0, 1, 2, 3]


def test_pass_at_k_is_the_share_of_problems_with_a_right_sample(tmp_path: Path):
    texts = ["1", "x", "1", "x", "x", "x", "x", "x", "3", "x", "4", "4"]  # right: 2 of 3, 0 of 3, 1 of 3, 2 of 3
    found, sampler = evaluate_texts(texts, config_of(tmp_path, rollout={"temperature": 0.7, "top_k": 9}), samples=3)
    assert found.pass_at_k == pytest.approx(3 / 4)
    assert found.accuracy == pytest.approx(5 / 12)
    ((rollout, _, _),) = sampler.asked
    assert (rollout.num_generations, rollout.temperature, rollout.top_k) == (3, 0.7, 9)
    assert rollout.slots is not None
    assert rollout.slots % 3 == 0


def test_no_more_completions_are_decoded_at_once_than_in_training(tmp_path: Path):
    config = config_of(tmp_path, train={"prompts_per_step": 1})
    _, greedy = evaluate_texts(["1"] * 4, config)
    _, sampled = evaluate_texts(["1"] * 8, config, samples=2)
    assert [sampler.asked[0][0].slots for sampler in (greedy, sampled)] == [4, 4]  # one prompt of G = 4 in training
    assert G == 4


def test_the_named_function_and_its_threshold_say_what_is_right(tmp_path: Path):
    def half(completions: list[str]) -> list[float]:
        return [0.5 if text == "ok" else 0.25 for text in completions]

    config = config_of(tmp_path, rewards={"accuracy": "half", "accuracy_threshold": 0.5, "weights": [1.0, 2.0]})
    found, _ = evaluate_texts(["ok", "2", "ok", "ok"], config, functions=["exact_match", half])
    assert found.accuracy == 0.75
    assert found.reward_mean == pytest.approx((1.0 + 1.5 + 1.0 + 1.0) / 4)


def test_an_answer_that_cannot_be_scored_is_not_right_and_too_many_stop_the_run(tmp_path: Path):
    def judged(text: str) -> float:
        if text == "?":
            raise ValueError("what?")
        return 1.0

    picky = TextReward("picky", judged)

    found, _ = evaluate_texts(["1", "?", "3", "4"], config_of(tmp_path), functions=picky)
    assert (found.accuracy, found.reward_mean) == (0.75, 1.0)
    with pytest.raises(RewardError, match="2 of 4 rows could not be scored"):
        evaluate_texts(["1", "?", "?", "4"], config_of(tmp_path), functions=picky)


def test_where_nothing_is_held_out_there_is_no_accuracy(tmp_path: Path):
    config = config_of(tmp_path)
    source = PromptSource.build(config, tokenizer(), additions())
    sampler = gx.Policy.from_pretrained(tiny_model()).sampler
    assert evaluate_held_out(sampler, {}, source, resolve_functions(["exact_match"]), tokenizer(), config) is None


def test_columns_without_the_prompts_reach_the_rewards(tmp_path: Path):
    config = config_of(tmp_path)
    rows = [row | {"unit": "eggs"} for row in additions()]
    assert reward_columns(PromptSource.build(config, tokenizer(), rows), config) == ["answer", "unit"]


def test_a_run_of_python_rows_or_functions_says_what_is_missing(tmp_path: Path):
    config = config_of(tmp_path, data={"path": None})
    with pytest.raises(gx.ConfigError, match=r"rewards\.functions is empty"):
        evaluate(config)
    with pytest.raises(gx.ConfigError, match=r"data\.path is null"):
        evaluate(replace(config, rewards=gx.RewardsConfig(functions=["exact_match"])))


def test_an_evaluation_without_held_out_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "eval.yaml").write_text(
        f"model: {{path: {tiny_model()}}}\ndata: {{path: {tmp_path}/rows.jsonl}}\nrewards: {{functions: [exact_match]}}\n"
    )
    assert cli.main(["eval", "--config", str(tmp_path / "eval.yaml")]) == 2
    assert "data.eval_size: 0; nothing is held out: set it, or data.eval_split or data.eval_path" in capsys.readouterr().err
    (tmp_path / "eval.yaml").write_text("rewards: {functions: [exact_match]}\n")
    assert cli.main(["eval", "--config", str(tmp_path / "eval.yaml")]) == 2
    assert "model.path: null; give a model folder or a hub id, or a run" in capsys.readouterr().err


def test_greedy_accuracy_has_an_interval_and_samples_have_estimates(tmp_path: Path):
    greedy, _ = evaluate_texts(["1", "2", "7", "4"], config_of(tmp_path))
    # Wilson's by hand: p = 3/4, n = 4, z² = 3.8415; (0.75 + 0.4802 ± 1.96·sqrt(0.1875/4 + 3.8415/64)) / 1.9604
    assert greedy.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    texts = ["1", "x", "1", "x", "x", "x", "x", "x", "3", "x", "4", "4"]  # right: 2 of 3, 0 of 3, 1 of 3, 2 of 3
    found, _ = evaluate_texts(texts, config_of(tmp_path, rollout={"temperature": 0.7}), samples=3)
    assert found.pass_at == pytest.approx({1: 5 / 12, 2: (1 + 0 + 2 / 3 + 1) / 4, 3: 3 / 4})
    assert found.majority_at_k == pytest.approx(2 / 4)


def test_a_set_has_its_own_rows_and_size(tmp_path: Path):
    rows = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(4)]
    (tmp_path / "easy.jsonl").write_text("\n".join(rows))
    path = str(tmp_path / "easy.jsonl")
    config = replace(config_of(tmp_path), eval=EvalConfig({"all": {"path": path}, "two": {"path": path, "size": 2}}))
    found = {name: source.held_out_batches(9) for name, source in evaluation_sets(config, tokenizer()).items()}
    answers = {name: [batch.columns["answer"] for batch in batches] for name, batches in found.items()}
    assert answers == {"all": [["1", "2", "3", "4"]], "two": [["1", "2"]]}


def test_sets_that_python_gives_are_read_and_named(tmp_path: Path):
    first, others = main_rows({"main": EVAL, "two": EVAL[:2]})
    assert (first, list(others)) == (EVAL, ["two"])
    assert main_rows(EVAL) == (EVAL, {})
    (source,) = evaluation_sets(config_of(tmp_path), tokenizer(), others).values()
    assert [batch.columns["answer"] for batch in source.held_out_batches(9)] == [["1", "2"]]
    with pytest.raises(DataError, match=r"eval_dataset\['bad'\]: "):
        evaluation_sets(config_of(tmp_path), tokenizer(), {"bad": [3]})
    for name, message in (
        ("a/b", "name a set with letters"),
        ("rewards", "use another name: metrics of the main set begin with it"),
    ):
        with pytest.raises(ConfigError, match=f"eval_dataset is '{name}': {message}"):
            main_rows({name: EVAL})


def test_settings_that_nothing_held_out_makes_pointless_are_named(tmp_path: Path):
    functions = resolve_functions(["exact_match"])
    for sections, message in (
        ({"eval": {"samples": 4}}, r"eval\.samples is 4: it has an effect where main rows are held out"),
        ({"train": {"best_metric": "pass_at/2"}}, r"train\.best_metric is 'pass_at/2': it has an effect where main rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_evaluation(config_of(tmp_path, **sections), functions, [], 0)
    config = config_of(tmp_path, eval={"samples": 3}, train={"best_metric": "-hard/sampled/rewards/exact_match/std"})
    check_evaluation(config, functions, ["hard"], 4)
    with pytest.raises(ConfigError, match=r"train\.best_metric is .*: use a metric of evaluations: accuracy, reward/mean"):
        check_evaluation(config, functions, ["easy"], 4)


@pytest.mark.slow  # samples three sets greedily, three times, and once in a run: many shapes are compiled
def test_further_sets_are_evaluated_with_the_main_one(tmp_path: Path):
    for name, first in (("main", 0), ("easy", 0), ("hard", 5)):
        rows = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sets = {"easy": {"path": str(tmp_path / "easy.jsonl"), "size": 2}, "hard": {"path": str(tmp_path / "hard.jsonl")}}
    config = config_of(tmp_path, data={"eval_path": str(tmp_path / "main.jsonl")}, train={"steps": 1, "prompts_per_step": 2})
    config = replace(config, eval=EvalConfig(sets, samples=2), rewards=replace(config.rewards, functions=["exact_match"]))
    found = evaluate(config, pass_k=2)
    assert {name: result["held_out_problems"] for name, result in found["sets"].items()} == {"easy": 2, "hard": 4}
    for result in (found, *found["sets"].values()):
        assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    gx.train(config, dataset=additions())
    step = records(Path(config.train.run_dir) / "evaluations.jsonl")[0]
    for name, result in found["sets"].items():
        assert step[f"{name}/accuracy"] == result["accuracy"]
        assert step[f"{name}/reward/mean"] == pytest.approx(result["reward_mean"])
        assert step[f"{name}/majority_at/2"] == result["majority_at_k"]
        assert {size: step[f"{name}/pass_at/{size}"] for size in (1, 2)} == result["pass_at"]
    assert step.keys() - {"step"} <= set(metric_names(config, resolve_functions(["exact_match"]), sets))
    assert (step["accuracy_low"], step["accuracy_high"]) == (found["accuracy_low"], found["accuracy_high"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"math": {"size": 3}}, r"eval\.sets\.math is .*give a path, or another split of data\.path"),
        ({"math": {"path": "x", "rows": 3}}, r"eval\.sets\.math is 'rows': .*path, split, size"),
        ({"math": {"path": "x", "size": 0}}, r"eval\.sets\.math\.size is 0: use a number of rows"),
        ({"a/b": {"path": "x"}}, r"eval\.sets is 'a/b': name a set with letters"),
    ],
)
def test_a_wrong_set_is_named(sets: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"eval": {"sets": sets}})


def test_a_set_that_cannot_be_read_is_named(tmp_path: Path):
    config = replace(config_of(tmp_path), eval=EvalConfig({"math": {"path": str(tmp_path / "none.jsonl")}}))
    with pytest.raises((ConfigError, DataError), match=r"eval\.sets\.math: "):
        evaluation_sets(config, tokenizer())
