"""Dropout of adapters: fixed by seed, update and place in the text, whatever the packing; off where there is no gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from padded_batches import PaddedBatch
from plain_oracles import quick_compiling, tiny_policy

from grpo_jax.config import LoraConfig, ObjectiveConfig
from grpo_jax.learner.dropout import token_owners, with_dropout_keys
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.micro_batches import MicroBatch
from grpo_jax.learner.packing import Lengths, pack, row_sizes
from grpo_jax.learner.step import train_step
from grpo_jax.models.dropout import dropped, layer_keys
from grpo_jax.models.spec import LINEAR_AXES
from grpo_jax.types import Frozen

PROMPTS = [[11, 12, 13], [14], [15, 16]]
COMPLETIONS = [[21, 22, 23], [24], [25, 26], [27, 28, 29, 30], [31, 32], [33, 34, 35]]
GROUP = 2
CRC32_OF_Q_PROJ = 3099051089


def micro_batches(tokens: int) -> list[MicroBatch]:
    """The three groups packed into rows of so many tokens."""
    sizes = row_sizes(Lengths(1, 3, 4), len(PROMPTS), GROUP, tokens)
    found = []
    for batch in pack(PROMPTS, COMPLETIONS, [True] * len(COMPLETIONS), sizes, width=4):
        for number in range(len(batch.completions)):
            rows: Any = jax.tree.map(lambda x, number=number: x[number], batch.rows)
            places: Any = batch.places - number * batch.completions[number].size
            found.append(MicroBatch(rows, jnp.asarray(batch.completions[number]), places))
    return found


def by_token(tokens: int) -> dict[tuple[int, int], Any]:
    """The key's data of every token, by its owner and its position; each has one wherever it is."""
    found: dict[tuple[int, int], Any] = {}
    for part in micro_batches(tokens):
        owners = np.asarray(token_owners(part, GROUP))
        keys = np.asarray(jax.random.key_data(with_dropout_keys(part, 3, jnp.int32(5), GROUP).rows.dropout_keys))
        for row, column in zip(*np.nonzero(part.rows.ranges.own_end > 0), strict=True):  # the rest is padding
            place = int(owners[row, column]), int(part.rows.positions[row, column])
            text = PROMPTS[place[0] - 6] if place[0] >= 6 else [0] * len(PROMPTS[place[0] // GROUP]) + COMPLETIONS[place[0]]
            assert part.rows.ids[row, column] == text[place[1]]  # its owner is the text that it is in
            assert np.array_equal(found.setdefault(place, keys[row, column]), keys[row, column])
    return found


@pytest.mark.slow
def test_a_tokens_key_does_not_depend_on_the_rows_that_it_is_packed_into() -> None:
    whole, cut = by_token(64), by_token(7)
    tokens = sum(map(len, PROMPTS)) + sum(len(ids) - 1 for ids in COMPLETIONS)  # a completion's last token predicts nothing
    assert len(whole) == len(cut) == tokens
    assert all(np.array_equal(key, cut[place]) for place, key in whole.items())
    assert len({key.tobytes() for key in whole.values()}) == tokens


def test_dropped_elements_differ_by_token_layer_and_linear_layer_and_keep_the_mean() -> None:
    keys = layer_keys(jax.random.split(jax.random.key(0), (3, 2)), 2)
    assert keys is not None
    x = jnp.ones((3, 2, 2000))
    q, again, v = (np.asarray(dropped(x, keys[0], 0.25, name)) for name in ("q_proj", "q_proj", "v_proj"))
    assert np.array_equal(q, again)
    assert set(np.unique(q)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_allclose(q.mean(axis=-1), 1, rtol=0, atol=0.06)  # 5 standard deviations of 2,000 draws
    rows = np.concatenate([y.reshape(6, -1) for y in (q, v, np.asarray(dropped(x, keys[1], 0.25, "q_proj")))])
    same = (rows[:, None] == rows[None]).mean(axis=-1)[~np.eye(len(rows), dtype=bool)]
    assert same.max() < 0.7  # 0.625 by chance


def test_masks_depend_on_a_layers_name_and_not_on_the_other_layers() -> None:
    keys, x = jax.random.split(jax.random.key(0), (1, 1)), jnp.ones((1, 1, 400))
    before = {name: np.asarray(dropped(x, keys, 0.5, name)) for name in LINEAR_AXES}
    assert len({mask.tobytes() for mask in before.values()}) == len(LINEAR_AXES)  # equal by chance: 2^-400
    drawn = jax.random.bernoulli(jax.random.fold_in(keys[0, 0], np.uint32(CRC32_OF_Q_PROJ)), 0.5, (400,))
    np.testing.assert_array_equal(before["q_proj"][0, 0] > 0, drawn)

    axes = dict(LINEAR_AXES)
    LINEAR_AXES.clear()
    try:
        LINEAR_AXES.update({"new_proj": ("embed", None)} | dict(reversed(axes.items())))
        for name, mask in before.items():
            np.testing.assert_array_equal(dropped(x, keys, 0.5, name), mask)
    finally:
        LINEAR_AXES.clear()
        LINEAR_AXES.update(axes)


def keep_gradient() -> Any:
    """Changes nothing and stores the gradient as its state."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, tree)

    made: Any = optax.GradientTransformation
    return made(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


@pytest.mark.slow
def test_an_update_with_dropout_does_not_depend_on_micro_batches_and_old_log_probabilities_have_none() -> None:
    policy = tiny_policy("qwen2", LoraConfig(rank=4, alpha=8.0, dropout=0.1))
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None, :] < rng.integers(2, 6, 8)[:, None]
    batch = PaddedBatch(
        prompt_ids=rng.integers(3, 90, (4, 4)).astype(np.int32),
        prompt_lengths=np.full(4, 4, np.int32),
        completion_ids=np.where(mask, rng.integers(3, 90, mask.shape), 0).astype(np.int32),
        completion_mask=mask,
        sampler_logprobs=np.zeros(mask.shape, np.float32),
        rewards=rng.normal(size=(4, 2)).astype(np.float32),
        valid=np.ones((4, 2), bool),
    )

    def update(micro: int, **change: Any) -> tuple[dict[str, float], Any]:
        options = {"remat": "layer" if micro == 1 else "none", "unroll": micro == 4} | change
        model = policy.model.clone(**options)
        objective = ObjectiveConfig(beta=0.0, importance_cap=None)
        learner = Learner(model, objective, keep_gradient(), lambda _: jnp.float32(1), False, 1.0, 5, seed=7)
        assert policy.adapters is not None
        packed, frozen = batch.packed((micro, 2), None, skips=learner.skips), Frozen(policy.params, {})
        state, metrics = jax.jit(functools.partial(train_step, learner))(learner.init(policy.adapters), packed, frozen)
        old = learner.old_logprobs(policy.adapters, packed, frozen)
        trainer = policy.logprobs([row.tolist() for row in batch.prompt_ids.repeat(2, 0)], [
            row[own].tolist() for row, own in zip(batch.completion_ids, mask, strict=True)
        ])  # fmt: skip
        for ours, own, theirs in zip(np.asarray(old), mask, trainer, strict=True):
            np.testing.assert_allclose(ours[own], theirs, rtol=0, atol=1e-5)
        return metrics.to_dict(), jax.device_get(state.opt_state)

    with quick_compiling():
        (one, gradient), (other, same), (_, without) = update(4), update(1), update(4, lora_dropout=0.0)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    changed = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*map(jax.tree.leaves, (gradient, without)), strict=True)]
    assert min(changed) > 1e-2
