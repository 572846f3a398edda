"""What llama.cpp calls a model's family, its settings and its tensors, and how values differ from Hugging Face's.

llama.cpp computes from a few numbers in the file's metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what it
cannot compute is refused here. Its rotary embedding turns neighbouring elements in the architecture `llama` and halves of a head in
the others, as Hugging Face does in all; so rows of q and k are interleaved for `llama`. Gemma's norms multiply by 1 + scale in
Hugging Face and by scale in llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.models.spec import ModelError, ModelSpec, Rope
from grpo_jax.weights.hf import read_json

MISSING_GGUF = "GGUF files are written with the package gguf: pip install 'grpo-jax[gguf]'"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a family.

    Attributes:
        name: of the architecture, a value of gguf's `MODEL_ARCH`.
        context_length: the family's default of `max_position_embeddings`.
        interleaved: rows of q and k are interleaved in each head.
        biases: linear layers that may have a bias.
        pattern: every so many layers one sees all positions and the others a window; 0 is an architecture without windows.
        scaled_by_width: numbers of layers of models whose attention scale llama.cpp takes from width / heads.
    """

    name: str
    context_length: int
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    pattern: int = 0
    scaled_by_width: tuple[int, ...] = ()


QKV = ("q_proj", "k_proj", "v_proj")
ARCHITECTURES = {
    "llama": Architecture("llama", 2048, interleaved=True, biases=(*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")),
    "mistral": Architecture("llama", 131072, interleaved=True),
    "qwen2": Architecture("qwen2", 32768, biases=QKV),
    "qwen3": Architecture("qwen3", 32768),
    "gemma2": Architecture("gemma2", 8192, pattern=2, scaled_by_width=(46,)),
    "gemma3_text": Architecture("gemma3", 131072, pattern=6, scaled_by_width=(62,)),
}
"""Family → how llama.cpp runs it."""


def import_gguf() -> Any:
    """Imports the package gguf; ModelError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(MISSING_GGUF) from error
    return gguf


def architecture_of(spec: ModelSpec) -> Architecture:
    """The architecture of a model.

    Raises:
        ModelError: llama.cpp has none that computes what this model does, or this package does not write it.
    """
    if spec.family not in ARCHITECTURES:
        raise ModelError(f"GGUF: {spec.family} is not supported; supported: {', '.join(ARCHITECTURES)}. Use --format merged")
    found = ARCHITECTURES[spec.family]
    own = [name for name in spec.linear_shapes() if spec.has_bias(name)]
    refuse_if(any(name not in found.biases for name in own), found, f"biases of {', '.join(own)}")
    refuse_if(found.name == "gemma2" and None in (spec.attention_softcap, spec.final_softcap), found, "no soft caps")
    refuse_if(found.name == "gemma3" and spec.attention_softcap is not None, found, "a soft cap of attention scores")
    kinds = {rope.kind for rope in spec.ropes}
    refuse_if("llama3" in kinds and found.name != "llama", found, "rope_type llama3")
    if found.name == "gemma3":
        refuse_if(spec.ropes[1].kind != "default", found, f"rope_type {spec.ropes[1].kind} in local layers")
    else:
        refuse_if(len(spec.ropes) > 1, found, "two rotary embeddings")
    if found.pattern:
        windows = {window for window in spec.windows if window is not None}
        local = [window is not None for window in spec.windows]
        wrong = len(windows) > 1 or local != [(i + 1) % found.pattern != 0 for i in range(spec.layers)]
        refuse_if(wrong, found, f"windows {list(spec.windows)}, and not one layer of {found.pattern} without")
    return found


def refuse_if(wrong: bool, architecture: Architecture, what: str) -> None:
    """Raises ModelError where a model has what llama.cpp's architecture has not."""
    if wrong:
        raise ModelError(f"GGUF: the model has {what}, which llama.cpp's {architecture.name} cannot compute: use --format merged")


def add_settings(writer: Any, spec: ModelSpec, architecture: Architecture, folder: Path) -> list[str]:
    """Adds the model's sizes and switches to a file's metadata.

    Args:
        writer: gguf's `GGUFWriter`.
        folder: the model's, for what only config.json says.

    Returns:
        Notes for the user on what is different in llama.cpp.
    """
    notes: list[str] = []
    length = read_json(folder / "config.json").get("max_position_embeddings") or architecture.context_length
    windows = [window for window in spec.windows if window is not None]
    if not architecture.pattern and windows and min(windows) < length:
        length = min(windows)
        notes.append(
            f"the file's context length is {length} tokens, the model's sliding window: llama.cpp's {architecture.name} has none"
        )
    writer.add_context_length(length)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffw)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab)
    writer.add_rope_dimension_count(spec.head_dim)
    add_ropes(writer, spec)
    if architecture.pattern:
        writer.add_sliding_window(windows[0])
    if spec.attention_softcap is not None:
        writer.add_attn_logit_softcapping(spec.attention_softcap)
    if spec.final_softcap is not None:
        writer.add_final_logit_softcapping(spec.final_softcap)
    return notes


def add_ropes(writer: Any, spec: ModelSpec) -> None:
    """Adds the rotary embedding of a model, of its global layers where local ones have another."""
    rope = spec.ropes[0]
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if len(spec.ropes) > 1:
        writer.add_rope_freq_base_swa(spec.ropes[1].theta)


def rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """[head_dim / 2] float32 divisors of the unscaled frequencies, for `llama3`; None for other kinds, which metadata describe."""
    rope = spec.ropes[0]
    if rope.kind != "llama3":
        return None
    unscaled = Rope(rope.theta).frequencies(spec.head_dim)
    return np.divide(unscaled, rope.frequencies(spec.head_dim)).astype(np.float32)


def converted(spec: ModelSpec, architecture: Architecture, part: str, values: np.ndarray) -> np.ndarray:
    """One tensor's values as llama.cpp has them.

    Args:
        part: of the parameter's path, such as `q_proj` or `attn_norm`.
        values: [out, in], or [out] for a bias or a norm.
    """
    values = (values + np.float32(spec.norm_offset)) if part.endswith("_norm") else values
    if architecture.interleaved and part in ("q_proj", "k_proj"):
        values = interleaved(values, spec.head_dim)
    if part == ("q_norm" if spec.qk_norm else "q_proj"):
        values = values * np.float32(query_factor(spec, architecture))
    return values


def interleaved(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of each head from two halves to pairs: 0, half, 1, half + 1, ..."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def query_factor(spec: ModelSpec, architecture: Architecture) -> float:
    """What q is multiplied by, so that llama.cpp's scale of q·k gives the model's; 1 for every model that was published."""
    by_width = spec.layers in architecture.scaled_by_width
    scale = (spec.width / spec.heads if by_width else spec.head_dim) ** -0.5
    return 1.0 if math.isclose(spec.query_scale, scale, rel_tol=1e-6) else spec.query_scale / scale
