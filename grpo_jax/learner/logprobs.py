"""Computes per-token log-probabilities and entropies of completions, under the policy or the reference, in float32 nats.

`completion_logprobs` uses the model's untruncated distribution, `truncated_completion_logprobs` also the truncated one that
completions are drawn from.
Each prompt is computed once for its G completions. The head and its softmax are one pass over the vocabulary, so no
[rows, tokens, vocabulary] array exists.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.learner.truncated import Truncation, truncated_logprobs
from grpo_jax.models.attention import group_attend, select_predicting_tokens
from grpo_jax.models.head import head_logprobs
from grpo_jax.models.transformer import Transformer, forward, head_matrix
from grpo_jax.types import Params


def group_hidden(
    model: Transformer,
    variables: Params,
    prompt_ids: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completion_ids: Int[Array, "N C"],
) -> Float[Array, "N C D"]:
    """Computes the hidden state that predicts each completion token: at the prompt's last token, then at each token before it."""
    b, p = prompt_ids.shape
    n, c = completion_ids.shape
    g = n // b
    own = completion_ids.reshape(b, g, c)[:, :, : c - 1]
    at = jnp.arange(p, dtype=jnp.int32)[None, :]
    after = prompt_lengths[:, None, None] + jnp.arange(c - 1, dtype=jnp.int32)[None, None, :]
    ids = jnp.concatenate([prompt_ids, own.reshape(b, g * (c - 1))], axis=1)
    positions = jnp.concatenate(
        [jnp.broadcast_to(at, (b, p)), jnp.broadcast_to(after, (b, g, c - 1)).reshape(b, g * (c - 1))], axis=1
    )
    attend = group_attend(model.spec, prompt_lengths, p, g if c > 1 else 0, model.implementation, model.layout)
    hidden = forward(model, variables, ids, positions, attend, select=select_predicting_tokens(prompt_lengths, p))[0]
    first = jnp.broadcast_to(hidden[:, None, :1], (b, g, 1, hidden.shape[-1]))
    rest = hidden[:, 1:].reshape(b, g, c - 1, hidden.shape[-1])
    return jnp.concatenate([first, rest], axis=2).reshape(n, c, hidden.shape[-1])


def completion_logprobs(
    model: Transformer,
    variables: Params,
    prompt_ids: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completion_ids: Int[Array, "N C"],
    temperature: float | Float[Array, ""] = 1.0,
    *,
    head_trainable: bool = False,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """Computes log-probabilities of completion tokens under the untruncated distribution, and its entropy.

    Args:
        model: the decoder.
        variables: {"params": base, "lora": adapters}, or without "lora" for the base.
        prompt_ids: padded on the right.
        prompt_lengths: tokens of each prompt, at least 1.
        completion_ids: N = B·G rows, padded on the right.
        temperature: divides the logits.
        head_trainable: whether the head's weights need a gradient; entropy has one only then.
    """
    hidden = group_hidden(model, variables, prompt_ids, prompt_lengths, completion_ids)
    n, c, d = hidden.shape
    head = head_matrix(model.spec, variables["params"]).astype(hidden.dtype)
    logps, entropy, _ = head_logprobs(
        hidden.reshape(n * c, d),
        head,
        completion_ids.reshape(n * c),
        temperature,
        model.layout,
        softcap=model.spec.final_softcap,
        head_trainable=head_trainable,
        implementation=model.implementation,
    )
    return logps.reshape(n, c), entropy.reshape(n, c)


def truncated_completion_logprobs(
    model: Transformer,
    variables: Params,
    prompt_ids: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completion_ids: Int[Array, "N C"],
    truncation: Truncation,
    temperature: float | Float[Array, ""] = 1.0,
    *,
    head_trainable: bool = False,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"], Float[Array, "N C"]]:
    """Computes log-probabilities under the sampled and the untruncated distribution, and the entropy of the untruncated one.

    Arguments are those of `completion_logprobs`, and `truncation`: what sampling does to the distribution.
    """
    hidden = group_hidden(model, variables, prompt_ids, prompt_lengths, completion_ids)
    return truncated_logprobs(
        hidden,
        head_matrix(model.spec, variables["params"]).astype(hidden.dtype),
        completion_ids,
        truncation,
        temperature=temperature,
        softcap=model.spec.final_softcap,
        head_trainable=head_trainable,
        implementation=model.implementation,
        layout=model.layout,
    )
