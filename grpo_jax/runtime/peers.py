"""Watches the other processes of a run: names those that are slow, and ends this process where one is dead or frozen.

Every process writes signs of life into the key-value store of JAX's coordination service, with the number of exchanges that it
has entered. A process whose sign does not change is dead, stopped, or holds Python's interpreter: all others end, with its number
and host. A process that lives but has entered fewer exchanges than this one, which waits for it, is named after 30 seconds and
then at growing intervals.

Silence is counted in this process's own looks at the store, not by a clock: where all processes were stopped for a while, none of
them is dead. Process 0 has the store; where that ends, JAX ends the others at once, before anything here can: `witness.py`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

FOLDER = "grpo_jax/alive/"
"""Where the store has the signs of life: "NUMBER EXCHANGES HOST" by process."""

DONE = -1
"""The number of the last sign of a process that ends in good order."""

SLOW_SECONDS = 30.0
"""Time of waiting after which the processes that are waited for are named."""

SILENT_LOOKS = 4
"""Looks without a new sign after which a process counts as the cause of an error that has already come up."""


class Store(Protocol):
    """What is used of JAX's client of the coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Stores a value under a key; with `allow_overwrite` it replaces the one before."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys below a folder, and their values."""
        ...


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process.

    Attributes:
        host: name of its machine.
        number: of the sign, counted from the process's start; or `DONE`.
        exchanges: how many exchanges the process has entered.
        looks: how many looks at the store have found it unchanged.
    """

    host: str
    number: int
    exchanges: int
    looks: int = 0


class Peers:
    """The processes of a run.

    Args:
        store: shared by all processes.
        own: number of this process.
        count: number of processes.
        timeout_seconds: time without a sign of life after which a process counts as dead.
        end: called with a message where one is dead; it ends this process.

    Example:
        peers = Peers(client, 0, 2, 30, end)
        peers.start()
        with peers.exchange():
            ...  # waits for the others
        peers.stop()
    """

    def __init__(self, store: Store, own: int, count: int, timeout_seconds: float, end: Callable[[str], Any]) -> None:
        self._store, self._own, self._count, self._end = store, own, count, end
        self.look_seconds = max(0.5, timeout_seconds / 20)
        self._longest = round(timeout_seconds / self.look_seconds)  # looks
        self._number, self._exchanges, self._unanswered = 0, 0, 0
        self._waiting_since: float | None = None
        self._say_after = 0.0
        self._signs: dict[int, Sign] = {}
        self._over = threading.Event()

    def start(self) -> None:
        """Gives and watches signs of life from now on, in threads that end with the process."""
        for work in (self._look_again, self._watch):
            threading.Thread(target=work, daemon=True, name="peers").start()

    def stop(self) -> None:
        """Tells the others that this process ends in good order, and watches no more."""
        self._over.set()
        with contextlib.suppress(Exception):  # of the client, whose types are XLA's
            self._store.key_value_set(f"{FOLDER}{self._own}", f"{DONE} 0 {socket.gethostname()}", allow_overwrite=True)

    def _look_again(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except Exception as error:
                self._lost(f"process {self.name(0)} has ended, or cannot be reached ({first_line(error)})")
            self._over.wait(self.look_seconds)

    def _watch(self) -> None:
        """Runs in another thread than the looks, which take as long as process 0 lets them."""
        while not self._over.wait(self.look_seconds):
            self._unanswered += 1
            if dead := self.silent(self._longest):
                self._lost(self.lost_line(dead))
            elif line := self.slow_line():
                print(line, file=sys.stderr, flush=True)

    def _lost(self, line: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._end(line)

    def look(self) -> None:
        """Gives a sign of life, and looks for those of the others."""
        self._number += 1
        value = f"{self._number} {self._exchanges} {socket.gethostname()}"
        self._store.key_value_set(f"{FOLDER}{self._own}", value, allow_overwrite=True)
        signs = dict(self._signs)
        for key, value in self._store.key_value_dir_get(FOLDER):
            number, exchanges, host = value.split(" ", 2)
            process, found = int(key.rpartition("/")[2]), Sign(host, int(number), int(exchanges))
            before = signs.get(process)
            same = before is not None and before.number == found.number != DONE
            signs[process] = Sign(host, found.number, found.exchanges, before.looks + 1) if before and same else found
        self._signs, self._unanswered = signs, 0

    def silent(self, looks: int) -> list[int]:
        """Numbers of the processes that gave no sign of life for at least so many looks; one that never gave any does not count.

        Process 0 alone where the store has not answered for so long.
        """
        if self._unanswered >= looks and self._own != 0:
            return [0]
        return [process for process, sign in sorted(self._signs.items()) if sign.looks >= looks and process != self._own]

    def find_lost(self, wait_seconds: float) -> list[int]:
        """After an error that the end of another process may have caused: waits until some have missed their signs of life.

        Returns:
            Their numbers; [] where all live.
        """
        until = time.monotonic() + wait_seconds
        while time.monotonic() < until and not self._over.is_set():
            if lost := self.silent(SILENT_LOOKS):
                return lost
            time.sleep(self.look_seconds / 2)
        return []

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Surrounds an exchange, which all processes enter in the same order."""
        self._exchanges += 1
        self._waiting_since, self._say_after = time.monotonic(), SLOW_SECONDS
        try:
            yield
        finally:
            self._waiting_since = None

    def slow_line(self) -> str | None:
        """Names the processes that this one waits for, after 30, 60, 120, ... seconds; None where there is nothing to say."""
        since = self._waiting_since
        if since is None or (seconds := time.monotonic() - since) < self._say_after:
            return None
        behind = [process for process, sign in sorted(self._signs.items()) if 0 <= sign.exchanges < self._exchanges]
        behind = [process for process in behind if process != self._own]
        self._say_after = 2 * seconds
        return f"waiting for process {' and '.join(map(self.name, behind))}, {seconds:.0f} s" if behind else None

    def name(self, process: int) -> str:
        """Number and host of a process, such as "1 of 4 on node-b"."""
        sign = self._signs.get(process)
        return f"{process} of {self._count}" + ("" if sign is None else f" on {sign.host}")

    def lost_line(self, lost: list[int]) -> str:
        """What to say of processes that give no sign of life."""
        names = " and ".join(f"process {self.name(process)}" for process in lost)
        return f"{names} gives no sign of life: it has ended, hangs or cannot be reached; its log may say why"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
