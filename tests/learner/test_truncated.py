"""Log-probabilities under truncated distributions and banned stop tokens, against float64 and sorting."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import log_softmax, quick_compiling, staying_tokens
from tiny_runs import config_of, run

from grpo_jax.config import ObjectiveConfig, RolloutConfig
from grpo_jax.learner import truncated
from grpo_jax.learner.loss import grpo_loss
from grpo_jax.learner.truncated import Truncation, separating_logit
from grpo_jax.rollout.sampling import Thresholds, truncate
from grpo_kernels import head_logprob

N, C, D, V = 3, 5, 16, 37
STOPS = (2, 5, 30)

TRUNCATIONS = {
    "top_k": Truncation(top_k=4),
    "top_p": Truncation(top_p=0.8),
    "min_p": Truncation(min_p=0.1),
    "all": Truncation(top_k=9, top_p=0.9, min_p=0.05),
    "all, ban": Truncation(top_k=5, top_p=0.9, min_p=0.05, stop_ids=STOPS, min_length=3),
    "ban": Truncation(stop_ids=STOPS, min_length=3),
    "ban everywhere": Truncation(stop_ids=STOPS, min_length=9),
    "ban of most tokens": Truncation(stop_ids=tuple(range(3, 33)), min_length=9),
    "stop beyond the head": Truncation(stop_ids=(*STOPS, V), min_length=3),
    "nothing": Truncation(),
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@functools.cache
def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [N, C, D], head [V, D], tokens [N, C]: half of them the most probable ones, half of them any; no stops."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(N, C, D)).astype(np.float32), (rng.normal(size=(V, D)) * 0.7).astype(np.float32)
    logits = hidden @ head.T
    logits[:, :, 2:33] -= 100
    ids = np.where(rng.random((N, C)) < 0.5, logits.argmax(axis=-1), rng.choice([0, 1, 33, 34, 35, 36], (N, C)))
    return hidden, head, ids.astype(np.int32)


def plain(
    hidden: Any, head: Any, ids: np.ndarray, truncation: Truncation, temperature: float, softcap: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Computes the three results in float64, token by token, and how many sampled tokens had to be added to the set."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits / temperature
    results, added = np.zeros((3, *ids.shape)), 0
    for n, t in np.ndindex(*ids.shape):
        row, y = logits[n, t], ids[n, t]
        allowed = row.copy()
        if t < truncation.min_length:
            allowed[[s for s in truncation.stop_ids if s < len(row)]] = -np.inf
        stay = staying_tokens(allowed, truncation.top_k, truncation.top_p, truncation.min_p) & (allowed > -np.inf)
        added += not stay[y]
        stay[y] = True
        untruncated = log_softmax(row)
        results[:, n, t] = row[y] - np.log(np.exp(row[stay]).sum()), untruncated[y], -(np.exp(untruncated) * untruncated).sum()
    return results[0], results[1], results[2], added


def truncated_logprobs(hidden: Any, head: Any, ids: Any, truncation: Truncation, **options: Any) -> tuple[Any, ...]:
    """The function of flat tokens, applied to tables: hidden [N, C, D], ids [N, C]."""
    n, c = ids.shape
    columns = jnp.tile(jnp.arange(c, dtype=jnp.int32), n)
    flat = jnp.reshape(hidden, (n * c, -1)), head, jnp.reshape(ids, -1), columns
    return tuple(x.reshape(n, c) for x in truncated.truncated_logprobs(*flat, truncation, **options))


def ours(
    hidden: Any, head: Any, ids: Any, truncation: Truncation, temperature: float = 1.0, softcap: float | None = None, **more: Any
) -> tuple[Any, Any, Any]:
    run = functools.partial(truncated_logprobs, truncation=truncation, temperature=temperature, softcap=softcap, **more)
    return jax.jit(run)(hidden, head, ids)


SOFTCAPPED = ("top_p", "all, ban", "ban", "nothing")
CASES = [(name, None) for name in TRUNCATIONS] + [(name, 3.0) for name in SOFTCAPPED]


@functools.cache
def values_and_gradients(name: str, softcap: float | None, trainable: bool) -> Any:
    """The three results, and the gradients of a weighted sum of both log-probabilities."""
    hidden, head, ids = problem()
    weights = sum_weights().astype(np.float32)

    def scalar(hidden: Any, head: Any) -> Any:
        found = truncated_logprobs(
            hidden, head, jnp.asarray(ids), TRUNCATIONS[name], temperature=0.7, softcap=softcap, head_trainable=trainable
        )
        return jnp.sum(found[0] * weights[0] + found[1] * weights[1]), found

    gradients, found = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, head)
    return jax.device_get(found), jax.device_get(gradients)


def sum_weights() -> np.ndarray:
    """[2, N, C] weights of the truncated and the untruncated log-probabilities in a scalar."""
    return np.random.default_rng(1).normal(size=(2, N, C))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("name", "softcap"), CASES)
def test_values_are_those_of_sorting_in_float64(name: str, softcap: float | None, trainable: bool) -> None:
    truncation = TRUNCATIONS[name]
    logps, untruncated, entropy, added = plain(*problem(), truncation, 0.7, softcap)
    got = values_and_gradients(name, softcap, trainable)[0]
    for ours_, theirs in zip(got, (logps, untruncated, entropy), strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=0, atol=1e-5)  # float32 keeps 7 digits of up to 20 nats
    if truncation.truncates:
        assert 0 < added < N * C  # some sampled tokens were in the set, others had to be added
        assert np.all(got[0] >= untruncated)
    else:  # after the ban they are the same
        late = np.arange(C) >= truncation.min_length
        assert np.array_equal(got[0][:, late], got[1][:, late])


@pytest.mark.parametrize(("name", "softcap"), CASES)
def test_gradients_are_those_of_differences_in_float64(name: str, softcap: float | None) -> None:
    """Of a weighted sum of both log-probabilities, along random directions; the set does not change over so small a step."""
    truncation, (hidden, head, ids), weights = TRUNCATIONS[name], problem(), sum_weights()

    def exact(hidden: np.ndarray, head: np.ndarray) -> float:
        logps, untruncated, *_ = plain(hidden, head, ids, truncation, 0.7, softcap)
        return float((logps * weights[0] + untruncated * weights[1]).sum())

    frozen, none = values_and_gradients(name, softcap, False)[1]
    of_hidden, of_head = values_and_gradients(name, softcap, True)[1]
    assert np.all(none == 0)
    rng, h = np.random.default_rng(2), 1e-6
    for _ in range(4):
        dx, dw = rng.normal(size=hidden.shape), rng.normal(size=head.shape)
        along_x = (exact(hidden + h * dx, head) - exact(hidden - h * dx, head)) / (2 * h)
        along_w = (exact(hidden, head + h * dw) - exact(hidden, head - h * dw)) / (2 * h)
        size = float(np.linalg.norm(of_hidden))
        np.testing.assert_allclose([np.sum(frozen * dx), np.sum(of_hidden * dx)], along_x, rtol=0, atol=1e-5 * size)
        np.testing.assert_allclose(np.sum(of_head * dw), along_w, rtol=0, atol=1e-5 * float(np.linalg.norm(of_head)))


def logits_as_hidden(logits: np.ndarray, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hidden states that are the logits, an identity head, and ids, one token a row."""
    return np.asarray(logits, np.float32)[:, None], np.eye(logits.shape[1], dtype=np.float32), np.array(ids, np.int32)[:, None]


def test_hand_worked_values() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]] * 4))
    arguments = logits_as_hidden(logits, [0, 1, 2, 3])
    got = ours(*arguments, Truncation(top_p=0.7))[0][:, 0]  # {0, 1} stay; 2 and 3 are added where they were sampled
    np.testing.assert_allclose(got, np.log([0.5 / 0.75, 0.25 / 0.75, 0.15 / 0.9, 0.1 / 0.85]), atol=1e-6)
    logps, untruncated, _ = ours(*arguments, Truncation(top_k=1, stop_ids=(0,), min_length=1))  # {1}, and what was sampled
    np.testing.assert_allclose(logps[1:, 0], np.log([1, 0.15 / 0.4, 0.1 / 0.35]), atol=1e-6)
    np.testing.assert_allclose(untruncated[:, 0], logits[0], atol=1e-6)
    logps, untruncated, _ = ours(*arguments, Truncation(stop_ids=(0, 3), min_length=1))
    np.testing.assert_allclose(logps[1:3, 0], np.log([0.625, 0.375]), atol=1e-6)
    np.testing.assert_allclose(untruncated[1:3, 0], logits[0, 1:3], atol=1e-6)


def test_ties_at_the_threshold_stay_together() -> None:
    arguments = logits_as_hidden(np.array([[2.0, 1.0, 2.0, 1.0, 0.0]] * 2), [0, 1])
    e = np.e
    np.testing.assert_allclose(ours(*arguments, Truncation(top_k=1))[0][:, 0], [np.log(1 / 2), np.log(1 / (2 * e + 1))], atol=1e-6)
    np.testing.assert_allclose(
        ours(*arguments, Truncation(top_k=3))[0][:, 0], np.log([e / (2 * e + 2), 1 / (2 * e + 2)]), atol=1e-6
    )


@pytest.mark.parametrize("sure", [5.0, 20.0, 60.0])
def test_a_ban_keeps_its_precision_where_the_model_is_sure_to_stop(sure: float) -> None:
    """1 − e⁻⁶⁰ is 1 in float32, and the rest of the distribution would be gone."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, 50)) * 2
    logits[:, 7] += sure
    hidden, head, ids = logits_as_hidden(logits, [0, 1, 2, 40, 41, 42])
    truncation = Truncation(stop_ids=(7, 8), min_length=1)
    logps, untruncated, entropy, _ = plain(hidden, head, ids, truncation, 1.0, None)
    got = ours(hidden, head, ids, truncation)
    np.testing.assert_allclose(got[0], logps, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[1], untruncated, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(got[2], entropy, rtol=0, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(truncated_logprobs(x, jnp.asarray(head), jnp.asarray(ids), truncation)[0])))(
        hidden
    )
    allowed = np.where(np.isin(np.arange(50), (7, 8)), -np.inf, logits)
    expected = np.eye(50)[ids[:, 0]] - np.exp(log_softmax(allowed))
    np.testing.assert_allclose(gradient[:, 0], expected, rtol=0, atol=2e-6)


def test_a_likely_token_whose_row_is_copied_costs_no_precision() -> None:
    """The row of token 0 is copied over the stop's, and has nearly all of the probability."""
    logits = np.array([[30.0, 1.0, 2.0, 25.0, 3.0]])
    arguments = logits_as_hidden(logits, [4])
    logps, *_ = plain(*arguments, Truncation(stop_ids=(3,), min_length=1), 1.0, None)
    np.testing.assert_allclose(ours(*arguments, Truncation(stop_ids=(3,), min_length=1))[0], logps, rtol=1e-6)


@pytest.mark.parametrize("name", ["all, ban", "ban"])
def test_a_banned_token_in_the_padding_gives_finite_numbers_and_gradients(name: str) -> None:
    hidden, head, _ = problem()
    ids = np.full((N, C), STOPS[0], np.int32)

    def scalar(hidden: Any) -> Any:
        logps, untruncated, _ = truncated_logprobs(hidden, jnp.asarray(head), jnp.asarray(ids), TRUNCATIONS[name])
        return jnp.sum(logps + untruncated)

    value, gradient = jax.jit(jax.value_and_grad(scalar))(hidden)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_a_ban_of_every_token_is_refused() -> None:
    hidden, head, ids = problem()
    with pytest.raises(ValueError, match="all 37 tokens are stop ids"):
        ours(hidden, head, ids, Truncation(stop_ids=tuple(range(V)), min_length=2))


def test_a_truncation_that_does_nothing_is_the_plain_log_probability() -> None:
    hidden, head, ids = problem()
    logps, entropy, _ = jax.jit(head_logprob)(hidden.reshape(-1, D), head, ids.reshape(-1))
    got = ours(hidden, head, ids, Truncation())
    for ours_, theirs in zip(got, (logps, logps, entropy), strict=True):
        np.testing.assert_array_equal(np.ravel(ours_), theirs)


def test_settings_make_a_truncation_only_where_sampling_changes_the_distribution() -> None:
    assert Truncation.of(RolloutConfig(), STOPS) is None
    assert Truncation.of(RolloutConfig(min_completion_length=3), ()) is None
    assert Truncation.of(RolloutConfig(temperature=0.5), STOPS) is None
    ban = Truncation.of(RolloutConfig(min_completion_length=3), (5, 2, 5))
    assert ban is not None
    assert ban == Truncation(stop_ids=(2, 5), min_length=3)
    assert not ban.truncates
    changes: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}]
    for change in changes:
        made = Truncation.of(RolloutConfig(**change), STOPS)
        assert made == Truncation(**change)
        assert made is not None
        assert made.truncates


def test_the_threshold_separates_exactly_what_stays() -> None:
    """Also between adjacent float32 values, with ties, and with −inf in the row."""
    rng = np.random.default_rng(3)
    near = np.float32(1) + np.arange(12, dtype=np.float32) * np.float32(2**-23)
    logits = np.concatenate(
        [
            rng.normal(size=(20, 12)),
            rng.integers(0, 4, (20, 12)),
            np.stack([rng.permutation(near) for _ in range(20)]),
            np.where(rng.random((20, 12)) < 0.5, -np.inf, rng.normal(size=(20, 12))),
        ]
    ).astype(np.float32)
    logits[-20:, 0] = 0.0
    for top_k, top_p, min_p in ((3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.4), (5, 0.6, 0.1), (12, 1.0, 0.0), (99, 1.0, 0.0)):
        settings = Thresholds(jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
        stay = np.asarray(jax.jit(truncate)(logits, settings)) & (logits > -np.inf)
        cut = np.asarray(jax.jit(separating_logit)(logits, settings))
        assert np.array_equal(logits >= cut[:, None], stay), (top_k, top_p, min_p)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, ids = problem()
    truncation = TRUNCATIONS["all, ban"]

    def scalar(hidden: Any, head: Any) -> Any:
        logps, untruncated, entropy = truncated_logprobs(hidden, head, jnp.asarray(ids), truncation, head_trainable=True)
        return jnp.sum(logps * logps + untruncated), (logps, untruncated, entropy)

    at_once = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, head)
    monkeypatch.setattr(truncated, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(truncated, "CHUNK_TOKENS", 4)  # 15 tokens: three chunks and a part of one
    parts = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, head)
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_does_not_look_for_the_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, ids = problem()
    searched: list[int] = []

    def found(logits: Any, _: Any) -> Any:
        def host(logits: np.ndarray) -> np.ndarray:
            searched.append(len(logits))
            return logits >= np.sort(logits, axis=-1)[:, -3:-2]

        return jax.pure_callback(host, jax.ShapeDtypeStruct(logits.shape, jnp.bool_), logits)

    monkeypatch.setattr(truncated, "truncate", found)
    monkeypatch.setattr(truncated, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(truncated, "CHUNK_TOKENS", 5)

    def scalar(hidden: Any) -> Any:
        return jnp.sum(truncated_logprobs(hidden, jnp.asarray(head), jnp.asarray(ids), Truncation(top_k=3))[0])

    jax.block_until_ready(jax.jit(jax.grad(scalar))(hidden))
    assert searched == [5, 5, 5]


def test_the_kl_term_uses_the_untruncated_distribution_and_the_policy_term_the_truncated_one() -> None:
    rng = np.random.default_rng(4)
    logps, old, ref, untruncated = (-rng.exponential(size=(4, 3, 6))).astype(np.float32)
    mask, advantages = rng.random((3, 6)) < 0.8, np.array([1.0, -0.5, 2.0], np.float32)
    settings = ObjectiveConfig(loss="dapo", beta=0.3, kl="k3")
    value, metrics = grpo_loss(logps, old, ref, advantages, mask, settings, whole_logps=untruncated)
    x = {name: np.asarray(array, np.float64) for name, array in {"l": logps, "o": old, "r": ref, "u": untruncated}.items()}
    ratio, d, a = np.exp(x["l"] - x["o"]), x["r"] - x["u"], advantages[:, None].astype(np.float64)
    term = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    k3 = np.exp(d) - d - 1
    assert float(value) == pytest.approx(((term + 0.3 * k3) * mask).sum() / mask.sum(), rel=1e-5)
    assert float(metrics["kl_divergence"]) == pytest.approx(k3[mask].mean(), rel=1e-5)

    def loss(logps: Any, untruncated: Any) -> Any:
        return grpo_loss(logps, old, ref, advantages, mask, settings, whole_logps=untruncated)[0]

    of_logps, of_untruncated = jax.grad(loss, argnums=(0, 1))(logps, untruncated)
    cut = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    np.testing.assert_allclose(of_logps, -ratio * a * ~cut * mask / mask.sum(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(of_untruncated, 0.3 * (1 - np.exp(d)) * mask / mask.sum(), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="whole_logps has shape"):
        grpo_loss(logps, old, ref, advantages, mask, settings, whole_logps=untruncated[:, :2])


TRUNCATED: dict[str, Any] = {"top_p": 0.9, "top_k": 5, "min_p": 0.05, "temperature": 0.8, "min_completion_length": 4}


@pytest.mark.parametrize("sampling", [TRUNCATED, pytest.param({"min_completion_length": 8}, marks=pytest.mark.slow)])
def test_a_run_reports_that_sampler_and_trainer_agree(sampling: dict[str, Any], tmp_path: Path) -> None:
    done = run(config_of(tmp_path, rollout=sampling))
    assert done.printed.count("log-probabilities use the truncated distribution") == (1 if "top_p" in sampling else 0)
    for metrics in done.result.history:
        assert metrics["sampling/logp_difference/max"] < 1e-4
        assert metrics["clip_ratio/region"] == 0
    assert done.result.history[0]["kl_divergence"] < 1e-9


@pytest.mark.slow
def test_a_run_with_the_setting_off_uses_untruncated_distributions_and_prints_nothing(tmp_path: Path) -> None:
    done = run(config_of(tmp_path, objective={"match_sampling": False}, rollout=TRUNCATED, train={"steps": 1}))
    assert "truncated as sampling is" not in done.printed
    assert done.result.history[0]["sampling/logp_difference/mean"] > 0.3
