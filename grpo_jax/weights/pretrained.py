"""Reads what a policy is made of: the model's weights and its adapters, on their devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import ConfigError, LoraConfig, MeshConfig
from grpo_jax.config.checks import require_choice
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.memory import least_limit_bytes
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.adapter_modules import check_experts
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.loading import load_params
from grpo_jax.weights.lora import init_lora, load_adapter
from grpo_jax.weights.lora_start import with_start
from grpo_jax.weights.mesh_choice import choose_mesh


@dataclass(frozen=True)
class Pretrained:
    """A model with its adapters.

    Attributes:
        folder: where the model was read from.
        spec: sizes and switches of the model.
        dtype: number format of the computation.
        params: the model's weights.
        adapters: the `lora` collection, or None.
        lora: how the adapters were made, or None.
        layout: sharding of weights and adapters; None is one device.
    """

    folder: Path
    spec: ModelSpec
    dtype: Any
    params: Params
    adapters: Params | None
    lora: LoraConfig | None
    layout: Layout | None


def read_pretrained(
    path: str | Path,
    *,
    lora: LoraConfig | None,
    adapter: str | Path | None,
    dtype: str,
    quantization: str,
    revision: str | None,
    seed: int,
    mesh: MeshConfig | None,
) -> Pretrained:
    """Reads a model from a folder or the hub; arguments and errors as of `Policy.from_pretrained`."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype: {dtype!r} is not supported; use 'auto', 'float32' or 'bfloat16'")
    require_choice("quantization", quantization, ("none", "int8", "int4", "nf4", "mxfp4"))
    if mesh is not None:
        make_layout(mesh)  # is wrong before anything is downloaded
    folder = find_model(str(path), revision)
    spec = read_folder_spec(folder)
    layout = None
    if mesh is not None:
        trains_adapters = adapter is not None or (lora is not None and lora.rank > 0)
        options: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "adapters": trains_adapters}
        layout = make_layout(choose_mesh(mesh, spec, limit_bytes=least_limit_bytes(), **options).mesh)
    check_mesh(layout, spec, quantization)
    chosen = jnp.dtype(spec.dtype if dtype == "auto" else dtype)
    adapters: Params | None = None
    if adapter is not None:
        adapters, read = load_adapter(adapter, spec)
        lora = read if lora is None else replace(read, dropout=lora.dropout, plus_ratio=lora.plus_ratio)
        check_experts(spec, lora)
    elif lora is not None and lora.rank > 0:
        adapters = init_lora(spec, lora, jax.random.key(seed))
    else:
        lora = None
    params = load_params(folder, spec, chosen, quantization=quantization, layout=layout)
    if adapter is None and lora is not None and adapters is not None:
        adapters = with_start(spec, lora, params, adapters, jax.device_get if layout is None else layout.get, seed)
    if layout is not None and adapters is not None:
        adapters = layout.put_tree(adapters, model_axes(spec))
    return Pretrained(folder, spec, chosen, params, adapters, lora, layout)
