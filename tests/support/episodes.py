"""Scripted episodes for tests: answers that follow from a turn's tokens alone, and come late and in any order; and a replay.

The replay computes each episode from its beginning by the plain model, without a cache, and draws with the same random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from plain_oracles import log_softmax
from rollouts import Task, next_logits, scaled, uniform_numbers

from grpo_jax.rollout.turns import Answer
from grpo_jax.types import FinishReason, Rollout


@dataclass(frozen=True)
class Script:
    """What an environment does; a function of the row and its turns alone.

    Attributes:
        turns: the most turns of each row.
        answer: the most tokens of an answer.
        turn_tokens: tokens after which a turn ends.
        first: the most tokens before the first turn.
    """

    rows: int
    turns: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    answer: int = 5
    turn_tokens: int | None = 4
    first: int = 0

    def first_ids(self, row: int) -> list[int]:
        """Tokens before the first turn."""
        return [(row + 3 * i) % 97 for i in range(row % (self.first + 1))]

    def answer_ids(self, row: int, turn: int, ids: Sequence[int]) -> list[int]:
        """The answer to a turn, counted from 0; empty after the last one."""
        if turn + 1 >= self.turns[row % len(self.turns)]:
            return []
        return [(7 * ids[-1] + 3 * turn + i) % 97 for i in range(1 + (sum(ids) + row + turn) % self.answer)]


@dataclass
class ScriptedTurns:
    """`Turns` of a script. An answer comes after some calls of `ready`, drawn at random.

    Attributes:
        delay: the most calls of `ready` that an answer takes; 0 answers at once.
        told: what `ended` was told, by row.
    """

    script: Script
    delay: int = 0
    seed: int = 0
    told: dict[int, list[tuple[list[int], FinishReason]]] = field(default_factory=dict)
    coming: list[tuple[int, Answer]] = field(default_factory=list)
    waits: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.first_ids: Sequence[Sequence[int]] = [self.script.first_ids(row) for row in range(self.script.rows)]
        self.max_turn_tokens: int | None = self.script.turn_tokens

    def ended(self, row: int, ids: list[int], reason: FinishReason) -> None:
        own = self.told.setdefault(row, [])
        own.append((list(ids), reason))
        answer = Answer(row, self.script.answer_ids(row, len(own) - 1, ids))
        self.coming.append((int(self.rng.integers(0, self.delay + 1)), answer))

    def ready(self, *, wait: bool) -> list[Answer]:
        assert self.coming, "asked without a turn that waits"
        self.waits += wait
        while True:
            answers = [answer for left, answer in self.coming if left <= 0]
            self.coming = [(left - 1, answer) for left, answer in self.coming if left > 0]
            if answers or not wait:
                return sorted(answers, key=lambda answer: answer.row)


def replay(task: Task, script: Script) -> Rollout:
    """Runs the episodes of a task with the plain model."""
    settings = task.settings
    n = len(task.prompts) * settings.num_generations
    prompts = [list(prompt) for prompt in task.prompts for _ in range(settings.num_generations)]
    limits = task.limits or [settings.max_completion_length] * n
    numbers = uniform_numbers(task)
    ids: list[list[int]] = [[] for _ in range(n)]
    logps: list[list[float]] = [[] for _ in range(n)]
    sampled: list[list[bool]] = [[] for _ in range(n)]
    turns, starts, reasons = [0] * n, [0] * n, ["length"] * n
    done = [False] * n

    def read(row: int, tokens: list[int]) -> None:
        done[row] = len(ids[row]) + len(tokens) >= limits[row]
        if done[row]:
            reasons[row] = "length"
            return
        ids[row] += tokens
        logps[row] += [0.0] * len(tokens)
        sampled[row] += [False] * len(tokens)
        starts[row] = len(ids[row])

    for row in range(n):
        if script.first_ids(row):
            read(row, script.first_ids(row))
    while not all(done):
        logits = next_logits(task, [prompt + own for prompt, own in zip(prompts, ids, strict=True)])
        for row in np.flatnonzero(~np.array(done)).tolist():
            at = len(ids[row])
            own = scaled(task, logits[row], at)
            distribution = log_softmax(own)
            passed = np.searchsorted(np.cumsum(np.exp(distribution)), numbers[row, at], side="right")
            token = int(own.argmax() if settings.temperature == 0 else passed)
            ids[row].append(token)
            logps[row].append(float(distribution[token]))
            sampled[row].append(True)
            turn = ids[row][starts[row] :]
            text = "" if task.decode_text is None else task.decode_text(turn)
            stopped = token in task.stops or any(string in text for string in settings.stop)
            full = script.turn_tokens is not None and len(turn) >= script.turn_tokens
            if not (stopped or full or at + 1 >= limits[row]):
                continue
            reasons[row] = "stop" if stopped else "length"
            done[row] = at + 1 >= limits[row]
            if not done[row]:
                answer = script.answer_ids(row, turns[row], turn)
                turns[row] += 1
                done[row] = not answer
                if answer:
                    read(row, answer)
    arrays = [np.array(own, np.float32) for own in logps]
    return Rollout(ids, arrays, reasons, sampled=[np.array(own, bool) for own in sampled])  # type: ignore[arg-type] - literals


def same_settings(task: Task) -> Task:
    """The task without what must not matter."""
    return task.but(slots=None, segment=None, refill=True, dispatch_ahead="auto")


REPLAYS: dict[str, Rollout] = {}


def replayed(task: Task, script: Script) -> Rollout:
    """`replay`, once for each task and script."""
    key = repr((same_settings(task), dataclasses.astuple(script)))
    if key not in REPLAYS:
        REPLAYS[key] = replay(same_settings(task), script)
    return REPLAYS[key]
