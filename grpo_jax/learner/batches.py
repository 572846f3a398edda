"""Lists of token ids to the arrays of an update, on the devices: packed rows, and tables as wide as the longest completion.

All batches of a run have one shape, so that an update is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import Config
from grpo_jax.learner.packing import pack
from grpo_jax.learner.rows import Recorded, RowSize, tables_of
from grpo_jax.learner.turn_credit import outcome_rewards, token_table
from grpo_jax.models.routing import expert_dtype
from grpo_jax.models.spec import ModelSpec
from grpo_jax.rewards import ScoredBatch
from grpo_jax.rewards.normalization import normalized_sum
from grpo_jax.runtime.sharding import BATCH_AXES, Layout
from grpo_jax.types import PromptBatch, Rollout, TrainBatch


def train_batch(
    prompts: PromptBatch,
    rollout: Rollout,
    scored: ScoredBatch,
    config: Config,
    sizes: Sequence[RowSize],
    layout: Layout | None = None,
    *,
    skips: bool = False,
) -> TrainBatch:
    """The batch of a GRPO step, on the host.

    Args:
        sizes: of the packed rows.
        skips: groups without an advantage are not computed (`step.py`); they are packed apart.
    """
    b, width = len(prompts.prompt_ids), config.rollout.max_completion_length
    lengths = np.array([len(ids) for ids in rollout.completion_ids])
    mask: np.ndarray = np.arange(width)[None, :] < lengths[:, None]
    logps = np.zeros(mask.shape, np.float32)
    logps[mask] = np.concatenate(rollout.logprobs)
    if rollout.sampled is not None:
        mask[mask] = np.concatenate(rollout.sampled)
    sampled_tokens = mask.sum(axis=1, dtype=np.int32)
    if config.objective.mask_truncated:
        mask &= np.array([reason == "stop" for reason in rollout.finish_reasons])[:, None]
    rewards, valid = reward_table(scored, config, b)
    by_turn = turn_table(rollout, scored, config)
    alike = ~differing(rewards, valid, by_turn)
    trained: np.ndarray = sampled_tokens > 0 if config.objective.kl_in_reward else np.asarray(mask.any(axis=1))
    shards = 1 if layout is None else layout.rows
    options: dict[str, Any] = {"last": alike if skips else None, "shards": shards, "sampled": rollout.sampled}
    if rollout.experts is not None:
        first, replays = rollout.experts[0], config.rollout.router_replay == "replay"
        options["recorded"] = Recorded(rollout.experts, first.shape[1:], first.dtype, replays)
    return TrainBatch(
        micro_batches=pack(prompts.prompt_ids, rollout.completion_ids, trained, sizes, width=width, **options),
        completion_lengths=sampled_tokens,
        completion_mask=mask,
        sampler_logprobs=logps,
        rewards=rewards,
        valid=valid,
        turn_advantages=by_turn,
    )


def reward_table(scored: ScoredBatch, config: Config, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rewards that completions are compared by, [B, G], and which are valid.

    With advantages by turn they are the rewards of the whole episode, without the environment's.
    """
    total, group = scored.rewards, len(scored.valid) // prompts
    if config.objective.credit == "turn":
        total = outcome_rewards(scored, config.rewards.weights)
    if config.objective.normalize_each_reward:
        total = normalized_sum(scored.per_function, config.rewards.weights, scored.valid, group, config.objective.advantage_eps)
    return total.reshape(prompts, group), scored.valid.reshape(prompts, group)


def turn_table(rollout: Rollout, scored: ScoredBatch, config: Config) -> np.ndarray | None:
    """Returns what is added to the advantage at each token, [N, C], with advantages by turn; None without."""
    if config.objective.credit == "episode":
        return None
    sampled = rollout.sampled or [np.ones(len(ids), bool) for ids in rollout.completion_ids]
    return token_table(scored, sampled, config.rollout.max_completion_length, config)


def learnable(rollout: Rollout, scored: ScoredBatch, config: Config, prompts: int) -> np.ndarray:
    """Returns [B] bool, True = the group has an advantage: its rewards differ, or those of a turn."""
    return differing(*reward_table(scored, config, prompts), turn_table(rollout, scored, config))


def differing(rewards: np.ndarray, valid: np.ndarray, by_turn: np.ndarray | None = None) -> np.ndarray:
    """Returns [B] bool, True = at least two of a group's rewards differ, or those of a turn.

    Args:
        rewards, valid: [B, G].
        by_turn: see `turn_table`.
    """
    found = np.where(valid, rewards, -np.inf).max(axis=1) > np.where(valid, rewards, np.inf).min(axis=1)
    return found if by_turn is None else found | by_turn.any(axis=1).reshape(len(rewards), -1).any(axis=1)


def padding_share(batches: Sequence[TrainBatch]) -> float:
    """Padding in the rows that a step's updates compute, as a share of their tokens; of batches on the host.

    Micro-batches that turn out to have no group with an advantage are counted, though they are skipped.
    """
    real = computed = 0
    for part in (part for batch in batches for part in batch.micro_batches):
        seen = np.asarray(part.rows.ranges.own_end) > 0
        real += int(seen.sum())
        computed += int(seen.any(axis=(1, 2)).sum()) * seen[0].size
    return 1 - real / max(computed, 1)


def text_batch(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    sizes: Sequence[RowSize],
    width: int,
    layout: Layout | None = None,
    sampled: Sequence[np.ndarray] | None = None,
) -> TrainBatch:
    """A batch of prompts with one completion each, without rewards.

    Rows are added until their number divides by the row shards; they have no token.

    Args:
        sizes: of the packed rows.
        width: C, columns of the tables.
        sampled: bool arrays, True = the model sampled the token; None = all.
    """
    shards = 1 if layout is None else layout.rows
    missing = -len(prompt_ids) % shards
    prompts = [*prompt_ids, *[prompt_ids[0]] * missing]
    completions = [*completion_ids, *[[]] * missing]
    lengths = np.array([len(ids) for ids in completions], np.int32)
    mask: np.ndarray = np.arange(width)[None, :] < lengths[:, None]
    if sampled is not None:
        sampled = [*sampled, *[np.zeros(0, bool)] * missing]
        mask[mask] = np.concatenate(sampled)
    trained = np.asarray(mask.any(axis=1))
    batch = TrainBatch(
        micro_batches=pack(prompts, completions, trained, sizes, width=width, shards=shards, sampled=sampled),
        completion_lengths=mask.sum(axis=1, dtype=np.int32),
        completion_mask=mask,
        sampler_logprobs=np.zeros(mask.shape, np.float32),
        rewards=np.zeros((len(prompts), 1), np.float32),
        valid=np.ones((len(prompts), 1), bool),
    )
    return on_devices(batch, layout)


def batch_shapes(
    sizes: Sequence[RowSize],
    prompts: int,
    generations: int,
    width: int,
    shards: int = 1,
    *,
    recorded: tuple[ModelSpec, bool] | None = None,
) -> TrainBatch:
    """The shapes of a batch, as `jax.ShapeDtypeStruct` without shardings.

    Args:
        prompts, generations: B and G.
        width: C.
        shards: R.
        recorded: the model whose experts are recorded, and whether they are replayed; None where they are not recorded.
    """
    n = prompts * generations
    experts = None
    if recorded is not None:
        spec, replays = recorded
        experts = Recorded([], (spec.expert_layers, spec.experts_per_token), expert_dtype(spec), replays)
    batch: Any = TrainBatch(
        micro_batches=tuple(tables_of([], size, [], [[]] * n, None, width, shards, experts) for size in sizes),
        completion_lengths=np.zeros(n, np.int32),
        completion_mask=np.zeros((n, width), bool),
        sampler_logprobs=np.zeros((n, width), np.float32),
        rewards=np.zeros((prompts, generations), np.float32),
        valid=np.zeros((prompts, generations), bool),
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def on_devices(batch: TrainBatch, layout: Layout | None) -> TrainBatch:
    """Moves a batch from the host to its devices."""
    return jax.device_put(batch) if layout is None else layout.put_tree(batch, BATCH_AXES)
