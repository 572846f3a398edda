"""The two kinds of training step: GRPO (`grpo`) and the supervised warm-up (`supervised`).

`trainer.py` runs the loop around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from grpo_jax.config import Config
from grpo_jax.learner.learner import Learner
from grpo_jax.policy import Policy
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.programs import Program
from grpo_jax.types import TrainState

StepResult = tuple[TrainState, dict[str, Any], StepCompletions | None]
"""The next state, the step's metrics on the host, and its completions."""


class Step(Protocol):
    """One kind of training step."""

    @property
    def config(self) -> Config:
        """The settings, with values for what `auto` leaves open."""
        ...

    @property
    def policy(self) -> Policy:
        """The policy that training starts from."""
        ...

    @property
    def learner(self) -> Learner:
        """The pure part of the step."""
        ...

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything that the step compiles."""
        ...

    @property
    def problems(self) -> int:
        """Number of held-out problems."""
        ...

    def inputs(self) -> dict[str, str | None]:
        """What the run is made from: model, data, rewards; see `run/inputs.py`."""
        ...

    @property
    def first_rewards_at(self) -> float | None:
        """When the first step's completions had been scored, by `time.perf_counter`; None before, and without rewards."""
        ...

    def future_calls(self, state: TrainState) -> list[FutureCall]:
        """What the run will compile, in the order in which it is needed; it is compiled in the background. May be incomplete."""
        ...

    def run(self, state: TrainState, number: int) -> StepResult:
        """Makes step `number`, from 0."""
        ...

    def finish(self, step: int, completions: StepCompletions | None) -> None:
        """Takes in that step `step`, counted from 1, is finished; the next one may depend on it. Every process calls it."""
        ...

    def progress(self) -> dict[str, Any]:
        """What a checkpoint stores of the steps so far, next to the state."""
        ...

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        """Continues after a checkpoint of `steps` steps; returns warnings.

        Args:
            progress: what the checkpoint stored; {} in one of an older version.
            records: of the run's ledger, up to the checkpoint.
        """
        ...

    def evaluate(self, state: TrainState) -> dict[str, Any] | None:
        """Metrics on the held-out part; None where nothing is held out."""
        ...

    def close(self) -> None:
        """Ends what runs beside the trainer; the next step starts it again."""
        ...
