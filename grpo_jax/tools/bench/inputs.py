"""What a benchmark's steps are given: random prompts, made-up rewards, and a policy that never stops by itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.tools.bench.lengths import StepLengths
from grpo_jax.types import PromptBatch
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantize_params


@dataclass(frozen=True)
class RandomPrompts:
    """A source of random prompts of given lengths."""

    spec: ModelSpec
    lengths: StepLengths

    def batch(self, step: int) -> PromptBatch:
        """Returns the prompts of a step."""
        lengths = self.lengths.of_step(step)
        count = len(lengths)
        ids = np.random.default_rng([0, step]).integers(0, self.spec.vocab, (count, lengths.max()))
        indices = np.arange(step * count, (step + 1) * count)
        own = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        return PromptBatch(step, indices, [f"prompt {index}" for index in indices], own, {})

    @property
    def prompt_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the prompts to train on, and of held-out ones, of which there are none."""
        return self.lengths.tokens, np.zeros(0, np.int64)


def made_up_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns rewards that differ within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def bench_policy(config: Config) -> tuple[Policy, bool]:
    """Builds the policy without stop tokens; also returns whether its weights are random."""
    assert config.model.path is not None
    folder = find_model(config.model.path, config.model.revision, weights=False)
    if any(folder.glob("*.safetensors")):
        policy = Policy.from_pretrained(folder, lora=config.lora, dtype=config.model.dtype, quantization=config.model.quantization)
        return replace(policy, stop_ids=()), False
    spec = read_folder_spec(folder)
    dtype = jnp.dtype(spec.dtype if config.model.dtype == "auto" else config.model.dtype)
    lora = config.lora if config.lora.rank else None
    adapters = None if lora is None else init_lora(spec, lora, jax.random.key(1))
    params = jax.jit(functools.partial(init_params, spec, dtype=dtype))(jax.random.key(0))
    if config.model.quantization != "none":
        params = jax.jit(functools.partial(quantize_params, spec, quantization=config.model.quantization), donate_argnums=0)(params)
    return Policy(spec, dtype, params, adapters, lora, None, (), folder, str(folder)), True
