"""How many completions' gradients are computed at once: as set, as a processor's cache serves well, or the most that fit.

Enters: settings and a policy. Leaves: (prompts, completions of each). The result of training does not depend on it.
"""

from __future__ import annotations

from grpo_jax.config import Config
from grpo_jax.policy import Policy
from grpo_jax.runtime.sharding import Layout, spread_prompts
from grpo_kernels.target import platform

CACHED_BYTES = 2**23
"""Size up to which an array of hidden states stays near a processor: on two cores, with four layers of width 256, updates whose
arrays had 13 MB took a tenth to a fifth longer than with 3 to 7 MB."""


def micro_batch_of(config: Config, policy: Policy) -> tuple[int, int]:
    """Prompts, and completions of each, whose gradient is computed at once; of `auto` the most, which need not fit."""
    prompts, generations = config.train.prompts_per_step, config.train.micro_batch_completions or config.rollout.num_generations
    given = config.train.micro_batch_prompts
    if isinstance(given, int) or platform() != "cpu":
        return spread_prompts(policy.layout, given) if isinstance(given, int) else prompts, generations
    shards = 1 if policy.layout is None else policy.layout.rows
    widest = max(policy.spec.width, policy.spec.ffw) * policy.model.dtype.itemsize
    each = prompts // shards
    sizes = [
        size
        for size in range(1, each + 1)
        if each % size == 0 and size * tokens_of(config, (1, generations)) * widest <= CACHED_BYTES
    ]
    return shards * max(sizes, default=1), generations


def tokens_of(config: Config, micro_batch: tuple[int, int]) -> int:
    """Tokens of a micro-batch at the longest lengths."""
    return micro_batch[0] * (config.rollout.max_prompt_length + micro_batch[1] * config.rollout.max_completion_length)


def smaller_micro_batches(config: Config, micro_batch: tuple[int, int], layout: Layout | None) -> list[tuple[int, int]]:
    """Every smaller one that divides the batch, the largest first: fewer prompts, and then part of each one's group."""
    prompts, generations = config.train.prompts_per_step, config.rollout.num_generations
    shards = 1 if layout is None else layout.rows
    whole = [(size, micro_batch[1]) for size in range(shards, micro_batch[0], shards) if prompts % size == 0]
    parts = [(min(shards, micro_batch[0]), size) for size in range(1, micro_batch[1]) if generations % size == 0]
    return sorted({*whole, *parts}, key=lambda size: -tokens_of(config, size))


def micro_batch_that_fits(
    config: Config, sizes: list[tuple[int, int]], tried: tuple[int, int], fixed_bytes: int, varying_bytes: int, limit_bytes: int
) -> list[tuple[int, int]]:
    """Sizes worth a compilation, in order: the largest that fits if memory grows with the tokens, then the smallest.

    Args:
        sizes: candidates, the largest first.
        tried: the size that `varying_bytes` were measured with.
        fixed_bytes: what does not depend on the size.
    """
    a_token = varying_bytes / tokens_of(config, tried)
    fitting = [size for size in sizes if fixed_bytes + a_token * tokens_of(config, size) <= limit_bytes]
    guessed = fitting[:1]
    # Not all memory shrinks with the tokens, so the guess may be too large: half of it, and the smallest, come after it.
    half = [size for size in fitting if guessed and 2 * tokens_of(config, size) <= tokens_of(config, guessed[0])][:1]
    return list(dict.fromkeys([*guessed, *half, *sizes[-1:]]))
