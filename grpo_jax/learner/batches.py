"""Lists of token ids to the padded arrays of an update, on the devices.

Widths are rounded up to a few sizes, so that a run compiles a handful of times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array

from grpo_jax.config import Config
from grpo_jax.data.completions import CompletionBatch
from grpo_jax.rewards import ScoredBatch
from grpo_jax.rollout.shapes import pad_rows, round_up
from grpo_jax.runtime.sharding import BATCH_AXES, Layout
from grpo_jax.types import PromptBatch, Rollout, TrainBatch


def train_batch(
    prompts: PromptBatch, rollout: Rollout, scored: ScoredBatch, config: Config, layout: Layout | None = None
) -> TrainBatch:
    """The batch of a GRPO step."""
    b = len(prompts.prompt_ids)
    lengths = np.array([len(ids) for ids in rollout.completion_ids])
    width = min(round_up(int(lengths.max())), config.rollout.max_completion_length)
    mask = np.arange(width)[None, :] < lengths[:, None]
    logps = np.zeros(mask.shape, np.float32)
    logps[mask] = np.concatenate(rollout.logprobs)
    if config.objective.mask_truncated:
        mask &= np.array([reason == "stop" for reason in rollout.finish_reasons])[:, None]
    batch = TrainBatch(
        prompt_ids=pad_rows(prompts.prompt_ids, round_up(max(len(ids) for ids in prompts.prompt_ids))),
        prompt_lengths=np.array([len(ids) for ids in prompts.prompt_ids], np.int32),
        completion_ids=pad_rows(rollout.completion_ids, width),
        completion_lengths=lengths.astype(np.int32),
        completion_mask=mask,
        sampler_logprobs=logps,
        rewards=scored.rewards.reshape(b, -1),
        valid=scored.valid.reshape(b, -1),
    )
    return on_devices(batch, layout)


def text_batches(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], rows: int, layout: Layout | None
) -> Iterator[tuple[tuple[Array, Array, Array], Array]]:
    """Batches of prompts with one completion each: padded prompts, their lengths, padded completions; and the tokens' mask.

    The last batch repeats its last row, without any token in its mask, so that all have one shape.
    """
    p, c = (round_up(max(map(len, ids))) for ids in (prompt_ids, completion_ids))
    for start in range(0, len(prompt_ids), rows):
        prompts, own = (list(ids[start : start + rows]) for ids in (prompt_ids, completion_ids))
        missing = rows - len(prompts)
        lengths = np.array([len(ids) for ids in own] + [0] * missing)
        prompts, own = prompts + [prompts[-1]] * missing, own + [own[-1]] * missing
        sizes = np.array([len(ids) for ids in prompts], np.int32)
        arrays = pad_rows(prompts, p), sizes, pad_rows(own, c), np.arange(c)[None, :] < lengths[:, None]
        put = jax.device_put if layout is None else functools.partial(layout.put, axes=("rows",))
        padded, prompt_lengths, completions, mask = map(put, arrays)
        yield (padded, prompt_lengths, completions), mask


def supervised_batch(batch: CompletionBatch, config: Config, layout: Layout | None = None) -> TrainBatch:
    """The batch of a step of the supervised warm-up."""
    lengths = np.array([len(ids) for ids in batch.completion_ids])
    width = min(round_up(int(lengths.max())), config.rollout.max_completion_length)
    rows = len(lengths)
    padded = TrainBatch(
        prompt_ids=pad_rows(batch.prompt_ids, round_up(max(len(ids) for ids in batch.prompt_ids))),
        prompt_lengths=np.array([len(ids) for ids in batch.prompt_ids], np.int32),
        completion_ids=pad_rows(batch.completion_ids, width),
        completion_lengths=lengths.astype(np.int32),
        completion_mask=np.arange(width)[None, :] < lengths[:, None],
        sampler_logprobs=np.zeros((rows, width), np.float32),
        rewards=np.zeros((rows, 1), np.float32),
        valid=np.ones((rows, 1), bool),
    )
    return on_devices(padded, layout)


def on_devices(batch: TrainBatch, layout: Layout | None) -> TrainBatch:
    """Moves a batch from the host to its devices."""
    return jax.device_put(batch) if layout is None else layout.put_tree(batch, BATCH_AXES)
