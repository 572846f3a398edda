"""Weights of the tiny models: NumPy arrays that follow from a tensor's name and shape, so that none need be stored.

Enters: a Hugging Face tensor name and a shape. Leaves: float32 numbers, random but the same everywhere. Norm weights and
biases are random too, and attention is far from uniform, so that a feature left out of a forward pass shows.
"""

from __future__ import annotations

import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...], *, norm_center: float = 1.0) -> np.ndarray:
    """The tensor of that name.

    Args:
        name: its name in the safetensors file, of a model or of a PEFT adapter.
        shape: its shape, a linear layer's (out, in).
        norm_center: what norm weights scatter around: 1, or 0 where the model adds 1 itself (Gemma).
    """
    numbers = np.random.default_rng([zlib.crc32(name.encode()), *shape]).standard_normal(shape)
    if "norm" in name:
        numbers = norm_center + 0.4 * numbers
    elif name.endswith(".bias"):
        numbers = 0.5 * numbers
    elif "embed_tokens" in name:
        numbers = 0.35 * numbers
    elif "lora_B" in name:
        numbers = 0.1 * numbers
    elif "lora_A" in name:
        numbers = numbers / np.sqrt(shape[-1])
    else:
        numbers = 1.5 * numbers / np.sqrt(shape[-1])
    return numbers.astype(np.float32)
