"""Batches of prompts and completions to imitate, for the supervised warm-up.

The order by seed and step, and the prompt's ids, are the same as for GRPO. A completion's ids end with a stop token, so that the
model learns to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError, DataConfig
from grpo_jax.config.checks import show
from grpo_jax.data.examples import Examples, read_splits
from grpo_jax.data.order import rows_of_step
from grpo_jax.data.prompts import (
    Encoded,
    check_column,
    check_settings,
    encode_prompt,
    encode_within_limit,
    read_message,
    read_prompt,
)
from grpo_jax.data.table import DataError, Table
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import TokenizerError
from grpo_jax.types import Prompt


@dataclass(frozen=True)
class CompletionBatch:
    """The B rows of one training step.

    Attributes:
        step: The training step.
        indices: [B] row numbers in the dataset.
        prompt_ids: B lists of token ids, template included.
        completion_ids: B lists of token ids, the stop token included.

    Example:
        CompletionBatch(step=0, indices=np.array([7]), prompt_ids=[[1, 15]], completion_ids=[[4, 2]])
    """

    step: int
    indices: np.ndarray
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]


@dataclass(frozen=True, eq=False)
class CompletionSource:
    """Batches of rows with completions, in the order of the seed; the attributes are those of `PromptSource`."""

    train: Examples
    held_out: Examples
    dropped: int
    shortened: int
    held_out_dropped: int
    data: DataConfig
    prompts_per_step: int
    seed: int

    def batch(self, step: int) -> CompletionBatch:
        """Returns the rows of a training step: B different rows, a pure function of seed and step."""
        positions = rows_of_step(step, self.prompts_per_step, len(self.train), self.seed, self.data.shuffle)
        return make_batch(self.train, positions, step)

    def held_out_batches(self, size: int, step: int = 0) -> Iterator[CompletionBatch]:
        """Iterates over the held-out rows in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self.held_out), size):
            yield make_batch(self.held_out, np.arange(start, min(start + size, len(self.held_out))), step)


def make_batch(examples: Examples, positions: np.ndarray, step: int) -> CompletionBatch:
    """Makes the batch of the rows at these positions."""
    prompts = [examples.prompt(int(position)) for position in positions]
    return CompletionBatch(
        step, examples.row_numbers[positions], prompts, [examples.completion(int(position)) for position in positions]
    )


def completion_pairs(
    config: Config, tokenizer: Tokenizer | None, dataset: Any = None, eval_dataset: Any = None
) -> CompletionSource:
    """Reads, checks and tokenises rows with a prompt and a completion.

    A completion is a text, or a list of one assistant message. Its ids end with the tokenizer's end-of-sequence token; where the
    chat template renders the prompt, they end with the template's end of the assistant's turn.

    Args:
        config: As for `PromptSource.build`; `rollout.max_completion_length` limits the completions too. `data.overlong` decides
            about longer ones, but a completion is never shortened: with `shorten` it raises an error.
        tokenizer: The model's tokenizer; None raises an error.
        dataset: Training rows (list of dicts, or `datasets.Dataset`) instead of `data.path`.
        eval_dataset: Held-out rows instead of `data.eval_split` and `data.eval_path`.

    Raises:
        ConfigError: A setting does not suit the data or the tokenizer.
        DataError: A row cannot be used; the message gives its number.
    """
    known = check_settings(config, tokenizer)
    if known.eos_id is None:
        raise ConfigError(
            f"model.path is {show(config.model.path)}: neither the model nor its tokenizer names an end-of-sequence token"
        )
    data, rollout = config.data, config.rollout

    def encode(table: Table, number: int) -> Encoded | None:
        where, row = table.where(number), table[number]
        prompt = read_prompt(row[data.prompt_column], data, where)
        completion = read_completion(row[data.completion_column], data, where)
        encoded = encode_within_limit(prompt, known, data, rollout.max_prompt_length, where)
        if encoded is None:
            return None
        ids = encode_completion(prompt, completion, known, data, where)
        if len(ids) > rollout.max_completion_length:
            if data.overlong == "drop":
                return None
            limit = f"rollout.max_completion_length ({rollout.max_completion_length})"
            fix = "raise it, or set data.overlong to drop (a completion is never shortened)"
            raise DataError(f"{where}: the completion has {len(ids)} tokens, more than {limit}; {fix}")
        return encoded._replace(completion_ids=ids)

    splits = read_splits(config, encode, check_table, dataset, eval_dataset)
    return CompletionSource(*splits, data, config.train.prompts_per_step, config.train.seed)


def check_table(table: Table, data: DataConfig) -> None:
    """Raises a ConfigError where the prompt or the completion column is missing."""
    check_column(table, data.prompt_column, "data.prompt_column")
    check_column(table, data.completion_column, "data.completion_column")


def read_completion(value: Any, data: DataConfig, where: str) -> str:
    """Reads the text to imitate.

    Raises:
        DataError: The value is neither a text nor a list of one assistant message, or it is empty.
    """
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        message = read_message(value[0], 0, f"{where}, {data.completion_column}")
        value = message["content"] if message["role"] == "assistant" else value
    if not isinstance(value, str):
        expected = 'a completion is a text or [{"role": "assistant", "content": ...}]'
        raise DataError(f"{where}: {expected}; column {data.completion_column} holds {show(value)}")
    if not value.strip():
        raise DataError(f"{where}: the completion is empty; remove the row")
    return value


def encode_completion(prompt: Prompt, completion: str, tokenizer: Tokenizer, data: DataConfig, where: str) -> list[int]:
    """Returns the token ids of a completion after its prompt, the stop token included.

    Prompt and completion are tokenised together if that leaves the prompt's own tokens unchanged: alone, the completion would get
    the mark that some tokenizers put at the start of a text.

    Raises:
        DataError: The chat template does not render the answer.
    """
    prompt_ids = encode_prompt(prompt, tokenizer, data, where)
    if isinstance(prompt, str) and not data.renders_texts:
        ids = continuation(
            tokenizer.encode_text(prompt), tokenizer.encode_text(prompt + completion), tokenizer.encode_text(completion)
        )
        return close(ids, tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [*messages, {"role": "assistant", "content": completion}]
    try:
        before = tokenizer.render(messages, generation=True, template_arguments=data.template_arguments)
        full = tokenizer.render(answered, generation=False, template_arguments=data.template_arguments)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from error
    if full.startswith(before):
        turn = full[len(before) :]
    else:  # the template opens a new turn in another way than it renders a past one, for instance with <think>
        start = full.rfind(completion.strip())
        if start < 0:
            raise DataError(f"{where}: the chat template does not render the answer as it stands")
        turn = completion + full[start + len(completion.strip()) :]
    ids = continuation(prompt_ids, tokenizer.encode_text(before + turn), tokenizer.encode_text(turn))
    stops = [position for position, token in enumerate(ids) if token in tokenizer.stop_ids]
    return ids[: stops[-1] + 1] if stops else close(ids, tokenizer)


def continuation(before: list[int], together: list[int], alone: list[int]) -> list[int]:
    """Returns what follows `before` in `together`, or `alone` where `together` does not begin with it."""
    return together[len(before) :] if together[: len(before)] == before else alone


def close(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Appends the end-of-sequence token, unless the ids end with it."""
    if tokenizer.eos_id is None or ids[-1:] == [tokenizer.eos_id]:
        return ids
    return [*ids, tokenizer.eos_id]
