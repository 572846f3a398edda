"""Weights of the tiny models: pseudo-random NumPy arrays computed from a tensor's name and shape, so that none are stored.

Norm weights and biases are random too, and attention is far from uniform, so that a feature missing in a forward pass changes the
result.
"""

from __future__ import annotations

import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...], *, norm_center: float = 1.0) -> np.ndarray:
    """The float32 tensor of a name and shape.

    Args:
        name: its name in a model's or PEFT adapter's safetensors file.
        shape: of the tensor; a linear layer's is (out, in).
        norm_center: mean of norms' weights and layers' factors: 1, or 0 where the model adds 1 (Gemma 2 and 3, Qwen3.5).
    """
    values = np.random.default_rng([zlib.crc32(name.encode()), *shape]).standard_normal(shape)
    if "norm" in name or name.endswith(("layer_scalar", "per_expert_scale")):
        values = norm_center + 0.4 * values
    elif name.endswith("router.scale"):  # the model divides it by the root of its width
        values = 5 + values
    elif name.endswith(".bias"):
        values = 0.5 * values
    elif name.endswith("A_log"):  # states that last for some tokens
        values = values - 2
    elif "embed_tokens" in name:
        values = 0.35 * values
    elif "lora_magnitude_vector" in name:
        values = 1.5 + 0.3 * values
    elif "lora_B" in name:
        values = 0.1 * values
    elif "lora_A" in name:
        values = values / np.sqrt(shape[-1])
    else:
        values = 1.5 * values / np.sqrt(shape[-1])
    return values.astype(np.float32)
