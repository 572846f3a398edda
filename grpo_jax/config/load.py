"""The way in for settings from outside, and where each value came from.

Enters: nested dicts, a YAML file, `section.field` overrides from the command line. Leaves: a validated `Config`, and the source of
every value that was given. Precedence, lowest first: default, preset, YAML file, command line. What a setting may be is said in
`sections.py` alone; this module only finds the field and, where the value is text, reads it as the field's type.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import ConfigError, MismatchError, field_types, fit, ill_typed, nearest, require, show
from grpo_jax.config.presets import OBJECTIVE_DEFAULTS, PRESETS
from grpo_jax.config.sections import Config
from grpo_jax.config.yaml_files import dump_yaml, parse_yaml, read_yaml

COMMAND_LINE = "command line"
IN_PYTHON = "set in Python"


@dataclass(frozen=True)
class Setting:
    """One setting of a run, as `resolved_settings` lists it.

    Attributes:
        name: `section.field`.
        value: what will be used.
        source: "default", "preset NAME", the YAML file's name, "command line" or "set in Python".

    Example:
        Setting(name="objective.epsilon_high", value=0.28, source="preset dapo")
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Loaded:
    """A config with the sources of the values that were given; what `sources` leaves out is a default or the preset's.

    Example:
        Loaded(config=Config(...), sources={"train.steps": "command line"})
    """

    config: Config
    sources: dict[str, str] = field(default_factory=dict)


def load(yaml_path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Loaded:
    """Builds a config from a YAML file and overrides of it.

    Args:
        yaml_path: File of {section: {field: value}}; None starts from the defaults.
        overrides: {"section.field": value}; text is read as the field's type, so "1e-6", "null" and "[a, b]" are what they seem.

    Raises:
        ConfigError: an unreadable file, an unknown name (the nearest one is suggested), a value of the wrong type or out of range.
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
    """A config from {"section.field": value}."""
    given: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        given.setdefault(section, {})[key] = value
    return Config(**{section: kind(**given.get(section, {})) for section, kind in field_types(Config).items()})


@functools.cache
def setting_types() -> dict[str, Any]:
    """The annotation of every setting, by its full name, in order."""
    return {
        f"{section}.{key}": kind for section, holder in field_types(Config).items() for key, kind in field_types(holder).items()
    }


def typed_settings(values: Mapping[str, Any], text: bool = False) -> dict[str, Any]:
    """Flattens nested settings and reads each value as its field's type.

    Args:
        values: {section: {field: value}} or {"section.field": value}, mixed at will.
        text: The values are words of a command line: "null" and "[a, b]" are null and a list even where text is allowed.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type.
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
    """One value as its field's type; text that is not what the field wants is read as YAML, so that '1e-6' is a number.

    Raises:
        ConfigError: it is not of that type in any reading.
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
            return fit(reading, setting_types()[name])
        except MismatchError:
            continue
    raise ill_typed(name, value, setting_types()[name])


def left_to_preset(name: str, value: Any) -> bool:
    """Whether a null says "as the preset has it", which it does for the settings that a preset may choose."""
    section, _, key = name.partition(".")
    return value is None and section == "objective" and key in OBJECTIVE_DEFAULTS


def unknown_setting(name: str) -> ConfigError:
    """The error for a name that is no setting, with the nearest one that is."""
    guess = nearest_setting(name)
    hint = f"did you mean {guess}?" if guess else f"the sections are {', '.join(field_types(Config))}"
    return ConfigError(f"{name} is not a setting; {hint}")


def nearest_setting(name: str) -> str | None:
    """The setting, or section, that `name` may have been meant for.

    Looked for in turn: a near name in the same section, the same name in another section, a near section, a near full name, a
    near name in any section.
    """
    sections, settings = field_types(Config), list(setting_types())
    by_key = {known.partition(".")[2]: known for known in reversed(settings)}
    section, _, key = name.rpartition(".")
    siblings = {known.partition(".")[2]: known for known in settings if known.startswith(f"{section}.")}
    searches: list[tuple[str, dict[str, str]]] = [
        (key, siblings),
        (key, {key: by_key[key]} if key in by_key else {}),
        (name, {known: known for known in sections}),
        (name, {known: known for known in settings}),
        (key, by_key),
    ]
    found = ((choices, nearest(wanted, choices)) for wanted, choices in searches)
    return next((choices[near] for choices, near in found if near is not None), None)


def resolved_settings(config: Config, sources: Mapping[str, str] | None = None) -> list[Setting]:
    """Every setting with its value and where it came from, in the order of the sections.

    Args:
        config: The settings that will be used.
        sources: Where the given ones came from (`Loaded.sources`); a value that it does not name is the preset's or the default,
            else it was set in Python.
    """
    known = sources or {}
    default = asdict(Config())
    preset = config.objective.preset
    chosen = PRESETS[preset] if preset is not None else {}
    listed = []
    for name in setting_types():
        section, _, key = name.partition(".")
        value = config.__dict__[section].__dict__[key]
        if name in known:
            source = known[name]
        elif section == "objective" and key in chosen:
            source = f"preset {preset}" if value == chosen[key] else IN_PYTHON
        elif name == "objective.epsilon_high":
            source = "default" if value == config.objective.epsilon else IN_PYTHON
        else:
            source = "default" if value == default[section][key] else IN_PYTHON
        listed.append(Setting(name, value, source))
    return listed


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} of every setting; `config_from_dict` makes the same config of it."""
    return asdict(config)


def write_yaml(config: Config, path: str | Path) -> None:
    """Writes every setting as YAML; `Config.from_yaml` reads the same config back.

    Raises:
        ConfigError: a setting holds something that is no plain data.
    """
    Path(path).write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs as `config_to_dict` gives them.

    Returns:
        One line a setting, such as "optim.learning_rate: 1e-05 -> 2e-05"; "(none)" is a setting that one side does not have.
    """
    before, after = (
        {f"{section}.{key}": item for section, held in side.items() for key, item in held.items()} for side in (old, new)
    )
    missing = object()
    lines = []
    for name in before | after:
        left, right = before.get(name, missing), after.get(name, missing)
        if left != right:
            shown = ("(none)" if value is missing else show(value) for value in (left, right))
            lines.append(f"{name}: {' -> '.join(shown)}")
    return lines


def check_training(config: Config, *, has_policy: bool = False, has_dataset: bool = False, has_rewards: bool = False) -> None:
    """Checks what a GRPO run needs beyond settings that are each in range.

    Args:
        config: The settings.
        has_policy: A policy was handed over, so that `model.path` is not needed.
        has_dataset: Rows were handed over, so that `data.path` is not needed.
        has_rewards: Functions were handed over, so that `rewards.functions` is not needed.

    Raises:
        ConfigError: as said.
    """
    check_supervised(config, has_policy=has_policy, has_dataset=has_dataset)
    group = config.rollout.num_generations
    require(
        group >= 2, "rollout.num_generations", group, "use 4 to 16; completions are compared within a group, which takes at least 2"
    )
    temperature = config.rollout.temperature
    require(
        temperature > 0,
        "rollout.temperature",
        temperature,
        "use 1.0; greedy completions of a prompt are all alike, so nothing is learnt",
    )
    functions = config.rewards.functions
    require(has_rewards or bool(functions), "rewards.functions", functions, "name at least one reward, such as [number_match]")


def check_supervised(config: Config, *, has_policy: bool = False, has_dataset: bool = False) -> None:
    """Checks what any training run needs beyond settings that are each in range; see `check_training`."""
    require(has_policy or bool(config.model.path), "model.path", config.model.path, "give a model folder or a hub id")
    require(has_dataset or bool(config.data.path), "data.path", config.data.path, "give a file of prompts or a dataset on the hub")
    warmup, steps = config.optim.warmup_steps, config.train.steps
    require(
        warmup < steps, "optim.warmup_steps", warmup, f"use fewer than train.steps ({steps}), or the rate never gets to its peak"
    )
