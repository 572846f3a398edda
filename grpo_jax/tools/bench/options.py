"""The options of a benchmark, the settings of the training loop that follow from them, and the lengths of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config, ConfigError, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from grpo_jax.policy import Policy
from grpo_jax.tools.bench.lengths import StepLengths, heavy_tail, read_lengths
from grpo_jax.tools.step_cost import StepCost, StepShapes

WARMUP_STEPS = 2


@dataclass(frozen=True)
class BenchOptions:
    """The options of a benchmark.

    Args:
        model: Folder of a Hugging Face model; weights are random where it holds only a config.json.
        prompts: Prompts of a step.
        num_generations: Completions of each.
        prompt_length: Tokens of every prompt, or the most that a prompt may have where `prompt_lengths` is given.
        completion_length: Tokens of every completion, or the most that a completion may have where lengths differ.
        steps: Measured steps, after two warm-up steps.
        lora_rank: Rank of the adapters on all linear layers; 0 trains every weight.
        slots: Completions decoded at once; null takes all, or as many as fit into the memory.
        segment: Tokens decoded between two checks for completions that have ended; null chooses.
        refill: False lets a free slot wait for all others.
        capacity: Completion length that the KV cache has room for, where it is more than completion_length.
        kv_dtype: Number format of the KV cache, `auto`, `int8` or `int4`.
        dtype: Number format of the model, `auto`, `float32` or `bfloat16`.
        remat: As `model.remat`.
        micro_batch_prompts: As `train.micro_batch_prompts`.
        micro_batch_tokens: As `train.micro_batch_tokens`.
        ragged: Draws lengths from a seeded heavy tail, with a mean of a quarter of the longest.
        lengths: File with lengths of completions, see `read_lengths`. Steps take them in order and begin again at the end; the
            first measured step takes the first ones.
        prompt_lengths: The same for prompts.
    """

    model: str
    prompts: int = 4
    num_generations: int = 8
    prompt_length: int = 64
    completion_length: int = 128
    steps: int = 6
    lora_rank: int = 16
    slots: int | None = None
    segment: int | None = None
    refill: bool = True
    capacity: int | None = None
    kv_dtype: Literal["auto", "int8", "int4"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["auto", "none", "selective", "layer", "offload"] = "auto"
    micro_batch_prompts: int | None = None
    micro_batch_tokens: int | None = None
    ragged: bool = False
    lengths: str | None = None
    prompt_lengths: str | None = None

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.num_generations

    def config(self) -> Config:
        """Returns the settings of the training loop.

        Raises:
            ConfigError: options that do not go together.
        """
        longest = self.capacity or self.completion_length
        if longest < self.completion_length:
            raise ConfigError(f"capacity: {longest}; use at least completion_length ({self.completion_length})")
        if self.ragged and self.lengths is not None:
            raise ConfigError(f"lengths: {self.lengths}; leave out ragged, which draws lengths, or lengths, which reads them")
        return Config(
            model=ModelConfig(path=self.model, dtype=self.dtype, remat=self.remat),
            lora=LoraConfig(rank=self.lora_rank),
            rollout=RolloutConfig(
                num_generations=self.num_generations,
                max_prompt_length=self.prompt_length,
                max_completion_length=longest,
                slots=self.slots,
                segment=self.segment,
                refill=self.refill,
                kv_dtype=self.kv_dtype,
            ),
            objective=ObjectiveConfig(beta=0.04),
            train=TrainConfig(
                steps=WARMUP_STEPS + self.steps,
                prompts_per_step=self.prompts,
                micro_batch_prompts=self.micro_batch_prompts,
                micro_batch_tokens=self.micro_batch_tokens,
                save_every=0,
                show_every=0,
                quiet=True,
            ),
        )

    @cached_property
    def of_completions(self) -> StepLengths:
        """Lengths of the completions.

        Raises:
            ConfigError: the file cannot be used.
        """
        if self.lengths is not None:
            tokens = read_lengths(self.lengths, "lengths", self.completion_length, "completion_length", records=True)
        elif self.ragged:
            tokens = heavy_tail(self.rows, self.completion_length)
        else:
            tokens = np.array([self.completion_length])
        return StepLengths(tokens, self.rows, WARMUP_STEPS)

    @cached_property
    def of_prompts(self) -> StepLengths:
        """Lengths of the prompts; raises as `of_completions`."""
        if self.prompt_lengths is None:
            return StepLengths(np.array([self.prompt_length]), self.prompts, WARMUP_STEPS)
        tokens = read_lengths(self.prompt_lengths, "prompt_lengths", self.prompt_length, "prompt_length")
        return StepLengths(tokens, self.prompts, WARMUP_STEPS)

    def limits(self, step: int) -> np.ndarray | None:
        """Returns the length at which each completion of a step ends; None where that is `max_completion_length` for all."""
        given = self.ragged or self.capacity is not None or self.lengths is not None
        return self.of_completions.of_step(step) if given else None

    def cost(self, policy: Policy, step: int) -> StepCost:
        """Counts the operations and bytes of a step."""
        shapes = StepShapes(self.prompts, self.num_generations, self.prompt_length, self.slots, self.lora_rank, self.kv_dtype)
        completions, prompts = self.of_completions.of_step(step), self.of_prompts.of_step(step)
        return StepCost.of(policy.spec, shapes, completions, jnp.dtype(policy.dtype).itemsize, prompt_lengths=prompts)
