"""Programs that try to break out of `code_execution`, or to be rewarded without a solution: none is, and the host does not change.

The task has an answer that nobody can know: the row expects a random text, which also stands in a file, in the environment, behind
a socket and in this process's memory. Whoever gets a reward has read it, or has forged the verdict. In the programs, CANARY_PATH,
LISTENER_PORT and TRAINER_PID are replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rewards import code_execution
from grpo_jax.rewards.protocol import RewardFunction

ESCAPES = sorted((Path(__file__).parent / "escapes").glob("*.py"))
KINDS = ("program", "call", "code")
REWARDED_WITHOUT_ISOLATION = (
    "environment_c_library",
    "environment_variables",
    "exhaustion_subprocess",
    "files_dot_dot",
    "files_open_canary",
    "files_proc_root",
    "network_abstract_socket",
    "network_loopback",
    "network_raw_system_call",
)
"""Programs that are harmless outside a sandbox, and print the answer there."""

REWARDED_BY_ITS_EXIT_CODE = (
    "ends_os_exit_in_call",
    "ends_os_exit_zero",
    "ends_system_exit",
    "output_class_lies",
    "output_everything_equal",
    "output_everything_equal_object",
)
"""Programs that are harmless outside a sandbox, and pass an assertion in their own process."""

SHORT: dict[str, Any] = {"test_seconds": 1.0, "total_seconds": 3.0, "memory_mb": 256}


@dataclass
class Host:
    """What the programs try to read or change.

    Attributes:
        answer: that a row expects.
        canary: a file with the answer.
        port: of a server on the loopback that tells it.
        visitors: who connected to a server.
    """

    answer: str
    canary: Path
    port: int
    visitors: list[Any] = field(default_factory=list)

    def text_of(self, path: Path) -> str:
        """A program with the places of this host in it."""
        text = path.read_text()
        for name, value in (("CANARY_PATH", self.canary), ("LISTENER_PORT", self.port), ("TRAINER_PID", os.getpid())):
            text = text.replace(name, str(value))
        return text

    def tests(self, kind: str) -> list[Any]:
        """A row's tests, which only the answer passes."""
        return {
            "program": [{"input": "7", "output": self.answer}],
            "call": [{"call": "solve", "args": [7], "expected": self.answer}],
            "code": [f"assert solve(7) == {self.answer!r}"],
        }[kind]

    def state(self) -> dict[str, Any]:
        """What must not change: the canary and its folder, places where programs leave files, the library, the visitors."""
        places = ["/", "/tmp", "/usr/lib", "/dev", "/dev/shm", "/run", os.path.dirname(os.__file__), str(self.canary.parent)]
        left = [f"{place}/{name}" for place in places for name in ("grpo-escape", "grpo-escape-big", "link")]
        return {
            "canary": self.canary.read_text(),
            "folder": sorted(path.name for path in self.canary.parent.iterdir()),
            "left": [path for path in left if os.path.lexists(path)],
            "library": hashlib.sha256(Path(json.__file__).read_bytes()).hexdigest(),
            "visitors": len(self.visitors),
            "environment": dict(os.environ),
        }


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    answer = f"answer-{secrets.token_hex(16)}"
    canary = tmp_path_factory.mktemp("host") / "canary.txt"
    canary.write_text(answer)
    canary.chmod(0o666)
    tcp, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0grpo-escape-{os.getpid()}")
    abstract.listen()
    found = Host(answer, canary, tcp.getsockname()[1])

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, visitor = server.accept()
            except OSError:
                return
            with connection:
                found.visitors.append(visitor)
                connection.sendall(answer.encode())

    threads = [threading.Thread(target=serve, args=(server,), daemon=True) for server in (tcp, abstract)]
    for thread in threads:
        thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_ESCAPE_ANSWER", answer)
        yield found
    for server in (tcp, abstract):
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for thread in threads:
        thread.join()


def isolated(isolation: str, **settings: Any) -> RewardFunction:
    """The reward with an isolation, or the test is skipped where that is not installed."""
    if isolation in ("docker", "podman"):
        settings["image"] = os.environ["GRPO_TEST_IMAGE"]
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    if isolation == "monty":
        pytest.importorskip("pydantic_monty", reason="needs the extra `code`")
    try:
        return code_execution(isolation=isolation, **settings)
    except ConfigError as error:
        if "does not work here" not in str(error):
            raise
        pytest.skip(f"bubblewrap does not work on this machine: {error}")


def descendants() -> set[int]:
    """Processes that this one started, and theirs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.mark.parametrize("isolation", ["bubblewrap", "monty"])
def test_the_honest_answer_is_rewarded(host: Host, isolation: str) -> None:
    reward = isolated(isolation, test_seconds=30.0, total_seconds=60.0)
    text = f"def solve(n):\n    return {host.answer!r}\n\n\nprint(solve(7))\n"
    kinds = KINDS if isolation == "bubblewrap" else KINDS[1:]
    assert reward(completions=[text] * len(kinds), tests=[host.tests(kind) for kind in kinds]) == [1.0] * len(kinds)


def test_without_isolation_such_programs_get_the_answer(host: Host) -> None:
    before = host.state()
    for name in REWARDED_WITHOUT_ISOLATION:
        (path,) = [path for path in ESCAPES if path.stem == name]
        ran = subprocess.run([sys.executable, "-c", host.text_of(path)], capture_output=True, text=True, check=False, timeout=60)
        assert ran.stdout.strip() == host.answer, (name, ran.stderr)
    assert host.state() != before  # the servers were visited
    for name in REWARDED_BY_ITS_EXIT_CODE:
        (path,) = [path for path in ESCAPES if path.stem == name]
        together = f"{host.text_of(path)}\nassert solve(7) == {host.answer!r}\n"
        ran = subprocess.run([sys.executable, "-c", together], capture_output=True, check=False, timeout=60)
        assert ran.returncode == 0, (name, ran.stderr)


def check_escape(host: Host, isolation: str, path: Path, kinds: Sequence[str]) -> None:
    # Monty starts at once, so that its programs need less time for what they try.
    reward = isolated(isolation, **SHORT | ({"test_seconds": 0.3} if isolation == "monty" else {}))
    before, running = host.state(), descendants()
    values = {kind: reward(completions=[host.text_of(path)], tests=[host.tests(kind)]) for kind in kinds}
    assert values == {kind: [0.0] for kind in kinds}
    assert host.state() == before
    assert isolation == "monty" or descendants() <= running  # monty's own workers stay


def first_kind(path: Path) -> str:
    return KINDS[ESCAPES.index(path) % len(KINDS)]


@pytest.mark.parametrize("path", ESCAPES, ids=lambda path: path.stem)
def test_an_escape_is_not_rewarded_and_changes_nothing(host: Host, path: Path) -> None:
    """Each program in one kind of test; `make test-slow` runs it in the others."""
    check_escape(host, "bubblewrap", path, [first_kind(path)])


@pytest.mark.slow
@pytest.mark.parametrize("path", ESCAPES, ids=lambda path: path.stem)
def test_an_escape_is_not_rewarded_in_the_other_kinds_of_test(host: Host, path: Path) -> None:
    check_escape(host, "bubblewrap", path, [kind for kind in KINDS if kind != first_kind(path)])


def test_no_escape_is_rewarded_by_monty(host: Host) -> None:
    isolated("monty")
    for path in ESCAPES:
        check_escape(host, "monty", path, [KINDS[1 + ESCAPES.index(path) % 2]])


@pytest.mark.slow
@pytest.mark.skipif("GRPO_TEST_IMAGE" not in os.environ, reason="GRPO_TEST_IMAGE names no image with python3, in podman or docker")
@pytest.mark.parametrize("path", ESCAPES, ids=lambda path: path.stem)
def test_no_escape_is_rewarded_in_a_container(host: Host, path: Path) -> None:
    runtime = next((name for name in ("podman", "docker") if shutil.which(name)), None)
    assert runtime is not None, "GRPO_TEST_IMAGE is set, and neither podman nor docker is installed"
    check_escape(host, runtime, path, [first_kind(path)])


def test_the_corpus_covers_every_way_out() -> None:
    assert len(ESCAPES) >= 40
    groups = {path.stem.partition("_")[0] for path in ESCAPES}
    assert groups == {
        *("ends", "environment", "exhaustion", "files", "network", "output"),
        *("parent", "ptrace", "signals", "symlinks", "tampering"),
    }
