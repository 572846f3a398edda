"""Reads and writes YAML as plain data: dicts, lists, text, numbers, true/false and null.

PyYAML follows YAML 1.1, where `1e-6` is text, `010` is eight, `1:30` is ninety and `2024-01-01` is a date. Here the first is a
number, as in YAML 1.2, and the others are text. A key that occurs twice in one mapping is an error. Text is quoted where it is
written so that it reads back as the same text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from grpo_jax.config.checks import ConfigError, show

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)

LONGEST_CHARACTERS = 10**6
MOST_VALUES = 100_000
"""Aliases make a few lines of YAML a structure of billions of values, of which nobody can print or copy even one."""


def yaml_1_2_resolvers() -> dict[Any, Any]:
    """Returns PyYAML's table of value types by first character, with the numbers above and without dates."""
    unchanged = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag in unchanged]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        table.setdefault(first, []).extend([("tag:yaml.org,2002:int", INTEGER), ("tag:yaml.org,2002:float", FLOAT)])
    return table


class Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data with other numbers, no dates and no duplicate keys."""

    yaml_implicit_resolvers = yaml_1_2_resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Builds a dict, after a check for duplicate keys: PyYAML would use the last one."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else id(key_node))
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """PyYAML's writer of plain data; text that `Loader` would read as a number is quoted."""

    yaml_implicit_resolvers = yaml_1_2_resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        """Writes a list that occurs twice in full both times, instead of an anchor and a reference."""
        return True


def parse_yaml(text: str, name: str = "text") -> Any:
    """Reads one YAML document.

    Args:
        text: The document.
        name: Name of the document in error messages.

    Raises:
        ConfigError: The text is not YAML; the message gives line and column.
    """
    if len(text) > LONGEST_CHARACTERS:
        raise ConfigError(f"{name} has {len(text):,} characters: settings take at most {LONGEST_CHARACTERS:,}")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{position}: {error.problem or error.context}; correct the YAML there") from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        # The last three: a tag such as !!int before a text that is none.
        raise ConfigError(f"{name} cannot be read as YAML: {type(error).__name__}: {error}") from None
    if more_values_than(value, MOST_VALUES):
        raise ConfigError(f"{name} has more than {MOST_VALUES:,} values, or a reference to itself: write fewer anchors and aliases")
    return value


def more_values_than(value: Any, most: int) -> bool:
    """Whether plain data has more values than that, each counted as often as it is referred to."""
    left = [value]
    for _ in range(most):
        if not left:
            return False
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)
    return bool(left)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of settings: {section: {field: value}}. An empty file is an empty dict.

    Raises:
        ConfigError: The file is missing, not text, not YAML (the message gives line and column), or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file of settings") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give a YAML file of settings") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"{show(str(path))} is not a path: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}: write sections, such as `train:` with `steps: 100` indented below it"
        )
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {show(key)} is no section: the names of sections are text, such as `train:`")
    return values


def dump_yaml(values: dict[str, Any]) -> str:
    """Formats plain data as YAML, keys in their order.

    Raises:
        ConfigError: A value is not plain data, such as a function.
    """
    try:
        return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as error:
        raise ConfigError(
            f"the settings cannot be written as YAML: {error.args[1]!r} is not plain data; use text, numbers and lists"
        ) from None
