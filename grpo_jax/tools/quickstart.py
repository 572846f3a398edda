"""The quickstart: creates a small random model and an addition task, warms the model up, then improves it with GRPO alone.

Nothing is downloaded. The run folder gets the task's data, a random Llama-shaped model with its tokenizer, the warmed-up model and
the GRPO run; the settings are the recipes `quickstart_sft.yaml` and `quickstart.yaml`.

The task is addition of two numbers below 100, one token per character. The warm-up trains on the answers of a pupil who forgets to
carry two times out of three, so the warmed-up model is mostly wrong where there is something to carry. GRPO is never shown a right
answer: it only learns whether a sampled one is right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError, load
from grpo_jax.run.result import TrainResult
from grpo_jax.steps.builtin.small_model import SMALL_MODEL, save_random_model, write_rows
from grpo_jax.training import sft, train

SYMBOLS = ("<pad>", "<s>", "</s>", *"0123456789+=")
HELD_OUT, PLAIN_SHARE, FORGETS = 512, 0.5, 2 / 3
"""Number of held-out problems; share of the problems without a carry that are used; how often the pupil forgets to carry."""

MODEL: dict[str, Any] = {**SMALL_MODEL, "vocab_size": len(SYMBOLS)}
"""The model's config.json."""


def quickstart(run_dir: str | Path = "runs/quickstart", configs: str | Path = "configs") -> TrainResult:
    """Makes the model and the task, warms up, trains, and shows the result.

    Args:
        run_dir: the folder that everything is written to; if it exists, a number is appended to its name.
        configs: folder with the two recipes.

    Raises:
        ConfigError: a recipe is missing.
    """
    recipes = [Path(configs) / name for name in ("quickstart_sft.yaml", "quickstart.yaml")]
    for recipe in recipes:
        if not recipe.is_file():
            raise ConfigError(f"configs: {recipe} is missing; run this in a checkout of the repository")
    folder = free_folder(Path(run_dir))
    make_task(folder / "task")
    make_model(folder / "model")
    print(
        f"made a random model and {HELD_OUT} held-out additions in {folder}; now the warm-up on a pupil who forgets to carry",
        flush=True,
    )
    settings = [load(recipe, overrides(folder, step)) for recipe, step in zip(recipes, ("warmup", "grpo"), strict=True)]
    warm = sft(settings[0].config, sources=settings[0].sources)
    warm.policy.save_merged(folder / "warm")
    print("now GRPO alone, rewarded where its own answers are right", flush=True)
    return train(settings[1].config, sources=settings[1].sources)


def overrides(folder: Path, run: str) -> dict[str, str]:
    """Returns the settings that are paths inside the folder, for the run `warmup` or `grpo`."""
    rows, model = ("warmup", "model") if run == "warmup" else ("train", "warm")
    return {
        "model.path": str(folder / model),
        "data.path": str(folder / "task" / f"{rows}.jsonl"),
        "data.eval_path": str(folder / "task" / ("held_out_rows.jsonl" if run == "warmup" else "held_out.jsonl")),
        "train.run_dir": str(folder / run),
    }


def free_folder(folder: Path) -> Path:
    """Returns the folder, or the first of folder-2, folder-3, ... that does not exist."""
    number, chosen = 1, folder
    while chosen.exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen


def make_task(folder: Path, seed: int = 0) -> None:
    """Writes the task's rows: demonstrations for the warm-up, problems for GRPO, and held-out problems that neither trains on."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(100) for b in range(100) if carries(a, b) or rng.random() < PLAIN_SHARE]
    order = rng.permutation(len(pairs))
    held_out = [pairs[i] for i in order[:HELD_OUT]]
    seen = [pairs[i] for i in order[HELD_OUT:]]
    folder.mkdir(parents=True)
    shown = [{"prompt": question(a, b), "completion": pupil(a, b, rng)} for a, b in seen for _ in range(2)]
    write_rows(folder / "warmup.jsonl", shown)
    write_rows(folder / "train.jsonl", [{"prompt": question(a, b), "answer": str(a + b)} for a, b in seen])
    write_rows(folder / "held_out.jsonl", [{"prompt": question(a, b), "answer": str(a + b)} for a, b in held_out])
    write_rows(folder / "held_out_rows.jsonl", [{"prompt": question(a, b), "completion": str(a + b)} for a, b in held_out])


def question(a: int, b: int) -> str:
    """Formats a problem: 47 and 8 → "47+08="."""
    return f"{a:02d}+{b:02d}="


def carries(a: int, b: int) -> bool:
    """Whether the units carry into the tens."""
    return a % 10 + b % 10 >= 10


def pupil(a: int, b: int, rng: np.random.Generator) -> str:
    """Returns the sum as the pupil writes it, who often forgets to carry from the units."""
    forgotten = carries(a, b) and rng.random() < FORGETS
    return str(a + b - 10 * forgotten)


def make_model(folder: Path, seed: int = 0) -> None:
    """Writes a Hugging Face model folder: random weights, config, and a tokenizer with one token per character."""
    save_random_model(folder, MODEL, seed)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per character that puts `<s>` in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.add_special_tokens(list(SYMBOLS[:3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
