"""Who is dead, frozen or slow among the processes of a run: decided from signs of life in a store, which is a dict here."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_jax.runtime import peers as module
from grpo_jax.runtime.peers import Peers


class Store:
    """A store in memory; while it is held, it does not answer."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.held = threading.Event()
        self.failing: str | None = None

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        if self.failing:
            raise RuntimeError(self.failing)
        if self.held.is_set():
            threading.Event().wait()
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[Peers], list[list[Any]]]:
    """Three processes on hosts node-0 to node-2, and what each was ended with."""
    store, ended = Store(), [[], [], []]
    made = [Peers(store, own, 3, 10, ended[own].append) for own in range(3)]
    for own, peers in enumerate(made):
        monkeypatch.setattr(module.socket, "gethostname", lambda own=own: f"node-{own}")
        peers.look()
    return store, made, ended


def test_a_process_without_signs_of_life_is_named_with_its_host(run: tuple[Store, list[Peers], Any]) -> None:
    _, (first, second, third), _ = run
    for _ in range(20):
        first.look()
        second.look()
    assert first.silent(20) == []  # the third gave its first sign after the first one's first look
    first.look()
    assert first.silent(20) == second.silent(19) == [2]
    assert first.lost_line([2]).startswith("process 2 of 3 on node-2 gives no sign of life")
    third.look()
    first.look()
    assert 2 not in first.silent(1)


def test_nobody_is_dead_after_all_were_stopped_for_a_while(run: tuple[Store, list[Peers], Any]) -> None:
    """However long it was by the clock: silence is counted in looks, and each of them looks again."""
    _, made, _ = run
    for _ in range(50):
        for peers in made:
            peers.look()
    assert [peers.silent(2) for peers in made] == [[], [], []]


def test_a_process_that_has_ended_in_good_order_is_not_dead(run: tuple[Store, list[Peers], Any]) -> None:
    _, (first, second, third), _ = run
    third.stop()
    for _ in range(50):
        first.look()
        second.look()
    assert first.silent(20) == []


def test_a_thread_ends_the_others_where_one_is_dead(run: tuple[Store, list[Peers], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = run
    over = threading.Event()
    said: list[str] = []

    def end(line: str) -> None:
        said.append(line)
        over.set()

    peers = Peers(store, 0, 3, 10, end)
    monkeypatch.setattr(peers, "look_seconds", 0.001)
    peers.start()
    assert over.wait(60)
    assert said == [peers.lost_line([1, 2])]


def test_process_0_is_named_where_its_store_fails_or_does_not_answer(
    run: tuple[Store, list[Peers], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = run
    for fault in ("fails", "hangs"):
        store.failing = None
        over, said = threading.Event(), list[str]()
        peers = Peers(store, 2, 3, 10, lambda line, said=said, over=over: (said.append(line), over.set()))
        peers.look()
        if fault == "fails":
            store.failing = "UNAVAILABLE: no connection\nmore"
        else:
            store.held.set()
        monkeypatch.setattr(peers, "look_seconds", 0.001)
        peers.start()
        assert over.wait(60)
        assert len(said) == 1
        assert said[0].startswith("process 0 of 3 on node-0 ")
        assert ("UNAVAILABLE: no connection)" in said[0]) == (fault == "fails")


def test_after_an_error_the_lost_one_is_found_soon(run: tuple[Store, list[Peers], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, (first, second, _), _ = run
    monkeypatch.setattr(first, "look_seconds", 0.001)
    assert first.find_lost(0.01) == []
    for _ in range(5):
        first.look()
        second.look()
    assert first.find_lost(60.0) == [2]


def test_those_that_are_waited_for_are_named_at_growing_intervals(
    run: tuple[Store, list[Peers], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (first, second, third), _ = run
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with second.exchange(), first.exchange():
        second.look()
        first.look()
        found = []
        for seconds in (10, 29, 30, 31, 59, 60, 100, 120):
            now[0] = 100.0 + seconds
            found.append(first.slow_line())
        assert found[2] == "waiting for process 2 of 3 on node-2, 30 s"
        assert [seconds for seconds, line in zip((10, 29, 30, 31, 59, 60, 100, 120), found, strict=True) if line] == [30, 60, 120]
        with third.exchange():
            third.look()
            first.look()
            now[0] = 1000.0
            assert first.slow_line() is None
    assert first.slow_line() is None
