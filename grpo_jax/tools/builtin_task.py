"""Tasks that a recipe makes by itself: `model.path: builtin:calculator` is a model that is made and warmed up where it is missing.

Nothing is downloaded. The run folder gets a folder `inputs` with the task's rows, a random Llama-shaped model with its tokenizer
and chat template, and the model after a supervised warm-up.

The task `calculator`: additions of numbers of three digits that carry. The warm-up shows two pupils: one calls the calculator and
copies its result; the other, seen more often, writes ~ and adds digit by digit without carrying, which is wrong here. GRPO is never
shown which of them is right.
"""

from __future__ import annotations

import json
import shutil
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError, load
from grpo_jax.config.checks import require
from grpo_jax.tools.quickstart import MODEL, save_random_model, write_rows
from grpo_jax.trainer import sft

PREFIX = "builtin:"
NAMES = ("calculator",)
UNFINISHED = ("task", "model", "warmup", "warm.unfinished")
"""Folders of a warm-up that did not end; they are made anew."""

RECIPE = "tools_quickstart_sft.yaml"
"""The settings of the warm-up, next to the recipe."""

TRAIN, HELD_OUT = 6000, 512
"""Numbers of problems."""

CALLS = 0.3
"""Share of the warm-up's rows in which the calculator is called."""

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
JSON = ('{"name": "', '", "arguments": {"expression": "', '"}}')
WORDS = ("<tool_call>", "</tool_call>", *JSON, "calculator", "assistant", "user", "tool")
"""Texts that are one token; all others are read character by character."""

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
SYMBOLS = (*SPECIAL, *WORDS, "\n", *(c for c in string.printable if c.isprintable()))

CALCULATOR_MODEL: dict[str, Any] = {**MODEL, "vocab_size": len(SYMBOLS), "max_position_embeddings": 128, "bos_token_id": None}
"""The model's config.json."""

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. It does not list the tools: the warm-up has shown the only one."""


def with_builtin_task(config: Config, configs: Path | None) -> Config:
    """The settings with the paths of a task that is made here; other settings are returned as they are.

    Args:
        config: of the run.
        configs: folder of the recipe, with that of the warm-up next to it; None = there is none.

    Raises:
        ConfigError: there is no such task, or the recipe of the warm-up is missing.
    """
    model, data = config.model.path or "", config.data.path or ""
    if not model.startswith(PREFIX) and not data.startswith(PREFIX):
        return config
    fix = f"choose from {', '.join(PREFIX + name for name in NAMES)}, for model.path and data.path alike"
    require(model == data, "data.path", data, fix)
    require(model.removeprefix(PREFIX) in NAMES, "model.path", model, fix)
    recipe = None if configs is None else configs / RECIPE
    if recipe is None or not recipe.is_file():
        raise ConfigError(f"model.path is {model}: {RECIPE} with the settings of its warm-up must be next to the recipe")
    inputs = Path(config.train.run_dir) / "inputs"
    task, warm = inputs / "task", inputs / "warm"
    if not warm.is_dir():
        for unfinished in UNFINISHED:
            shutil.rmtree(inputs / unfinished, ignore_errors=True)
        make_rows(task, config.train.seed)
        make_model(inputs / "model", config.train.seed)
        print(f"made a random model and {HELD_OUT} held-out additions in {inputs}; now the warm-up", flush=True)
        warm_up(inputs, recipe, config.train.seed)
    path = {"path": str(task / "train.jsonl"), "eval_path": str(task / "held_out.jsonl")}
    return replace(config, model=replace(config.model, path=str(warm)), data=replace(config.data, **path))


def warm_up(inputs: Path, recipe: Path, seed: int) -> None:
    """Trains the random model on the pupils' answers; the folder of the result appears when it is complete."""
    settings = load(
        recipe,
        {
            "model.path": str(inputs / "model"),
            "data.path": str(inputs / "task" / "warmup.jsonl"),
            "train.run_dir": str(inputs / "warmup"),
            "train.seed": seed,
        },
    )
    result = sft(settings.config, sources=settings.sources)
    unfinished = inputs / "warm.unfinished"
    result.policy.save_merged(unfinished)
    unfinished.rename(inputs / "warm")
    print("now GRPO alone, rewarded where its own answers are right", flush=True)


def make_rows(folder: Path, seed: int) -> None:
    """Writes the rows: problems to train on, held-out ones, and the pupils' answers for the warm-up."""
    rng = np.random.default_rng(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < TRAIN + HELD_OUT:
        a, b = (int(x) for x in rng.integers(100, 1_000, 2))
        if without_carry(a, b) != a + b:
            pairs[a, b] = None
    problems = list(pairs)
    folder.mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "answer": str(a + b)} for a, b in problems]
    write_rows(folder / "held_out.jsonl", rows[:HELD_OUT])
    write_rows(folder / "train.jsonl", rows[HELD_OUT:])
    write_rows(folder / "warmup.jsonl", [row for a, b in problems[HELD_OUT:] for row in shown(a, b, rng)])


def shown(a: int, b: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What the warm-up shows of a problem: the first turn of either pupil, and how the result of a call is copied."""
    question = {"role": "user", "content": f"{a}+{b}=?"}
    call = {"role": "assistant", "content": CALL % f"{a}+{b}"}
    first = call["content"] if rng.random() < CALLS else f"~{without_carry(a, b)}"
    copied = [question, call, {"role": "tool", "content": str(a + b)}]
    return [{"prompt": [question], "completion": first}, {"prompt": copied, "completion": str(a + b)}]


def without_carry(a: int, b: int) -> int:
    """Adds digit by digit and forgets to carry: 58 + 67 → 15 (8 + 7 = 15 → 5, 5 + 6 = 11 → 1)."""
    total, place = 0, 1
    while a or b:
        total += (a % 10 + b % 10) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total


def make_model(folder: Path, seed: int) -> None:
    """Writes a random model with its tokenizer."""
    save_random_model(folder, CALCULATOR_MODEL, seed)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per character, and some for words of tool calls."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    escaped = "|".join("".join(c if c.isalnum() else "\\" + c for c in word) for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{escaped}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
