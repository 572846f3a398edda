"""Reads one row's prompt, renders the chat template, tokenises, and shortens what is too long.

A plain prompt becomes a conversation where `data.system_prompt` is set. With `data.chat_template` alone it is rendered as a
conversation, but reward functions still get the plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.config import Config, ConfigError, DataConfig
from grpo_jax.config.checks import nearest, require, show
from grpo_jax.data.table import DataError, Table
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import TokenizerError
from grpo_jax.types import Prompt

RESERVED_ARGUMENTS = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)
"""Arguments of `apply_chat_template` that `data.template_arguments` may not set."""

NEARBY_CUTS = 4
"""Number of shorter cuts that are tried next to the found one: cutting one token more may lengthen the rest by a token or two."""


class Encoded(NamedTuple):
    """The token ids of a row.

    Attributes:
        prompt_ids: The prompt, template included.
        completion_ids: The completion to imitate, stop token included; empty where there is none.
        shortened: Whether the prompt was cut.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    shortened: bool


def check_settings(config: Config, tokenizer: Tokenizer | None) -> Tokenizer:
    """Checks that there is a tokenizer that suits the settings of `data`, and returns it.

    Raises:
        ConfigError: There is no tokenizer, it lacks a chat template that is asked for, or a template argument is reserved.
    """
    data = config.data
    if tokenizer is None:
        raise ConfigError(
            f"model.path is {show(config.model.path)}: the model has no tokenizer, and prompts need one: add tokenizer.json"
        )
    require(
        data.system_prompt is None or data.chat_template is not False,
        "data.chat_template",
        data.chat_template,
        "data.system_prompt needs the chat template; set this to true or null, or system_prompt to null",
    )
    if not tokenizer.has_chat_template:
        fix = "the model's tokenizer has no chat template; use an instruct model, or "
        require(data.system_prompt is None, "data.system_prompt", data.system_prompt, fix + "set this to null")
        require(not data.chat_template, "data.chat_template", data.chat_template, fix + "set this to false")
        require(not data.template_arguments, "data.template_arguments", data.template_arguments, fix + "leave this out")
    taken = sorted(RESERVED_ARGUMENTS & set(data.template_arguments))
    require(
        not taken,
        "data.template_arguments",
        data.template_arguments,
        f"{', '.join(taken)} cannot be set; name variables of the template",
    )
    return tokenizer


def check_column(table: Table, column: str, field: str) -> None:
    """Raises a ConfigError where a column is missing; it lists the columns and suggests the nearest one."""
    if column not in table.columns:
        guess = nearest(column, table.columns)
        hint = f"did you mean {guess}? " if guess else ""
        raise ConfigError(
            f"{field} is {show(column)}: {table.origin} has no such column; {hint}columns: {', '.join(table.columns)}"
        )


def read_prompt(value: Any, data: DataConfig, where: str) -> Prompt:
    """Reads a prompt as reward functions get it, the system message included.

    Args:
        value: Value of the prompt column.
        data: The settings of the section `data`.
        where: Name of the row in messages.

    Raises:
        DataError: The value is not a prompt or is empty, or a message lacks its role or content.
    """
    if value is None:
        raise DataError(f"{where}: there is no prompt; column {data.prompt_column} is null or left out")
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt is empty; remove the row")
        return value if data.system_prompt is None else with_system([{"role": "user", "content": value}], data.system_prompt)
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: a prompt is a text or a list of messages, not {show(value)}")
    messages = [read_message(message, position, where) for position, message in enumerate(value)]
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the prompt is empty: " + ("its last message has no text" if messages else "it has no message"))
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the conversation ends with the assistant's message; put the answer in another column")
    if data.chat_template is False:
        raise DataError(f"{where}: the prompt is a conversation, but data.chat_template is false; set it to null")
    if data.system_prompt is None:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise DataError(
            f"{where}: the conversation has a system message of its own; set data.system_prompt to null, or remove the message"
        )
    return with_system(messages, data.system_prompt)


def with_system(messages: list[dict[str, Any]], system_prompt: str) -> list[dict[str, Any]]:
    """Adds a system message at the start of a conversation."""
    return [{"role": "system", "content": system_prompt}, *messages]


def read_message(message: Any, position: int, where: str) -> dict[str, Any]:
    """Copies a message, or raises a DataError where it lacks a role or a text."""
    if not isinstance(message, Mapping):
        raise DataError(f'{where}, message {position}: expected {{"role": ..., "content": ...}}, not {show(message)}')
    for key in ("role", "content"):
        value = message.get(key)
        if value is None:
            raise DataError(f"{where}, message {position}: there is no {key}; it has {', '.join(map(str, message)) or 'nothing'}")
        if not isinstance(value, str):
            raise DataError(f"{where}, message {position}: {key} must be a text, not {show(value)}")
    return dict(message)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, data: DataConfig, where: str) -> list[int]:
    """Returns the token ids of a prompt.

    Raises:
        DataError: The chat template is missing or refuses the conversation, or the prompt has no tokens.
    """
    if not isinstance(prompt, str) and not tokenizer.has_chat_template:
        fix = "use an instruct model, or plain texts as prompts"
        raise DataError(f"{where}: the prompt is a conversation, but the model's tokenizer has no chat template; {fix}")
    try:
        ids = tokenizer.encode_prompt(prompt, chat=data.renders_texts, template_arguments=data.template_arguments)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from error
    if not ids:
        raise DataError(f"{where}: the prompt has no tokens")
    return ids


def encode_within_limit(prompt: Prompt, tokenizer: Tokenizer, data: DataConfig, limit_tokens: int, where: str) -> Encoded | None:
    """Returns at most `limit_tokens` token ids of a prompt; `data.overlong` says whether a longer one is dropped (None) or cut.

    Raises:
        DataError: As `encode_prompt`; or the prompt is longer and `data.overlong` is `error`, or it cannot be shortened enough.
    """
    ids = encode_prompt(prompt, tokenizer, data, where)
    if len(ids) <= limit_tokens:
        return Encoded(ids, [], False)
    if data.overlong == "drop":
        return None
    if data.overlong == "error":
        fix = "raise it, or set data.overlong to drop or shorten"
        raise DataError(f"{where}: the prompt has {len(ids)} tokens, more than rollout.max_prompt_length ({limit_tokens}); {fix}")
    if isinstance(prompt, str) and not data.renders_texts:
        return Encoded(shorten_text(prompt, tokenizer, limit_tokens, where), [], True)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Encoded(shorten_conversation(messages, tokenizer, data, limit_tokens, where), [], True)


def shorten_text(text: str, tokenizer: Tokenizer, limit_tokens: int, where: str) -> list[int]:
    """Cuts the start of a plain text, not the special tokens around it, and returns `limit_tokens` token ids.

    Raises:
        DataError: The special tokens alone do not fit.
    """
    room = limit_tokens - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    if room < 0:
        raise DataError(f"{where}: the special tokens alone are more than rollout.max_prompt_length ({limit_tokens}); raise it")
    ids = tokenizer.encode_text(text)
    return [*tokenizer.prefix_ids, *ids[len(ids) - room :], *tokenizer.suffix_ids]


def shorten_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, data: DataConfig, limit_tokens: int, where: str
) -> list[int]:
    """Cuts as few tokens as possible from the start of the last user message, and returns the conversation's token ids.

    The template is rendered again around the rest, so that its own tokens do not change.

    Raises:
        DataError: The conversation does not fit even with that message empty, or there is no user message.
    """
    users = [position for position, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise DataError(f"{where}: the conversation is too long and has no user message to shorten; set data.overlong to drop")
    text = messages[users[-1]]["content"]
    cuts = [*tokenizer.token_starts(text), len(text)]

    def encode(cut: int) -> list[int]:
        shorter = [dict(message) for message in messages]
        shorter[users[-1]]["content"] = text[cuts[cut] :]
        return encode_prompt(shorter, tokenizer, data, where)

    low, high = 0, len(cuts) - 1
    if (shortest := len(encode(high))) > limit_tokens:
        rest = f"the rest of the conversation alone has {shortest} tokens"
        raise DataError(
            f"{where}: {rest}, more than rollout.max_prompt_length ({limit_tokens}); raise it, or set data.overlong to drop"
        )
    while low < high:
        middle = (low + high) // 2
        if len(encode(middle)) <= limit_tokens:
            high = middle
        else:
            low = middle + 1
    return next(ids for cut in range(max(0, high - NEARBY_CUTS), high + 1) if len(ids := encode(cut)) <= limit_tokens)
