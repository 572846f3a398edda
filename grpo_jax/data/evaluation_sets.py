"""Reads the further held-out rows of `eval.sets`."""

from __future__ import annotations

from dataclasses import replace

from grpo_jax.config import Config, ConfigError
from grpo_jax.data.source import PromptSource
from grpo_jax.data.table import DataError
from grpo_jax.data.tokenizer import Tokenizer


def evaluation_sets(config: Config, tokenizer: Tokenizer | None) -> dict[str, PromptSource]:
    """Reads, checks and tokenises the rows of every set.

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
    return found
