"""Reads the further held-out rows: those of `eval.sets`, and those that Python gives in a dict of several sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.evaluation import check_set_name
from grpo_jax.data.source import PromptSource
from grpo_jax.data.table import DataError
from grpo_jax.data.tokenizer import Tokenizer


def main_rows(eval_dataset: Any) -> tuple[Any, dict[str, Any]]:
    """Splits the held-out rows that Python gives into those of the main set, and further sets by name.

    Args:
        eval_dataset: rows; or a dict of rows by name, of which the first ones are the main set.

    Raises:
        ConfigError: There is no set in the dict, or a name cannot be used.
    """
    if not isinstance(eval_dataset, Mapping):
        return eval_dataset, {}
    if not eval_dataset:
        raise ConfigError("eval_dataset is {}: give rows, or a dict of several sets by name")
    for name in eval_dataset:
        check_set_name("eval_dataset", name)
    (_, first), *others = eval_dataset.items()
    return first, dict(others)


def evaluation_sets(config: Config, tokenizer: Tokenizer | None, given: Mapping[str, Any] | None = None) -> dict[str, PromptSource]:
    """Reads, checks and tokenises the rows of every set.

    Args:
        given: rows by name, of `main_rows`.

    Returns:
        By name, sources that have held-out rows only.

    Raises:
        ConfigError, DataError: A set or a row cannot be used; the message begins with the set's name.
    """
    found: dict[str, PromptSource] = {}
    for name, chosen in config.eval.sets.items():
        path = chosen.get("path", config.data.path)
        if path is None:
            raise ConfigError(f"eval.sets.{name}.path is null: rows from Python have no splits; give a path")
        data = replace(config.data, eval_path=path, eval_split=chosen.get("split"), eval_size=chosen.get("size"))
        try:
            found[name] = PromptSource.build(replace(config, data=data), tokenizer, only_held_out=True)
        except (ConfigError, DataError) as error:
            raise type(error)(f"eval.sets.{name}: {error}") from error
    for name, rows in (given or {}).items():
        if name in found:
            raise ConfigError(f"eval.sets.{name}: eval_dataset has a set of this name too: rename one")
        try:
            found[name] = PromptSource.build(config, tokenizer, None, rows, only_held_out=True)
        except (ConfigError, DataError) as error:
            raise type(error)(f"eval_dataset[{name!r}]: {error}") from error
    return found
