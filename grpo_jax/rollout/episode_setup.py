"""What a run with episodes needs before it begins: environments and tools, the reward of the environment, the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.checks import require
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.conversation import Chat
from grpo_jax.environments.protocol import EnvironmentFactory
from grpo_jax.environments.resolve import Environments
from grpo_jax.rewards.builtin import environment as environment_reward
from grpo_jax.rollout.environment_turns import EpisodeDriver

ADDED_TOKENS = 256
"""What environments may add to a prompt that is computed once for its group; each episode reads by itself what is longer."""

COLUMNS = ("environment_reward", "environment_failure", "environment_info", "environments")
"""What rewards get in addition to the dataset's columns."""


@dataclass(frozen=True)
class EpisodeInputs:
    """What Python gives a run for its episodes.

    Attributes:
        environment: makes the environment of an episode; None has none, or the settings' own.
        tools: functions that the model may call.
        methods: the environment has the shape of TRL's: its public methods are tools.
    """

    environment: EnvironmentFactory | None = None
    tools: Sequence[Callable[..., Any]] = ()
    methods: bool = False

    @property
    def gives_tools(self) -> bool:
        """Whether the model may call something of Python's."""
        return bool(self.tools) or self.methods


@dataclass(frozen=True)
class EpisodeSetup:
    """The episodes of a run.

    Attributes:
        config: the settings, with the environment's reward among the weights.
        entries: the reward functions, the environment's reward among them.
        environments: None where a completion is a single answer.
    """

    config: Config
    entries: list[Any]
    environments: Environments | None

    @staticmethod
    def read(config: Config, given: EpisodeInputs, entries: Sequence[Any]) -> EpisodeSetup:
        """Finds environment and tools.

        Args:
            config: the settings.
            given: what Python gives.
            entries: reward functions, or entries of rewards.functions.

        Raises:
            ConfigError: environment or tools cannot be found or used, or the environment's reward is named and there is none.
        """
        environments = Environments.read(config.environment, given.environment, given.tools, methods=given.methods)
        named = [entry for entry in entries if names_environment(entry)]
        turns = environments is not None and environments.factory is not None and not given.methods
        fix = "use episode: only an environment gives rewards by turn, and tools give none"
        require(turns or config.objective.credit == "episode", "objective.credit", config.objective.credit, fix)
        if environments is None:
            fix = "there is no environment: set environment.name or environment.tools, or leave this reward out"
            require(not named, "rewards.functions", ["environment"] if named else [], fix)
            return EpisodeSetup(config, list(entries), None)
        rewards = config.rewards
        if named:
            weight = 1.0 if rewards.weights is None else rewards.weights[list(entries).index(named[0])]
            fix = (
                "use another weight for environment, which also keeps failed episodes out of training; 1.0 where it gives no reward"
            )
            require(weight != 0, "rewards.weights", rewards.weights, fix)
            return EpisodeSetup(config, list(entries), environments)
        weights = None if rewards.weights is None else [*rewards.weights, 1.0]
        functions = [*rewards.functions, "environment"] if rewards.functions else []
        config = replace(config, rewards=replace(rewards, functions=functions, weights=weights))
        return EpisodeSetup(config, [*entries, environment_reward], environments)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that rewards get in addition to the dataset's."""
        return () if self.environments is None else COLUMNS

    @property
    def adds_to_prompts(self) -> bool:
        """Whether an environment may add to prompts, so that their lengths are not known before."""
        return self.environments is not None and self.environments.factory is not None

    def longest_prompt(self, *lengths: np.ndarray) -> int:
        """Tokens of the longest prompt that is shared, with what an environment adds to it.

        Args:
            lengths: of the dataset's prompts.
        """
        longest = max(int(own.max(initial=1)) for own in lengths)
        return min(self.config.rollout.max_prompt_length, longest + ADDED_TOKENS)

    def source_config(self, tokenizer: Tokenizer | None) -> Config:
        """The settings that prompts are rendered with: the chat template gets the tools.

        Raises:
            ConfigError: `data.template_arguments` names tools too.
        """
        if self.environments is None or self.environments.toolbox is None or tokenizer is None or not tokenizer.has_chat_template:
            return self.config
        data = self.config.data
        fix = "tools are given as environment.tools already: leave them out here"
        require("tools" not in data.template_arguments, "data.template_arguments", data.template_arguments, fix)
        arguments: Mapping[str, Any] = {**data.template_arguments, "tools": self.environments.toolbox.schemas}
        return replace(self.config, data=replace(data, template_arguments=dict(arguments)))

    def hidden_tools(self, tokenizer: Tokenizer) -> str | None:
        """A warning where the chat template leaves the tools out; None where the model sees them, or there are none."""
        if self.environments is None or self.environments.toolbox is None or not tokenizer.has_chat_template:
            return None
        message, schemas = [{"role": "user", "content": "?"}], self.environments.toolbox.schemas
        arguments = self.config.data.template_arguments
        without, shown = (
            tokenizer.render(message, generation=True, template_arguments={**arguments, "tools": tools})
            for tools in (None, schemas)
        )
        if without != shown:
            return None
        names = ", ".join(self.environments.toolbox.tools)
        return (
            f"the chat template does not show the model its tools ({names}): describe them in data.system_prompt, or in a warm-up"
        )

    def driver(self, tokenizer: Tokenizer, *, several_processes: bool) -> EpisodeDriver | None:
        """The driver of the run's episodes; None where a completion is a single answer.

        Args:
            tokenizer: of the model.
            several_processes: the run has more than one process.

        Raises:
            ConfigError: the format of calls is not known, or there are several processes.
        """
        if self.environments is None:
            return None
        if several_processes:
            raise ConfigError("environment: a run with episodes has one process so far: start one, or train without environment")
        config = self.source_config(tokenizer)
        tools = None if self.environments.toolbox is None else self.environments.toolbox.schemas
        template = tokenizer.template_for(tools) if tokenizer.has_chat_template else None
        data = config.data
        chat = Chat(
            tokenizer,
            renders_text=bool(data.chat_template),
            template_arguments=data.template_arguments,
            strict=config.environment.history == "strict",
        )
        return EpisodeDriver.of(self.environments.with_format(template), chat, config.rollout.max_prompt_length)


def names_environment(entry: Any) -> bool:
    """Whether an entry of rewards.functions is the environment's own reward."""
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    return name == "environment" or entry is environment_reward
