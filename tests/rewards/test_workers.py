"""Reward functions in processes of their own: every fault costs its rows and not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import ConfigError, RewardsConfig
from grpo_jax.rewards import RewardError, ScoredBatch, math_verify, resolve_functions, runner_of, score

LIMIT_SECONDS = 2.0
SLACK_SECONDS = 30.0
"""The promise is 0.5 s after the last deadline, with a core to run on; a busy machine needs longer to start a process."""

SOURCE = """
import asyncio, os, signal, sys, threading, time

CALLS = []

def lengths(completions):
    return [float(len(text)) for text in completions]

def who(completions):
    return [float(os.getpid()) for text in completions]

def at_hang(completions, **columns):
    for text in completions:
        while text == "hang":
            pass
    return lengths(completions)

def holds_the_interpreter(completions):
    if "hang" in completions:
        9 ** 9 ** 9 ** 9
    return lengths(completions)

def leaves(completions):
    if "leave" in completions:
        os._exit(0)
    return lengths(completions)

def killed(completions):
    os.kill(os.getpid(), signal.SIGKILL)

def flaky(completions):
    CALLS.append(len(completions))
    if len(CALLS) == 1:
        raise ConnectionError("lost")
    return [float(count) for count in CALLS][-1:] * len(completions)

def compares(completions):
    if "bad" in completions:
        raise ValueError("no")
    best = max(completions)
    return [float(text == best) for text in completions]

def given(completions, answer):
    return eval(answer[0])

def noisy(completions):
    for _ in range(1000):
        print("x" * 1000)
    return lengths(completions)

async def loops(completions):
    return [float(id(asyncio.get_running_loop()) % 2**40) for text in completions]

async def waits(completions):
    await asyncio.sleep(1000 if "hang" in completions else 0)
    return lengths(completions)

async def blocks(completions):
    time.sleep(1000)

def module_of_main(completions):
    return [float("pytest" in getattr(sys.modules["__main__"], "__file__", "")) for text in completions]
"""

Score = Callable[..., ScoredBatch]


@pytest.fixture
def user(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(SOURCE)
    return tmp_path / "user.py"


@pytest.fixture
def run(user: Path) -> Iterator[Score]:
    """Scores texts with functions of the file, in workers; settings are those of `rewards`. `said` has what was shown."""
    runners: dict[str, Any] = {}

    def made(settings: dict[str, Any]) -> RewardsConfig:
        return RewardsConfig(**{"workers": 2, **settings})

    def scored(functions: list[Any], texts: list[str], answers: Any = None, weights: Any = None, **settings: Any) -> ScoredBatch:
        entries = [f"{user}:{entry}" if isinstance(entry, str) and f"def {entry}(" in SOURCE else entry for entry in functions]
        named = resolve_functions(entries)
        key = f"{entries}{settings}"
        if key not in runners:
            runners[key] = runner_of(made(settings), entries, named, None, said.append)
        return score(
            named,
            weights,
            prompts=["p"] * len(texts),
            completions=texts,
            completion_ids=[[1]] * len(texts),
            columns={"answer": answers or ["1"] * len(texts)},
            timeout_seconds=settings.get("timeout_seconds", 60.0),
            max_failed_share=1.0,
            runner=runners[key],
        )

    said: list[str] = []
    scored.said = said  # pyright: ignore[reportFunctionMemberAccess]
    yield scored
    for runner in runners.values():
        runner.close()


def reasons(batch: ScoredBatch) -> dict[int, str]:
    return {failure.row: failure.reason for failure in batch.failures}


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SLACK_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_values_of_workers_are_those_of_the_trainer_s_process(run: Score) -> None:
    functions = ["lengths", "exact_match", {"name": "regex_format", "pattern": "b"}, "compares"]
    texts, answers = ["a", "bb", "cab", "1"], ["1", "bb", "x", None]
    here, away = run(functions, texts, answers, workers=0), run(functions, texts, answers)
    assert here.failures == away.failures == []
    assert here.rewards.tolist() == away.rewards.tolist()
    assert {name: repr(values) for name, values in here.per_function.items()} == {
        name: repr(values) for name, values in away.per_function.items()
    }


def test_functions_of_a_config_run_in_other_processes_and_the_same_ones_at_every_step(run: Score) -> None:
    processes = {pid for _ in range(50) for pid in run(["who"], ["a", "b"]).per_function["who"].tolist()}
    assert os.getpid() not in processes
    assert len(processes) == 1
    assert run(["who"], ["a"], workers=0).per_function["who"].tolist() == [os.getpid()]


def test_the_trainer_s_main_is_not_imported(run: Score) -> None:
    assert run(["module_of_main"], ["a"]).rewards.tolist() == [0.0]


def test_a_function_that_hangs_ends_at_its_deadline_and_the_others_keep_their_values(run: Score) -> None:
    started = time.monotonic()
    batch = run(["at_hang", "lengths"], ["a", "hang"], timeout_seconds=LIMIT_SECONDS)
    assert time.monotonic() - started < LIMIT_SECONDS + SLACK_SECONDS
    assert reasons(batch) == dict.fromkeys((0, 1), "took longer than rewards.timeout_seconds = 2")
    assert batch.per_function["lengths"].tolist() == [1.0, 4.0]
    assert not batch.valid.any()
    assert run(["at_hang", "lengths"], ["a", "b"], timeout_seconds=LIMIT_SECONDS).valid.all()  # the worker was replaced


@pytest.mark.parametrize(
    ("function", "workers"),
    [
        ("at_hang", 2),
        ("holds_the_interpreter", 1),
        pytest.param("at_hang", 1, marks=pytest.mark.slow),
        pytest.param("holds_the_interpreter", 2, marks=pytest.mark.slow),
    ],
)
def test_called_row_by_row_only_the_rows_that_hang_fail(run: Score, function: str, workers: int) -> None:
    texts = ["a", "hang", "bb", "hang", "ccc", "dddd"]
    started = time.monotonic()
    batch = run([function], texts, timeout_seconds=LIMIT_SECONDS, row_by_row=[function], workers=workers)
    assert time.monotonic() - started < LIMIT_SECONDS + SLACK_SECONDS
    assert batch.rewards.tolist() == [1.0, 0.0, 2.0, 0.0, 3.0, 4.0]
    assert set(reasons(batch)) == {1, 3}


def test_rows_that_no_worker_gets_to_fail_at_the_deadline_too(run: Score) -> None:
    started = time.monotonic()
    batch = run(["at_hang"], ["hang"] * 60, timeout_seconds=0.5, row_by_row=["at_hang"], workers=1)
    assert time.monotonic() - started < 0.5 + SLACK_SECONDS
    assert len(batch.failures) == 60
    assert any("was not called on this row" in reason for reason in reasons(batch).values())


def test_math_verify_is_always_in_a_worker_and_loses_only_the_rows_that_hang(run: Score) -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    texts = ["$2$", "$9^{9^{9^{9}}}$", "$1$", "$10!!!!!$"]
    # As a Python object, and with `workers: 0`: neither keeps it in this process, where nothing could stop it.
    batch = run([math_verify("answer")], texts, ["2"] * 4, timeout_seconds=4.0, workers=0)
    assert batch.valid.tolist()[0] == batch.valid.tolist()[2] is True
    assert batch.rewards.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert 1 in reasons(batch)


def test_a_function_that_ends_its_process_costs_its_rows(run: Score) -> None:
    batch = run(["leaves", "lengths"], ["a", "leave"])
    assert reasons(batch) == dict.fromkeys((0, 1), "ended its process (exit code 0)")
    assert batch.per_function["lengths"].tolist() == [1.0, 5.0]
    batch = run(["leaves"], ["a", "leave", "bb"], row_by_row=["leaves"])
    assert batch.rewards.tolist() == [1.0, 0.0, 2.0]
    assert reasons(run(["killed"], ["a"])) == {0: "ended its process (signal SIGKILL)"}


def test_a_function_that_always_ends_its_process_is_given_up(run: Score) -> None:
    batch = run(["killed"], ["a"] * 40, row_by_row=["killed"])
    assert len(batch.failures) == 40
    assert "ended its process in 8 calls, and was not called on the other rows" in reasons(batch).values()


def test_a_call_that_raises_is_made_again_and_the_user_is_told(run: Score) -> None:
    batch = run(["flaky"], ["a", "b"])
    assert batch.failures == []
    assert batch.rewards.tolist() == [2.0, 2.0]  # both rows in the second call too
    (remark,) = batch.remarks
    assert remark.startswith("flaky raised ConnectionError: lost (user.py, line ")
    assert remark.endswith("); called again, it answered")


def test_a_batch_that_raises_twice_fails_as_a_whole_and_shows_one_traceback(run: Score) -> None:
    for _ in range(2):
        batch = run(["compares"], ["a", "bad", "c"])
        assert set(reasons(batch)) == {0, 1, 2}
        assert batch.failures[0].reason.startswith("raised ValueError: no (user.py, line ")
    (shown,) = run.said  # pyright: ignore[reportFunctionMemberAccess]
    assert shown.startswith("the first exception of reward compares:\nTraceback")
    assert 'raise ValueError("no")' in shown


@pytest.mark.parametrize(
    ("result", "values"),
    [
        ("[1.0, None, float('nan')]", [1.0, None, "returned NaN"]),
        ("[True, float('inf'), 'x']", [1.0, "returned inf, which is beyond 1e+15", "returned str 'x' instead of a number"]),
        ("(0.1 for _ in completions)", [0.1, 0.1, 0.1]),
        ("__import__('numpy').float32([0.5, 1.5, 2.5])", [0.5, 1.5, 2.5]),
    ],
)
def test_every_result_is_checked_in_the_worker(run: Score, result: str, values: list[Any]) -> None:
    batch = run(["given"], ["a", "b", "c"], [result.replace("completions", "range(3)")] * 3)
    assert reasons(batch) == {row: value for row, value in enumerate(values) if isinstance(value, str)}
    kept = {row: value for row, value in enumerate(values) if isinstance(value, float)}
    assert {row: float(batch.per_function["given"][row]) for row in kept} == pytest.approx(kept)
    assert batch.valid.tolist() == [row in kept for row in range(3)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0]", "returned 1 values for 2 rows"),
        ("None", "instead of a list of 2"),
        ("iter(int, 1)", "returned more than 2 values"),
    ],
)
def test_a_wrong_length_ends_the_run_naming_the_function(run: Score, result: str, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward given .*{message}"):
        run(["given"], ["a", "b"], [result] * 2)
    watched = run(["given", "lengths"], ["a", "b"], [result] * 2, weights=[0.0, 1.0])
    assert watched.valid.all()


def test_much_output_holds_nobody_up(run: Score, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["noisy"], ["a"]).rewards.tolist() == [1.0]
    assert len(capfd.readouterr().out) == 1001 * 1000


def test_output_that_nobody_reads_fails_no_row(run: Score) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` leaves it
    before = os.dup(1)
    os.dup2(writing, 1)
    try:
        batches = [run(["noisy"], ["a"], workers=1) for _ in range(2)]
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(writing)
    assert [batch.rewards.tolist() for batch in batches] == [[1.0], [1.0]]
    assert [batch.failures for batch in batches] == [[], []]


def test_async_functions_keep_their_event_loop_and_are_stopped_by_it(run: Score) -> None:
    first, second = (run(["loops"], ["a"], workers=1).rewards.tolist() for _ in range(2))
    assert first == second
    batch = run(["waits"], ["a", "hang", "bb"], row_by_row=["waits"], timeout_seconds=LIMIT_SECONDS)
    assert batch.rewards.tolist() == [1.0, 0.0, 2.0]
    assert reasons(run(["blocks"], ["a"], timeout_seconds=0.5)) == {0: "took longer than rewards.timeout_seconds = 0.5"}


def test_python_objects_stay_unless_workers_are_set(run: Score) -> None:
    pid = os.getpid()

    def mine(completions: list[str]) -> list[float]:
        return [float(os.getpid() == pid)] * len(completions)

    assert run([mine], ["a"], workers=None).rewards.tolist() == [1.0]
    pytest.importorskip("cloudpickle")
    assert run([mine], ["a"], workers=1).rewards.tolist() == [0.0]


def test_an_object_that_cannot_be_sent_stays_and_the_user_is_told(run: Score) -> None:
    pid, lock = os.getpid(), __import__("threading").Lock()

    def locked(completions: list[str]) -> list[float]:
        with lock:
            return [float(os.getpid() == pid)] * len(completions)

    assert run([locked], ["a"], workers=1).rewards.tolist() == [1.0]
    (line,) = run.said  # pyright: ignore[reportFunctionMemberAccess]
    assert line.startswith("reward locked cannot be sent to a worker (")
    assert line.endswith("so it runs in the trainer's process")


def test_inputs_that_cannot_be_sent_are_scored_here(run: Score) -> None:
    batch = run(["at_hang"], ["a"], [lambda: 0])
    assert batch.rewards.tolist() == [1.0]
    (line,) = run.said  # pyright: ignore[reportFunctionMemberAccess]
    assert line.startswith("reward at_hang cannot run in a worker (its inputs cannot be sent: ")


def test_a_name_in_row_by_row_that_is_no_function_is_refused(run: Score) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.row_by_row is 'length': did you mean lengths\?"):
        run(["lengths"], ["a"], row_by_row=["length"])


SCRIPT = """
import sys, time
from grpo_jax.config import RewardsConfig
from grpo_jax.rewards import resolve_functions, runner_of, score

entries = ["{user}:who", "{user}:{function}"]
functions = resolve_functions(entries)
runner = runner_of(RewardsConfig(workers=1), entries, functions, None, print)
batch = score(functions[:1], prompts=["p"], completions=["a"], completion_ids=[[1]], runner=runner)
print(int(batch.rewards[0]), flush=True)
if "{function}" != "lengths":
    score(functions[1:], prompts=["p"], completions=["hang"], completion_ids=[[1]], runner=runner)
"""


@pytest.mark.parametrize("function", ["lengths", "holds_the_interpreter"])
def test_no_process_is_left_when_the_trainer_ends_or_is_killed(user: Path, repository: Path, function: str) -> None:
    # A script without a main guard: a worker that imported it would start workers of its own.
    script = user.with_name("script.py")
    script.write_text(SCRIPT.format(user=user, function=function))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "kernels")])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        if function == "lengths":
            assert trainer.wait(SLACK_SECONDS) == 0
        else:
            time.sleep(0.5)  # by now C code holds the worker's interpreter
            assert not gone(worker)
            trainer.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(worker))
