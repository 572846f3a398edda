"""Per-token log-probabilities: a prompt is computed once for all its completions, and no logits of all tokens exist."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import LORA, STOPS, array_sizes, golden_config, log_softmax, plain_model, quick_compiling, tiny_policy

from goldens.folders import ALIKE, FAMILIES, NEWER_FAMILIES
from grpo_jax.learner.logprobs import completion_logprobs, padded_rows, row_logprobs
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import abstract_params
from grpo_jax.models.transformer import Transformer
from grpo_jax.types import Params

B, G, P, C = 2, 3, 12, 8
PROMPT_LENGTHS = np.array([4, 11], np.int32)  # longer than the families' windows (5 to 7), and shorter


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def batch(vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [B, P], completions [N, C], and the weight of each token in a scalar [N, C]; padding is random too."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(6, vocabulary, (B, P)).astype(np.int32)
    completions = rng.integers(6, vocabulary, (B * G, C)).astype(np.int32)
    lengths = np.array([8, 1, 5, 8, 3, 7])
    counts = rng.normal(size=(B * G, C)) * (np.arange(C)[None, :] < lengths[:, None])
    return prompts, completions, counts.astype(np.float32)


@functools.cache
def program(family: str, unroll: bool = False, remat: Any = "none") -> Any:
    """Jitted (adapters, base, prompts, lengths, completions, counts) → gradient of a weighted sum, log-probabilities."""
    model = tiny_policy(family, LORA).model.clone(unroll=unroll, remat=remat)

    @jax.jit
    def run(adapters: Params, base: Params, prompts: Any, lengths: Any, completions: Any, counts: Any) -> Any:
        def scalar(adapters: Params) -> tuple[Any, Any]:
            logps, _ = completion_logprobs(model, {"params": base, "lora": adapters}, prompts, lengths, completions, 0.7)
            return jnp.sum(logps * counts), logps

        return jax.grad(scalar, has_aux=True)(adapters)

    return run


def values_and_gradient(
    family: str, prompts: Any, lengths: Any, completions: Any, counts: Any, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and the gradient of their weighted sum with respect to the adapters, as one vector."""
    policy = tiny_policy(family, LORA)
    gradient, logps = program(family, **how)(policy.adapters, policy.params, prompts, lengths, completions, counts)
    return np.asarray(logps), np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])


def tables(outputs: Any, rows: int, columns: int) -> Any:
    """Outputs of `row_logprobs` of padded rows, as tables [N, C]."""
    groups = rows // PROMPT_LENGTHS.size

    def table(x: Any) -> Any:
        return jnp.concatenate([x[:, :groups].reshape(rows, 1), x[:, groups:].reshape(rows, columns - 1)], axis=1)

    return tuple(map(table, outputs))


@functools.cache
def scoring(family: str) -> Any:
    """Jitted (variables, prompts, lengths, completions, temperature) → log-probabilities, entropies."""
    return jax.jit(functools.partial(completion_logprobs, tiny_policy(family, LORA).model))


def scored(family: str, prompts: np.ndarray, completions: np.ndarray, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies."""
    return scoring(family)(tiny_policy(family, LORA).variables, prompts, PROMPT_LENGTHS, completions, jnp.float32(temperature))


def assert_near_in_norm(got: np.ndarray, expected: np.ndarray, share: float = 1e-5) -> None:
    assert np.linalg.norm(got - expected) <= share * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in (*ALIKE, *NEWER_FAMILIES))) for name in (*FAMILIES, *NEWER_FAMILIES)],
)
def test_completions_that_share_a_prompt_equal_completions_with_their_own(family: str) -> None:
    prompts, completions, counts = batch(tiny_policy(family).spec.vocab)
    shared, gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts)
    own_prompts = (np.repeat(prompts, G, 0), np.repeat(PROMPT_LENGTHS, G))
    each, each_gradient = values_and_gradient(family, *own_prompts, completions, counts)
    trained = counts != 0
    np.testing.assert_allclose(shared[trained], each[trained], rtol=2e-6, atol=1e-5)  # float32 keeps 7 digits of up to 17 nats
    assert_near_in_norm(gradient, each_gradient)


def plain_table(prompts: np.ndarray, lengths: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """Returns [N, P + C]: each prompt without its padding, then a completion, then zeros."""
    table = np.zeros((len(completions), P + C), np.int32)
    for row, completion in enumerate(completions):
        n = lengths[row // G]
        table[row, :n], table[row, n : n + C] = prompts[row // G, :n], completion
    return table


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_values_entropies_and_gradients_are_those_of_the_plain_forward_pass(family: str) -> None:
    policy = tiny_policy(family, LORA)
    assert policy.adapters is not None
    prompts, completions, counts = batch(policy.spec.vocab)
    table = plain_table(prompts, PROMPT_LENGTHS, completions)
    starts = np.repeat(PROMPT_LENGTHS, G)[:, None] + np.arange(C)[None, :] - 1
    run = plain_model(family, LORA.scale)

    def scalar(adapters: Params) -> tuple[Any, Any]:
        logits = jnp.take_along_axis(run(table, adapters), jnp.asarray(starts)[:, :, None], axis=1) / 0.7
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.asarray(completions)[:, :, None], axis=-1)[:, :, 0]
        return jnp.sum(logps * counts), (logps, logits)

    plain_gradient, (plain, logits) = jax.jit(jax.grad(scalar, has_aux=True))(policy.adapters)
    got, gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts, unroll=True)
    np.testing.assert_allclose(got, plain, rtol=0, atol=1e-4)
    assert_near_in_norm(gradient, np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(plain_gradient)]), 1e-4)
    _, entropy = scored(family, prompts, completions, 0.7)
    wide = log_softmax(logits)
    np.testing.assert_allclose(entropy, -(np.exp(wide) * wide).sum(axis=-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "remat"), [("qwen2", "offload"), ("gemma3", "layer"), ("qwen2", "selective")])
def test_computing_layers_again_in_the_backward_pass_changes_nothing(family: str, remat: str) -> None:
    prompts, completions, counts = batch(tiny_policy(family).spec.vocab)
    saved, gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts)
    again, again_gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts, remat=remat)
    # With jax 0.12 `offload` differs by up to 6e-6 at 17 nats, three steps of float32; 1e-6 is less than one step there.
    np.testing.assert_allclose(again, saved, rtol=4 * 2**-23 if jax.__version_info__ >= (0, 12) else 0, atol=1e-6)
    assert_near_in_norm(again_gradient, gradient)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_layers_without_a_loop_over_them_are_the_same_layers(family: str) -> None:
    prompts, completions, counts = batch(tiny_policy(family).spec.vocab)
    stacked, gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts)
    single, single_gradient = values_and_gradient(family, prompts, PROMPT_LENGTHS, completions, counts, unroll=True)
    np.testing.assert_allclose(single, stacked, rtol=0, atol=1e-5)  # 20 nats in float32, summed in another order
    assert_near_in_norm(single_gradient, gradient)


def test_the_last_layer_may_have_as_many_queries_as_a_row_has_tokens() -> None:
    """With prompts as long as there are completions of each, a row has as many entries as tokens, in another order."""
    prompts, completions, counts = batch(tiny_policy("qwen2").spec.vocab)
    short, lengths = prompts[:, :G], np.minimum(PROMPT_LENGTHS, G)
    rows = padded_rows(jnp.asarray(short), jnp.asarray(lengths), jnp.asarray(completions))
    assert rows.selected.shape == rows.ids.shape
    stacked, gradient = values_and_gradient("qwen2", short, lengths, completions, counts)
    single, single_gradient = values_and_gradient("qwen2", short, lengths, completions, counts, unroll=True)
    np.testing.assert_allclose(single, stacked, rtol=0, atol=1e-5)  # 20 nats in float32, summed in another order
    assert_near_in_norm(single_gradient, gradient)


def test_padding_changes_nothing() -> None:
    prompts, completions, counts = batch(tiny_policy("mistral").spec.vocab)
    other_prompts, other_completions = prompts.copy(), completions.copy()
    for row, n in enumerate(PROMPT_LENGTHS):
        other_prompts[row, n:] = 0
    other_completions[counts == 0] = 0
    logps, gradient = values_and_gradient("mistral", prompts, PROMPT_LENGTHS, completions, counts)
    others, other_gradient = values_and_gradient("mistral", other_prompts, PROMPT_LENGTHS, other_completions, counts)
    assert np.array_equal(logps[counts != 0], others[counts != 0])
    assert np.array_equal(gradient, other_gradient)


def test_a_completion_of_one_token() -> None:
    prompts, completions, _ = batch(tiny_policy("llama2").spec.vocab)
    longer, _ = scored("llama2", prompts, completions)
    first, _ = scored("llama2", prompts, completions[:, :1])
    assert first.shape == (B * G, 1)
    np.testing.assert_allclose(first[:, 0], longer[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "truncation"),
    [
        ("gemma2", Truncation(top_k=5, top_p=0.9, min_p=0.05, stop_ids=STOPS, min_length=4)),
        ("qwen2", Truncation(top_p=0.6)),
        ("gemma2", Truncation(stop_ids=STOPS, min_length=4)),
        ("qwen2", Truncation(stop_ids=STOPS, min_length=C)),
    ],
)
def test_the_trainer_has_the_log_probabilities_that_the_sampler_returned(family: str, truncation: Truncation) -> None:
    """Also with a soft cap on the logits, and where few tokens stay."""
    policy = tiny_policy(family, LORA)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(6, policy.spec.vocab, n).tolist() for n in PROMPT_LENGTHS]
    drawn = policy.generate(
        prompts,
        num_generations=G,
        max_completion_length=C,
        min_completion_length=truncation.min_length,
        temperature=0.7,
        top_k=truncation.top_k,
        top_p=truncation.top_p,
        min_p=truncation.min_p,
    )
    rows = [completion for group in drawn for completion in group]
    table, theirs = np.zeros((B * G, C), np.int32), np.zeros((B * G, C), np.float32)
    for number, row in enumerate(rows):
        table[number, : len(row.ids)], theirs[number, : len(row.ids)] = row.ids, row.logprobs
    mask = np.arange(C)[None, :] < np.array([len(row.ids) for row in rows])[:, None]
    padded = np.array([row + [0] * (P - len(row)) for row in prompts], np.int32)
    run = jax.jit(lambda v, *rows: tables(row_logprobs(policy.model, v, padded_rows(*rows), truncation, 0.7), B * G, C))
    logps, untruncated, entropy = run(policy.variables, padded, PROMPT_LENGTHS, table)
    assert np.abs(np.asarray(logps) - theirs)[mask].max() < 1e-4
    plain, plain_entropy = scored(family, padded, table, 0.7)
    np.testing.assert_allclose(np.asarray(untruncated)[mask], np.asarray(plain)[mask], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(entropy)[mask], np.asarray(plain_entropy)[mask], rtol=0, atol=1e-5)
    assert np.all(np.asarray(logps - untruncated)[mask] >= -1e-5)
    if truncation.truncates:
        assert np.abs(np.asarray(untruncated) - theirs)[mask].mean() > 0.1


@pytest.mark.parametrize("truncation", [None, Truncation(top_p=0.9), Truncation(stop_ids=(2,), min_length=100)])
@pytest.mark.parametrize("trainable", [False, True])
def test_there_is_never_an_array_of_rows_by_tokens_by_vocabulary(trainable: bool, truncation: Truncation | None) -> None:
    vocabulary, rows, tokens = 50_000, 8, 256
    spec = read_spec(golden_config("llama2") | {"vocab_size": vocabulary})
    model = Transformer(spec, jnp.dtype("float32"))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 64), (2,), (rows, tokens))]

    def scalar(params: Params, prompts: Any, lengths: Any, completions: Any) -> Any:
        variables = {"params": params}
        if truncation is None:
            return jnp.sum(completion_logprobs(model, variables, prompts, lengths, completions, head_trainable=trainable)[0])
        rows = padded_rows(prompts, lengths, completions)
        logps, untruncated, _ = row_logprobs(model, variables, rows, truncation, head_trainable=trainable)
        assert untruncated is not None
        return jnp.sum(logps + untruncated)

    largest = array_sizes(jax.make_jaxpr(jax.grad(scalar))(abstract_params(spec, "float32"), *shapes))
    assert largest < rows * tokens * vocabulary / 10
