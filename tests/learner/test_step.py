"""One update against a plain one with whole logits; micro-batches change nothing, and nothing is computed that is not needed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from padded_batches import PaddedBatch, micro_batches_used, shapes_of
from plain_oracles import (
    LORA,
    array_sizes,
    golden_config,
    moved,
    plain_logits,
    plain_model,
    quick_compiling,
    staying_tokens,
    tiny_policy,
)

from goldens.folders import model_tensors
from grpo_jax.config import LoraConfig, ObjectiveConfig, OptimConfig
from grpo_jax.learner import batch_logprobs
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import abstract_params, lora_specs, nest
from grpo_jax.models.transformer import Transformer
from grpo_jax.rewards.protocol import ScoredBatch
from grpo_jax.runtime.programs import Program
from grpo_jax.steps.mini_batches import MiniBatches
from grpo_jax.types import Frozen, Params

B, G, P, C = 4, 4, 8, 6
N = B * G
TEMPERATURE = 0.7
MAX_LENGTH = 9  # the constant of dr_grpo; the batch is narrower
FAMILY = "qwen2"
PROMPT_LENGTHS = np.array([3, 8, 5, 6], np.int32)
LENGTHS = np.array([6, 1, 4, 2, 6, 6, 3, 5, 2, 4, 6, 1, 5, 5, 3, 6])


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@functools.cache
def batch() -> PaddedBatch:
    """Sixteen rows of unequal length: row 5 could not be scored, the last group's rewards are equal, row 9 is masked."""
    rng = np.random.default_rng(0)
    vocabulary = golden_config(FAMILY)["vocab_size"]
    mask = np.arange(C)[None, :] < LENGTHS[:, None]
    mask[9] = False
    rewards, valid = rng.normal(size=(B, G)).astype(np.float32), np.ones((B, G), bool)
    rewards[1, 1], valid[1, 1] = np.nan, False
    rewards[3] = 0.7
    completions = np.where(np.arange(C)[None, :] < LENGTHS[:, None], rng.integers(6, vocabulary, (N, C)), 0)
    prompts = np.where(np.arange(P)[None, :] < PROMPT_LENGTHS[:, None], rng.integers(6, vocabulary, (B, P)), 0)
    return PaddedBatch(
        prompt_ids=prompts.astype(np.int32),
        prompt_lengths=PROMPT_LENGTHS,
        completion_ids=jnp.asarray(completions.astype(np.int32)),
        completion_mask=mask,
        sampler_logprobs=np.where(mask, -4 + rng.normal(size=(N, C)), 0).astype(np.float32),
        rewards=rewards,
        valid=valid,
    )


OPTIM = OptimConfig(learning_rate=0.01, max_grad_norm=0.5, weight_decay=0.1, eps=1e-3)


def recording() -> optax.GradientTransformation:
    """The package's AdamW, which also keeps the last gradient: its state is (AdamW's, gradient)."""
    inner = make_optimizer(OPTIM, 10)

    def init(params: Any) -> Any:
        return inner.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        changes, after = inner.update(updates, state[0], params)
        return changes, (after, updates)

    return optax.GradientTransformation(init, update)


def plain_adamw(params: Params, gradients: list[Params]) -> Params:
    """AdamW after clipping by global norm, float64, by its formulas."""
    norms = [max(1.0, np.linalg.norm(flat(g)) / 0.5) for g in gradients]

    def leaf(p: Any, *own: Any) -> np.ndarray:
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        for k, (g, norm) in enumerate(zip(own, norms, strict=True), start=1):
            g = np.asarray(g, np.float64) / norm
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            p = p - 0.01 * (m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-3) + 0.1 * p)
        return p

    return jax.tree.map(leaf, params, *gradients)


def learner(objective: ObjectiveConfig, **change: Any) -> Learner:
    made = Learner(
        model=tiny_policy(FAMILY, LORA).model,
        objective=objective,
        optimizer=recording(),
        learning_rate=lambda step: jnp.float32(0.01) + step.astype(jnp.float32),  # seen in the metric only
        full=False,
        temperature=TEMPERATURE,
        max_completion_length=MAX_LENGTH,
    )
    return dataclasses.replace(made, **change)


def start(full: bool = False) -> tuple[Params, Frozen]:
    """Trainable arrays of their own, and frozen ones; the reference is not the policy."""
    policy = tiny_policy(FAMILY, LORA)
    assert policy.adapters is not None
    if full:
        return jax.tree.map(jnp.copy, policy.params), Frozen({}, moved(policy.params, 3, 0.004))
    return jax.tree.map(jnp.copy, policy.adapters), Frozen(policy.params, moved(policy.adapters, 3, 0.02))


@functools.cache
def program(
    objective: ObjectiveConfig, cut: tuple[int, int] = (B, G), full: bool = False, truncation: Truncation | None = None
) -> Callable[..., Any]:
    """Compiled (trainable, batch, frozen) → state, metrics; the trainable arrays are donated."""
    made = learner(objective, full=full, truncation=truncation)
    run = Program("update", functools.partial(train_step, made), donate=(0,))
    return lambda trainable, batch, frozen: run(made.init(trainable), batch.packed(cut, skips=made.skips), frozen)


@functools.cache
def update(
    objective: ObjectiveConfig, cut: tuple[int, int] = (B, G), full: bool = False, truncation: Truncation | None = None
) -> tuple[Params, Params, dict[str, float], np.ndarray]:
    """Trained arrays, last gradient, metrics and advantages of one step."""
    trainable, frozen = start(full)
    state, packed = program(objective, cut, full, truncation)(trainable, batch(), frozen)
    return state.trainable, state.opt_state[1], *packed.to_host()


def flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_near_in_norm(got: Params, expected: Params, share: float = 1e-5) -> None:
    assert np.linalg.norm(flat(got) - flat(expected)) <= share * np.linalg.norm(flat(expected))


OBJECTIVES = {
    "dapo": ObjectiveConfig(loss="dapo", beta=0.1),
    "gspo, two updates": ObjectiveConfig(loss="gspo", beta=0.05, num_iterations=2, importance_cap=2.0),
    "dr_grpo, two updates": ObjectiveConfig(loss="dr_grpo", beta=0.0, scale_rewards="none", num_iterations=2),
    "top entropy": ObjectiveConfig(loss="dapo", beta=0.0, top_entropy=0.4),
    "entropy bonus": ObjectiveConfig(loss="dapo", beta=0.0, entropy_coef=0.3, entropy_target=9.0),
    "clip_cov": ObjectiveConfig(loss="clip_cov", beta=0.0, cov_share=0.2, advantage="opo"),
    "cispo, KL in the reward": ObjectiveConfig(loss="cispo", beta=0.3, kl="k1", kl_in_reward=True),
}


def mean_size_of_a_token(objective: ObjectiveConfig, advantages: np.ndarray, kl: float) -> float:
    """Σ w |term|, at ratio 1: |A|, for cispo |A·logπ|, and the KL term."""
    mask = np.asarray(batch().completion_mask)
    size = np.abs(advantages)[:, None] * mask
    if objective.loss == "cispo":
        logps = plain_token_logps(plain_model(FAMILY, LORA.scale)(plain_table()[0], start()[0]))
        size = size * np.abs(np.asarray(logps))
    mean = float(size.sum() / mask.sum()) + (0.0 if objective.kl_in_reward else objective.beta * kl)
    mean += 4 * objective.entropy_coef  # the entropy
    return mean * (mask.sum() / (N * MAX_LENGTH) if objective.loss == "dr_grpo" else 1)


CUTS = [
    ("dapo", (1, 1), False),
    ("dapo", (2, 2), True),
    pytest.param("gspo, two updates", (B, 2), False, marks=pytest.mark.slow),
    pytest.param("dr_grpo, two updates", (2, G), False, marks=pytest.mark.slow),
    pytest.param("top entropy", (1, 2), False, marks=pytest.mark.slow),
    pytest.param("entropy bonus", (1, 2), False, marks=pytest.mark.slow),
    pytest.param("entropy bonus", (2, G), True, marks=pytest.mark.slow),
    pytest.param("clip_cov", (1, 2), False, marks=pytest.mark.slow),
    pytest.param("cispo, KL in the reward", (2, 2), False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "cut", "full"), CUTS)
def test_the_micro_batch_changes_nothing(name: str, cut: tuple[int, int], full: bool) -> None:
    at_once, gradient, metrics, advantages = update(OBJECTIVES[name], full=full)
    trained, cut_gradient, cut_metrics, cut_advantages = update(OBJECTIVES[name], cut, full)
    # The gradient of a second update is that of adapters which the first one has rounded.
    assert_near_in_norm(cut_gradient, gradient, 1e-5 * OBJECTIVES[name].num_iterations)
    assert_near_in_norm(
        jax.tree.map(jnp.subtract, trained, start(full)[0]), jax.tree.map(jnp.subtract, at_once, start(full)[0]), 2e-5
    )
    mean_term = mean_size_of_a_token(OBJECTIVES[name], advantages, metrics.get("kl_divergence", 0.0))
    # The ratio that multiplies KL in a second update is of arrays that are 2e-5 apart, as above.
    of_kl = 2e-5 * (OBJECTIVES[name].num_iterations - 1) * abs(metrics["loss"] - metrics["policy_loss"])
    assert abs(cut_metrics["loss"] - metrics["loss"]) <= 1e-6 * mean_term + of_kl
    # With KL in the reward up to 2·C log-probabilities as low as -19, float32 and so 1e-5 apart, enter it times beta.
    apart = OBJECTIVES[name].beta * 2 * C * 1e-5 if OBJECTIVES[name].kl_in_reward else 0
    np.testing.assert_allclose(cut_advantages, advantages, rtol=0, atol=1e-6 + apart)
    assert cut_metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        assert cut_metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def plain_table() -> tuple[np.ndarray, np.ndarray]:
    """[N, P + C] each prompt without padding, then its completion; and from which position each completion token is predicted."""
    table = np.zeros((N, P + C), np.int32)
    for row in range(N):
        n = PROMPT_LENGTHS[row // G]
        table[row, :n] = np.asarray(batch().prompt_ids)[row // G, :n]
        table[row, n : n + C] = np.asarray(batch().completion_ids)[row]
    return table, np.repeat(PROMPT_LENGTHS, G)[:, None] + np.arange(C)[None, :] - 1


def plain_token_logps(logits: Any) -> Any:
    """[N, P + C, V] logits → [N, C] log-probabilities of the completions at the temperature."""
    own = jnp.take_along_axis(logits, jnp.asarray(plain_table()[1])[:, :, None], axis=1) / TEMPERATURE
    return jnp.take_along_axis(jax.nn.log_softmax(own, axis=-1), batch().completion_ids[:, :, None], axis=-1)[:, :, 0]


def plain_advantages(rewards: np.ndarray, scaled: bool = True) -> np.ndarray:
    """[N] by group, with one row that is not valid and one group whose rewards are equal."""
    result, valid = np.zeros((B, G)), np.asarray(batch().valid)
    for b in range(B):
        own = rewards[b][valid[b]].astype(np.float64)
        if own.max() > own.min():
            result[b, valid[b]] = (own - own.mean()) / ((own.std(ddof=1) + 1e-4) if scaled else 1)
    return result.reshape(-1)


def plain_loss(logps: Any, old: Any, ref: Any, advantages: Any, weights: Any, beta: float) -> Any:
    """Σ w (−min(ρA, clip(ρ)A) + β ρ (e^d − d − 1)), d = logπ_ref − logπ."""
    ratio, d = jnp.exp(logps - old), ref - logps
    a = advantages[:, None]
    term = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a) + beta * ratio * (jnp.exp(d) - d - 1)
    return jnp.sum(weights * term)


@functools.cache
def plain_adapter_gradient() -> Callable[..., Any]:
    """Jitted (adapters, old or None, ref, advantages, weights, beta) → (loss, log-probabilities), gradient; whole logits."""
    run, table = plain_model(FAMILY, LORA.scale), plain_table()[0]

    def loss(adapters: Params, old: Any, ref: Any, advantages: Any, weights: Any, beta: Any) -> Any:
        logps = plain_token_logps(run(table, adapters))
        return plain_loss(logps, jax.lax.stop_gradient(logps) if old is None else old, ref, advantages, weights, beta), logps

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def plain_reference() -> tuple[Any, np.ndarray]:
    """Log-probabilities of the reference, and the mask."""
    ref = plain_token_logps(plain_model(FAMILY, LORA.scale)(plain_table()[0], start()[1].reference))
    return ref, np.asarray(batch().completion_mask)


def as_float32(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def assert_same_step(got: Params, expected: Params) -> None:
    """1e-3: the size of the change, of which float32 forward passes in another order leave that much."""
    before = start()[0]
    changes = [jax.tree.map(lambda p, q: np.asarray(p, np.float64) - np.asarray(q), after, before) for after in (got, expected)]
    assert_near_in_norm(changes[0], changes[1], 1e-3)


def test_one_update_is_that_of_whole_logits_and_the_formulas() -> None:
    """dapo with the corrected k3, AdamW with clipping and decay."""
    trained, gradient, metrics, advantages = update(OBJECTIVES["dapo"])
    (ref, mask), trainable = plain_reference(), start()[0]
    expected = as_float32(plain_advantages(np.asarray(batch().rewards)))
    weights = as_float32(mask / mask.sum())
    (loss, logps), plain_gradient = plain_adapter_gradient()(trainable, None, ref, expected, weights, 0.1)
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-6)
    assert_near_in_norm(gradient, plain_gradient, 1e-4)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(-float((expected[:, None] * weights).sum()), abs=1e-5)
    d = np.asarray(ref - logps, np.float64)[mask]
    assert metrics["kl_divergence"] == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-3)
    difference = np.abs(np.asarray(logps) - np.asarray(batch().sampler_logprobs))[mask]
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(difference.max(), rel=1e-4)
    norm = np.linalg.norm(flat(plain_gradient))
    assert norm > 0.5  # so that clipping is seen
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    scored = np.asarray(batch().rewards)[np.asarray(batch().valid)].astype(np.float64)
    assert metrics["reward/mean"] == pytest.approx(scored.mean(), abs=1e-6)
    assert metrics["reward/std"] == pytest.approx(scored.std(ddof=1), rel=1e-5)
    assert metrics["reward/frac_zero_std"] == 0.25
    assert (metrics["clip_ratio/region"], metrics["learning_rate"]) == (0.0, pytest.approx(0.01))
    assert_same_step(trained, plain_adamw(trainable, [plain_gradient]))


def test_only_tokens_of_high_entropy_have_a_policy_term() -> None:
    _, gradient, metrics, _ = update(OBJECTIVES["top entropy"])
    (_, mask), trainable = plain_reference(), start()[0]
    logits = plain_model(FAMILY, LORA.scale)(plain_table()[0], trainable)
    own = np.take_along_axis(np.asarray(logits, np.float64), plain_table()[1][:, :, None], axis=1) / TEMPERATURE
    p = np.exp(own - own.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=-1)
    least = np.sort(entropy[mask])[-int(0.4 * mask.sum())]
    weights = as_float32((mask & (entropy >= least)) / mask.sum())
    expected = as_float32(plain_advantages(np.asarray(batch().rewards)))
    (loss, _), plain = plain_adapter_gradient()(trainable, None, plain_reference()[0], expected, weights, 0.0)
    assert_near_in_norm(gradient, plain, 1e-4)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_the_entropy_bonus_is_of_all_trained_tokens_also_of_groups_without_an_advantage() -> None:
    """Its weight is 0.3 in this step and rises, because the sampled entropy, about 4, is below the target."""
    trained, gradient, metrics, _ = update(OBJECTIVES["entropy bonus"])
    (ref, mask), trainable = plain_reference(), start()[0]
    advantages, run = as_float32(plain_advantages(np.asarray(batch().rewards))), plain_model(FAMILY, LORA.scale)
    weights = as_float32(mask / mask.sum())

    def loss(adapters: Params) -> Any:
        logits = run(plain_table()[0], adapters)
        own = jnp.take_along_axis(logits, jnp.asarray(plain_table()[1])[:, :, None], axis=1) / TEMPERATURE
        of_entropy = -jnp.sum(jax.nn.softmax(own, axis=-1) * jax.nn.log_softmax(own, axis=-1), axis=-1)
        logps = plain_token_logps(logits)
        policy = plain_loss(logps, jax.lax.stop_gradient(logps), ref, advantages, weights, 0.0)
        return policy - 0.3 * jnp.sum(weights * of_entropy)

    expected, plain = jax.jit(jax.value_and_grad(loss))(trainable)
    assert_near_in_norm(gradient, plain, 1e-4)
    assert metrics["loss"] == pytest.approx(float(expected), abs=2e-5)
    assert metrics["entropy_coef"] == pytest.approx(0.3)
    assert_same_step(trained, plain_adamw(trainable, [plain]))


def test_the_second_update_on_a_batch_keeps_the_first_ones_old_log_probabilities() -> None:
    trained, gradient, metrics, _ = update(OBJECTIVES["dr_grpo, two updates"])
    (ref, mask), trainable = plain_reference(), start()[0]
    advantages = as_float32(plain_advantages(np.asarray(batch().rewards), scaled=False))
    weights = as_float32(mask / (N * MAX_LENGTH))
    run = functools.partial(plain_adapter_gradient(), ref=ref, advantages=advantages, weights=weights, beta=0.0)
    (_, old), first = run(trainable, None)
    middle = jax.tree.map(as_float32, plain_adamw(trainable, [first]))
    (loss, logps), second = run(middle, old)
    assert_near_in_norm(gradient, second, 1e-3)
    assert_same_step(trained, plain_adamw(trainable, [first, second]))
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-4)
    mask = mask & np.repeat(np.asarray(advantages).reshape(B, G).any(axis=1), G)[:, None]  # the last group is not computed
    ratio = np.exp(np.asarray(logps - old))[mask]
    advantage = np.repeat(np.asarray(advantages)[:, None], C, axis=1)[mask]
    high, low = ((ratio > 1.2) & (advantage > 0)).mean(), ((ratio < 0.8) & (advantage < 0)).mean()
    assert min(high, low) > 0.02  # so that clipping is seen
    assert (metrics["clip_ratio/high"], metrics["clip_ratio/low"]) == (pytest.approx(high, abs=1e-3), pytest.approx(low, abs=1e-3))
    assert metrics["learning_rate"] == pytest.approx(1.01)  # the second update's


@pytest.mark.slow
def test_updates_on_parts_take_ratio_and_advantages_from_the_whole_step() -> None:
    """Two prompts each. The second update's ratio is to the policy that sampled; the batch's deviation is of all four prompts."""
    made = learner(ObjectiveConfig(loss="dapo", beta=0.1, scale_rewards="batch"))
    mini_batches = MiniBatches.of(made, Program("update", functools.partial(train_step, made), donate=(0,)))
    trainable, frozen = start()
    halves = [rows_of(batch(), half).packed((2, G), skips=made.skips) for half in (slice(0, 2), slice(2, 4))]
    scored = ScoredBatch(np.ravel(batch().rewards), np.ravel(batch().valid), {}, [])
    state, metrics, advantages = mini_batches.run(made.init(trainable), halves, frozen, scored)

    (ref, mask), trainable = plain_reference(), start()[0]
    valid, rewards = np.asarray(batch().valid), np.asarray(batch().rewards, np.float64)
    expected = plain_advantages(np.asarray(batch().rewards), scaled=False) / (rewards[valid].std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    own = [mask * (np.arange(N)[:, None] // (N // 2) == half) for half in (0, 1)]
    weights = [as_float32(rows / rows.sum()) for rows in own]
    run = functools.partial(plain_adapter_gradient(), ref=ref, advantages=as_float32(expected), beta=0.1)
    (first_loss, old), first = run(trainable, None, weights=weights[0])
    middle = jax.tree.map(as_float32, plain_adamw(trainable, [first]))
    (loss, logps), second = run(middle, old, weights=weights[1])
    assert_near_in_norm(state.opt_state[1], second, 1e-3)
    assert_same_step(state.trainable, plain_adamw(trainable, [first, second]))
    assert metrics["loss"] == pytest.approx((float(first_loss) + float(loss)) / 2, abs=1e-4)
    ratio, sign = np.exp(np.asarray(logps - old)), np.sign(expected)[:, None]
    clipped = (((ratio > 1.2) & (sign > 0)) | ((ratio < 0.8) & (sign < 0)))[own[1] > 0].mean()
    assert clipped > 0.02  # so that clipping is seen
    assert metrics["clip_ratio/region"] == pytest.approx(clipped / 2, abs=1e-3)
    assert metrics["reward/std"] == pytest.approx(rewards[valid].std(ddof=1), rel=1e-5)
    assert metrics["reward/frac_zero_std"] == 0.25
    assert (int(state.step), metrics["update/skipped"]) == (2, 0.0)


def rows_of(padded: PaddedBatch, prompts: slice) -> PaddedBatch:
    """Some prompts of a batch with their completions."""
    rows = slice(prompts.start * G, prompts.stop * G)
    of_rows = {name: getattr(padded, name)[rows] for name in ("completion_ids", "completion_mask", "sampler_logprobs")}
    of_prompts = {name: getattr(padded, name)[prompts] for name in ("prompt_ids", "prompt_lengths", "rewards", "valid")}
    return PaddedBatch(**of_rows, **of_prompts)


def test_kl_in_the_reward_comes_off_before_the_advantage() -> None:
    _, gradient, metrics, advantages = update(OBJECTIVES["cispo, KL in the reward"])
    (ref, mask), trainable = plain_reference(), start()[0]
    own = plain_token_logps(plain_model(FAMILY, LORA.scale)(plain_table()[0], trainable))
    k1 = np.where(mask, np.asarray(own) - np.asarray(ref), 0).sum(axis=1)
    expected = as_float32(plain_advantages(np.asarray(batch().rewards) - 0.3 * k1.reshape(B, G)))
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-3)
    # At ratio 1, where no bound is met, cispo's gradient is that of the clipped loss.
    _, plain = plain_adapter_gradient()(trainable, None, ref, expected, as_float32(mask / mask.sum()), 0.0)
    assert_near_in_norm(gradient, plain, 1e-3)
    assert metrics["kl_divergence"] > 0
    assert metrics["loss"] == metrics["policy_loss"]
    assert metrics["reward/mean"] == pytest.approx(np.nanmean(np.asarray(batch().rewards)), abs=1e-6)


@functools.cache
def truncation(name: str) -> Truncation:
    """Stops that no completion has; its tokens are any, so that most have to be added to the truncated set."""
    unused = set(range(golden_config(FAMILY)["vocab_size"])) - set(
        np.asarray(batch().completion_ids)[batch().completion_mask].tolist()
    )
    ban = Truncation(stop_ids=tuple(sorted(unused)[::3]), min_length=3)
    return ban if name == "ban" else dataclasses.replace(ban, top_k=30, top_p=0.9, min_p=0.02)


TRUNCATIONS = ("truncated, ban", "ban")


def plain_sets(logits: np.ndarray, truncation: Truncation) -> np.ndarray:
    """[N, C, V] True = stays, from logits over the temperature, by sorting."""
    stay = np.zeros(logits.shape, bool)
    for n, t in np.ndindex(N, C):
        row = np.asarray(logits[n, t], np.float64).copy()
        if t < truncation.min_length:
            row[list(truncation.stop_ids)] = -np.inf
        stay[n, t] = staying_tokens(row, truncation.top_k, truncation.top_p, truncation.min_p) & (row > -np.inf)
        stay[n, t, int(batch().completion_ids[n, t])] = True
    return stay


def plain_scaled(adapters: Params) -> Any:
    """[N, C, V] logits over the temperature that predict the completions."""
    logits = plain_model(FAMILY, LORA.scale)(plain_table()[0], adapters)
    return jnp.take_along_axis(logits, jnp.asarray(plain_table()[1])[:, :, None], axis=1) / TEMPERATURE


@functools.cache
def plain_truncated_gradient() -> Callable[..., Any]:
    """Jitted (adapters, sets, old or None, ref, advantages, weights, beta) → (loss, both log-probabilities), gradient."""

    def loss(adapters: Params, stay: Any, old: Any, ref: Any, advantages: Any, weights: Any, beta: Any) -> Any:
        logits = plain_scaled(adapters)
        own = jnp.take_along_axis(logits, batch().completion_ids[:, :, None], axis=-1)[:, :, 0]
        logps = own - jnp.log(jnp.sum(jnp.exp(logits) * stay, axis=-1))
        untruncated = own - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        before = jax.lax.stop_gradient(logps) if old is None else old
        policy = plain_loss(logps, before, logps, advantages, weights, 0.0)
        d = ref - untruncated
        kl = jnp.sum(weights * beta * jnp.exp(logps - before) * (jnp.exp(d) - d - 1))
        return policy + kl, (logps, untruncated)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def plain_truncated(
    adapters: Params, truncation: Truncation, old: Any, ref: Any, advantages: Any, weights: Any, beta: float
) -> tuple[float, Any, Any, Params]:
    """Loss, truncated and untruncated log-probabilities, and gradient; whole logits, sets by sorting and held constant."""
    stay = as_float32(plain_sets(np.asarray(plain_scaled(adapters)), truncation))
    (value, (logps, untruncated)), gradient = plain_truncated_gradient()(adapters, stay, old, ref, advantages, weights, beta)
    return float(value), logps, untruncated, gradient


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_one_update_on_what_was_sampled_from_is_that_of_whole_logits_and_sorting(name: str) -> None:
    trained, gradient, metrics, advantages = update(OBJECTIVES["dapo"], truncation=truncation(name))
    (ref, mask), trainable = plain_reference(), start()[0]
    weights = as_float32(mask / mask.sum())
    value, logps, untruncated, expected = plain_truncated(
        trainable, truncation(name), None, ref, as_float32(advantages), weights, 0.1
    )
    assert np.abs(np.asarray(logps - untruncated))[mask].max() > 0.1  # so that a mistake is seen
    assert_near_in_norm(gradient, expected, 1e-4)
    assert np.linalg.norm(flat(gradient) - flat(update(OBJECTIVES["dapo"])[1])) > 0.01 * np.linalg.norm(flat(expected))
    assert metrics["loss"] == pytest.approx(value, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(-float((advantages[:, None] * weights).sum()), abs=1e-5)  # every ratio is 1
    assert metrics["clip_ratio/region"] == 0
    d = np.asarray(ref - untruncated, np.float64)[mask]
    assert metrics["kl_divergence"] == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-3)
    difference = np.abs(np.asarray(logps) - np.asarray(batch().sampler_logprobs))[mask]
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(difference.max(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(update(OBJECTIVES["dapo"])[2]["entropy"], rel=1e-5)
    assert_same_step(trained, plain_adamw(trainable, [expected]))


def test_the_second_update_finds_the_sets_of_the_policy_as_it_is_then() -> None:
    cut = truncation("truncated, ban")
    _, gradient, metrics, advantages = update(OBJECTIVES["dr_grpo, two updates"], truncation=cut)
    (ref, mask), trainable = plain_reference(), start()[0]
    given = (ref, as_float32(advantages), as_float32(mask / (N * MAX_LENGTH)), 0.0)
    _, old, _, first = plain_truncated(trainable, cut, None, *given)
    middle = jax.tree.map(as_float32, plain_adamw(trainable, [first]))
    value, logps, _, second = plain_truncated(middle, cut, old, *given)
    assert_near_in_norm(gradient, second, 1e-3)
    assert metrics["loss"] == pytest.approx(value, abs=1e-4)
    assert np.all(np.isfinite(np.asarray(logps - old)[mask]))


TRUNCATED_CUTS = [pytest.param("truncated, ban", True, marks=pytest.mark.slow), ("ban", False)]


@pytest.mark.parametrize(("name", "full"), TRUNCATED_CUTS)
def test_the_micro_batch_changes_nothing_on_what_was_sampled_from(name: str, full: bool) -> None:
    _, gradient, metrics, _ = update(OBJECTIVES["dapo"], full=full, truncation=truncation(name))
    _, cut_gradient, cut_metrics, _ = update(OBJECTIVES["dapo"], (2, 2), full, truncation(name))
    assert_near_in_norm(cut_gradient, gradient)
    for key, value in metrics.items():
        assert cut_metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_truncation_that_cuts_nothing_off_changes_nothing(full: bool) -> None:
    """Also holds the form that computes logits again to the one-pass head."""
    _, gradient, metrics, _ = update(OBJECTIVES["dapo"], full=full)
    everything = Truncation(top_k=golden_config(FAMILY)["vocab_size"])
    _, other_gradient, other_metrics, _ = update(OBJECTIVES["dapo"], full=full, truncation=everything)
    assert_near_in_norm(other_gradient, gradient)
    for key, value in metrics.items():
        assert other_metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_there_is_no_kl_where_the_policy_is_the_reference_whatever_sampling_cut_off(name: str) -> None:
    """And none of its gradient: with equal rewards nothing moves."""
    trainable, frozen = start()
    equal = dataclasses.replace(batch(), rewards=jnp.full((B, G), 0.7, jnp.float32))
    same = Frozen(frozen.base, jax.tree.map(jnp.copy, trainable))
    state, packed = program(OBJECTIVES["dapo"], truncation=truncation(name))(trainable, equal, same)
    assert packed.to_dict()["kl_divergence"] < 1e-10
    assert np.linalg.norm(flat(state.opt_state[1])) < 1e-4


def test_kl_in_the_reward_is_that_of_whole_distributions_whatever_sampling_cut_off() -> None:
    objective = OBJECTIVES["cispo, KL in the reward"]
    _, gradient, metrics, advantages = update(objective, truncation=truncation("truncated, ban"))
    _, _, plain_metrics, plain_kl_advantages = update(objective)
    np.testing.assert_allclose(advantages, plain_kl_advantages, rtol=0, atol=1e-4)
    assert metrics["kl_divergence"] == pytest.approx(plain_metrics["kl_divergence"], rel=1e-4)
    ref, mask = plain_reference()
    *_, expected = plain_truncated(
        start()[0], truncation("truncated, ban"), None, ref, as_float32(advantages), as_float32(mask / mask.sum()), 0.0
    )
    assert_near_in_norm(gradient, expected, 1e-3)  # at ratio 1 cispo's gradient is that of the clipped loss


def test_full_fine_tuning_trains_every_weight_by_its_own_gradient() -> None:
    trained, gradient, _, _ = update(OBJECTIVES["dapo"], full=True)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, trained))
    trainable, frozen = start(full=True)
    assert frozen.reference is not None
    config, table = golden_config(FAMILY), plain_table()[0]

    def tensors(params: Params) -> Params:
        """Hugging Face's names for what this test looks at; the rest unchanged."""
        weights: Params = {name: jnp.asarray(array) for name, array in model_tensors(FAMILY).items()}
        weights["model.embed_tokens.weight"] = params["embed"]["embedding"]
        weights["model.norm.weight"] = params["final_norm"]["scale"]
        modules = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffw_norm"} | {
            f"{block}.{name}": name
            for block, names in {"self_attn": "q_proj k_proj v_proj o_proj", "mlp": "gate_proj up_proj down_proj"}.items()
            for name in names.split()
        }
        for name, ours in modules.items():
            for number in range(config["num_hidden_layers"]):
                for leaf, value in params["layers"][ours].items():
                    one = value[number].T if leaf == "kernel" else value[number]
                    weights[f"model.layers.{number}.{name}.{'bias' if leaf == 'bias' else 'weight'}"] = one
        return weights

    def logps_of(params: Params) -> Any:
        weights = tensors(params)
        return plain_token_logps(jax.vmap(lambda row: plain_logits(config, weights, row))(table))

    mask = plain_reference()[1]
    advantages, weights = as_float32(plain_advantages(np.asarray(batch().rewards))), as_float32(mask / mask.sum())

    @jax.jit
    def plain(params: Params, reference: Params) -> Params:
        def loss(params: Params) -> Any:
            logps = logps_of(params)
            return plain_loss(logps, jax.lax.stop_gradient(logps), logps_of(reference), advantages, weights, 0.1)

        return jax.grad(loss)(params)

    expected = plain(trainable, frozen.reference)
    for path, got in jax.tree_util.tree_leaves_with_path(gradient):
        theirs = functools.reduce(lambda node, key: node[key.key], path, expected)
        assert float(jnp.linalg.norm(theirs)) > 0, path
        assert_near_in_norm(got, theirs, 1e-3)
    assert_near_in_norm(gradient, expected, 1e-4)


def test_equal_rewards_and_no_kl_change_nothing_and_are_counted() -> None:
    trainable, frozen = start()
    equal = dataclasses.replace(batch(), rewards=jnp.full((B, G), 0.7, jnp.float32))
    before = jax.tree.map(np.asarray, learner(OBJECTIVES["dr_grpo, two updates"]).init(jax.tree.map(jnp.copy, trainable)))
    state, packed = program(OBJECTIVES["dr_grpo, two updates"])(trainable, equal, frozen)
    metrics, advantages = packed.to_host()
    assert np.all(advantages == 0)
    assert (metrics["loss"], metrics["grad_norm"], metrics["reward/frac_zero_std"]) == (0.0, 0.0, 1.0)
    assert (metrics["update/zero_gradient"], metrics["update/skipped"]) == (2, 0)
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), state) == jax.tree.map(lambda leaf: leaf.tobytes(), before)


@pytest.mark.parametrize(
    ("name", "cut", "updates"), [("dapo", (1, 1), 1), pytest.param("gspo, two updates", (B, 2), 2, marks=pytest.mark.slow)]
)
def test_a_step_with_one_poisoned_micro_batch_changes_nothing_and_is_counted(name: str, cut: tuple[int, int], updates: int) -> None:
    """The ids of one prompt have no embedding, so that the loss and the gradient of its completions are NaN."""
    poisoned = np.array(batch().prompt_ids)
    poisoned[2] = 10**6
    trainable, frozen = start()
    before = jax.tree.map(np.asarray, learner(OBJECTIVES[name]).init(jax.tree.map(jnp.copy, trainable)))
    state, packed = program(OBJECTIVES[name], cut)(
        trainable, dataclasses.replace(batch(), prompt_ids=jnp.asarray(poisoned)), frozen
    )
    metrics, _ = packed.to_host()
    assert np.isnan(metrics["grad_norm"])
    assert np.isnan(metrics["loss"])
    assert metrics["update/skipped"] == updates
    assert metrics["learning_rate"] == pytest.approx(0.01)  # no update was made before the last one
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), state) == jax.tree.map(lambda leaf: leaf.tobytes(), before)
    assert update(OBJECTIVES[name], cut)[2]["update/skipped"] == 0


@pytest.mark.parametrize(
    ("name", "cut"), [("dr_grpo, two updates", (1, 2)), pytest.param("gspo, two updates", (1, G), marks=pytest.mark.slow)]
)
def test_groups_without_advantage_are_not_computed_where_there_is_no_kl_term(name: str, cut: tuple[int, int]) -> None:
    """Three of four groups have equal rewards. Their prompts are ids that no embedding has: computed, they would make all NaN."""
    objective = dataclasses.replace(OBJECTIVES[name], beta=0.0)
    rewards = np.array(batch().rewards)
    rewards[0], rewards[2] = 1.0, -1.0
    equal = dataclasses.replace(batch(), rewards=jnp.asarray(rewards))
    poisoned = np.array(equal.prompt_ids)
    poisoned[[0, 2, 3]] = 10**6

    def gradient_of(
        batch: PaddedBatch, cut: tuple[int, int], objective: ObjectiveConfig = objective
    ) -> tuple[np.ndarray, dict[str, float], np.ndarray]:
        trainable, frozen = start()
        state, packed = program(objective, cut)(trainable, batch, frozen)
        return flat(state.opt_state[1]), *packed.to_host()

    gradient, metrics, advantages = gradient_of(equal, (B, G))
    assert np.linalg.norm(gradient) > 0
    assert metrics["reward/frac_zero_std"] == 0.75
    unknown = dataclasses.replace(equal, prompt_ids=jnp.asarray(poisoned))
    assert np.isnan(gradient_of(unknown, (B, G), OBJECTIVES["dapo"])[1]["grad_norm"])  # with a KL term all are computed
    own, own_metrics, own_advantages = gradient_of(unknown, cut)
    assert np.linalg.norm(own - gradient) <= 1e-5 * np.linalg.norm(gradient)
    assert np.array_equal(advantages, own_advantages)
    assert own_metrics == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in metrics.items()}


def test_a_batch_without_a_trained_token_changes_nothing() -> None:
    trainable, frozen = start()
    nothing = dataclasses.replace(batch(), completion_mask=jnp.zeros((N, C), bool))
    state, packed = program(OBJECTIVES["dapo"])(trainable, nothing, frozen)
    assert np.all(flat(state.opt_state[1]) == 0)
    assert all(np.isfinite(value) for value in packed.to_dict().values())


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("iterations", [1, 2])
def test_no_forward_pass_that_is_not_needed(monkeypatch: pytest.MonkeyPatch, beta: float, iterations: int) -> None:
    """One pass with a gradient; the reference's only where there is a KL term; never one for the old log-probabilities."""
    seen: list[bool] = []
    inner = batch_logprobs.row_outputs

    def counted(model: Any, variables: Params, *rest: Any, **options: Any) -> Any:
        seen.append("lora" in variables)
        return inner(model, variables, *rest, **options)

    monkeypatch.setattr(batch_logprobs, "row_outputs", counted)
    made = learner(ObjectiveConfig(beta=beta, num_iterations=iterations))
    trainable, frozen = start()
    jax.eval_shape(functools.partial(train_step, made), made.init(trainable), batch().packed((B, G)), Frozen(frozen.base, {}))
    assert set(seen) == ({True, False} if beta else {True})
    assert seen.count(False) <= len(batch().packed((B, G)).micro_batches)  # once a size of rows


def test_without_a_kl_term_full_fine_tuning_needs_no_reference() -> None:
    made = learner(ObjectiveConfig(beta=0.0), full=True)
    _, metrics = jax.eval_shape(
        functools.partial(train_step, made), made.init(start(full=True)[0]), batch().packed((B, G)), Frozen({}, None)
    )
    assert "kl_divergence" not in metrics.names


def test_the_first_step_of_a_run_has_no_kl_and_clips_nothing() -> None:
    """New adapters start as the base; log-probabilities that the sampler returned are the trainer's."""
    policy = tiny_policy(FAMILY, LORA)
    assert policy.adapters is not None
    fresh = {
        "layers": {
            name: {"a": jnp.copy(pair["a"]), "b": jnp.zeros_like(pair["b"])} for name, pair in policy.adapters["layers"].items()
        }
    }
    prompts = [np.asarray(batch().prompt_ids)[row // G, : PROMPT_LENGTHS[row // G]].tolist() for row in range(N)]
    completions = [np.asarray(batch().completion_ids)[row, : LENGTHS[row]].tolist() for row in range(N)]
    sampled = tiny_policy(FAMILY).logprobs(prompts, completions, temperature=TEMPERATURE)
    table = np.zeros((N, C), np.float32)
    for row, values in enumerate(sampled):
        table[row, : len(values)] = values
    given = dataclasses.replace(batch(), sampler_logprobs=jnp.asarray(table))
    state, packed = program(OBJECTIVES["dapo"])(fresh, given, Frozen(policy.params, {}))
    metrics = packed.to_dict()
    assert metrics["kl_divergence"] < 1e-10  # two compiled passes: d² / 2 with d near 1e-6
    assert metrics["clip_ratio/region"] == 0
    assert metrics["sampling/logp_difference/max"] < 5e-5  # float32 keeps 7 digits of up to 20 nats
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"], abs=1e-8)
    assert np.all(np.isfinite(flat(state.trainable)))


def test_training_from_an_adapter_takes_its_frozen_state_as_the_reference() -> None:
    trainable, frozen = start()
    run = program(OBJECTIVES["dapo"])
    _, own = run(jax.tree.map(jnp.copy, trainable), batch(), Frozen(frozen.base, trainable))
    _, base = run(jax.tree.map(jnp.copy, trainable), batch(), Frozen(frozen.base, {}))
    assert own.to_dict()["kl_divergence"] < 1e-10
    ref = plain_token_logps(plain_model(FAMILY)(plain_table()[0]))
    d = np.asarray(ref - plain_token_logps(plain_model(FAMILY, LORA.scale)(plain_table()[0], trainable)), np.float64)[
        plain_reference()[1]
    ]
    assert base.to_dict()["kl_divergence"] == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-3)


def test_the_state_is_donated_and_nothing_else() -> None:
    trainable, frozen = start()
    before = flat(frozen.base)
    after, _ = program(OBJECTIVES["dapo"])(trainable, batch(), frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, frozen)))
    assert np.array_equal(flat(frozen.base), before)


def test_metrics_come_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    trainable, frozen = start()
    _, packed = program(OBJECTIVES["dapo"])(trainable, batch(), frozen)
    fetched: list[Any] = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    metrics, advantages = packed.to_host()
    assert len(fetched) == 1
    assert len(jax.tree.leaves(packed)) == 1
    assert advantages.shape == (N,)
    assert set(packed.names) == set(metrics)
    assert set(packed.to_dict()) == set(metrics)


def test_completions_without_a_trained_token_are_not_computed() -> None:
    """Their tokens are ids that no embedding has: computed, they would make all NaN."""
    poisoned = np.array(batch().completion_ids)
    poisoned[9] = 10**6
    _, gradient, metrics, _ = update(OBJECTIVES["dapo"])
    trainable, frozen = start()
    unknown = dataclasses.replace(batch(), completion_ids=jnp.asarray(poisoned))
    state, packed = program(OBJECTIVES["dapo"])(trainable, unknown, frozen)
    assert np.array_equal(flat(state.opt_state[1]), flat(gradient))
    assert packed.to_dict() == metrics


def test_micro_batches_without_tokens_are_not_computed() -> None:
    """The batch needs two rows of the four that the longest texts would; in the others a token could only add NaN."""
    packed = batch().packed((1, G))
    used = micro_batches_used(packed)
    assert sum(used) < sum(part.completions.shape[0] for part in packed.micro_batches)
    largest = packed.micro_batches[0]
    poisoned = np.array(largest.rows.ids)
    poisoned[used[0] :] = 10**6
    rows = largest.rows.replace(ids=jnp.asarray(poisoned))
    trainable, frozen = start()
    made = learner(OBJECTIVES["dapo"])
    changed = packed.replace(micro_batches=(largest.replace(rows=rows), *packed.micro_batches[1:]))
    state, _ = jax.jit(functools.partial(train_step, made))(made.init(trainable), changed, frozen)
    assert_near_in_norm(state.opt_state[1], update(OBJECTIVES["dapo"])[1])


@pytest.mark.parametrize("full", [False, True])
def test_no_update_ever_holds_rows_by_tokens_by_vocabulary(full: bool) -> None:
    vocabulary, rows, tokens = 60_000, 8, 256
    spec = read_spec(golden_config("llama2") | {"vocab_size": vocabulary})
    lora = LoraConfig(rank=2)
    model = Transformer(spec, jnp.dtype("float32"), lora.scale, "layer")
    made = learner(ObjectiveConfig(beta=0.1, num_iterations=2), model=model, full=full)
    base = abstract_params(spec, "float32")
    shape: Any = jax.ShapeDtypeStruct
    adapters = nest({path: shape(p.shape, jnp.float32) for path, p in lora_specs(spec, 2, lora.target_names).items()})
    trainable = base if full else adapters
    state = jax.eval_shape(made.init, trainable)
    given = shapes_of(2, 4, 32, tokens, (2, 4))
    frozen = Frozen({}, base) if full else Frozen(base, {})
    assert array_sizes(jax.make_jaxpr(functools.partial(train_step, made))(state, given, frozen)) < rows * tokens * vocabulary / 10
