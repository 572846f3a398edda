"""The objective against hand-worked numbers and a float64 oracle that loops over rows and tokens and differentiates numerically."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling

from grpo_jax.config import ObjectiveConfig
from grpo_jax.learner.advantages import group_advantages
from grpo_jax.learner.loss import (
    finish_stats,
    grpo_loss,
    kl_per_token,
    kl_reward_penalty,
    token_weights,
    total_stats,
    weighted_loss,
)

LOSSES = ["reinforce", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"]
NEWER_LOSSES = ["gpg", "luspo", "geo_mean", "vespo", "dppo_tv", "dppo_kl"]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def objective(**settings: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**{"beta": 0.0, **settings})


def as_jax(array: Any) -> jax.Array:
    return jnp.asarray(array, bool if array.dtype == bool else jnp.float32)


@functools.cache
def program(settings: ObjectiveConfig, length: int | None) -> Any:
    """((loss, metrics), gradient) of a case, compiled."""

    def loss_of(logps: Any, old: Any, ref: Any, advantages: Any, mask: Any, sampler: Any, weights: Any) -> Any:
        options = {"sampler_logps": sampler, "weights": weights, "max_completion_length": length}
        return grpo_loss(logps, old, ref, advantages, mask, settings, **options)

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


@dataclass
class Case:
    """Arguments of `grpo_loss`, float64."""

    logps: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray

    def loss(self, settings: ObjectiveConfig, **more: Any) -> tuple[Any, dict[str, Any]]:
        return self.loss_and_gradient(settings, **more)[0]

    def gradient(self, settings: ObjectiveConfig, **more: Any) -> np.ndarray:
        return np.asarray(self.loss_and_gradient(settings, **more)[1])

    def loss_and_gradient(self, settings: ObjectiveConfig, weights: Any = None, max_completion_length: int | None = None) -> Any:
        arrays = (self.logps, self.old, self.ref, self.advantages, self.mask, self.sampler, weights)
        return program(settings, max_completion_length)(*(array if array is None else as_jax(array) for array in arrays))

    def rows(self, chosen: Any) -> Case:
        return Case(*(array[chosen] for array in (self.logps, self.old, self.ref, self.sampler, self.advantages, self.mask)))


def random_case(rows: int = 12, length: int = 7, seed: int = 0, spread: float = 0.4) -> Case:
    rng = np.random.default_rng(seed)

    def near(logps: np.ndarray) -> np.ndarray:
        return logps + rng.normal(scale=spread, size=logps.shape)

    logps = -rng.exponential(size=(rows, length))
    mask = np.arange(length) < rng.integers(1, length + 1, size=rows)[:, None]
    mask[1, 0] = False  # a hole, as a masked token in the middle of a row
    mask[2] = False
    mask[3] = True
    case = Case(logps, near(logps), near(logps), near(logps), rng.normal(size=rows), mask)
    return Case(*(array.astype(np.float32).astype(array.dtype) for array in vars(case).values()))  # exact in float32 too


# --- the oracle ---------------------------------------------------------------------------------------------------------


def oracle_kl(policy: float, reference: float, kind: str) -> float:
    d = reference - policy
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]


def oracle_weight(case: Case, s: ObjectiveConfig, i: int, t: Any) -> float:
    """The importance weight of a token."""
    if s.importance_cap is None and s.importance_floor is None:
        return 1.0
    level, kind = s.importance_mode.split("_")
    weight = 1.0
    for u in np.flatnonzero(case.mask[i]) if level == "sequence" else [t]:
        weight *= math.exp(case.old[i, u] - case.sampler[i, u])
    floor, cap = s.importance_floor or 0.0, s.importance_cap or math.inf
    if kind == "mask":
        return weight if floor <= weight <= cap else 0.0
    return min(max(weight, floor), cap)


def oracle_loss(case: Case, s: ObjectiveConfig, logps: np.ndarray, frozen: np.ndarray, constant: int | None = None) -> float:
    """Computes the module's table of losses row by row. `frozen` is used where the formula stops the gradient."""
    rows, length = case.mask.shape
    row_sums, row_tokens = np.zeros(rows), np.zeros(rows)
    for i in range(rows):
        tokens, a = np.flatnonzero(case.mask[i]), case.advantages[i]
        for t in tokens:
            base = case.sampler if s.loss in ("vespo", "dppo_tv", "dppo_kl") else case.old
            ratio = math.exp(logps[i, t] - base[i, t])
            if s.loss in ("gspo", "luspo"):
                ratio = math.exp(np.mean([logps[i, u] - case.old[i, u] for u in tokens]))
            if s.loss == "geo_mean":
                logs = [logps[i, u] - case.old[i, u] for u in tokens]
                bounded = [min(x, s.epsilon_high) if a > 0 else max(x, -s.epsilon) for x in logs]
                term = -a * math.exp(sum(bounded) / len(bounded))
            elif s.loss == "vespo":
                weight = math.exp(sum(frozen[i, u] - base[i, u] for u in tokens))
                k, scale = (2, 3) if a >= 0 else (3, 2)
                term = -(weight**k) * math.exp(scale * (1 - weight)) * a * logps[i, t]
            elif s.loss.startswith("dppo"):
                p, q = math.exp(frozen[i, t]), math.exp(base[i, t])
                tv, kl = abs(p - q), q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
                apart = tv if s.loss == "dppo_tv" else kl
                moved = (a > 0 and p > q and apart > s.epsilon_high) or (a < 0 and p < q and apart > s.epsilon)
                term = 0.0 if moved else -ratio * a
            elif s.loss in ("reinforce", "gpg"):
                term = -a * logps[i, t]
            elif s.loss == "cispo":
                term = -min(math.exp(frozen[i, t] - case.old[i, t]), s.epsilon_max) * a * logps[i, t]
            elif s.loss == "sapo":
                tau = 1.0 if a > 0 else 1.05
                term = -(4 / tau) / (1 + math.exp(-tau * (ratio - 1))) * a
            else:
                bounded = ratio if s.delta is None else min(ratio, s.delta)
                term = -min(bounded * a, min(max(ratio, 1 - s.epsilon), 1 + s.epsilon_high) * a)
            term *= oracle_weight(case, s, i, t)
            if s.off_policy_threshold is not None and a < 0:
                drift = np.mean([case.sampler[i, u] - frozen[i, u] for u in tokens])
                term *= float(drift <= s.off_policy_threshold)
            if s.beta > 0 and not s.kl_in_reward:
                of_token = math.exp(logps[i, t] - case.old[i, t]) if s.kl == "k3_corrected" else 1.0
                term += s.beta * of_token * oracle_kl(logps[i, t], case.ref[i, t], s.kl[:2])
            row_sums[i] += term
            row_tokens[i] += 1
    if s.loss in ("reinforce", "luspo"):
        return float(row_sums.mean())
    if s.loss == "dr_grpo":
        return row_sums.sum() / (rows * (length if constant is None else constant))
    if s.loss in ("bnpo", "dapo", "cispo", "gpg", "vespo", "dppo_tv", "dppo_kl"):
        return row_sums.sum() / row_tokens.sum()
    return float(np.mean(row_sums / np.maximum(row_tokens, 1)))


def oracle_gradient(case: Case, settings: ObjectiveConfig) -> np.ndarray:
    """Central differences in float64: error about 1e-9."""
    gradient, step = np.zeros(case.logps.shape), 1e-5
    for index in zip(*np.nonzero(case.mask), strict=True):
        up, down = case.logps.copy(), case.logps.copy()
        up[index] += step
        down[index] -= step
        difference = oracle_loss(case, settings, up, case.logps) - oracle_loss(case, settings, down, case.logps)
        gradient[index] = difference / (2 * step)
    return gradient


# --- hand-worked --------------------------------------------------------------------------------------------------------

# Ratios, advantages 2 and -1, logπ_old = -1 everywhere, clip range 0.8 to 1.3; the last token of row 0 is padding.
GOLDEN_RATIOS = np.array([[1.5, 0.5, 7.0], [2.0, 0.9, 0.5]])
GOLDEN = Case(
    logps=np.log(GOLDEN_RATIOS) - 1,
    old=np.full((2, 3), -1.0),
    ref=np.log(GOLDEN_RATIOS) - 1 + math.log(2),
    sampler=np.array([[-2.0, -1.0, -1.0], [-1.0, -0.5, -1.0]]),
    advantages=np.array([2.0, -1.0]),
    mask=np.array([[True, True, False], [True, True, True]]),
)


ICEPOP = {"importance_mode": "token_mask", "importance_floor": 0.9, "importance_cap": 1.2}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Terms of the clipped loss: row 0: -1.3·2, -0.5·2; row 1: +2, +0.9, +0.8.
        ({"loss": "grpo"}, (-3.6 / 2 + 3.7 / 3) / 2),
        ({"loss": "bnpo"}, 0.1 / 5),
        ({"loss": "dapo"}, 0.1 / 5),
        ({"loss": "dr_grpo"}, 0.1 / (2 * 3)),
        ({"loss": "grpo", "delta": 1.6}, (-3.6 / 2 + 3.3 / 3) / 2),  # the 2 becomes 1.6
        # Σ logπ: row 0: -2 + ln 0.75 = -2.2876821; row 1: -3 + ln 0.9 = -3.1053605.
        ({"loss": "reinforce"}, (2 * 2.2876821 - 3.1053605) / 2),
        ({"loss": "gspo"}, (-2 * 0.8660254 + 0.9654894) / 2),  # ratios sqrt(0.75) and cbrt(0.9)
        # -min(ρ, 1.2)·A·logπ: row 0: 1.4268838 + 1.6931472; row 1: -0.3682234 - 0.9948245 - 0.8465736.
        ({"loss": "cispo", "epsilon_max": 1.2}, 0.9104094 / 5),
        # Row 0: -4·2·(σ(0.5) + σ(-0.5)) = -8; row 1: (4 / 1.05)·(σ(1.05) + σ(-0.105) + σ(-0.525)) = 3.8095238·1.5862329.
        ({"loss": "sapo"}, (-8 / 2 + 6.0427920 / 3) / 2),
        ({"loss": "gpg"}, (2 * 2.2876821 - 3.1053605) / 5),
        ({"loss": "luspo"}, (-2 * 0.8660254 * 2 + 0.9654894 * 3) / 2),
        # Logs of the ratios, limited to 0.3 above where A > 0 and to -0.2 below where A < 0: means -0.1965736 and 0.1292622.
        ({"loss": "geo_mean"}, (-2 * 0.8215409 + 1.1379885) / 2),
        # W = e^0.7123179 and e^-0.6053605 against the sampler: φ = 0.1842433 and 0.4033959.
        ({"loss": "vespo"}, (0.1842433 * 2 * 2.2876821 - 0.4033959 * 3.1053605) / 5),
        # Against the sampler: ratios 4.08, 0.5; 2, 0.9·e^-0.5, 0.5. TV of those that move on: 0.42 > 0.3; 0.28 > 0.2, 0.18.
        ({"loss": "dppo_tv"}, (0 - 2 * 0.5 + 2 + 0 + 0.5) / 5),
        # KL of the same: 0.378 > 0.3; 0.158, 0.093.
        ({"loss": "dppo_kl"}, (0 - 2 * 0.5 + 2 + 0.9 * 0.6065307 + 0.5) / 5),
        # d = ln 2 at every token: k1 = -0.6931472, k2 = 0.2402265, k3 = 2 - 0.6931472 - 1; beta 0.5.
        ({"loss": "dapo", "beta": 0.5, "kl": "k1"}, 0.02 - 0.5 * 0.6931472),
        ({"loss": "dapo", "beta": 0.5, "kl": "k2"}, 0.02 + 0.5 * 0.2402265),
        ({"loss": "dapo", "beta": 0.5, "kl": "k3"}, 0.02 + 0.5 * 0.3068528),
        ({"loss": "dapo", "beta": 0.5, "kl": "k3_corrected"}, 0.02 + 0.5 * 0.3068528 * 5.4 / 5),  # the ratios' sum is 5.4
        ({"loss": "dapo", "beta": 0.5}, 0.02 + 0.5 * 0.3068528 * 5.4 / 5),  # the default
        ({"loss": "reinforce", "beta": 0.5, "kl": "k3"}, 0.7350018 + 0.5 * 0.3068528 * 5 / 2),
        ({"loss": "dapo", "beta": 0.5, "kl": "k1", "kl_in_reward": True}, 0.02),
        # π_old/π_sampler = e, 1; 1, e^-0.5, 1, capped at 1.5; the KL term is not multiplied.
        ({"loss": "dapo", "importance_cap": 1.5}, (-2.6 * 1.5 - 1.0 + 2.0 + 0.9 * 0.6065307 + 0.8) / 5),
        # The weights e and e^-0.5 are out of the bounds and become 0, or 1.2 and 0.9; those of the sequences are e and e^-0.5.
        ({"loss": "dapo", **ICEPOP}, (-1.0 + 2.0 + 0.8) / 5),
        ({"loss": "dapo", **ICEPOP, "importance_mode": "token_truncate"}, (-2.6 * 1.2 - 1.0 + 2.0 + 0.9 * 0.9 + 0.8) / 5),
        ({"loss": "dapo", "importance_mode": "sequence_mask", "importance_cap": 2.0}, 0.6065307 * 3.7 / 5),
        ({"loss": "dapo", "importance_mode": "sequence_truncate", "importance_cap": 2.0}, (-3.6 * 2 + 0.6065307 * 3.7) / 5),
        # Row 1 has A < 0 and π_sampler above π: Σ log(π_sampler/π) = 0.5 - ln 0.9, 0.2017868 a token.
        ({"loss": "dapo", "off_policy_threshold": 0.2}, -3.6 / 5),
        ({"loss": "dapo", "off_policy_threshold": 0.203}, 0.1 / 5),
        (
            {"loss": "dapo", "importance_cap": 1.5, "beta": 0.5, "kl": "k3"},
            (-2.6 * 1.5 - 1.0 + 2.0 + 0.9 * 0.6065307 + 0.8) / 5 + 0.5 * 0.3068528,
        ),
    ],
    ids=lambda value: "-".join(f"{name}={choice}" for name, choice in value.items()) if isinstance(value, dict) else "",
)
def test_hand_worked_loss(settings: dict[str, Any], expected: float) -> None:
    loss, _ = GOLDEN.loss(objective(epsilon=0.2, epsilon_high=0.3, **settings))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, atol=5e-7)


def test_dr_grpo_divides_by_the_given_length() -> None:
    loss, _ = GOLDEN.loss(objective(loss="dr_grpo", epsilon=0.2, epsilon_high=0.3), max_completion_length=10)
    np.testing.assert_allclose(loss, 0.1 / (2 * 10), atol=5e-8)


def test_hand_worked_metrics() -> None:
    settings = objective(loss="dapo", epsilon=0.2, epsilon_high=0.3, beta=0.5, kl="k1")
    _, metrics = GOLDEN.loss(settings)
    expected = {
        "policy_loss": 0.02,  # without the KL term
        "kl_divergence": 0.3068528,  # k3, though the loss has k1
        "clip_ratio/low": 1 / 5,  # ρ = 0.5 where A = -1; not the 0.5 where A = 2
        "clip_ratio/high": 1 / 5,  # ρ = 1.5 where A = 2; not the 2 where A = -1
        "clip_ratio/region": 2 / 5,
        "sampling/logp_difference/mean": 1.5 / 5,
        "sampling/logp_difference/max": 1.0,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=5e-7, err_msg=name)
        assert metrics[name].dtype == jnp.float32
        assert metrics[name].shape == ()


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"loss": "grpo", "delta": 1.6}, 1 / 5, 2 / 5),  # δ clips the 2 where A = -1
        ({"loss": "cispo", "epsilon_max": 1.4}, 0, 2 / 5),
        ({"loss": "gspo", "epsilon": 0.01, "epsilon_high": 0.01}, 3 / 5, 0),  # row 1: 0.965 < 0.99, A < 0
        ({"loss": "reinforce"}, 0, 0),
        ({"loss": "geo_mean"}, 1 / 5, 1 / 5),
        ({"loss": "dppo_tv"}, 1 / 5, 1 / 5),
        ({"loss": "dppo_kl"}, 0, 1 / 5),
        ({"loss": "sapo"}, 0, 0),
    ],
    ids=lambda value: value["loss"] if isinstance(value, dict) else "",
)
def test_clip_ratios_count_the_tokens_that_are_clipped(settings: dict[str, Any], low: float, high: float) -> None:
    _, metrics = GOLDEN.loss(objective(**{"epsilon": 0.2, "epsilon_high": 0.3, **settings}))
    np.testing.assert_allclose(metrics["clip_ratio/low"], low, atol=1e-7)
    np.testing.assert_allclose(metrics["clip_ratio/high"], high, atol=1e-7)
    np.testing.assert_allclose(metrics["clip_ratio/region"], low + high, atol=1e-7)


def test_metrics_without_reference_and_sampler_leave_their_names_out() -> None:
    _, metrics = grpo_loss(GOLDEN.logps, None, None, GOLDEN.advantages, GOLDEN.mask, objective())
    assert set(metrics) == {"policy_loss", "clip_ratio/low", "clip_ratio/high", "clip_ratio/region"}


# --- oracle -------------------------------------------------------------------------------------------------------------


KL_CASES = [(loss, kl) for loss in LOSSES for kl in (None, "k1", "k2", "k3")]


@pytest.mark.parametrize(("loss", "kl"), [*KL_CASES, *((loss, "k3_corrected") for loss in [*LOSSES, *NEWER_LOSSES])])
def test_loss_and_gradient_equal_the_oracle(loss: str, kl: str | None) -> None:
    settings = objective(loss=loss, epsilon=0.15, epsilon_high=0.25, epsilon_max=1.3, **({"beta": 0.3, "kl": kl} if kl else {}))
    case = random_case(seed=[*LOSSES, *NEWER_LOSSES].index(loss))
    case.logps -= 0.5  # probabilities of p and q below 1
    case.old, case.sampler = case.old - 0.5, np.minimum(case.sampler - 0.5, -0.1)
    case.logps = np.minimum(case.logps, -0.1)
    value, _ = case.loss(settings)
    np.testing.assert_allclose(value, oracle_loss(case, settings, case.logps, case.logps), rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(case.gradient(settings), oracle_gradient(case, settings), rtol=1e-5, atol=2e-7)


CORRECTIONS: list[dict[str, Any]] = [
    {"delta": 1.5},
    {"importance_cap": 1.2},
    {"delta": 1.4, "importance_cap": 0.9, "beta": 0.1},
    {"importance_mode": "token_mask", "importance_floor": 0.6, "importance_cap": 1.6},
    {"importance_mode": "sequence_truncate", "importance_floor": 0.5, "importance_cap": 1.5},
    {"importance_mode": "sequence_mask", "importance_cap": 3.0, "off_policy_threshold": 0.1},
]


@pytest.mark.parametrize(
    ("loss", "more"),
    [(loss, more) for loss in LOSSES for more in CORRECTIONS[:3]]
    + [(loss, more) for loss in ("dapo", "geo_mean") for more in CORRECTIONS[3:]],
    ids=str,
)
def test_two_sided_clip_and_importance_weight_equal_the_oracle(loss: str, more: dict[str, float]) -> None:
    settings = objective(loss=loss, epsilon=0.15, epsilon_high=0.25, **more)
    case = random_case(seed=100 + [*LOSSES, *NEWER_LOSSES].index(loss), spread=0.6)
    value, _ = case.loss(settings)
    np.testing.assert_allclose(value, oracle_loss(case, settings, case.logps, case.logps), rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(case.gradient(settings), oracle_gradient(case, settings), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(("kind", "exact"), [("k3_corrected", "policy"), ("k3", "reference"), ("k1", "none")])
def test_the_mean_gradient_of_a_kl_term_over_all_tokens(kind: str, exact: str) -> None:
    """Of KL(π ‖ π_ref) where corrected, also off-policy; of KL(π_ref ‖ π) where plain, on-policy; 0 of k1.

    One row a token of a vocabulary of 5, weighted by the probability with which π_old draws it.
    """
    rng = np.random.default_rng(3)
    logits, old_logits, ref_logits = rng.normal(size=(3, 5))

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum())

    old, ref = log_softmax(old_logits if exact == "policy" else logits), log_softmax(ref_logits)

    def divergence(logits: np.ndarray) -> float:
        logps = log_softmax(logits)
        if exact == "policy":
            return float((np.exp(logps) * (logps - ref)).sum())
        return float((np.exp(ref) * (ref - logps)).sum()) if exact == "reference" else 0.0

    expected = np.array([(divergence(logits + e) - divergence(logits - e)) / 2e-5 for e in 1e-5 * np.eye(5)])
    settings = objective(beta=1.0, kl=kind)

    def mean_term(logits: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(logits)[:, None]
        given = (as_jax(old[:, None]), as_jax(ref[:, None]), jnp.zeros(5), jnp.ones((5, 1), bool), settings)
        return grpo_loss(logps, *given, weights=as_jax(np.exp(old)[:, None]))[0]

    np.testing.assert_allclose(jax.grad(mean_term)(as_jax(logits)), expected, atol=5e-7)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_per_token_equals_the_oracle(kind: str) -> None:
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    expected = [
        [oracle_kl(float(p), float(r), kind) for p, r in zip(*pair, strict=True)] for pair in zip(policy, reference, strict=True)
    ]
    np.testing.assert_allclose(kl_per_token(policy, reference, kind), expected, rtol=1e-5, atol=1e-6)


def test_k3_of_nearly_equal_policies_keeps_its_digits() -> None:
    d = np.float32(2.0**-12)  # e^d - d - 1 in float32 would have three digits left of d²/2 + d³/6
    np.testing.assert_allclose(kl_per_token(np.zeros(1, np.float32), np.full(1, d), "k3"), [d**2 / 2 + d**3 / 6], rtol=1e-3)
    assert np.all(np.asarray(kl_per_token(np.full(3, -0.7, np.float32), np.full(3, -0.7, np.float32), "k3")) == 0)


# --- invariances and exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*LOSSES, *NEWER_LOSSES])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 5]], ids=["rows", "7+5"])
def test_any_split_of_the_rows_gives_the_same_loss_gradient_and_metrics(loss: str, pieces: list[int]) -> None:
    against_sampler = loss in ("vespo", "dppo_tv", "dppo_kl")
    corrections = {} if against_sampler else {"importance_mode": "sequence_mask", "importance_cap": 3.0}
    settings = objective(loss=loss, beta=0.2, epsilon=0.15, off_policy_threshold=0.1, **corrections)
    case = random_case(rows=12, seed=5)
    unsplit, unsplit_metrics = case.loss(settings, max_completion_length=9)
    weights = token_weights(case.mask, settings, max_completion_length=9)

    of_a_piece = jax.jit(jax.value_and_grad(weighted_loss, has_aux=True), static_argnums=(5,))
    order = np.random.default_rng(0).permutation(12)
    total, gradient, sums = np.float32(0), np.zeros(case.logps.shape, np.float32), []
    for chosen in np.split(order, np.cumsum(pieces)[:-1]):
        part, piece_weights = case.rows(chosen), weights[chosen]
        arguments = (part.logps, part.old, part.ref, part.advantages, part.mask, settings, piece_weights)
        (value, stats), gradient[chosen] = of_a_piece(*arguments, sampler_logps=part.sampler)
        total += np.asarray(value)
        sums.append(stats)

    assert abs(float(total - unsplit)) <= 1e-6 * float(np.abs(case.advantages).mean())  # the size of a term
    np.testing.assert_allclose(gradient, case.gradient(settings, max_completion_length=9), rtol=1e-6, atol=1e-9)
    metrics = finish_stats(total_stats(jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)))
    assert set(metrics) == set(unsplit_metrics)
    for name, value in unsplit_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("loss", [*LOSSES, *NEWER_LOSSES])
def test_what_is_masked_changes_nothing_and_an_empty_row_gives_no_nan(loss: str) -> None:
    cap = {} if loss in ("vespo", "dppo_tv", "dppo_kl") else {"importance_cap": 2.0}
    settings = objective(loss=loss, beta=0.2, delta=3.0, **cap)
    case = random_case(seed=3)
    value, metrics = case.loss(settings)
    gradient = case.gradient(settings)
    poisoned = random_case(seed=3)
    for array, poison in ((poisoned.logps, np.nan), (poisoned.old, -np.inf), (poisoned.ref, np.nan), (poisoned.sampler, np.inf)):
        array[~case.mask] = poison
    poisoned.advantages[2] = np.nan  # row 2 has no trained token
    poisoned_value, poisoned_metrics = poisoned.loss(settings)
    assert float(poisoned_value) == float(value)
    assert np.isfinite(value)
    np.testing.assert_array_equal(poisoned.gradient(settings), gradient)
    assert np.all(gradient[~case.mask] == 0)
    for name in metrics:
        assert float(poisoned_metrics[name]) == float(metrics[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_any_trained_token_is_zero(loss: str) -> None:
    settings = objective(loss=loss, beta=0.2)
    case = random_case()
    case.mask[:] = False
    value, metrics = case.loss(settings)
    assert float(value) == 0
    assert np.all(case.gradient(settings) == 0)
    assert all(float(metric) == 0 for metric in metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rewards_give_exactly_zero_loss_and_gradient(loss: str) -> None:
    settings = objective(loss=loss, advantage_eps=1e-8)
    case = random_case(rows=8)
    advantages = group_advantages(np.full((1, 8), 0.7, np.float32), settings.scale_rewards, settings.advantage_eps)
    case.advantages = np.asarray(advantages).reshape(-1)
    assert float(case.loss(settings)[0]) == 0
    assert np.all(case.gradient(settings) == 0)


def test_a_group_with_equal_rewards_can_be_left_out_when_the_weights_stay() -> None:
    settings = objective(loss="dapo")
    case = random_case(rows=12)
    case.advantages[4:8] = 0
    rest = np.r_[0:4, 8:12]
    weights = token_weights(case.mask, settings)
    np.testing.assert_allclose(case.rows(rest).loss(settings, weights=weights[rest])[0], case.loss(settings)[0], rtol=1e-6)


def test_masked_rows_stay_in_the_denominators_that_count_rows() -> None:
    mask = np.array([[True, True], [False, False]])
    for loss, weight in (("grpo", 1 / 4), ("reinforce", 1 / 2), ("dr_grpo", 1 / 4), ("dapo", 1 / 2)):
        np.testing.assert_allclose(token_weights(mask, objective(loss=loss)), [[weight, weight], [0, 0]], rtol=1e-7)


def test_plain_is_the_first_formulas_exactly() -> None:
    """Advantage (r - mean) / (std + 1e-8), ddof 1; KL = Σ (logπ - logπ_ref); loss = -mean(A·logπ) + β·mean KL; of sequences."""
    settings = ObjectiveConfig(preset="plain", beta=0.1)
    rng = np.random.default_rng(7)
    rewards = rng.normal(size=(2, 4)).astype(np.float32)
    case = random_case(rows=8, seed=7)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-8)
    ours = group_advantages(rewards, settings.scale_rewards, settings.advantage_eps)
    np.testing.assert_allclose(ours, advantages, rtol=1e-5, atol=1e-6)

    case.advantages = advantages.reshape(-1).astype(np.float64)
    sequence = (case.logps * case.mask).sum(1)
    kl = sequence - (case.ref * case.mask).sum(1)
    loss, metrics = case.loss(settings)
    np.testing.assert_allclose(loss, -np.mean(case.advantages * sequence) + 0.1 * np.mean(kl), rtol=2e-6)
    np.testing.assert_allclose(metrics["policy_loss"], -np.mean(case.advantages * sequence), rtol=2e-6)
    expected = case.mask * (0.1 - case.advantages[:, None]) / 8
    np.testing.assert_allclose(case.gradient(settings), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_old_logps_left_out_are_the_policys_own_without_gradient(loss: str) -> None:
    settings = objective(loss=loss)
    case = random_case(seed=2)
    logps = jnp.asarray(case.logps, jnp.float32)

    def loss_of(values: Any, old: Any) -> Any:
        return grpo_loss(values, old, None, case.advantages, case.mask, settings)[0]

    left_out, given = jax.value_and_grad(loss_of)(logps, None), jax.value_and_grad(loss_of)(logps, logps)
    np.testing.assert_array_equal(left_out[0], given[0])
    np.testing.assert_array_equal(left_out[1], given[1])
    # On the policy that sampled, every loss has the gradient of -A·logπ times its weights.
    expected = -np.asarray(token_weights(case.mask, settings)) * case.advantages[:, None]
    np.testing.assert_allclose(left_out[1], expected, rtol=2e-6, atol=1e-9)


def test_at_ratio_one_the_gradient_is_unclipped_even_without_a_clip_range() -> None:
    settings = objective(loss="grpo", epsilon=0.0)
    case = random_case(seed=2)
    case.old[:] = case.logps
    expected = -np.asarray(token_weights(case.mask, settings)) * case.advantages[:, None]
    np.testing.assert_allclose(case.gradient(settings), expected, rtol=1e-6, atol=1e-9)


def test_gspo_gradient_is_the_sequence_ratio_times_the_advantage_over_the_length() -> None:
    gradient = GOLDEN.gradient(objective(loss="gspo"))
    expected = [[-0.8660254 * 2 / 2 / 2] * 2 + [0], [0.9654894 / 3 / 2] * 3]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_only_the_policy_gets_a_gradient() -> None:
    case = random_case()
    settings = objective(loss="grpo", beta=0.5, importance_cap=2.0)

    def loss(old: Any, ref: Any, sampler: Any, advantages: Any) -> Any:
        return grpo_loss(case.logps, old, ref, advantages, case.mask, settings, sampler_logps=sampler)[0]

    arrays = (jnp.asarray(array, jnp.float32) for array in (case.old, case.ref, case.sampler, case.advantages))
    for gradient in jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays):
        assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("loss", [*LOSSES, *NEWER_LOSSES])
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_policies_far_apart_give_finite_numbers(loss: str, shift: float) -> None:
    cap = {} if loss in ("vespo", "dppo_tv", "dppo_kl") else {"importance_cap": 2.0}
    settings = objective(loss=loss, beta=0.1, delta=3.0, **cap)
    case = random_case()
    case.old += shift
    case.sampler += shift if loss in ("vespo", "dppo_tv", "dppo_kl") else 0
    case.ref -= shift
    value, metrics = case.loss(settings)
    assert np.isfinite(value)
    assert np.all(np.isfinite(case.gradient(settings)))
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_kl_in_the_reward_is_the_sum_of_k1_and_leaves_the_loss_alone() -> None:
    case = random_case()
    penalty = kl_reward_penalty(case.logps, case.ref, case.mask)
    np.testing.assert_allclose(penalty, ((case.logps - case.ref) * case.mask).sum(1), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda logps: jnp.sum(kl_reward_penalty(logps, case.ref, case.mask)))(jnp.asarray(case.logps, jnp.float32))
    assert np.all(np.asarray(gradient) == 0)
    with_kl, without = objective(loss="grpo", beta=0.5, kl="k1", kl_in_reward=True), objective(loss="grpo")
    assert float(case.loss(with_kl)[0]) == float(case.loss(without)[0])


def test_bnpo_over_the_whole_batch_is_dapo() -> None:
    case = random_case()
    assert float(case.loss(objective(loss="bnpo"))[0]) == float(case.loss(objective(loss="dapo"))[0])


@pytest.mark.parametrize("mask_kind", [bool, np.int32, np.float32])
def test_numpy_and_jit_and_mask_types_agree(mask_kind: type) -> None:
    case = random_case()
    settings = ObjectiveConfig(loss="grpo")
    compiled = jax.jit(grpo_loss, static_argnames=("objective",))
    loss, metrics = compiled(case.logps, case.old, case.ref, case.advantages, case.mask.astype(mask_kind), objective=settings)
    eager, eager_metrics = grpo_loss(case.logps, case.old, case.ref, case.advantages, case.mask, settings)
    np.testing.assert_allclose(loss, eager, rtol=1e-6)
    assert set(metrics) == set(eager_metrics)


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": np.zeros(3)}, r"logps has shape \(3,\): it must be \[N, C\]"),
        ({"logps": np.zeros((0, 3))}, r"logps has shape \(0, 3\)"),
        ({"old_logps": np.zeros((2, 4))}, r"old_logps has shape \(2, 4\).*\(2, 3\)"),
        ({"old_logps": np.zeros((1, 3))}, r"old_logps has shape \(1, 3\)"),
        ({"ref_logps": np.zeros((3, 2))}, r"ref_logps has shape \(3, 2\)"),
        ({"ref_logps": None}, "ref_logps is None, but beta is 0.1"),
        ({"advantages": np.zeros((2, 4))}, r"advantages has shape \(2, 4\): it must be \[N\] = \(2,\)"),
        ({"advantages": np.zeros((1, 2))}, "advantages has shape"),
        ({"advantages": np.zeros(3)}, "advantages has shape"),
        ({"completion_mask": np.ones(3, bool)}, "completion_mask has shape"),
        ({"completion_mask": np.ones((2, 2), bool)}, "completion_mask has shape"),
        ({"sampler_logps": np.zeros((2, 1))}, "sampler_logps has shape"),
        ({"sampler_logps": None}, "sampler_logps is None, but importance_cap is 2"),
        ({"weights": np.zeros(2)}, "weights has shape"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    arrays: dict[str, Any] = {name: np.zeros((2, 3)) for name in ("logps", "old_logps", "ref_logps", "sampler_logps")}
    arrays |= {"advantages": np.zeros(2), "completion_mask": np.ones((2, 3), bool)}
    settings = ObjectiveConfig(loss="dr_grpo", beta=0.1, importance_cap=2.0)
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**arrays, **change}, objective=settings)


def test_an_unknown_kl_and_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from k1, k2, k3"):
        kl_per_token(np.zeros(2), np.zeros(2), "k4")
    with pytest.raises(ValueError, match="ref_logps has shape"):
        kl_per_token(np.zeros((2, 1)), np.zeros(2), "k1")
