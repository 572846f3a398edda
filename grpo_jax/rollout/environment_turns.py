"""Drives the episodes of a rollout: calls environments between turns, and gives the sampler the tokens of their answers.

Results depend on the row alone, never on the order in which environments answer. An environment that raises or takes too long ends
its episode, which then fails as where a reward fails: it is not trained on, is counted, and ends the run above
`rewards.max_failed_share`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.environments.conversation import Chat, with_added
from grpo_jax.environments.pool import EnvironmentPool, FailedStep
from grpo_jax.environments.protocol import Closing, Step, as_messages, reset_with
from grpo_jax.environments.resolve import Environments
from grpo_jax.environments.tool_environment import object_of
from grpo_jax.rollout.episode_content import Episode, RewardRows, finite_reward, transcript
from grpo_jax.rollout.turns import Answer
from grpo_jax.types import FinishReason, PromptBatch, Rollout


@dataclass(frozen=True)
class EpisodeDriver:
    """Begins the episodes of rollouts; one for a run.

    Attributes:
        environments: makes them.
        chat: makes tokens of messages.
        pool: calls them.
        longest_prompt: rollout.max_prompt_length; what `reset` adds beyond it is read by each episode alone.
    """

    environments: Environments
    chat: Chat
    pool: EnvironmentPool
    longest_prompt: int

    @staticmethod
    def of(environments: Environments, chat: Chat, longest_prompt: int) -> EpisodeDriver:
        """Makes a driver with a pool of its own."""
        settings = environments.settings
        return EpisodeDriver(environments, chat, EnvironmentPool(settings.concurrency, settings.timeout_seconds), longest_prompt)

    def begin(self, prompts: PromptBatch, generations: int) -> EnvironmentTurns:
        """Makes and resets the environments of B·G episodes.

        Raises:
            ConfigError: there are tools, and the prompts are plain texts, which do not show them to the model.
        """
        tools, template = self.environments.toolbox is not None, self.chat.tokenizer.has_chat_template
        if tools and template and not all(self.chat.uses_template(prompt) for prompt in prompts.prompts):
            fix = "set it to true, so that plain texts are rendered with the chat template, which shows the model its tools"
            raise ConfigError(f"data.chat_template is null: {fix}")
        episodes = EnvironmentTurns(self, prompts, generations)
        episodes.reset()
        return episodes

    def close(self) -> None:
        """Ends what runs."""
        self.pool.close()


class EnvironmentTurns:
    """The episodes of one rollout: implements `rollout.turns.Turns`.

    Attributes:
        prompts: the batch, its `prompt_ids` with what `reset` added to the prompts of all episodes of a group.
        first_ids: what `reset` added to the prompt of one episode.
        max_turn_tokens: environment.max_turn_tokens.
    """

    def __init__(self, driver: EpisodeDriver, prompts: PromptBatch, generations: int) -> None:
        settings = driver.environments.settings
        self.driver, self.prompts, self.generations = driver, prompts, generations
        self.max_turns = settings.max_turns
        self.max_turn_tokens: int | None = settings.max_turn_tokens
        self.episodes = [Episode(prompt) for prompt in prompts.prompts for _ in range(generations)]
        self.first_ids: Sequence[Sequence[int]] = [[] for _ in self.episodes]
        self._ended: list[Answer] = []

    def reset(self) -> None:
        """Begins all episodes, and waits for them."""
        batch, pool = self.prompts, self.driver.pool
        rows = [
            {"prompt": prompt, **{name: values[number] for name, values in batch.columns.items()}}
            for number, prompt in enumerate(batch.prompts)
        ]
        for number, episode in enumerate(self.episodes):
            pool.submit(number, self._begin, episode, rows[number // self.generations])
        ids: list[list[int] | None] = [None] * len(self.episodes)
        while pool.outstanding:
            for ended in pool.finished(wait=True):
                episode = self.episodes[ended.key]
                episode.seconds += ended.seconds
                ids[ended.key] = self._added(episode, ended.result)
        self._share(ids)

    def ended(self, row: int, ids: list[int], reason: FinishReason) -> None:
        """Starts to answer a turn; see `Turns`."""
        episode = self.episodes[row]
        episode.turn, episode.turns = list(ids), episode.turns + 1
        episode.tokens += len(ids)
        if episode.failure or episode.environment is None:
            self._ended.append(Answer(row, []))
            return
        message = {"role": "assistant", "content": self.driver.chat.text_of_turn(ids)}
        self.driver.pool.submit(row, episode.environment.step, message)

    def ready(self, *, wait: bool) -> list[Answer]:
        """The answers that have come; see `Turns`."""
        answers, self._ended = self._ended, []
        for ended in self.driver.pool.finished(wait=wait and not answers):
            episode = self.episodes[ended.key]
            episode.seconds += ended.seconds
            answers.append(Answer(ended.key, self._answer(episode, ended.result)))
        return sorted(answers, key=lambda answer: answer.row)

    def finish(self, rollout: Rollout) -> RewardRows:
        """What the episodes were, after the rollout; closes the environments that can be closed."""
        rows = self.ended_rows(range(len(self.episodes)), rollout.completion_ids, sampled_tokens(rollout))
        self._close()
        return rows

    def ended_rows(self, rows: range, ids: Sequence[list[int]], sampled: Sequence[np.ndarray]) -> RewardRows:
        """What some episodes were, after their end. It may be asked again.

        Args:
            rows: of the episodes.
            ids, sampled: their completions, as in `Rollout`.
        """
        episodes = [self.episodes[row] for row in rows]
        for episode, own_ids, own_sampled in zip(episodes, ids, sampled, strict=True):
            rest = [i for i, own in zip(own_ids[episode.tokens :], own_sampled[episode.tokens :], strict=True) if own]
            if rest:  # a turn in which the episode reached its limit, so that nobody answered it
                episode.turns += 1
                episode.tokens = len(own_ids)
                episode.messages.append({"role": "assistant", "content": self.driver.chat.text_of_turn(rest)})
        columns = {name: [values[row // self.generations] for row in rows] for name, values in self.prompts.columns.items()}
        columns |= {
            "environment_reward": [own.reward for own in episodes],
            "environment_failure": [own.failure or None for own in episodes],
            "environment_info": [own.info for own in episodes],
            "environments": [object_of(own.environment) for own in episodes],
        }
        return RewardRows(
            prompts=[own.prompt for own in episodes],
            completions=[own.messages for own in episodes],
            columns=columns,
            texts=[transcript(own.messages) for own in episodes],
            episodes=episodes,
        )

    def _begin(self, episode: Episode, row: dict[str, Any]) -> Any:
        """Makes the environment of an episode and resets it; in a thread of the pool."""
        environment = episode.environment = self.driver.environments.make()
        return reset_with(environment, row)

    def _added(self, episode: Episode, result: Any) -> list[int] | None:
        """Adds what `reset` returned to the prompt; returns the prompt's tokens, None where it is as it was."""
        if isinstance(result, FailedStep):
            episode.failure = f"reset {result.reason}"
            return None
        try:
            messages = as_messages(result, "reset")
        except TypeError as error:
            episode.failure = str(error)
            return None
        if not messages:
            return None
        episode.prompt = with_added(episode.prompt, result, messages)
        return self.driver.chat.prompt_ids(episode.prompt)

    def _share(self, ids: Sequence[list[int] | None]) -> None:
        """Puts what all episodes of a group begin with into the group's prompt, and the rest into `first_ids`."""
        if all(own is None for own in ids):
            return
        shared, first_ids = list[list[int]](), [list[int]() for _ in self.episodes]
        for number, prompt in enumerate(self.prompts.prompt_ids):
            rows = range(number * self.generations, (number + 1) * self.generations)
            known = {row: own if (own := ids[row]) is not None else list(prompt) for row in rows if not self.episodes[row].failure}
            common = common_start(list(known.values()))[: self.driver.longest_prompt] or list(prompt)
            shared.append(common)
            for row, own in known.items():
                first_ids[row] = own[len(common) :]
                self.episodes[row].tokens += len(first_ids[row])
        self.first_ids = first_ids
        self.prompts = replace(self.prompts, prompt_ids=shared)

    def _answer(self, episode: Episode, result: Any) -> list[int]:
        """Takes a step's result into the episode; returns the tokens that the model reads next, none at its end."""
        turn = {"role": "assistant", "content": self.driver.chat.text_of_turn(episode.turn)}
        history = [*episode.messages]
        episode.messages.append(turn)
        step = result
        if isinstance(step, FailedStep):
            episode.failure = f"step {episode.turns} {step.reason}"
            return []
        try:
            if not isinstance(step, Step):
                raise TypeError(f"step returned {type(step).__name__} instead of a Step")
            messages = as_messages(step.messages, "step")
            episode.rewards.append(None if step.reward is None else finite_reward(step.reward))
        except TypeError as error:
            episode.failure = str(error)
            return []
        episode.info.append(dict(step.info))
        episode.messages += messages
        if step.done or episode.turns >= self.max_turns:
            return []
        ids = self.driver.chat.answer_ids(episode.prompt, history, episode.turn, messages) if messages else []
        if not ids:
            episode.failure = f"step {episode.turns} gave no text and did not end the episode: give messages or done=True"
        episode.tokens += len(ids)
        return ids

    def _close(self) -> None:
        """Closes the environments that have a `close`; what it raises is not looked at, because the episode is over."""
        pool, objects = self.driver.pool, [object_of(episode.environment) for episode in self.episodes]
        for number, environment in enumerate(objects):
            if isinstance(environment, Closing):
                pool.submit(number, environment.close)
        while pool.outstanding:
            pool.finished(wait=True)


def reward_rows(
    prompts: PromptBatch, rollout: Rollout, turns: EnvironmentTurns | None, decode: Callable[[list[int]], str]
) -> RewardRows:
    """Makes what rewards get: texts of single answers, or whole conversations.

    Args:
        turns: of the rollout; None where a completion is a single answer.
        decode: token ids -> text.
    """
    if turns is None:
        texts = [decode(ids) for ids in rollout.completion_ids]
        return RewardRows(prompts.prompts, texts, prompts.columns, texts)
    return turns.finish(rollout)


def sampled_tokens(rollout: Rollout) -> Sequence[np.ndarray]:
    """Which tokens of each completion the model sampled."""
    return [np.ones(len(ids), bool) for ids in rollout.completion_ids] if rollout.sampled is None else rollout.sampled


def common_start(lists: Sequence[Sequence[int]]) -> list[int]:
    """What all lists begin with."""
    if not lists:
        return []
    alike = itertools.takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False))
    return [items[0] for items in alike]
