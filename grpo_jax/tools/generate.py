"""The command `grpo-jax generate`.

Talks to a model, through its chat template where it has one, and prints the text as it comes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_jax.config import ConfigError, DataConfig, RolloutConfig
from grpo_jax.policy import Policy
from grpo_jax.rollout.completions import Completion
from grpo_jax.run.saved import load_run
from grpo_jax.runtime.safe_text import safe_text
from grpo_jax.types import Prompt

STREAMED_TOKENS = 8
"""Tokens that are decoded before new text is printed. Tokens do not depend on it."""


@dataclass(frozen=True)
class GenerateOptions:
    """What is generated.

    Args:
        prompts: Texts of the user.
        rollout: Settings of sampling.
        model: Model folder or hub id; None takes the run.
        run: Run folder. Its newest checkpoint is used, and its prompts' form: plain texts, or conversations with its system prompt.
        adapter: PEFT adapter of the model, a folder or a hub id.
        dtype: As `model.dtype`.
        system: System message; None takes that of the run, if there is one.
        raw: Give the model the plain text, without its chat template.
        seed: The same seed draws the same completions.
    """

    prompts: Sequence[str]
    rollout: RolloutConfig
    model: str | None = None
    run: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    system: str | None = None
    raw: bool = False
    seed: int = 0


def generate(options: GenerateOptions, write: Callable[[str], None] | None = None) -> None:
    """Generates completions of each prompt and prints them.

    Args:
        options: What is generated.
        write: Prints text; None prints to the standard output.

    Raises:
        ConfigError: a system message without a chat template, or settings that cannot be used.
        ModelError: the model cannot be read.
    """
    data = DataConfig()
    if options.run is not None:
        config, policy = load_run(options.run)
        data = config.data
        unsaid = (data.chat_template, data.system_prompt, data.chat_template_file) == (None, None, None)
        if unsaid and had_plain_prompts(Path(options.run)):
            data = replace(data, chat_template=False)
    else:
        assert options.model is not None
        policy = Policy.from_pretrained(options.model, adapter=options.adapter, dtype=options.dtype)
    prompts = [as_prompt(text, options, data, policy) for text in options.prompts]
    rollout = options.rollout
    printer = Printer(options.prompts, rollout.num_generations, write or to_stdout)
    groups = policy.generate(
        prompts,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=rollout.stop,
        seed=options.seed,
        segment=STREAMED_TOKENS,
        template_arguments=data.template_arguments,
        on_text=printer.show,
    )
    printer.finish(groups)


def as_prompt(text: str, options: GenerateOptions, data: DataConfig, policy: Policy) -> Prompt:
    """A user's text as the model expects it: a conversation where there is a chat template, unless `--raw`.

    With `data.chat_template: false` and without `--system` it stays plain text.
    """
    system = options.system if options.system is not None else data.system_prompt
    templated = policy.need_tokenizer().has_chat_template
    if options.raw or not templated or (data.chat_template is False and options.system is None):
        if options.system is not None:
            why = "--raw leaves the template out" if options.raw else "the model has no chat template"
            raise ConfigError(f"--system: {options.system!r} needs a chat template, and {why}; leave --system out")
        return text
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": text}]


def had_plain_prompts(run_dir: Path) -> bool:
    """Whether a run was trained on plain texts, by its first recorded prompt; False where nothing is recorded."""
    file = run_dir / "completions.jsonl"
    if not file.is_file():
        return False
    with file.open(encoding="utf-8") as lines:
        first = lines.readline()
    return bool(first.strip()) and isinstance(json.loads(first)["prompt"], str)


class Printer:
    """Prints completions in order: that of the first unfinished row as it comes, later ones when it is their turn."""

    def __init__(self, prompts: Sequence[str], generations: int, write: Callable[[str], None]) -> None:
        self.prompts, self.generations, self.write = prompts, generations, write
        self.row, self.shown = -1, 0

    def show(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Prints what is new of the rows' texts so far."""
        self.row = max(self.row, 0)
        while self.row < len(texts):
            self.add(texts[self.row], last=ended[self.row])
            if not ended[self.row]:
                break
            self.row, self.shown = self.row + 1, 0

    def add(self, text: str, *, last: bool) -> None:
        """Prints the part of the current row's text that was not printed yet; an incomplete character waits for its other bytes."""
        if self.shown == 0 and (text or last):
            prompt, number = divmod(self.row, self.generations)
            if number == 0:
                self.write(f"prompt: {safe_text(self.prompts[prompt])}\n")
            self.write(f"--- {number + 1} of {self.generations}\n")
        text = text if last else text.rstrip("\N{REPLACEMENT CHARACTER}")
        self.write(safe_text(text[self.shown :]) + ("\n" if last else ""))
        self.shown = max(self.shown, len(text))

    def finish(self, groups: Sequence[Sequence[Completion]]) -> None:
        """Prints the number of tokens and the reason of each completion's end."""
        rows = [row for group in groups for row in group]
        self.show([row.text for row in rows], [True] * len(rows))
        ends = ", ".join(f"{len(row.ids)} tokens ({row.finish_reason})" for row in rows)
        self.write(f"--- {ends}\n")


def to_stdout(text: str) -> None:
    """Prints text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
