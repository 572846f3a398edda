"""Rows in the shape of OpenAI's fine-tuning files: a column `messages` with a whole conversation, instead of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo_jax.config import DataConfig
from grpo_jax.data.table import DataError, Table

MESSAGES = "messages"


def with_prompts(table: Table, data: DataConfig) -> Table:
    """The table with a prompt and a completion instead of `messages`, where it has that column and no prompt column.

    The completion is the text of the last message where that is the assistant's, and None elsewhere; the messages before it are
    the prompt. A completion column that the table has stays as it is. Every other table is returned unchanged.
    """
    if data.prompt_column in table.columns or MESSAGES not in table.columns:
        return table
    others = [name for name in table.columns if name != MESSAGES]
    added = [data.prompt_column, *([] if data.completion_column in others else [data.completion_column])]
    return replace(table, rows=ConversationRows(table, data), columns=(*added, *others))


@dataclass(frozen=True)
class ConversationRows:
    """The rows of a table, each with its conversation divided in two.

    Example:
        {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]} becomes
        {"prompt": [{"role": "user", "content": "2+2="}], "completion": "4"}
    """

    table: Table
    data: DataConfig

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int, /) -> Mapping[str, Any]:
        row = self.table[number]
        messages = row.pop(MESSAGES)
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(f"{self.table.where(number)}: messages must be a list of {{role, content}}, not {messages!r:.80}")
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        completion = messages[-1].get("content") if answered else None
        return {self.data.completion_column: completion, **row, self.data.prompt_column: list(messages[: len(messages) - answered])}
