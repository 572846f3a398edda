"""The doctor's rules: on synthetic runs with one fault each, on curves of published runs that did not learn, on healthy runs."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_jax import cli
from grpo_jax.config import Config, ConfigError
from grpo_jax.config.training import DoctorRule
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.run.doctor.callback import DoctorCallback
from grpo_jax.run.doctor.findings import diagnose
from grpo_jax.run.doctor.history import RunHistory
from grpo_jax.run.doctor.ranges import check_stop_on, setting_notes
from grpo_jax.run.doctor.report import diagnose_folder
from grpo_jax.run.doctor.rules import RULES
from grpo_jax.run.variety import repeated_share, variety_metrics

STEPS = 60
FOUR = ["reward hacking", "KL explosion", "no improvement", "mode collapse"]
RISING = {"reward/mean": (0.3, 0.7), "reward/std": (0.45, 0.45)}
FLAT = {"reward/mean": (0.3, 0.3), "reward/std": (0.45, 0.45)}
FALLING = {"rewards/right/mean": (0.5, 0.3), "rewards/format/mean": (0.1, 0.9)}
LONGER = {"completions/mean_length": (100.0, 300.0)}
SURE = {"entropy": (1.5, 0.01), "reward/frac_zero_std": (0.1, 0.95), "completions/distinct": (0.9, 0.2)}
NOISE = {"reward/mean": 0.03, "completions/mean_length": 3.0, "rewards/right/mean": 0.03, "rewards/format/mean": 0.03}
"""From step to step; other metrics have 2 % of their value."""


def synthetic(seed: int, slopes: dict[str, tuple[float, float]], steps: int = STEPS) -> list[dict[str, float]]:
    """A run whose metrics go from one value to another along a line, with noise."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(steps):
        share = number / (steps - 1)
        means = {name: (1 - share) * start + share * end for name, (start, end) in slopes.items()}
        record = {name: value + rng.normal(0, NOISE.get(name, 0.02 * abs(value))) for name, value in means.items()}
        spreads = {f"{name.removesuffix('/mean')}/std": 0.4 for name in slopes if name.startswith("rewards/")}
        records.append(record | spreads)
    return records


def evaluated(*accuracies: float, problems: int = 500, rewards: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    records = [{"step": 20 * number, "accuracy": value, "problems": problems} for number, value in enumerate(accuracies)]
    return [record | {"reward/mean": value} for record, value in zip(records, rewards, strict=True)] if rewards else records


def found(records: list[dict[str, Any]], evaluations: list[dict[str, Any]] = [], **train: Any) -> set[tuple[str, str]]:  # noqa: B006
    config = Config.from_dict({"train": {"steps": len(records)} | train})
    return {(finding.name, finding.kind) for finding in diagnose(RULES, RunHistory(config, records, evaluations))}


CASES: list[tuple[dict[str, tuple[float, float]], list[dict[str, Any]], set[tuple[str, str]]]] = [
    # reward hacking
    (RISING, evaluated(0.3, 0.5, 0.35), {("reward_hacking", "accuracy")}),
    (RISING, evaluated(0.3, 0.5, 0.35, rewards=(0.3, 0.5, 0.7)), {("reward_hacking", "accuracy")}),
    (RISING | FALLING, [], {("reward_hacking", "component")}),
    (RISING | LONGER, evaluated(0.5, 0.5), {("reward_hacking", "length")}),
    (RISING, evaluated(0.3, 0.5, 0.7), set()),
    (RISING, evaluated(0.3, 0.5, 0.48), set()),  # within chance
    (RISING, evaluated(0.3, 0.5, 0.35, problems=20), set()),
    (RISING | {"rewards/right/mean": (0.1, 0.5), "rewards/format/mean": (0.5, 0.9)}, [], set()),
    (RISING | FALLING | {"rewards/right/mean": (0.5, 0.45)}, [], set()),  # a little of the spread of 0.4
    (RISING | LONGER, evaluated(0.3, 0.7), set()),  # longer, and better
    # held-out accuracy falls together with the held-out reward
    (RISING, evaluated(0.3, 0.5, 0.35, rewards=(0.3, 0.5, 0.35)), {("held_out_falls", "overfitted")}),
    # KL explosion
    (RISING | {"kl_divergence": (0.0, 3.0)}, [], {("kl_explosion", "far")}),
    (RISING | {"kl_divergence": (0.0, 0.4)}, [], set()),
    (RISING, [{"step": 20, "accuracy": 0.5, "problems": 9, "kl_divergence": 2.0}], {("kl_explosion", "far")}),
    # no improvement
    (FLAT, [], {("no_improvement", "flat")}),
    (FLAT | {"reward/frac_zero_std": (0.95, 0.95)}, [], {("no_improvement", "no_spread")}),
    (FLAT | {"reward/mean": (0.5, 0.3)}, [], {("no_improvement", "falls")}),
    (FLAT | {"reward/mean": (0.3, 0.42)}, [], set()),
    # mode collapse
    (FLAT | SURE, [], {("mode_collapse", "alike"), ("no_improvement", "no_spread")}),
    (RISING | SURE, [], set()),  # has learnt the answers
    (RISING | {"completions/most_common": (0.1, 0.95)}, [], {("mode_collapse", "one_answer")}),
    (RISING | {"completions/repeated_ngrams": (0.05, 0.8)}, [], {("mode_collapse", "repeats")}),
    (RISING | {"completions/repeated_ngrams": (0.05, 0.2)}, [], set()),
    # the others
    (FLAT | {"completions/clipped_ratio": (0.95, 0.95)}, [], {("nothing_stops", "hardly"), ("no_improvement", "flat")}),
    (RISING | {"completions/clipped_ratio": (0.99, 0.99)}, [], set()),  # learns all the same
    (RISING | {"sampling/logp_difference/mean": (0.001, 0.2)}, [], {("sampler_drift", "apart")}),
    (RISING | {"sampling/logp_difference/mean": (0.002, 0.06)}, [], {("sampler_drift", "apart")}),
    (RISING | {"sampling/logp_difference/mean": (0.03, 0.03)}, [], set()),  # bfloat16
    (RISING | {"grad_norm": (4.0, 3.0)}, [], {("gradient_clipped", "always")}),
    (RISING | {"grad_norm": (4.0, 0.5)}, [], set()),
    (RISING | {"rewards/failed": (2.0, 2.0)}, [], {("reward_fails", "rows")}),
    (RISING | LONGER | {"completions/clipped_ratio": (0.0, 0.6)}, [], {("length_runaway", "longer")}),
    (FLAT | LONGER, [], {("length_runaway", "longer"), ("no_improvement", "flat")}),
    (RISING | LONGER, [], set()),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("slopes", "evaluations", "expected"), CASES)
def test_each_rule_fires_on_its_case_alone(slopes: Any, evaluations: Any, expected: set[tuple[str, str]], seed: int) -> None:
    assert found(synthetic(seed, slopes), evaluations) == expected


def test_no_reward_and_solved_groups_are_said_of_runs_that_start_so() -> None:
    zero = [{"reward/mean": 0.0, "reward/std": 0.0, "rewards/failed": 0.0, "rewards/right/mean": 0.0}] * STEPS
    assert found(zero[:4], steps=STEPS) == set()
    assert found(zero[:5], steps=STEPS) == {("no_reward", "zero")}
    assert found(zero) == {("no_reward", "zero"), ("no_improvement", "flat")}
    none = [{"reward/mean": 0.0, "reward/std": 0.0, "rewards/failed": 0.0}] * 10
    assert found(none, steps=STEPS) == {("no_reward", "none")}
    easy = {"reward/mean": 1.0, "reward/std": 0.02, "reward/frac_zero_std": 0.98, "rewards/right/mean": 1.0}
    assert found([easy] * STEPS) == {("all_solved", "easy")}
    # A run that has learnt to solve everything is no such case.
    assert found(synthetic(0, RISING | {"reward/frac_zero_std": (0.2, 1.0), "reward/mean": (0.4, 1.0)})) == set()


def test_every_rule_has_a_case_words_and_a_name_for_stop_on() -> None:
    fired = {pair for _, _, pairs in CASES for pair in pairs} | {
        ("no_reward", "zero"),
        ("no_reward", "none"),
        ("all_solved", "easy"),
    }
    assert fired | {("nothing_stops", "never")} == {(rule.name, kind) for rule in RULES for kind in rule.words}
    assert typing.get_args(DoctorRule) == tuple(rule.name for rule in RULES)
    assert [rule.title for rule in RULES[:4]] == FOUR
    titles = [rule.title.lower() for rule in RULES]
    said = [
        text.format(**vars(Config())).lower() for rule in RULES for words in rule.words.values() for text in vars(words).values()
    ]
    assert not [text for text in said if any(title in text for title in titles)]  # a title stands above its findings alone


def test_where_no_completion_ever_stopped_the_stop_token_is_the_cause() -> None:
    steps = [step | {"completions/clipped_ratio": 1.0} for step in synthetic(0, FLAT)]
    assert found(steps) == {("nothing_stops", "never"), ("no_improvement", "flat")}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [25, 60, 250])
@pytest.mark.parametrize(
    ("reward", "cut"), [((-1.31, -3.17), None), ((-4.96, -6.16), (0.87, 0.93))], ids=["first notebook", "second notebook"]
)
def test_published_runs_that_did_not_learn_are_flagged(reward: Any, cut: Any, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    curve = np.linspace(reward[0], reward[1], steps) + rng.normal(0, 0.3, steps)
    records = [{"reward/mean": float(value)} for value in curve]
    if cut is not None:
        records = [
            record | {"completions/clipped_ratio": float(value)}
            for record, value in zip(records, np.linspace(cut[0], cut[1], steps), strict=True)
        ]
    names = {name for name, _ in found(records)}
    assert "no_improvement" in names
    assert ("nothing_stops" in names) == (cut is not None)


@pytest.mark.parametrize("seed", range(3))
def test_a_short_run_that_falls_first_and_recovers_is_not_flagged_early(seed: int) -> None:
    down = synthetic(seed, {"reward/mean": (0.5, 0.4), "reward/std": (0.45, 0.45)}, 20)
    up = synthetic(seed + 10, {"reward/mean": (0.42, 0.9), "reward/std": (0.45, 0.45)}, 20)
    run = down + up
    assert all(found(run[:seen], steps=40) == set() for seen in range(5, 41))
    falling = synthetic(seed, {"reward/mean": (0.5, 0.1), "reward/std": (0.45, 0.45)}, 40)
    assert found(falling[:30], steps=40) == {("no_improvement", "falls")}


def healthy(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A stored run: records of its steps, and of its evaluations."""
    columns = json.loads((Path(__file__).parents[1] / "goldens" / "healthy_runs" / f"{name}.json").read_text())
    evaluations = columns.pop("evaluations")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], evaluations


@pytest.mark.parametrize("name", [f"{recipe}-{seed}" for recipe in ("quickstart", "stories") for seed in range(3)])
def test_nothing_is_found_in_healthy_runs_at_any_step(name: str) -> None:
    """Quickstart (150 steps) and stories (50 steps), as their recipes make them, three seeds each."""
    steps, evaluations = healthy(name)
    history, seen = RunHistory(Config.from_dict({"train": {"steps": len(steps)}})), []
    for number, record in enumerate(steps, start=1):
        history.add_step(number, record)
        for one in evaluations:
            if one["step"] == number:
                history.add_evaluation(number, one)
        seen += [(number, finding.name, finding.numbers) for finding in diagnose(RULES, history)]
    assert seen == []


def write_run(folder: Path, steps: list[dict[str, Any]], completions: list[dict[str, Any]] = [], config: str = "") -> Path:  # noqa: B006
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    for name, records in (("metrics", steps), ("completions", completions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def numbered(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"step": number, **record} for number, record in enumerate(steps, start=1)]


def test_the_command_prints_titles_with_numbers_and_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = numbered([{"reward/mean": 0.25 + 0.01 * n, "reward/std": 0.4, "kl_divergence": 2.0} for n in range(40)])
    config = "train: {steps: 40}\noptim: {learning_rate: 0.01}\n"
    run = write_run(tmp_path / "run", steps, config=config)
    assert cli.main(["doctor", "--run", str(run)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "KL explosion"
    assert lines[1] == "  seen    kl_divergence 2 (steps 36 to 40)"
    assert "lower optim.learning_rate (0.01)" in lines[3]
    assert lines[-1] == "note: optim.learning_rate is 0.01; usual rates for LoRA are 5e-06 to 5e-05"
    assert cli.main(["doctor", "--run", str(run), "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], len(said["findings"]), said["notes"]) == (40, 1, [lines[-1]])
    (finding,) = said["findings"]
    assert (finding["name"], finding["title"]) == ("kl_explosion", "KL explosion")
    assert (finding["evidence"], finding["setting"][:5]) == (["kl_divergence 2 (steps 36 to 40)"], "lower")
    assert finding["values"] == [{"metric": "kl_divergence", "steps": [[36, 40]], "values": [2.0]}]


def test_a_healthy_run_has_no_findings_and_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", numbered(healthy("stories-0")[0]), config="train: {steps: 50}\n")
    assert cli.main(["doctor", "--run", str(run)]) == 0
    assert capsys.readouterr().out == "no findings\n"
    for words in ([], [{"step": 1, "loss": 0.4}]):
        other = write_run(tmp_path / f"other{len(words)}", words)
        assert cli.main(["doctor", "--run", str(other)]) == 2
        assert "run: " in capsys.readouterr().err


def test_what_the_reward_saw_is_shown_and_variety_is_read_from_completions(tmp_path: Path) -> None:
    steps = numbered([{"reward/mean": 0.0, "reward/std": 0.0, "rewards/right/mean": 0.0}] * 40)
    row = {"rewards": {"right": 0.0}, "finish_reason": "stop", "columns": {"answer": "72"}}
    rows = [
        {"step": step, "prompt": f"p{prompt}", "completion": f"#### {prompt if step < 20 else 'x'}{n}", **row}
        for step in range(1, 41)
        for prompt in range(4)
        for n in (range(4) if step < 20 else [0] * 4)
    ]
    diagnosis = diagnose_folder(write_run(tmp_path / "run", steps, rows, "train: {steps: 40}\n"))
    assert {finding.kind for finding in diagnosis.findings} == {"flat", "one_answer", "zero"}
    lines = diagnosis.lines()
    assert lines.count("  the reward saw") == 3
    first = lines.index("  the reward saw")
    assert [line.strip() for line in lines[first + 1 : first + 5]] == [
        "prompt: p0",
        "completion: #### 00",
        "answer: 72",
        "gave: right 0.0 (stop)",
    ]


def test_variety_counts_answers_and_repetitions() -> None:
    texts = ["a", "a", "b", "b", "a", "c"]  # 2 of 3 and 3 of 3 are different; a is 3 of 6
    assert variety_metrics(texts, 3) == {"completions/distinct": pytest.approx(5 / 6), "completions/most_common": 0.5}
    assert repeated_share("a b a b a b a b") == pytest.approx(1 - 2 / 5)
    assert repeated_share("a b c d") is None
    assert variety_metrics(["a b a b a b a b", "x"], 2)["completions/repeated_ngrams"] == pytest.approx(3 / 5)


def test_settings_outside_the_usual_ranges_are_notes() -> None:
    assert setting_notes(Config()) == []
    odd = {"rollout": {"num_generations": 32, "max_completion_length": 64}, "objective": {"beta": 0}, "lora": {"rank": 0}}
    assert setting_notes(Config.from_dict(odd)) == [
        "note: rollout.num_generations is 32; usual completions of a prompt are 4 to 16",
        "note: objective.beta is 0; usual weights of the KL term are 0.01 to 0.1",
        "note: rollout.max_completion_length is 64; usual tokens are 128 to 512",
        "note: optim.learning_rate is 1e-05; usual rates for full training are 1e-06 to 5e-06",
    ]
    assert len(setting_notes(Config.from_dict(odd), own_optimizer=True)) == 3


def test_stop_on_is_refused_where_its_rule_can_never_hold() -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_on.*kl_explosion"):
        Config.from_dict({"train": {"stop_on": ["kl_explosions"]}})
    config = Config.from_dict(
        {"train": {"stop_on": ["kl_explosion", "held_out_falls"], "eval_every": 5}, "objective": {"beta": 0.04}}
    )
    check_stop_on(config, held_out=3)
    with pytest.raises(ConfigError, match="held_out_falls needs evaluations"):
        check_stop_on(config, held_out=0)
    without = Config.from_dict({"train": {"stop_on": ["kl_explosion"]}, "objective": {"beta": 0.0}})
    with pytest.raises(ConfigError, match=r"no KL divergence is known: set train\.eval_kl"):
        check_stop_on(without, held_out=3)


class Watched:
    """A doctor at work on a run that exists in records alone."""

    def __init__(self, before: list[dict[str, Any]] = [], **train: Any):  # noqa: B006
        self.warnings, self.notes = list[str](), list[str]()
        config = Config.from_dict({"train": {"steps": STEPS} | train})
        self.callback = DoctorCallback(config, SimpleNamespace(warning=self.warnings.append, note=self.notes.append))  # type: ignore[arg-type]
        folder = SimpleNamespace(history=lambda: before, evaluations=lambda: {})
        self.trainer: Any = SimpleNamespace(folder=folder, should_stop=False, stopped_by=None, steps_done=len(before))
        self.callback.on_train_begin(self.trainer)

    def step(self, metrics: dict[str, Any], completions: StepCompletions | None = None) -> None:
        self.trainer.steps_done += 1
        self.callback.on_step_end(self.trainer, metrics, completions)


def test_a_finding_is_said_once_when_it_begins_also_after_a_resume() -> None:
    steps = synthetic(0, RISING | {"kl_divergence": (0.0, 3.0)})
    watched = Watched(numbered(steps[:15]))
    for record in steps[15:]:
        watched.step(record)
    (line,) = watched.warnings
    begun = next(n for n in range(5, STEPS + 1) if np.median([step["kl_divergence"] for step in steps[n - 5 : n]]) > 1)
    assert line.startswith(f"step {begun}: KL explosion: kl_divergence ")
    assert not watched.trainer.should_stop


def test_stop_on_ends_the_run_and_only_for_its_rules() -> None:
    watched = Watched(stop_on=["no_improvement", "kl_explosion"])
    for _ in range(6):
        watched.step({"reward/mean": 0.0, "reward/std": 0.0, "kl_divergence": 0.1})
    assert not watched.trainer.should_stop  # no reward is not in the list
    for _ in range(3):
        watched.step({"reward/mean": 0.0, "reward/std": 0.0, "kl_divergence": 5.0})
    assert (watched.trainer.should_stop, watched.trainer.stopped_by) == (True, "kl_explosion")
    assert [line for line in watched.warnings if "train.stop_on" in line] == [
        "step 9: the run ends here, as train.stop_on names kl_explosion"
    ]


def test_completions_without_any_reward_are_shown_while_the_run_goes_on() -> None:
    watched = Watched()
    rewards = {"right": np.zeros(4, np.float32)}
    shown = StepCompletions(
        ["1+1=", "2+2="], ["a", "b", "c", "d"], [[1]] * 4, rewards, np.zeros(4), ["stop"] * 4, columns={"answer": ["2", "4"]}
    )
    for _ in range(5):
        watched.step({"reward/mean": 0.0, "reward/std": 0.0, "rewards/right/mean": 0.0}, shown)
    assert len(watched.warnings) == 1
    assert [line.strip() for line in watched.notes if line.strip().startswith(("prompt", "completion", "answer"))] == [
        *("prompt: 1+1=", "completion: a", "answer: 2"),
        *("prompt: 2+2=", "completion: c", "answer: 4"),
    ]


def test_missing_numbers_are_no_change() -> None:
    steps = [{**step, "rewards/right/mean": math.nan} for step in synthetic(0, RISING | FALLING)]
    assert found(steps) == set()
    assert found(synthetic(0, RISING | FALLING)[:19], steps=STEPS) == set()
