"""The reward `code_execution`: what it reads, what it compares, what it refuses. `test_escapes.py` has what tries to cheat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import ConfigError, RewardsConfig
from grpo_jax.rewards import code_execution, resolve_functions, runner_of, score
from grpo_jax.rewards.code import Judge, code_of
from grpo_jax.rewards.protocol import ColumnReward, RewardFunction
from grpo_jax.rewards.sandbox.inside.plain import decode, encode
from grpo_jax.rewards.sandbox.isolation import FILES, Bubblewrap, checked
from grpo_jax.rewards.sandbox.judge import same
from grpo_jax.rewards.sandbox.tests import CallTest, ProgramTest, TestCode, read_tests

PATIENT: dict[str, Any] = {"test_seconds": 60.0, "total_seconds": 120.0}
"""For tests whose code ends by itself, on a busy machine."""

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
SUM = "a, b = map(int, input().split())\nprint(a + b)"


def bubblewrap(**settings: Any) -> RewardFunction:
    """The reward in bubblewrap, or the test is skipped where that does not work."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    try:
        return code_execution(isolation="bubblewrap", **{**PATIENT, **settings})
    except ConfigError as error:
        if "does not work here" not in str(error):
            raise
        pytest.skip(f"bubblewrap does not work on this machine: {error}")


def monty(**settings: Any) -> RewardFunction:
    """The reward in monty, or the test is skipped where that is not installed."""
    pytest.importorskip("pydantic_monty", reason="needs the extra `code`")
    return code_execution(isolation="monty", **{**PATIENT, **settings})


def rewards(reward: RewardFunction, rows: list[tuple[str, Any]]) -> list[float | None]:
    return reward(completions=[text for text, _ in rows], tests=[tests for _, tests in rows])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nor\n```\nx = 2\n```\nDone.", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```", "x = 1\n"),
        ("```py\nx = '```'\ny = 2", "x = '```'\ny = 2"),
        ("- this\n  ```Python3 title=a\n  x = 1\n  ```", "  x = 1\n"),
        ("```\n```", ""),
    ],
)
def test_the_code_is_the_last_fenced_block_of_python(text: str, code: str) -> None:
    assert code_of(text) == code


def test_tests_are_read_in_three_kinds() -> None:
    assert read_tests([{"input": "1", "output": "2"}]) == [ProgramTest("1", "2")]
    assert read_tests('{"input": "1", "output": "2"}') == [ProgramTest("1", "2")]
    assert read_tests({"inputs": ["1", "3"], "outputs": ["2", "4"]}) == [ProgramTest("1", "2"), ProgramTest("3", "4")]
    assert read_tests({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}) == [CallTest("add", [1, 2], {}, 3)]
    nothing = {"input": None, "output": None, "kwargs": None}  # as a table with one column per key has it
    assert read_tests([{"call": "f", "args": [], "expected": None, **nothing}]) == [CallTest("f", [], {}, None)]
    code = "import math\ndef close(a, b):\n    return math.isclose(a, b)\nassert close(root(4), 2) and other.root(9) == 3"
    assert read_tests(code) == [TestCode(code, ("root", "other"))]
    (named_so,) = read_tests(["assert bisect(statistics.mean([1, 3])) == bisect.x"])
    assert named_so == TestCode("assert bisect(statistics.mean([1, 3])) == bisect.x", ("bisect",), ("statistics",))
    assert read_tests(["from solution import f\ndef test_f():\n    assert f(1) == 2"])[0].names == ()  # pyright: ignore


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "missing"),
        (["assert f(1) == 2", {"input": "1", "output": "2"}], "several kinds"),
        ([{"input": "1", "output": " \n"}], "a program that prints nothing would pass"),
        (["assert 1 + 1 == 2"], "any code would pass it"),
        (["assert pow(2, 3) == 8"], "any code would pass it"),
        (["assert math.sqrt(4) == 2"], "any code would pass it"),
        (["assert f("], "cannot be read"),
        ("[1, 2", "no JSON"),
        ([{"input": 1, "output": "2"}], "must be text"),
        ([{"call": "f(1)", "args": [], "expected": 1}], "neither a function's name"),
        ([{"call": "f", "args": 1, "expected": 1}], "its args a list"),
        ([{"call": "f", "args": [], "expected": object()}], "more than plain data"),
        ([{"given": 1}], "give a list of"),
        ([7], "give a list of"),
    ],
)
def test_tests_that_cannot_be_used_are_refused(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_plain_data_comes_back_as_built_in_types() -> None:
    class Text(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    values = [None, True, 3, 2.5, "a\ud800", b"x", 1j, [1, (2, {3})], {(1, "a"): [None]}, frozenset({1}), float("inf")]
    assert decode(json.loads(json.dumps(encode(values)))) == values
    assert type(decode(encode(Text("x")))) is str
    assert decode(encode(iter([1, 2]))) == [1, 2]
    for hostile in ({"eval": "1"}, {}, {"dict": [[{"dict": []}, 1]]}, {"object": 0}, {"tuple": 1}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            decode(hostile)


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (3, 3, True),
        (3, 4, False),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**400, 1.0, False),
        (float("nan"), float("nan"), True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        ((1, [2]), [1, (2,)], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": [1.0]}, {"a": (1,)}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (None, False, False),
        ({1}, {1}, True),
        ({1}, frozenset({1}), False),
    ],
)
def test_values_are_compared_as_plain_data(found: Any, expected: Any, equal: bool) -> None:
    assert same(found, expected) is equal


def test_programs_get_each_input_in_a_process_of_their_own() -> None:
    counts = "import sys\nn = len(sys.modules.setdefault('seen', []))\nsys.modules['seen'].append(0)\nprint(n + int(input()))"
    pairs = [{"input": "2 3", "output": "5"}, {"input": "-1 1\n", "output": "0\n\n"}]
    fails = "print(5)\nraise SystemExit(1)"
    late = "import threading\nthreading.Thread(target=lambda: print(5)).start()\nimport sys\nsys.stdout.write('')"
    bytes_ = "import os\nos.write(1, os.read(0, 9)[:1] + b'  \\n')"
    rows: list[tuple[str, Any]] = [
        (SUM, pairs),
        ("print(5)", pairs),
        (counts, [{"input": "0", "output": "0"}, {"input": "0", "output": "0"}]),
        (fails, [{"input": "", "output": "5"}]),
        (late, [{"input": "", "output": "5"}]),
        (bytes_, [{"input": "5", "output": "5"}]),
        ("print(5", [{"input": "", "output": "5"}]),
    ]
    assert rewards(bubblewrap(), rows) == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert rewards(bubblewrap(all_or_nothing=False), rows[:2]) == [1.0, 0.5]


CALLS: list[tuple[str, Any, float]] = [
    (ADD, [{"call": "add", "args": [2, 3], "expected": 5}, {"call": "add", "args": [[1], [2]], "expected": [1, 2]}], 1.0),
    (ADD, [{"call": "add", "args": [2], "kwargs": {"b": 4}, "expected": 6}], 1.0),
    (ADD, [{"call": "add", "args": [2, 3], "expected": 6}], 0.0),
    (ADD, [{"call": "sub", "args": [2, 3], "expected": 5}], 0.0),
    (ADD, [{"call": "add", "args": [2, "3"], "expected": 5}], 0.0),
    ("class S:\n    def f(self, x):\n        return (x, {x: x})", [{"call": "S.f", "args": [1], "expected": [1, {1: 1}]}], 1.0),
    ("def add(a, b):\n    return lambda: 5", [{"call": "add", "args": [2, 3], "expected": 5}], 0.0),
    ("raise ValueError", [{"call": "add", "args": [2, 3], "expected": None}], 0.0),
    (ADD, ["assert add(2, 3) == 5", "assert add('a', b='b') == 'ab'"], 1.0),
    (ADD, ["assert add(2, 3) == 6"], 0.0),
    (ADD, ["try:\n    add(2, '3')\nexcept TypeError:\n    raised = True\nassert raised"], 1.0),
    ("class S:\n    def f(self, x):\n        return x + 1", ["assert max([1, 2]) == 2 and f(1) == 2"], 0.0),
]


def test_calls_and_test_code_in_bubblewrap() -> None:
    rows = [(text, tests) for text, tests, _ in CALLS]
    assert rewards(bubblewrap(), rows) == [value for *_, value in CALLS]


def test_calls_and_test_code_in_monty() -> None:
    rows = [(text, tests) for text, tests, _ in CALLS]
    assert rewards(monty(), rows) == [value for *_, value in CALLS]
    tests = ["assert add(1, 1) == 3", "assert add(1, 1) == math.sqrt(4)"]
    assert rewards(monty(all_or_nothing=False), [(ADD, tests)]) == [0.5]
    with pytest.raises(ValueError, match="install bubblewrap"):
        rewards(monty(), [(SUM, [{"input": "2 3", "output": "5"}])])
    with pytest.raises(ValueError, match="more than monty can run"):
        rewards(monty(), [(ADD, ["import heapq\nassert add(1, 1) == 2"])])


def test_test_code_can_use_objects_modules_and_functions_of_its_own() -> None:
    stack = """
class Stack:
    def __init__(self):
        self.x = []
    def push(self, v):
        self.x.append(v)
        return self
    def pop(self):
        return self.x.pop()
def size(stack):
    return len(stack.x)
math = None
"""
    rows: list[tuple[str, Any]] = [
        (stack, ["s = Stack()\ns.push(1).push((2,))\nassert size(s) == 2 and s.pop() == (2,)"]),
        (stack, ["from solution import Stack\ndef test_pop():\n    assert Stack().push(4).pop() == 4"]),
        (stack, ["from solution import Stack\ndef test_pop():\n    assert Stack().push(4).pop() == 5"]),
        (stack, ["assert math.isclose(size(Stack()), 0)"]),  # the module, not what the solution calls so
        (stack, ["assert Stack()"]),
        (stack, ["assert Stack() == Stack()"]),
        (stack, ["x = [1]\nassert size(Stack().push(x)) == 1 and x == [1]"]),
        (ADD, ["assert all(map(lambda n: add(n, 1) == n + 1, [1, 2]))"]),
        # Within one process this would pass: the exception ends `all`.
        ("def add(a, b):\n    raise StopIteration", ["assert all(map(lambda n: add(n, 1) == n + 1, [1, 2]))"]),
    ]
    assert rewards(bubblewrap(), rows) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="an argument that cannot be sent"):
        rewards(bubblewrap(), [(ADD, ["assert add(len, 1) == 1"])])
    with pytest.raises(ValueError, match="called nothing of the solution"):
        rewards(bubblewrap(), [(ADD, ["if False:\n    add(1, 1)"])])


def test_what_code_sees_in_bubblewrap() -> None:
    """Nothing of this machine but libraries: no packages, no environment, a number space of its own for processes."""
    code = """
import glob, os
print(sorted(os.environ.keys() - {"PWD", "LC_CTYPE"}))
print(sorted(os.listdir("/")), os.listdir("/dev"), os.listdir("/etc"))
print([name for path in glob.glob(os.path.dirname(os.__file__) + "/*-packages") for name in os.listdir(path)])
print([name for path in glob.glob("/usr/lib/python3*/*-packages") for name in os.listdir(path)])
print(os.getuid(), os.getpid() < 10)
"""
    folders = {"dev", "etc", "lib", "lib64", "sandbox", "usr"} | {Path(os.__file__).resolve().parts[1]}
    folders = sorted(name for name in folders if name in ("dev", "etc", "sandbox") or os.path.exists(f"/{name}"))
    expected = f"['PYTHONHASHSEED']\n{folders} ['null'] ['ld.so.cache']\n[]\n[]\n65534 True"
    assert rewards(bubblewrap(), [(code, [{"input": "", "output": expected}])]) == [1.0]


def test_a_test_that_takes_too_long_is_not_passed_and_the_next_input_runs() -> None:
    code = "import time\nn = int(input())\ntime.sleep(1000 if n == 1 else 0)\nprint(n)"
    tests = [{"input": str(number), "output": str(number)} for number in (1, 2)]
    assert rewards(bubblewrap(test_seconds=4.0, all_or_nothing=False), [(code, tests)]) == [0.5]


def test_no_process_is_left_where_the_judging_one_is_killed() -> None:
    bubblewrap()
    script = f"""
from grpo_jax.rewards import code_execution
reward = code_execution(isolation="bubblewrap", **{PATIENT})
reward(completions=["while True: pass"], tests=[["assert f(1) == 1"]])
"""
    judging = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    try:
        # The code runs when one of the processes has computed for longer than Python needs to start.
        while max((below := below_of(judging.pid)).values(), default=0.0) < 1.0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(below) == 6  # two sandboxes, each of two processes of bubblewrap and one of Python
    finally:
        judging.send_signal(signal.SIGKILL)
        judging.wait()
    while (left := [pid for pid in below if alive(pid)]) and time.monotonic() < deadline + 60:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def below_of(pid: int) -> dict[int, float]:
    """The processes that a process started, and theirs; with the seconds that each has computed."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        seconds[int(stat.parent.name)] = int(fields[11]) / os.sysconf("SC_CLK_TCK")
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: seconds[child] for child in found - {pid}}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rows_run_in_workers_where_the_function_was_given_as_an_object() -> None:
    functions = resolve_functions([bubblewrap()])
    rows: dict[str, Any] = {"completion_ids": [[1]] * 3, "columns": {"tests": [["assert add(2, 3) == 5"]] * 2 + [["assert add("]]}}
    with runner_of(RewardsConfig(), [functions[0][1]], functions, None, print) as runner:
        before = threading.active_count()
        batch = score(functions, prompts=["p"] * 3, completions=[ADD, "x = 1", ADD], max_failed_share=1.0, runner=runner, **rows)
        assert threading.active_count() == before
        assert runner.pool is not None
        assert len(runner.pool.workers) >= 1
    assert batch.rewards.tolist() == [1.0, 0.0, 0.0]
    assert [(failure.row, "cannot be read" in failure.reason) for failure in batch.failures] == [(2, True)]


def fake(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program in front of all others."""
    (folder / name).write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    checked.cache_clear()


WITHOUT_ISOLATION = f"""
words = sys.argv[1:]
if words[0] == "rm":
    open(os.path.join(os.path.dirname(__file__), "removed"), "w").write(words[2])
    sys.exit(0)
program = words[words.index("-c") + 1].replace("/sandbox", {os.path.dirname(FILES)!r})
os.execv(sys.executable, [sys.executable, "-c", program])
"""
"""A program that runs what it is given, with all rights of this process."""


def test_it_is_refused_where_nothing_confines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    for isolation in ("auto", "bubblewrap", "podman", "docker", "monty"):
        with pytest.raises(ConfigError, match=r"apt-get install bubblewrap.*pip install grpo_jax\[code\].*never run without"):
            resolve_functions([{"name": "code_execution", "isolation": isolation, "image": "python"}])


def isolation_of(reward: RewardFunction) -> Any:
    assert isinstance(reward, ColumnReward)
    assert isinstance(reward.compare, Judge)
    return reward.compare.isolation


def test_auto_takes_bubblewrap_first_and_then_monty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pydantic_monty", reason="needs the extra `code`")
    if shutil.which("bwrap") is not None:
        bubblewrap()
        assert isinstance(isolation_of(code_execution()), Bubblewrap)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isolation_of(code_execution()) is None


def test_an_isolation_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, "bwrap", "sys.exit('bwrap: No permissions to create new namespace')", monkeypatch)
    with pytest.raises(ConfigError, match=r"does not work here.*No permissions to create new namespace.*sysctl"):
        code_execution()


@pytest.mark.parametrize(("name", "isolation"), [("bwrap", "bubblewrap"), ("podman", "podman")])
def test_an_isolation_that_does_not_isolate_is_refused(
    name: str, isolation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(tmp_path, name, WITHOUT_ISOLATION, monkeypatch)
    with pytest.raises(ConfigError, match="does not confine code on this machine: it reads a file of this machine"):
        code_execution(isolation=isolation, image="python")
    if name == "podman":
        assert (tmp_path / "removed").read_text().startswith("grpo-jax-")


def test_a_container_needs_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, "docker", "", monkeypatch)
    with pytest.raises(ConfigError, match=r"code_execution.image is None: name an image"):
        code_execution(isolation="docker")


@pytest.mark.parametrize(
    "settings", [{"isolation": "none"}, {"test_seconds": 0.0}, {"test_seconds": 9.0, "total_seconds": 8.0}, {"memory_mb": 1}]
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"code_execution\."):
        code_execution(**settings)
