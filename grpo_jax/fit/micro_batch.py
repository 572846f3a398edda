"""Chooses the micro-batch: how many completions' gradients are computed at once, as (prompts, completions of each).

It is what the settings say, what suits a CPU's cache, or the most that fits into memory. The result of training does not depend on
it.
"""

from __future__ import annotations

from grpo_jax.config import Config
from grpo_jax.policy import Policy
from grpo_jax.runtime.mesh import mesh_micro_batch
from grpo_jax.runtime.sharding import Layout
from grpo_kernels.target import platform

CACHED_BYTES = 2**23
"""Largest array of hidden states that a CPU's cache serves well. Measured on two cores, four layers of width 256: updates whose
arrays had 13 MB took a tenth to a fifth longer than with 3 to 7 MB."""


def micro_batch_of(config: Config, policy: Policy) -> tuple[int, int]:
    """Returns the micro-batch of the settings; for `auto` the largest one, whether it fits or not."""
    prompts, generations = config.train.prompts_per_step, config.train.micro_batch_completions or config.rollout.num_generations
    given = config.train.micro_batch_prompts
    if isinstance(given, int):
        return mesh_micro_batch(policy.layout, given), generations
    if platform() != "cpu":
        return prompts, generations
    shards = 1 if policy.layout is None else policy.layout.rows
    widest = max(policy.spec.width, policy.spec.ffw) * policy.model.dtype.itemsize
    per_shard = prompts // shards
    bytes_of_prompt = tokens_of(config, (1, generations)) * widest
    sizes = [size for size in range(1, per_shard + 1) if per_shard % size == 0 and size * bytes_of_prompt <= CACHED_BYTES]
    return shards * max(sizes, default=1), generations


def tokens_of(config: Config, micro_batch: tuple[int, int]) -> int:
    """Returns the tokens of a micro-batch at the longest lengths."""
    return micro_batch[0] * (config.rollout.max_prompt_length + micro_batch[1] * config.rollout.max_completion_length)


def smaller_micro_batches(config: Config, micro_batch: tuple[int, int], layout: Layout | None) -> list[tuple[int, int]]:
    """Lists the smaller micro-batches that divide the batch, largest first: fewer prompts, then part of each prompt's group."""
    prompts, generations = config.train.prompts_per_step, config.rollout.num_generations
    shards = 1 if layout is None else layout.rows
    fewer_prompts = [(size, micro_batch[1]) for size in range(shards, micro_batch[0], shards) if prompts % size == 0]
    fewer_completions = [(min(shards, micro_batch[0]), size) for size in range(1, micro_batch[1]) if generations % size == 0]
    return sorted({*fewer_prompts, *fewer_completions}, key=lambda size: -tokens_of(config, size))


def micro_batches_to_try(
    config: Config, sizes: list[tuple[int, int]], tried: tuple[int, int], fixed_bytes: int, varying_bytes: int, limit_bytes: int
) -> list[tuple[int, int]]:
    """Picks the micro-batches worth compiling: the largest that fits if memory grows with the tokens, half of it, the smallest.

    Args:
        sizes: candidates, the largest first.
        tried: the micro-batch that `varying_bytes` were measured with.
        fixed_bytes: memory that does not depend on the micro-batch.
    """
    token_bytes = varying_bytes / tokens_of(config, tried)
    fitting = [size for size in sizes if fixed_bytes + token_bytes * tokens_of(config, size) <= limit_bytes]
    largest = fitting[:1]
    # Not all memory shrinks with the tokens, so the first guess may be too large.
    half = [size for size in fitting if 2 * tokens_of(config, size) <= tokens_of(config, largest[0])][:1]
    return list(dict.fromkeys([*largest, *half, *sizes[-1:]]))
