"""The settings of a run listed: each with its value and source, as plain dicts and YAML, and where two configs differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.config.load import Config, setting_types
from grpo_jax.config.presets import PRESETS
from grpo_jax.config.yaml_files import dump_yaml

IN_PYTHON = "set in Python"


@dataclass(frozen=True)
class Setting:
    """One setting of a run with its value and its source.

    Attributes:
        name: `section.field`.
        value: The value in use.
        source: "default", "preset NAME", the YAML file's name, "command line" or "set in Python".

    Example:
        Setting(name="objective.epsilon_high", value=0.28, source="preset dapo")
    """

    name: str
    value: Any
    source: str


def resolved_settings(config: Config, sources: Mapping[str, str] | None = None) -> list[Setting]:
    """Lists every setting with its value and source, in the order of the sections.

    Args:
        config: The settings in use.
        sources: `Loaded.sources`. A value that it does not name is the preset's or the default, or else was set in Python.
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
        elif name == "train.steps" and config.train.epochs is not None:
            source = "train.epochs"
        elif name == "objective.epsilon_high":
            source = "default" if value == config.objective.epsilon else IN_PYTHON
        else:
            source = "default" if value == default[section][key] else IN_PYTHON
        listed.append(Setting(name, value, source))
    return listed


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns every setting as {section: {field: value}}; `config_from_dict` makes the same config from it."""
    return asdict(config)


def write_yaml(config: Config, path: str | Path) -> None:
    """Writes every setting as YAML; `Config.from_yaml` reads the same config back.

    Raises:
        ConfigError: A setting is not plain data.
    """
    Path(path).write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists the settings that differ between two configs as `config_to_dict` gives them.

    Returns:
        One line per setting, such as "optim.learning_rate: 1e-05 -> 2e-05"; "(none)" where one side lacks the setting.
    """
    before, after = (
        {f"{section}.{key}": item for section, inner in side.items() for key, item in inner.items()} for side in (old, new)
    )
    missing = object()
    lines = []
    for name in before | after:
        left, right = before.get(name, missing), after.get(name, missing)
        if left != right:
            shown = ("(none)" if value is missing else show(value) for value in (left, right))
            lines.append(f"{name}: {' -> '.join(shown)}")
    return lines
