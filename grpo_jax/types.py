"""What flows from one part to the next.

The axis legend, used in every signature: B prompts, G completions per prompt, N = B·G rows (row b·G + g is completion g
of prompt b), P prompt length, C completion length, D width, H query heads, K key/value heads, F feed-forward,
V vocabulary, L layers.

Host side, plain Python and NumPy: `PromptBatch`, `Rollout`. Device side, pytrees of arrays: `TrainBatch`, `Frozen`, `TrainState`.
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
"""An array on the device, or still on the host."""

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step.

    Attributes:
        step: the training step that they belong to.
        indices: [B] row numbers in the dataset; they enter the random numbers of the completions.
        prompts: B prompts as rewards get them.
        prompt_ids: B lists of token ids, template included.
        columns: every other column of the dataset, B values each.

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
    """Sampled completions, N rows in order.

    Attributes:
        completion_ids: token ids, the stop token included where there is one.
        logprobs: float32 nats per token, of the distribution that the token was drawn from.
        finish_reasons: "stop" (a stop token or a stop string ended the row) or "length".
        near_ties: tokens of which another might have been drawn with other shapes (`sampling.NEAR_LOGITS`).
        slots: completions that were decoded at once.

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
    """What an update needs of a batch of completions, on the device.

    Attributes:
        prompt_ids: padded on the right with 0.
        prompt_lengths: number of tokens of each prompt, at least 1.
        completion_ids: padded on the right with 0.
        completion_mask: True = the token is trained (and counted in denominators).
        sampler_logprobs: what the sampler returned, 0 where there is no token.
        rewards: weighted sum over the reward functions; any number where not valid.
        valid: True = the row could be scored and enters its group's statistics.
    """

    prompt_ids: Int[AnyArray, "B P"]
    prompt_lengths: Int[AnyArray, "B"]
    completion_ids: Int[AnyArray, "N C"]
    completion_mask: Bool[AnyArray, "N C"]
    sampler_logprobs: Float[AnyArray, "N C"]
    rewards: Float[AnyArray, "B G"]
    valid: Bool[AnyArray, "B G"]

    def of_prompts(self, order: Int[AnyArray, "B"]) -> TrainBatch:
        """The same batch with its prompts in another order."""

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
        )


@struct.dataclass
class Frozen:
    """Arrays that an update reads and never changes.

    Attributes:
        base: the model's weights; empty in full fine-tuning, where they are trained.
        reference: what turns the base into the reference policy: the adapter that training started from, empty for
            the plain base; in full fine-tuning a copy of the weights, None where there is no KL term.
    """

    base: Params
    reference: Params | None


@struct.dataclass
class TrainState:
    """What an update changes; donated to it.

    Attributes:
        step: updates made so far.
        trainable: the adapters, or in full fine-tuning the weights; float32.
        opt_state: Optax's state of them.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
