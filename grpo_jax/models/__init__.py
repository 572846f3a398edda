"""Models: a spec read from config.json, a Flax Linen decoder used as a pure function, weights and adapters in and out."""

from grpo_jax.models.hf import find_model, read_folder_spec
from grpo_jax.models.loading import load_params
from grpo_jax.models.lora import init_lora, load_adapter, save_adapter
from grpo_jax.models.spec import ModelError, ModelSpec, init_params, param_specs
from grpo_jax.models.transformer import Transformer, head_matrix

__all__ = [
    "ModelError",
    "ModelSpec",
    "Transformer",
    "find_model",
    "head_matrix",
    "init_lora",
    "init_params",
    "load_adapter",
    "load_params",
    "param_specs",
    "read_folder_spec",
    "save_adapter",
]
