"""Data types that several packages share: batches of prompts, sampled completions, and the state of training.

The axis legend, used in every signature: B prompts, G completions per prompt, N = B·G rows (row b·G + g is completion g
of prompt b), P prompt length, C completion length, D width, H query heads, K key/value heads, F feed-forward,
V vocabulary, L layers. On a mesh a row shard is one of the `data` × `fsdp` parts that prompts, with all their completions, are
split into.

`PromptBatch` and `Rollout` hold Python and NumPy values on the host. `PackedRows`, `TrainBatch`, `Frozen` and `TrainState` are
pytrees of arrays. In an update, sequences stand back to back in packed rows of T tokens, R rows at once; per-token values of
completions are tables [N, C], padded on the right. A completion's first token has position = its prompt's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Integer

from grpo_kernels import KeyRanges, Limits

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
        sampled: N bool arrays, True = the model sampled the token, False = it came from outside (an environment's or a tool's
            answer), has log-probability 0 here, and is not trained. None = all tokens were sampled.
        experts: N arrays [tokens, L, k], the experts that each token of the prompt and of the completion but its last used in every
            layer; None where they were not recorded.
        idle_tokens: Number of tokens that slots decoded without a completion: free ones, and those whose completion has ended.

    Example:
        Rollout(completion_ids=[[4, 2]], logprobs=[np.array([-0.1, -0.7], np.float32)], finish_reasons=["stop"])
    """

    completion_ids: list[list[int]]
    logprobs: list[np.ndarray]
    finish_reasons: list[FinishReason]
    near_ties: int = 0
    slots: int = 0
    sampled: list[np.ndarray] | None = None
    experts: list[np.ndarray] | None = None
    idle_tokens: int = 0


@struct.dataclass
class PackedRows:
    """Rows of sequences back to back, each prompt before the completions that continue it, with their real lengths.

    A completion's last token predicts nothing and is not in the row. E = F + later entries say which token predicts which: the F
    first ones are the first tokens of completions, predicted by the prompt's last token; each later one is predicted by a token of
    its own. Tokens of an episode that came from outside have no entry. Entries that are not needed predict token 0 from the row's
    first token.

    Attributes:
        ids, positions: [R, T] token ids, and each token's position in its sequence.
        ranges: [R, T], the keys that each token sees; padding sees none.
        selected: [R, E], index of the token that predicts each entry.
        inverse: [R, T], which later entry a token predicts, counted from the first of them; -1 for none.
        targets: [R, E], the tokens that are predicted.
        columns: [R, E], index of the predicted token in its completion.
        firsts: F.
        limits: what every row keeps to.
        dropout_keys: [R, T] keys of the adapters' dropout, where an update is computed with it; None is no dropout.
        experts: [R, T, L, k], the experts that the sampler used for each token; 0 for padding. None where they were not recorded.
        replays: these experts are used again, instead of those that the routers would select.

    Example:
        A prompt [7, 8] with completions [3, 4] and [5]: ids [7, 8, 3], selected [1, 1, 2], targets [3, 5, 4], firsts 2.
    """

    ids: Int[AnyArray, "R T"]
    positions: Int[AnyArray, "R T"]
    ranges: KeyRanges
    selected: Int[AnyArray, "R E"]
    inverse: Int[AnyArray, "R T"]
    targets: Int[AnyArray, "R E"]
    columns: Int[AnyArray, "R E"]
    firsts: int = struct.field(pytree_node=False)
    limits: Limits = struct.field(pytree_node=False)
    dropout_keys: Any = None
    experts: Integer[AnyArray, "R T L k"] | None = None
    replays: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class MicroBatches:
    """M micro-batches of R packed rows, and where the tokens of every completion are in them.

    Attributes:
        rows: with a leading axis M.
        completions: [M, R, E], the completion that each entry belongs to; N for none.
        places: [N, C], the entry of every sampled token of a completion, counted through all micro-batches and rows; -1 where it is
            not in these micro-batches.
    """

    rows: PackedRows
    completions: Int[AnyArray, "M R E"]
    places: Int[AnyArray, "N C"]


@struct.dataclass
class TrainBatch:
    """The input of an update: packed rows, and tables of per-token values with the rewards, on the device.

    Attributes:
        micro_batches: one entry per size of row; together they have every completion that has a trained token.
        completion_mask: [N, C], True = the token is trained (and counted in denominators).
        sampler_logprobs: [N, C] log-probabilities in nats that the sampler returned, 0 where there is no token.
        rewards: [B, G] weighted sums over the reward functions; any value where not valid.
        valid: [B, G], True = the row was scored and enters its group's statistics.
        completion_lengths: [N], tokens of each completion that the model sampled, also those that are not trained; None = all are
            trained.
        advantages: [B, G], already computed, where the batch is a part of a step's prompts; None = from the rewards.
        old_logprobs: [N, C] log-probabilities in nats of the policy before the step's first update, where updates on other parts
            come before this batch's, or of an older policy that has sampled the completions; None = those of the policy as the
            update finds it.
        turn_advantages: [N, C], added to the row's advantage at every token, with advantages by turn (`objective.credit`); 0 where
            there is no token. None = a row has one advantage.
    """

    micro_batches: tuple[MicroBatches, ...]
    completion_mask: Bool[AnyArray, "N C"]
    sampler_logprobs: Float[AnyArray, "N C"]
    rewards: Float[AnyArray, "B G"]
    valid: Bool[AnyArray, "B G"]
    completion_lengths: Int[AnyArray, "N"] | None = None
    advantages: Float[AnyArray, "B G"] | None = None
    old_logprobs: Float[AnyArray, "N C"] | None = None
    turn_advantages: Float[AnyArray, "N C"] | None = None


@struct.dataclass
class Frozen:
    """Arrays that an update reads and never changes.

    Attributes:
        base: The model's weights; empty in full fine-tuning, where the weights are trained.
        reference: What makes the reference policy out of the base. With LoRA: the adapter that training started from, or an empty
            dict for the plain base. In full fine-tuning: a copy of the weights. None where there is no KL term. Where the reference
            changes, `TrainState.reference` counts instead.
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
        reference: The reference policy's own adapters or weights, float32, where it changes (`train.reference_every`); None where
            it is `Frozen.reference`.
        entropy_coef: [] weight of the entropy bonus, where it adapts (`objective.entropy_target`); None where it does not.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
    reference: Params | None = None
    entropy_coef: Float[Array, ""] | None = None
