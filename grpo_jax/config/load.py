"""`Config`, all settings of a run: read from YAML, dicts and the command line, with a record of where each value came from.

Precedence, lowest first: default, preset, YAML file, command line. The sections' dataclasses alone define what a setting may be;
this module finds the field and, where the value is text, reads it as the field's type.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import ConfigError, MismatchError, check_types, convert, field_types, nearest, require, show, wrong_type
from grpo_jax.config.distributed import DistributedConfig
from grpo_jax.config.environment import EnvironmentConfig
from grpo_jax.config.evaluation import EvalConfig
from grpo_jax.config.lora import LoraConfig
from grpo_jax.config.objective import ObjectiveConfig
from grpo_jax.config.presets import OBJECTIVE_DEFAULTS
from grpo_jax.config.sections import DataConfig, ModelConfig, RewardsConfig, RolloutConfig
from grpo_jax.config.staleness import check_rollout_mesh, check_staleness
from grpo_jax.config.training import MeshConfig, OptimConfig, TrainConfig
from grpo_jax.config.yaml_files import parse_yaml, read_yaml

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Config:
    """All settings of a run. `Config.from_dict` and `Config.from_yaml` build it from dicts and files."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        require(
            self.model.quantization == "none" or self.lora.rank > 0 or self.lora.adapter is not None,
            "model.quantization",
            self.model.quantization,
            "a quantised base stays frozen, and lora.rank 0 trains every weight: set lora.rank to 8, 16, 32, ..., or use none",
        )
        require(
            self.model.quantization == "none" or not self.rollout.merge_adapters,
            "rollout.merge_adapters",
            self.rollout.merge_adapters,
            f"adapters cannot be added to a base in {self.model.quantization}: use false, or model.quantization none",
        )
        require(
            self.model.quantization in ("int4", "nf4") or not self.rollout.dense_base,
            "rollout.dense_base",
            self.rollout.dense_base,
            f"model.quantization is {self.model.quantization}, which is sampled with as it is: use false, or int4 or nf4",
        )
        learned = self.train.update_generations
        fix = f"use 2 to rollout.num_generations - 1 ({self.rollout.num_generations - 1}), or null for all completions"
        require(learned is None or 2 <= learned < self.rollout.num_generations, "train.update_generations", learned, fix)
        for setting in ("kl_in_reward", "normalize_each_reward"):
            fix = f"use null with objective.{setting}, which changes the rewards that the completions would be chosen by"
            require(learned is None or not getattr(self.objective, setting), "train.update_generations", learned, fix)
        fix = "use null with objective.credit turn, which compares the same turn of all completions"
        require(learned is None or self.objective.credit == "episode", "train.update_generations", learned, fix)
        group = "rollout.num_generations" if learned is None else "train.update_generations"
        size = self.train.micro_batch_completions
        if size is not None:
            require(
                size >= 1 and self.generations_per_update % size == 0,
                "train.micro_batch_completions",
                size,
                f"use a divisor of {group} ({self.generations_per_update}), or null",
            )
        parts = self.train.updates_per_rollout
        fix = "use 1 with objective.kl_in_reward, whose KL would be taken from weights that updates on other prompts have changed"
        require(parts == 1 or not self.objective.kl_in_reward, "train.updates_per_rollout", parts, fix)
        check_staleness(self.train, self.objective, self.rollout)
        check_rollout_mesh(self.mesh, self.train, self.optim, self.rollout)
        every, used = self.train.reference_every, self.objective.needs_reference
        fix = "leave it out, or use objective.beta above 0: without a KL term nothing is compared with the reference"
        require(every is None or used, "train.reference_every", every, fix)
        k, completions = self.objective.pass_k, self.generations_per_update
        fix = f"use 2 to {group} ({completions}): the best of k is estimated from sets within a group"
        require(self.objective.advantage != "pass_at_k" or k <= completions, "objective.pass_k", k, fix)
        epochs = self.train.epochs
        fix = "use train.steps with data.streaming, which does not know the number of rows"
        require(epochs is None or not self.data.streaming, "train.epochs", epochs, fix)
        tokens, least = self.train.micro_batch_tokens, self.rollout.max_prompt_length + self.rollout.max_completion_length
        if isinstance(tokens, int):
            require(
                tokens >= least,
                "train.micro_batch_tokens",
                tokens,
                f"use at least {least}, which the longest prompt with one completion needs "
                "(rollout.max_prompt_length + rollout.max_completion_length), or null",
            )

    @property
    def generations_per_update(self) -> int:
        """Completions of each prompt that an update learns from."""
        learned = self.train.update_generations
        return self.rollout.num_generations if learned is None else learned

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Builds a config from nested dicts.

        Args:
            values: {section: {field: value}}; a setting that is left out has its default.

        Raises:
            ConfigError: A name is unknown (the nearest one is suggested), or a value has the wrong type or is out of range.
        """
        return config_from_dict(values)

    @staticmethod
    def from_yaml(path: str | Path) -> Config:
        """Builds a config from a YAML file; see `from_dict`."""
        return Config.from_dict(read_yaml(path))


@dataclass(frozen=True)
class Loaded:
    """A config with the sources of its values; a value that `sources` does not name is a default or the preset's.

    Example:
        Loaded(config=Config(...), sources={"train.steps": "command line"})
    """

    config: Config
    sources: dict[str, str] = field(default_factory=dict)


def load(yaml_path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Loaded:
    """Builds a config from a YAML file and overrides from the command line.

    Args:
        yaml_path: File of {section: {field: value}}; None starts from the defaults.
        overrides: {"section.field": value}; text is read as the field's type, so "1e-6" is a number and "[a, b]" a list.

    Raises:
        ConfigError: The file cannot be read, a name is unknown (the nearest one is suggested), or a value has the wrong type or is
            out of range.
    """
    from_file = typed_settings(read_yaml(yaml_path)) if yaml_path is not None else {}
    from_line = typed_settings(overrides or {}, text=True)
    sources = {name: Path(yaml_path).name for name in from_file} if yaml_path is not None else {}
    sources.update(dict.fromkeys(from_line, COMMAND_LINE))
    values = from_file | from_line
    return Loaded(build(values), {name: source for name, source in sources.items() if not left_to_preset(name, values[name])})


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a config from {section: {field: value}}; see `Config.from_dict`."""
    return build(typed_settings(values))


def build(values: Mapping[str, Any]) -> Config:
    """Builds a config from {"section.field": value}."""
    given: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        given.setdefault(section, {})[key] = value
    return Config(**{section: kind(**given.get(section, {})) for section, kind in field_types(Config).items()})


@functools.cache
def setting_types() -> dict[str, Any]:
    """Returns the annotation of every setting by its full name, in the order of the sections."""
    return {
        f"{section}.{key}": kind for section, holder in field_types(Config).items() for key, kind in field_types(holder).items()
    }


def typed_settings(values: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
    """Flattens nested settings and reads each value as its field's type.

    Args:
        values: {section: {field: value}} or {"section.field": value}, or both mixed.
        text: The values are text from the command line: "null" and "[a, b]" are null and a list even where text is allowed.

    Raises:
        ConfigError: A name is unknown, or a value has the wrong type.
    """
    flat: dict[str, Any] = {}
    sections = field_types(Config)
    if not isinstance(values, Mapping):
        raise ConfigError(f"the settings are {show(values)}: expected a mapping of sections, such as {{'train': {{'steps': 100}}}}")
    for key, value in values.items():
        if key not in sections:
            flat[key] = value
        elif isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        elif value is not None:
            example = next(iter(field_types(sections[key])))
            raise ConfigError(f"{key} is {show(value)}: expected a mapping of its settings, such as {{'{example}': ...}}")
    for name in flat:
        if name not in setting_types():
            raise unknown_setting(str(name))
    return {name: typed_value(name, value, text) for name, value in flat.items()}


def typed_value(name: str, value: Any, text: bool = False) -> Any:
    """Converts one value to its field's type; text that does not fit the field is read as YAML, so that '1e-6' is a number.

    Raises:
        ConfigError: Neither the value nor its reading as YAML has that type.
    """
    if left_to_preset(name, value):
        return None
    readings = [value]
    if isinstance(value, str):
        try:
            read = parse_yaml(value)
        except ConfigError:
            read = value
        plain_first = not text or isinstance(read, str | bool | int | float)
        readings = [value, read] if plain_first else [read, value]
    for reading in readings:
        if left_to_preset(name, reading):
            return None
        try:
            return convert(reading, setting_types()[name])
        except MismatchError:
            continue
    raise wrong_type(name, value, setting_types()[name])


def left_to_preset(name: str, value: Any) -> bool:
    """Whether a null means "use the preset's value", which it does for the settings that a preset may choose."""
    section, _, key = name.partition(".")
    return value is None and section == "objective" and key in OBJECTIVE_DEFAULTS


def unknown_setting(name: str) -> ConfigError:
    """Makes the error for a name that is not a setting; the nearest setting is suggested."""
    guess = nearest_setting(name)
    hint = f"did you mean {guess}?" if guess else f"the sections are {', '.join(field_types(Config))}"
    return ConfigError(f"{name} is not a setting; {hint}")


def nearest_setting(name: str) -> str | None:
    """Returns the setting or section that `name` is probably a misspelling of; None where nothing is similar.

    Searches, in this order: a name in the same section that an unknown one ends with (max_steps: steps), a similar name in the
    same section, the same name in another section, a similar section, a similar full name, a similar name in any section.
    """
    sections, settings = field_types(Config), list(setting_types())
    by_key = {known.partition(".")[2]: known for known in reversed(settings)}
    section, _, key = name.rpartition(".")
    siblings = {known.partition(".")[2]: known for known in settings if known.startswith(f"{section}.")}
    searches: list[tuple[str, dict[str, str]]] = [
        (key, {known: full for known, full in siblings.items() if key.endswith(f"_{known}") and key not in by_key}),
        (key, siblings),
        (key, {key: by_key[key]} if key in by_key else {}),
        (name, {known: known for known in sections}),
        (name, {known: known for known in settings}),
        (key, by_key),
    ]
    found = ((choices, nearest(word, choices)) for word, choices in searches)
    return next((choices[match] for choices, match in found if match is not None), None)
