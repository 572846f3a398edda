"""The files of a tokenizer in a model's folder: which they are, what `Tokenizer` reads from them, and how they are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import require, show
from grpo_jax.runtime.files import replacing
from grpo_jax.runtime.untrusted_json import JsonError, located, read_json_file

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "tiktoken.model")
"""A folder has a tokenizer if it has one of these files."""

TEMPLATE_FILE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MOST_TEMPLATE_BYTES = 1_000_000

OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)
"""Other files that belong to a tokenizer."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or a conversation that its chat template cannot render."""


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer, if there are any, from one existing folder to another."""
    if source.resolve() == target.resolve():
        return
    for name in (*VOCABULARY_FILES, *OTHER_FILES):
        (target / name).unlink(missing_ok=True)  # of another tokenizer, written before
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)


def write_template(folder: Path, template: str) -> None:
    """Makes a text the only chat template of a tokenizer's folder; "" leaves it without one."""
    for name in (TEMPLATE_FILE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    config = folder / "tokenizer_config.json"
    values = read_object(config) if config.is_file() else {}
    if values.pop("chat_template", None) is not None:
        with replacing(config) as unfinished:
            unfinished.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template:
        with replacing(folder / TEMPLATE_FILE) as unfinished:
            unfinished.write_text(template, encoding="utf-8")


def read_template_file(path: str) -> str:
    """Reads the file that `data.chat_template_file` names.

    Raises:
        ConfigError: It is missing, empty, no UTF-8, or too long for a template.
    """
    field, file = "data.chat_template_file", Path(path).expanduser()
    require(file.is_file(), field, path, "there is no such file; give a Jinja template")
    size = file.stat().st_size
    require(size <= MOST_TEMPLATE_BYTES, field, path, f"it has {size} bytes, and a template has at most {MOST_TEMPLATE_BYTES}")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field} is {show(path)}: it is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{field} is {show(path)}: it cannot be read ({error.strerror})") from error
    require(bool(text.strip()), field, path, "it is empty; give a Jinja template")
    return text


def read_model_stop_ids(folder: Path) -> tuple[int, ...]:
    """Reads the end-of-sequence ids of `generation_config.json`, else of `config.json` (or its `text_config`), sorted; may be none.

    Raises:
        TokenizerError: A file is not JSON, or its `eos_token_id` is neither a number nor a list of numbers.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        values = read_object(path)
        found = values.get("eos_token_id")
        if found is None and isinstance(values.get("text_config"), dict):
            found = values["text_config"].get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            raise TokenizerError(f"{path}: eos_token_id is {show(found)}: use a token id from 0 on, or a list of them")
        if ids:
            return tuple(sorted(set(ids)))
    return ()


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file's object; TokenizerError where it is broken."""
    try:
        values = read_json_file(path)
    except JsonError as error:
        raise TokenizerError(f"{path} cannot be read: {located(error)}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return values


def read_vocabulary(folder: Path) -> int | None:
    """Reads the number of the model's token ids from `config.json`; None where it does not say."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = read_object(path)
    text = values.get("text_config")
    size = values.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None
