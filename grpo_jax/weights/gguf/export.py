"""Writes folders with a GGUF file, its digest and an Ollama Modelfile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import LoraConfig
from grpo_jax.config.checks import require_choice
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.digests import DIGESTS, write_digests
from grpo_jax.runtime.files import explains_write_errors, replacing
from grpo_jax.types import Params
from grpo_jax.weights.export import ReadTensor, refuse_other_weights
from grpo_jax.weights.gguf.architecture import architecture_of, import_gguf
from grpo_jax.weights.gguf.files import GGUF_TYPES, write_adapter, write_model
from grpo_jax.weights.ollama import MODELFILE, modelfile

ADAPTER_FILE = "adapter.gguf"


def model_file(gguf_type: str) -> str:
    """Name of a model's file."""
    return f"model-{gguf_type}.gguf"


@explains_write_errors
def save_gguf(
    out: Path,
    spec: ModelSpec,
    read: ReadTensor,
    original: Path,
    tokenizer: Tokenizer | None,
    gguf_type: str = "f16",
    *,
    name: str = "model",
    temperature: float | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> list[str]:
    """Writes a model's GGUF file and its Modelfile.

    Args:
        out: created where it does not exist. It may have files of other GGUF types, but no other weights.
        read: gives each tensor; see `merged_weights`.
        original: the folder that the model was read from.
        name, temperature, template_arguments: for the Modelfile, and for what llama.cpp shows.
        writes: False only calls `read`, as in `save_merged`.

    Returns:
        Notes for the user on what is different in llama.cpp and Ollama.

    Raises:
        ModelError: gguf is not installed, llama.cpp cannot compute the model or its tokenizer, or out has other weights.
        ConfigError: there is no such type.
    """
    require_choice("gguf_type", gguf_type, GGUF_TYPES)
    import_gguf()
    architecture_of(spec)
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        refuse_other_weights(out, {DIGESTS})
        (out / DIGESTS).unlink(missing_ok=True)  # of a file that is about to be replaced
    notes = write_model(out / model_file(gguf_type), spec, read, original, tokenizer, gguf_type, name, writes)
    if writes:
        text, more = modelfile(model_file(gguf_type), tokenizer, temperature, template_arguments)
        with replacing(out / MODELFILE) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        write_gguf_digests(out)
        notes += more
    return notes


@explains_write_errors
def save_gguf_adapter(out: Path, spec: ModelSpec, adapters: Params, lora: LoraConfig, name: str = "adapter") -> None:
    """Writes adapters as a GGUF LoRA; arguments and errors as of `write_adapter` and `save_gguf`."""
    import_gguf()
    architecture_of(spec)
    out.mkdir(parents=True, exist_ok=True)
    refuse_other_weights(out, {DIGESTS})
    (out / DIGESTS).unlink(missing_ok=True)
    write_adapter(out / ADAPTER_FILE, spec, adapters, lora, name)
    write_gguf_digests(out)


def write_gguf_digests(out: Path) -> None:
    """Writes the digests of all GGUF files of a folder, and of the Modelfile."""
    write_digests(out, sorted(file.name for file in [*out.glob("*.gguf"), *out.glob(MODELFILE)]))
