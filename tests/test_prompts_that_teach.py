"""Runs that replace groups without a spread of rewards, draw by a curriculum or learn from some completions; and their resumption.

What a step trains is compared with the order of the rows worked out here, where the row decides whether a group has a spread.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many_processes import config_folder, together
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import G, additions, assert_same_arrays, config_of, records, run, saved_weights

import grpo_jax as gx
from grpo_jax.config import Config, ConfigError
from grpo_jax.data.ledger import Ledger, PromptResults
from grpo_jax.rewards import Failure, ScoredBatch
from grpo_jax.rollout.loop import LoopState, RolloutLoop
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.resume import RunFolderError
from grpo_jax.steps.dynamic_sampling import FilledStep, Filling, fill_step, filled_step
from grpo_jax.steps.groups import Groups
from grpo_jax.steps.last_step import LastStep
from grpo_jax.types import PromptBatch, Rollout

ROWS = additions()
LIMIT = 5
"""Prompts that a step of these runs samples at most: 2, and 3 more."""
DYNAMIC: dict[str, Any] = {"steps": 6, "save_every": 3, "dynamic_sampling": True, "max_extra_groups": LIMIT - 2}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


def teaches(row: dict[str, Any]) -> bool:
    """Whether `by_row` gives a row's completions different rewards."""
    return int(row["answer"]) % 3 == 0


def by_row(completion_ids: list[list[int]], answer: list[str]) -> list[float | None]:
    """A reward: of rows that teach it depends on the tokens; of others all are right, or none has a reward."""
    return [
        sum(ids) % 89 / 89 if int(own) % 3 == 0 else (1.0 if int(own) % 3 == 1 else None)
        for ids, own in zip(completion_ids, answer, strict=True)
    ]


def stopping(ledger: Path, steps: int) -> Any:
    """The same function, until so many steps are in the ledger: it then interrupts the run within the next step."""

    @functools.wraps(by_row)
    def stopped(completion_ids: list[list[int]], answer: list[str]) -> list[float | None]:
        if ledger.exists() and len(records(ledger)) >= steps:
            raise KeyboardInterrupt
        return by_row(completion_ids, answer)

    return stopped


def by_tokens(completion_ids: list[list[int]]) -> list[float]:
    """A reward that hardly ever gives two completions the same."""
    return [sum(ids) % 997 / 997 for ids in completion_ids]


def train(config: Config, reward: Any = by_row, **given: Any) -> gx.TrainResult:
    return gx.train(config, dataset=ROWS, reward_funcs=reward, **given)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in history]


def prompts_by_step(run_dir: Path) -> dict[int, list[str]]:
    """The prompts that each step trained, in order."""
    found: dict[int, list[str]] = {}
    for number, record in enumerate(records(run_dir / "completions.jsonl")):
        if number % G == 0:
            found.setdefault(record["step"], []).append(record["prompt"])
    return found


# filling a step


def made_up(numbers: list[int], rewards: list[list[float]]) -> Groups:
    """Groups of the prompts `numbers` with these rewards; NaN is a completion without one, and a failure."""
    values = np.array(rewards, np.float32).reshape(-1)
    valid = ~np.isnan(values)
    failures = [Failure("f", int(row), "fell over") for row in np.flatnonzero(~valid)]
    scored = ScoredBatch(np.nan_to_num(values), valid, {"f": values}, failures, ["a remark"], [0.5, 0.25])
    ids = [[number, completion] for number in numbers for completion in range(len(rewards[0]))]
    rollout = Rollout(ids, [np.array([-0.5, -0.25], np.float32)] * len(ids), ["stop"] * len(ids), near_ties=1, slots=4)
    prompts = PromptBatch(
        3, np.array(numbers), [f"p{number}" for number in numbers], [[number] for number in numbers], {"n": numbers}
    )
    return Groups(prompts, rollout, [str(row) for row in ids], scored)


def test_groups_are_selected_and_joined_with_all_that_belongs_to_them() -> None:
    one, two = made_up([4, 5], [[0, 1], [np.nan, 1]]), made_up([6], [[1, np.nan]])
    both = Groups.joined([one, two])
    assert [failure.row for failure in both.scored.failures] == [2, 5]
    assert both.scored.seconds_by_process == [1.0, 0.5]
    assert both.scored.remarks == ["a remark"]
    assert both.rollout.near_ties == 2
    taken = both.take(np.array([1, 2]))
    assert taken.prompts.indices.tolist() == [5, 6]
    assert (taken.prompts.prompts, taken.prompts.prompt_ids, taken.prompts.columns) == (["p5", "p6"], [[5], [6]], {"n": [5, 6]})
    assert taken.rollout.completion_ids == [[5, 0], [5, 1], [6, 0], [6, 1]]
    assert taken.texts == ["[5, 0]", "[5, 1]", "[6, 0]", "[6, 1]"]
    assert taken.scored.valid.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(taken.scored.per_function["f"], [np.nan, 1, 1, np.nan])
    assert [failure.row for failure in taken.scored.failures] == [0, 3]
    last = both.take_completions(np.array([[1], [1], [0]]))
    assert last.rollout.completion_ids == [[4, 1], [5, 1], [6, 0]]
    assert last.prompts is both.prompts
    assert last.scored.rewards.tolist() == [1, 1, 1]
    assert last.scored.failures == []


def filled_by_rollouts(size: int, extra: int, most: int, teach: np.ndarray) -> tuple[FilledStep, list[tuple[int, int]]]:
    """A step whose rollouts follow each other, and which groups each has sampled."""
    rollouts: list[tuple[int, int]] = []

    def spread_of(groups: Groups) -> np.ndarray:
        return teach[groups.prompts.indices]

    def rollout(filling: Filling, count: int) -> tuple[list[int], Groups]:
        numbers = filling.begin(count)
        rollouts.append((numbers[0], numbers[-1] + 1))
        groups = made_up(numbers, [[0.0, 1.0]] * count)
        filling.note(numbers, spread_of(groups))
        return numbers, groups

    filling = Filling(size, size + extra)
    return filled_step(filling, fill_step(rollout, filling, most), spread_of), rollouts


def filled_while_decoding(size: int, extra: int, teach: np.ndarray, rng: np.random.Generator) -> FilledStep:
    """A step whose groups end in any order, and are replaced at once."""

    def spread_of(groups: Groups) -> np.ndarray:
        return teach[groups.prompts.indices]

    def rollout(filling: Filling, count: int) -> tuple[list[int], Groups]:
        running, ended = filling.begin(count), list[int]()
        while running and not filling.full:
            ended.append(running.pop(int(rng.integers(len(running)))))
            filling.note(ended[-1:], teach[ended[-1:]])
            running += filling.begin(filling.replacements(int(rng.integers(0, 4))))
        return ended, made_up(ended, [[0.0, 1.0]] * len(ended))

    filling = Filling(size, size + extra)
    return filled_step(filling, fill_step(rollout, filling, size), spread_of)


def test_a_step_trains_the_first_groups_that_teach_and_never_exceeds_its_budget() -> None:
    rng = np.random.default_rng(0)
    cancelled = 0.0
    for _ in range(200):
        size, extra, most = (int(number) for number in rng.integers([1, 0, 1], [6, 12, 9]))
        teach = rng.random(size + extra) < rng.choice([0.05, 0.3, 0.7, 1.0])
        filled, rollouts = filled_by_rollouts(size, extra, most, teach)
        drawn = len(filled.drawn)
        assert filled.drawn.prompts.indices.tolist() == list(range(drawn))  # no prompt twice, none left out
        assert drawn <= size + extra
        assert rollouts[0] == (0, size)
        assert all(0 < stop - start <= most for start, stop in rollouts[1:])
        good = [number for number in range(drawn) if teach[number]]
        chosen = filled.chosen.tolist()
        metrics = {name.partition("/")[2]: value for name, value in filled.metrics.items()}
        if len(good) >= size:
            assert chosen == good[:size]
            assert filled.used == chosen[-1] + 1
            assert sum(teach[: rollouts[-1][0]]) < size  # no rollout more than needed
        else:
            assert drawn == size + extra == filled.used
            assert set(good) < set(chosen)
            assert [n for n in chosen if n not in good] == [n for n in range(drawn) if not teach[n]][: size - len(good)]
        assert metrics["extra_groups"] == drawn - size
        assert metrics["replaced"] == sum(number >= size for number in chosen)
        assert metrics["unfilled"] == max(0, size - len(good))
        assert metrics["discarded"] == max(0, len(good) - size)
        assert metrics["spread_of_first"] == pytest.approx(teach[:size].mean())
        assert metrics["cancelled"] == 0
        at_once = filled_while_decoding(size, extra, teach, rng)
        assert at_once.drawn.prompts.indices[at_once.chosen].tolist() == chosen  # whatever ends first
        assert at_once.used == filled.used
        begun = size + at_once.metrics["dynamic_sampling/extra_groups"]
        assert begun - at_once.metrics["dynamic_sampling/cancelled"] == len(at_once.drawn)
        assert begun <= size + extra
        cancelled += at_once.metrics["dynamic_sampling/cancelled"]
    assert cancelled > 0


def test_a_rollout_goes_by_what_was_found_so_far() -> None:
    def filling(found: int, drawn: int, extra: int) -> Filling:
        made = Filling(8, 8 + extra)
        made.note(made.begin(drawn), np.arange(drawn) < found)
        return made

    assert Filling(8, 32).next_rollout(8) == 8
    assert filling(8, 8, 24).next_rollout(8) == 0
    assert filling(4, 8, 24).next_rollout(99) == (4 + 2) * 2  # half of them teach; 2 = √4 more
    assert filling(4, 8, 24).next_rollout(8) == 8  # what one rollout decodes at once
    assert filling(4, 8, 3).next_rollout(8) == 3  # what is left of the budget
    assert filling(4, 11, 3).next_rollout(8) == 0
    assert filling(0, 8, 24).next_rollout(8) == 8


def test_what_is_begun_while_others_are_decoded_goes_by_what_was_found_so_far() -> None:
    filling = Filling(8, 32)
    numbers = filling.begin(8)
    assert filling.replacements(99) == 0  # nothing is known
    filling.note(numbers[:3], np.array([True, True, True]))
    assert filling.replacements(99) == 0  # 5 are missing, and 5 are decoded
    filling.note(numbers[3:4], np.array([False]))
    assert filling.replacements(99) == 3  # of 5 + 1 groups 4 teach: ⌈5 · 5/4⌉ = 7 are needed, and 4 are decoded
    assert filling.replacements(1) == 1
    informed = Filling(8, 32, before=(6, 14))
    informed.begin(8)
    assert informed.replacements(99) == 10  # of 15 groups 7 teach: ⌈8 · 15/7⌉ = 18 are needed, and 8 are decoded
    ahead = Filling(8, 32, carried=3, keeps=True)
    assert ahead.next_rollout(8) == 8  # 3 of this step are there already
    ahead.begin(8)
    assert ahead.replacements(99) == 5  # up to two steps' groups


def test_surplus_groups_are_trained_first_in_the_next_step_and_once() -> None:
    """Three of the first step's seven groups with a spread are trained, three kept, and one is dropped."""
    filling = Filling(3, 9, keeps=True)
    first = made_up([0, 1, 2, 3, 4, 5, 6, 7], [[0.0, 1.0]] * 8)
    numbers = filling.begin(8)
    spread = np.array([1, 0, 1, 1, 1, 1, 1, 1], bool)
    filling.note(numbers, spread)
    one = filled_step(filling, [(numbers, first)], lambda groups: spread[groups.prompts.indices])
    assert one.drawn.prompts.indices[one.chosen].tolist() == [0, 2, 3]
    assert (one.used, one.metrics["dynamic_sampling/kept"], one.metrics["dynamic_sampling/discarded"]) == (8, 3, 1)
    last = LastStep(keeps=True)
    last.finish(one)
    kept = last.groups
    assert last.share == (7, 8)
    assert kept is not None
    assert kept.prompts.indices.tolist() == [4, 5, 6]
    assert kept.rollout.near_ties == 0
    filling = Filling(4, 6, carried=3, keeps=True)
    numbers = filling.begin(3)
    filling.note(numbers, np.array([False, True, True]))
    two = filled_step(filling, [(numbers, made_up([8, 9, 10], [[0.0, 1.0]] * 3))], lambda _: np.array([False, True, True]), kept)
    assert two.drawn.prompts.indices.tolist() == [4, 5, 6, 8, 9, 10]
    assert two.drawn.prompts.indices[two.chosen].tolist() == [4, 5, 6, 9]
    assert two.fresh.prompts.indices.tolist() == [8, 9, 10]  # what the ledger learns of
    assert two.kept is not None
    assert two.kept.prompts.indices.tolist() == [10]
    assert two.metrics["sampling/staleness"] == 0.75


# runs


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> gx.TrainResult:
    """A run of six steps with dynamic sampling, in the order of the data."""
    return train(config_of(tmp_path_factory.mktemp("dynamic"), train=DYNAMIC))


def expected_steps(steps: int) -> list[tuple[list[int], int, int]]:
    """By the definition: rows that each step trains, where it ends, and how many do not teach; no row twice within LIMIT."""
    order: list[int] = []
    for epoch in range(3):
        left = np.random.default_rng([0, epoch]).permutation(len(ROWS)).tolist()
        for _ in range(len(ROWS)):
            order.append(next(row for row in left if row not in order[-(LIMIT - 1) :]))
            left.remove(order[-1])
    position, found = 0, []
    for _ in range(steps):
        window = order[position : position + LIMIT]
        good = [number for number, row in enumerate(window) if teaches(ROWS[row])][:2]
        full = len(good) == 2
        chosen = good if full else sorted(good + [n for n, row in enumerate(window) if not teaches(ROWS[row])][: 2 - len(good)])
        position += chosen[-1] + 1 if full else LIMIT
        found.append(([window[number] for number in chosen], position, 2 - len(good)))
    return found


def test_groups_without_spread_are_replaced_by_the_next_rows_of_the_order(dynamic: gx.TrainResult) -> None:
    expected = expected_steps(6)
    assert prompts_by_step(dynamic.run_dir) == {
        step: [ROWS[row]["prompt"] for row in rows] for step, (rows, _, _) in enumerate(expected, start=1)
    }
    ledger = records(dynamic.run_dir / "ledger.jsonl")
    assert [record["position"] for record in ledger] == [position for _, position, _ in expected]
    unfilled = [missing for _, _, missing in expected]
    assert [record["dynamic_sampling/unfilled"] for record in dynamic.history] == unfilled
    assert sum(unfilled) > 0  # both cases are in this run
    assert unfilled.count(0) > 0
    for record, found, missing in zip(dynamic.history, ledger, unfilled, strict=True):
        assert record["dynamic_sampling/extra_groups"] == len(found["rows"]) - 2 <= LIMIT - 2
        assert record["reward/frac_zero_std"] == missing / 2


def test_the_ledger_has_every_group_that_was_sampled(dynamic: gx.TrainResult) -> None:
    trained = {step: set(rows) for step, (rows, _, _) in enumerate(expected_steps(6), start=1)}
    for record in records(dynamic.run_dir / "ledger.jsonl"):
        assert trained[record["step"]] <= set(record["rows"])
        for row, completions, total, solved in zip(
            record["rows"], record["completions"], record["reward_sums"], record["solved"], strict=True
        ):
            kind = int(ROWS[row]["answer"]) % 3
            assert completions == (0 if kind == 2 else G)
            if kind:
                assert (total, solved) == ((G, G) if kind == 1 else (0, 0))
    with RunFolder.create(dynamic.run_dir, Config.from_yaml(dynamic.run_dir / "config.yaml"), resume=True) as folder:
        ledger = Ledger.empty(np.arange(len(ROWS)))
        ledger.replay(folder.ledger(4))
    assert ledger.last_step.max() == 4


AT_ONCE: dict[str, Any] = {"rollout": {"segment": 2}, "rewards": {"by_group": ["by_row"]}}
"""With these settings groups end and are scored while others are decoded."""

RESUMED: dict[str, dict[str, Any]] = {
    "order": {"train": DYNAMIC},
    "learnable": {"train": DYNAMIC, "data": {"curriculum": "learnable"}},
    "at once": AT_ONCE | {"train": DYNAMIC, "data": {"curriculum": "learnable"}},
    "stale": AT_ONCE | {"train": DYNAMIC | {"max_staleness": 1}},
}


@pytest.fixture(scope="module")
def uninterrupted(dynamic: gx.TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], gx.TrainResult]:
    made = {"order": dynamic}

    def of(kind: str) -> gx.TrainResult:
        if kind not in made:
            made[kind] = train(config_of(tmp_path_factory.mktemp(kind), **RESUMED[kind]))
        return made[kind]

    return of


@pytest.mark.parametrize(
    "kind", ["order", "learnable", pytest.param("at once", marks=pytest.mark.slow), pytest.param("stale", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one_ledger_included(
    uninterrupted: Callable[[str], gx.TrainResult], kind: str, tmp_path: Path
) -> None:
    whole = uninterrupted(kind)
    config = config_of(tmp_path, **RESUMED[kind])
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(tmp_path / "ledger.jsonl", 4))
    assert [record["step"] for record in records(tmp_path / "ledger.jsonl")] == [1, 2, 3, 4]  # the checkpoint is of step 3
    resumed = train(config, resume=True)
    assert_same_arrays(resumed.policy.variables, whole.policy.variables)
    assert_same_arrays(saved_weights(resumed.run_dir), saved_weights(whole.run_dir))
    assert timeless(resumed.history) == timeless(whole.history)
    for name in ("ledger.jsonl", "completions.jsonl"):
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


def test_a_group_without_spread_is_replaced_while_others_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, real = list[set[int]](), RolloutLoop.collect

    def collect(self: RolloutLoop, state: LoopState) -> None:
        decoded.append({int(row) // G for row in state.schedule.completion_in_slot if row >= 0})
        real(self, state)

    monkeypatch.setattr(RolloutLoop, "collect", collect)
    done = train(config_of(tmp_path, **AT_ONCE | {"train": DYNAMIC}))
    assert any(min(prompts) < 2 <= max(prompts) for prompts in decoded)  # one of the first two, and one in the other's place
    expected = expected_steps(6)
    assert prompts_by_step(done.run_dir) == {
        step: [ROWS[row]["prompt"] for row in rows] for step, (rows, _, _) in enumerate(expected, start=1)
    }
    ledger = records(done.run_dir / "ledger.jsonl")
    assert [record["position"] for record in ledger] == [position for _, position, _ in expected]
    for found, metrics in zip(ledger, done.history, strict=True):
        begun = 2 + metrics["dynamic_sampling/extra_groups"]
        assert len(found["rows"]) == begun - metrics["dynamic_sampling/cancelled"] <= LIMIT


@pytest.mark.slow
def test_surplus_groups_are_those_of_the_policy_before_and_are_trained_with_its_log_probabilities(tmp_path: Path) -> None:
    policies, learned = list[gx.Policy](), list[StepCompletions]()

    class Watch(Callback):
        def on_train_begin(self, trainer: Any) -> None:
            policies.append(trainer.policy)

        def on_step_end(self, trainer: Any, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
            assert completions is not None
            policies.append(trainer.policy)
            learned.append(completions)

    epsilon = 0.01
    settings = AT_ONCE | {"train": DYNAMIC | {"max_staleness": 1, "max_extra_groups": 9}}
    done = train(config_of(tmp_path, **settings, objective={"epsilon": epsilon, "beta": 0.0}), callbacks=[Watch()])
    stale = [round(metrics["sampling/staleness"] * 2) for metrics in done.history]
    kept = [0, *(int(metrics["dynamic_sampling/kept"]) for metrics in done.history)]
    assert stale == [min(2, number) for number in kept[:-1]]
    assert stale[0] == 0
    assert sum(stale) > 0
    for number, (own, metrics, old) in enumerate(zip(learned, done.history, stale, strict=True)):
        assert own.logprobs is not None
        before, now = (token_logprobs(policies[at], own) for at in (max(0, number - 1), number))
        drawn = np.concatenate(own.logprobs)
        lengths = [len(ids) for ids in own.ids]
        of_before = np.repeat(np.arange(2 * G) < old * G, lengths)
        np.testing.assert_allclose(drawn, np.where(of_before, before, now), atol=1e-4)
        ratio, advantage = np.exp(now - drawn), np.repeat(own.advantages, lengths)
        clipped = ((advantage > 0) & (ratio > 1 + epsilon)) | ((advantage < 0) & (ratio < 1 - epsilon))
        assert metrics["clip_ratio/region"] == pytest.approx(clipped.mean(), abs=1e-6)
        assert not clipped[~of_before].any()


def token_logprobs(policy: gx.Policy, completions: StepCompletions) -> np.ndarray:
    """Log-probabilities of all tokens of a step under a policy."""
    prompts = [policy.need_tokenizer().encode_prompt(prompt, chat=False) for prompt in completions.prompts for _ in range(G)]
    return np.concatenate(policy.logprobs(prompts, completions.ids))


@pytest.mark.slow
def test_a_ledger_that_lost_a_step_is_named(
    uninterrupted: Callable[[str], gx.TrainResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, **RESUMED["learnable"] | {"train": DYNAMIC | {"steps": 3}})
    train(config)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:1] + lines[2:]))
    capsys.readouterr()
    train(config, resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "ledger.jsonl is not the one of the checkpoint" in printed
    assert "the curriculum draws other prompts" in printed
    with pytest.raises(RunFolderError, match=r"data\.curriculum: 'learnable' -> 'uniform'"):
        train(config_of(tmp_path, train=DYNAMIC | {"steps": 3}), resume=True)


def test_a_curriculum_draws_what_teaches_more_often(uninterrupted: Callable[[str], gx.TrainResult], tmp_path: Path) -> None:
    """The function's weights alone decide: it gives one to rows that were never drawn, and nothing to the others."""
    (tmp_path / "own.py").write_text("def unseen(ledger):\n    return (ledger.groups == 0) + 1e-200\n")
    config = config_of(tmp_path / "run", train={"steps": 11}, data={"curriculum": f"{tmp_path / 'own.py'}:unseen"})
    result = train(config)
    drawn = [row for record in records(result.run_dir / "ledger.jsonl") for row in record["rows"]]
    assert sorted(drawn) == sorted(set(drawn))  # 22 of 24 rows, none twice
    assert len(drawn) == 22
    assert {record["position"] for record in records(result.run_dir / "ledger.jsonl")} == {0}
    with pytest.raises(ConfigError, match=r"data\.curriculum: .* has no function sseen; did you mean unseen"):
        train(config_of(tmp_path / "other", data={"curriculum": f"{tmp_path / 'own.py'}:sseen"}))


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_update_learns_from_the_completions_that_differ_most(tmp_path: Path, updates: int) -> None:
    section = {"prompts_per_step": 4, "update_generations": 3, "updates_per_rollout": updates, "steps": 1}
    done = run(config_of(tmp_path, train=section, objective={"beta": 0.0}), reward_funcs=by_tokens)
    rows = done.completions[1]
    assert len(rows) == 4 * G  # all are in the records
    weighted = tokens = 0.0
    for first in range(0, 4 * G, G):
        group = rows[first : first + G]
        rewards = np.array([row["rewards"]["by_tokens"] for row in group])
        best = list(max(itertools.combinations(range(G), 3), key=lambda subset: np.var(rewards[list(subset)])))
        expected, own = np.zeros(G), rewards[best]
        expected[best] = (own - own.mean()) / (own.std(ddof=1) + 1e-4)  # within the subset
        np.testing.assert_allclose([row["advantage"] for row in group], expected, atol=1e-4)
        lengths = np.array([row["completion_tokens"] for row in group])
        weighted, tokens = weighted + (expected * lengths).sum(), tokens + lengths[best].sum()
    (metrics,) = records(tmp_path / "metrics.jsonl")
    if updates == 1:  # on-policy and without KL the loss of `dapo` is −Σ A·tokens / Σ tokens of those that are learned from
        assert metrics["policy_loss"] == pytest.approx(-weighted / tokens, abs=1e-5)
    assert metrics["reward/mean"] == pytest.approx(np.mean([row["rewards"]["by_tokens"] for row in rows]), abs=1e-6)


TEACHES = """\
def letters(completion_ids, answer, **columns):
    return [sum(ids) % 89 / 89 if int(own) % 3 == 0 else 1.0 for ids, own in zip(completion_ids, answer)]
"""


@pytest.mark.slow
def test_processes_on_a_mesh_draw_what_one_process_draws(tmp_path: Path) -> None:
    """Two processes of two devices: all decide alike, while groups end one after the other on different devices."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    changes = {"train.dynamic_sampling": "true", "train.max_extra_groups": "7", "train.steps": "4", "data.curriculum": "learnable"}
    changes |= {"rollout.segment": "2", "rewards.by_group": "[letters]", "distributed.heartbeat_timeout_seconds": "300"}
    values = {name: config_folder(tmp_path / name) for name in ("one", "two")}
    for name in values:
        (tmp_path / name / "mine.py").write_text(TEACHES)
    ended = together(tmp_path / "two", 2, 2, *(word for name, value in changes.items() for word in (f"--{name}", value)))
    assert [process.status for process in ended] == [0, 0], ended[0].err
    train_section = values["one"]["train"] | {"dynamic_sampling": True, "max_extra_groups": 7, "steps": 4}
    data = values["one"]["data"] | {"curriculum": "learnable"}
    rollout, rewards = values["one"]["rollout"] | {"segment": 2}, values["one"]["rewards"] | {"by_group": ["letters"]}
    sections = {"train": train_section, "data": data, "rollout": rollout, "rewards": rewards}
    whole = gx.train(Config.from_dict(values["one"] | sections))
    assert any(record["dynamic_sampling/extra_groups"] % 4 for record in whole.history)
    assert records(tmp_path / "two" / "run" / "ledger.jsonl") == records(tmp_path / "one" / "run" / "ledger.jsonl")
    assert prompts_by_step(tmp_path / "two" / "run") == prompts_by_step(tmp_path / "one" / "run")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_extra_groups": 4}, "train.max_extra_groups is 4: it has an effect only with train.dynamic_sampling true"),
        ({"max_extra_groups": 0, "dynamic_sampling": True}, "train.max_extra_groups is 0: use at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"train": values})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"dynamic_sampling": True}}, "train.dynamic_sampling is true: use false: a supervised warm-up has no rewards"),
        ({"train": {"update_generations": 2}}, "train.update_generations is 2: use null: a supervised warm-up"),
        ({"data": {"curriculum": "learnable"}}, "data.curriculum is 'learnable': use uniform: a supervised warm-up"),
    ],
)
def test_a_supervised_warm_up_refuses_what_goes_by_rewards(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    with pytest.raises(ConfigError, match=message):
        gx.sft(config_of(tmp_path, **sections), dataset=rows)


def test_results_come_back_from_their_record() -> None:
    found = PromptResults(7, np.array([3, 1]), np.array([4, 0]), np.array([0.1 + 0.2, 0.0]), np.array([1, 0]))
    again = PromptResults.of_record({name: getattr(value, "tolist", lambda v=value: v)() for name, value in found.record().items()})
    assert again.position == 7
    for name, value in found.record().items():
        np.testing.assert_array_equal(getattr(again, name), value)
