"""What is known of an episode: messages, rewards and failure while it runs, and what rewards, records and metrics get of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.environments.protocol import Environment, Message
from grpo_jax.types import Prompt


@dataclass
class Episode:
    """What has happened in one episode.

    Attributes:
        prompt: with what `reset` added.
        environment: None until it is made.
        messages: after the prompt.
        turn: tokens of the turn that is being answered.
        turns: turns of the model so far.
        tokens: of the completion that `messages` have.
        rewards: of every step; None where it gave none.
        info: of every step.
        failure: why the episode failed; "" where it did not.
        seconds: spent in the environment.
    """

    prompt: Prompt
    environment: Environment | None = None
    messages: list[Message] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    turns: int = 0
    tokens: int = 0
    rewards: list[float | None] = field(default_factory=list)
    info: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    @property
    def reward(self) -> float | None:
        """The sum over the steps; None where none gave a reward."""
        given = [reward for reward in self.rewards if reward is not None]
        return sum(given) if given else None

    @property
    def turn_rewards(self) -> list[float]:
        """The reward of every step, 0 where it gave none."""
        return [0.0 if reward is None else reward for reward in self.rewards]


@dataclass(frozen=True)
class RewardRows:
    """What rewards get of N completions; for episodes N prompts, else B of them.

    Attributes:
        prompts, completions, columns: as `rewards.scoring.score` takes them. Of an episode they are all messages after the prompt,
            and more columns: `environment_reward` (the sum over the turns, None without one), `environment_failure` (None where
            there is none), `environment_info` (one dict a step), `environments` (the objects).
        texts: N completions as records show them.
        episodes: N, where completions are episodes; else empty.
    """

    prompts: list[Prompt]
    completions: list[Any]
    columns: dict[str, list[Any]]
    texts: list[str]
    episodes: Sequence[Episode] = ()


def finite_reward(reward: Any) -> float:
    """A step's reward as a number; TypeError where it is none."""
    try:
        number = float(reward)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not np.isfinite(number):
        raise TypeError(f"step returned the reward {reward!r:.100}: give a finite number or None")
    return number


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as a text, each message but a first one of the model's behind its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"[{message['role']}] {message['content']}" for message in messages)


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over the episodes: turns, calls of tools, those answered with an error, seconds in the environment; failed episodes."""

    def total(name: str) -> float:
        return float(sum(int(info.get(name, 0)) for own in episodes for info in own.info))

    count = max(1, len(episodes))
    return {
        "turns/mean": sum(own.turns for own in episodes) / count,
        "turns/max": float(max((own.turns for own in episodes), default=0)),
        "tools/calls": total("tool_calls") / count,
        "tools/errors": total("tool_errors") / count,
        "environment/seconds": sum(own.seconds for own in episodes) / count,
        "environment/failed": float(sum(bool(own.failure) for own in episodes)),
    }
