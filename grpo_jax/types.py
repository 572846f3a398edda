"""Data types that several packages share: batches of prompts, sampled completions, and the state of training.

The axis legend, used in every signature: B prompts, G completions per prompt, N = B·G rows (row b·G + g is completion g
of prompt b), P prompt length, C completion length, D width, H query heads, K key/value heads, F feed-forward,
V vocabulary, L layers. On a mesh a row shard is one of the `data` × `fsdp` parts that prompts, with all their completions, are
split into.

`PromptBatch` and `Rollout` hold Python and NumPy values on the host. `TrainBatch`, `Frozen` and `TrainState` are pytrees of arrays.
Prompts and completions are padded on the right; a completion's first token has position = its prompt's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

Params: TypeAlias = dict[str, Any]
"""A nested dict of arrays."""

Prompt: TypeAlias = str | list[dict[str, Any]]
"""A plain text, or a conversation of {"role", "content"} messages."""

AnyArray: TypeAlias = Array | np.ndarray
"""An array on the device or on the host."""

FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a completion ended: a stop token or stop string, or the maximal length."""


@dataclass(frozen=True)
class PromptBatch:
    """The B prompts of one training step.

    Attributes:
        step: The training step.
        indices: [B] row numbers in the dataset. The random numbers of the completions depend on them.
        prompts: B prompts as reward functions get them.
        prompt_ids: B lists of token ids, chat template included.
        columns: Every other column of the dataset, B values each.

    Example:
        PromptBatch(step=0, indices=np.array([7]), prompts=["2+2="], prompt_ids=[[1, 15]], columns={"answer": ["4"]})
    """

    step: int
    indices: np.ndarray
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]


@dataclass(frozen=True)
class Rollout:
    """N sampled completions, in the order of the rows.

    Attributes:
        completion_ids: N lists of token ids, the stop token included where there is one.
        logprobs: N float32 arrays of nats per token, under the distribution that the token was drawn from.
        finish_reasons: N times "stop" (a stop token or a stop string ended the row) or "length".
        near_ties: Number of tokens that other array shapes might have drawn differently (`sampling.NEAR_LOGITS`).
        slots: Number of completions that were decoded at once.

    Example:
        Rollout(completion_ids=[[4, 2]], logprobs=[np.array([-0.1, -0.7], np.float32)], finish_reasons=["stop"])
    """

    completion_ids: list[list[int]]
    logprobs: list[np.ndarray]
    finish_reasons: list[FinishReason]
    near_ties: int = 0
    slots: int = 0


@struct.dataclass
class TrainBatch:
    """The input of an update: padded prompts and completions with their rewards, on the device.

    Attributes:
        prompt_ids: [B, P] token ids, padded on the right with 0.
        prompt_lengths: [B] number of tokens of each prompt, at least 1.
        completion_ids: [N, C] token ids, padded on the right with 0.
        completion_mask: [N, C], True = the token is trained (and counted in denominators).
        sampler_logprobs: [N, C] log-probabilities in nats that the sampler returned, 0 where there is no token.
        rewards: [B, G] weighted sums over the reward functions; any value where not valid.
        valid: [B, G], True = the row was scored and enters its group's statistics.
        completion_lengths: [N], sampled tokens of each completion, also those that are not trained; None = all are trained.
    """

    prompt_ids: Int[AnyArray, "B P"]
    prompt_lengths: Int[AnyArray, "B"]
    completion_ids: Int[AnyArray, "N C"]
    completion_mask: Bool[AnyArray, "N C"]
    sampler_logprobs: Float[AnyArray, "N C"]
    rewards: Float[AnyArray, "B G"]
    valid: Bool[AnyArray, "B G"]
    completion_lengths: Int[AnyArray, "N"] | None = None

    def reorder_prompts(self, order: Int[AnyArray, "B"]) -> TrainBatch:
        """Returns the batch with its prompts, and their groups of rows, reordered by `order`."""

        def rows(x: Any) -> Any:
            return x.reshape(*self.rewards.shape, *x.shape[1:])[order].reshape(x.shape)

        return TrainBatch(
            prompt_ids=self.prompt_ids[order],
            prompt_lengths=self.prompt_lengths[order],
            completion_ids=rows(self.completion_ids),
            completion_mask=rows(self.completion_mask),
            sampler_logprobs=rows(self.sampler_logprobs),
            rewards=self.rewards[order],
            valid=self.valid[order],
            completion_lengths=None if self.completion_lengths is None else rows(self.completion_lengths),
        )


@struct.dataclass
class Frozen:
    """Arrays that an update reads and never changes.

    Attributes:
        base: The model's weights; empty in full fine-tuning, where the weights are trained.
        reference: What makes the reference policy out of the base. With LoRA: the adapter that training started from, or an empty
            dict for the plain base. In full fine-tuning: a copy of the weights. None where there is no KL term.
    """

    base: Params
    reference: Params | None


@struct.dataclass
class TrainState:
    """Arrays that an update changes; they are donated to it.

    Attributes:
        step: [] number of updates made so far.
        trainable: The adapters, or in full fine-tuning the weights; float32.
        opt_state: Optax's state for `trainable`.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
