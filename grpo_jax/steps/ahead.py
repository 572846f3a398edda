"""Completions that were sampled before their step (`train.max_staleness: 1`).

A step then does this, in this order, which never depends on a clock:

    rewards of its own completions     called in workers and threads
    completions of the next step       sampled with the weights before this step's update
    rewards of its own completions     waited for
    update

So rewards are computed while the device samples. The completions are one update old when they are learned from, except those of the
first step. A checkpoint holds the completions of the next step, because the weights that sampled them are gone.

With a mesh of its own (`mesh.rollout`) the rollout goes on in a thread, with a copy of the weights before the update, while the
other devices update. The next step, an evaluation or a checkpoint waits for its end. Which weights sample what is the same.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grpo_jax.rollout.episode_content import RewardRows
from grpo_jax.runtime.threads import in_thread
from grpo_jax.steps.sampling import SampledGroups
from grpo_jax.types import PromptBatch, Rollout


class RolloutEndedError(Exception):
    """A rollout in a thread was ended, because nobody will use its completions."""


@dataclass(frozen=True)
class RolloutInThread:
    """A rollout that goes on next to the steps.

    Attributes:
        number: of the step that will learn from it.
        completions: its result or its error.
        unwanted: set where it is to end after its segment.
    """

    number: int
    completions: Future[SampledGroups]
    unwanted: threading.Event = field(default_factory=threading.Event)


class Ahead:
    """The completions of steps that are not finished, by number of the step, from 0."""

    def __init__(self) -> None:
        self._sampled: dict[int, SampledGroups] = {}
        self._running: RolloutInThread | None = None
        self._failed: dict[int, BaseException] = {}

    def of(self, number: int, sample: Callable[[], SampledGroups]) -> SampledGroups:
        """Returns the completions of a step, and samples them where that has not been done.

        Raises:
            BaseException: what ended their rollout in a thread; the next call samples them again.
        """
        self.wait()
        if number in self._failed:
            raise self._failed.pop(number)
        if number not in self._sampled:
            self._sampled[number] = sample()
        return self._sampled[number]

    def has_begun(self, number: int) -> bool:
        """Whether the completions of a step are there, or being sampled in a thread."""
        return number in self._sampled or (self._running is not None and self._running.number == number)

    def begin(self, number: int, sample: Callable[[Callable[[], None]], SampledGroups]) -> None:
        """Samples the completions of a step in a thread, and returns at once.

        Args:
            sample: is given a function to call after every segment, which raises where nobody will use the completions.
        """
        self.wait()
        unwanted = threading.Event()

        def check() -> None:
            if unwanted.is_set():
                raise RolloutEndedError(f"the rollout of step {number + 1} was ended")

        self._running = RolloutInThread(number, in_thread(lambda: sample(check), "rollout"), unwanted)

    def wait(self) -> None:
        """Waits for the rollout in the thread, if there is one; `of` raises its error. It is ended where a signal ends the wait."""
        if self._running is None:
            return
        number, completions = self._running.number, self._running.completions
        try:
            error = completions.exception()
        except BaseException:
            self.close()
            raise
        if error is None:
            self._sampled[number] = completions.result()
        else:
            self._failed[number] = error
        self._running = None

    def close(self) -> None:
        """Ends the rollout in the thread after its segment; its completions are lost."""
        if self._running is not None:
            self._running.unwanted.set()
            self._running.completions.exception()
            self._running = None

    def finish(self, number: int) -> None:
        """Takes in that a step has learned from its completions."""
        del self._sampled[number]

    def progress(self) -> dict[str, Any] | None:
        """Returns what a checkpoint stores: the completions of the first step that is not finished; None where there are none."""
        self.wait()
        if not self._sampled:
            return None
        sampled = self._sampled[min(self._sampled)]
        own = {"number": sampled.number, "sampled_in": sampled.sampled_in, "seconds": sampled.seconds}
        return own | stored_completions(sampled.prompts, sampled.rollout)

    def resume(
        self,
        stored: Mapping[str, Any],
        make_batch: Callable[[np.ndarray, int], PromptBatch],
        text_of: Callable[[list[int]], str],
    ) -> None:
        """Continues with the completions of a checkpoint.

        Args:
            stored: what `progress` returned.
            make_batch: the prompts of rows of the dataset, for a step.
            text_of: token ids -> text.
        """
        prompts = make_batch(np.asarray(stored["rows"]), stored["number"])
        rollout = restored_completions(stored)
        texts = [text_of(own) for own in rollout.completion_ids]
        rows = RewardRows(prompts.prompts, texts, prompts.columns, texts)
        sampled = SampledGroups(stored["number"], stored["sampled_in"], prompts, rollout, rows, stored["seconds"])
        self._sampled = {sampled.number: sampled}


def stored_completions(prompts: PromptBatch, rollout: Rollout) -> dict[str, Any]:
    """Returns completions, and the rows of the dataset that they belong to, as values for JSON."""
    return {
        "rows": prompts.indices.tolist(),
        "lengths": [len(ids) for ids in rollout.completion_ids],
        "ids": text_of_array(np.concatenate([np.asarray(ids, np.int32) for ids in rollout.completion_ids])),
        "logprobs": text_of_array(np.concatenate(rollout.logprobs)),
        "finish_reasons": rollout.finish_reasons,
        "near_ties": rollout.near_ties,
        "idle_tokens": rollout.idle_tokens,
        "slots": rollout.slots,
    }


def restored_completions(stored: Mapping[str, Any]) -> Rollout:
    """Returns the completions that `stored_completions` has stored."""
    ends = np.cumsum(stored["lengths"])[:-1]
    ids = [own.tolist() for own in np.split(array_of_text(stored["ids"], np.int32), ends)]
    logprobs = np.split(array_of_text(stored["logprobs"], np.float32), ends)
    rollout = Rollout(ids, logprobs, list(stored["finish_reasons"]), stored["near_ties"], stored["slots"])
    return replace(rollout, idle_tokens=stored.get("idle_tokens", 0))  # older checkpoints have none


def text_of_array(array: np.ndarray) -> str:
    """The bytes of an array as text."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def array_of_text(text: str, dtype: Any) -> np.ndarray:
    """The array whose bytes a text holds."""
    return np.frombuffer(base64.b64decode(text), dtype)
