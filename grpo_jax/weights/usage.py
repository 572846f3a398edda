"""The commands that use what was written: transformers, PEFT, vLLM, llama.cpp and Ollama."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from grpo_jax.config import LoraConfig
from grpo_jax.data.tokenizer_files import TEMPLATE_FILE
from grpo_jax.weights.gguf.export import ADAPTER_FILE, model_file
from grpo_jax.weights.ollama import MODELFILE

Kind = Literal["adapter", "merged", "gguf", "gguf-lora"]
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank; the first is its default."""


def usage_lines(
    kind: Kind,
    folder: str,
    *,
    name: str,
    base: str = "",
    lora: LoraConfig | None = None,
    template: bool = False,
    gguf_type: str = "f16",
) -> list[str]:
    """The lines that serve and load an export.

    Args:
        folder: path or hub id of the export.
        name: of the model, in vLLM and Ollama.
        base: path or hub id of the base model.
        lora: of an adapter.
        template: whether an adapter's folder has a chat template that the base does not have.
        gguf_type: of a GGUF model.
    """
    quote = shlex.quote
    if kind == "merged":
        return [f"vllm serve {quote(folder)}", f"AutoModelForCausalLM.from_pretrained({folder!r})"]
    if kind == "gguf":
        return [
            f"ollama create {quote(name)} -f {quote(str(Path(folder) / MODELFILE))}",
            f"llama-cli -m {quote(str(Path(folder) / model_file(gguf_type)))}",
        ]
    if kind == "gguf-lora":
        return [f"llama-cli -m BASE.gguf --lora {quote(str(Path(folder) / ADAPTER_FILE))}"]
    largest = 0 if lora is None else max([lora.rank, *(lora.rank_pattern or {}).values()]) * (2 if lora.pissa else 1)
    rank = next((size for size in VLLM_RANKS if size >= largest), largest)
    options = f" --max-lora-rank {rank}" if rank > VLLM_RANKS[0] else ""
    options += f" --chat-template {quote(str(Path(folder) / TEMPLATE_FILE))}" if template else ""
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})"
    if lora is not None and lora.use_dora:
        return ["# vLLM has no DoRA: export it with --format merged", load]
    return [
        f"vllm serve {quote(base)} --enable-lora{options} --lora-modules {quote(f'{name}={folder}')}",
        load,
    ]
