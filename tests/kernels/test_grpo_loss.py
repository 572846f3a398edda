"""`grpo_loss`, every implementation, against NumPy in float64 with slopes by hand; its TPU kernel interpreted and compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import CHIPS, V5P_TAKES_MORE, compiled_for, interpreted, no_race
from plain_oracles import quick_compiling

from grpo_kernels import LossSettings, grpo_loss
from grpo_kernels.ops.grpo_loss import BlockSizes, choose_block_sizes
from grpo_kernels.ops.grpo_loss.block_sizes import BLOCK_TOKENS
from grpo_kernels.ops.grpo_loss.shapes import LONG, SHORT, Shape

IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
RAGGED = (13, 300)  # two blocks of rows and three of tokens, both with a tail, where blocks are (8, 128)
Case = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@functools.cache
def case(rows: int, length: int, seed: int = 0) -> Case:
    """Arguments of `grpo_loss`, in float32; NaN or infinity where the mask is False; row 0 is whole, the last but one empty."""
    rng = np.random.default_rng(seed + rows + length)
    logps = -rng.exponential(size=(rows, length))
    arrays = {name: logps + rng.normal(scale=0.4, size=logps.shape) for name in ("old", "ref", "sampler", "whole")}
    arrays |= {"logps": logps, "weights": rng.uniform(0.1, 1, size=logps.shape) / logps.size}
    mask = np.arange(length) < rng.integers(0, length + 1, size=rows)[:, None]
    mask[0] = True
    mask[:, length // 2] &= rng.random(rows) < 0.5  # holes
    if rows > 1:
        mask[-2] = False
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    for number, array in enumerate(arrays.values()):
        array[~mask] = (np.nan, np.inf, -np.inf)[number % 3]
    advantages = rng.normal(size=rows).astype(np.float32)
    advantages[~mask.any(1)] = np.nan
    return {**arrays, "mask": mask, "advantages": advantages, "chosen": rng.random(mask.shape) < 0.6}


CHOOSING = ("clip_cov", "kl_cov", "geo_mean")
"""Losses that the tests give `chosen`; they need it, or their factor is of the whole row."""


@functools.cache
def program(implementation: str, settings: LossSettings) -> Any:
    """(logps, whole, the rest, factor) → factor times the loss with (loss, sums), and slopes by the first two."""

    def loss_of(logps: Any, whole: Any, given: Case, factor: Any) -> Any:
        arrays = (logps, given["old"], given["ref"], given["advantages"], given["mask"], given["weights"])
        chosen = given["chosen"] if settings.loss in CHOOSING else None
        options = {"sampler_logps": given["sampler"], "whole_logps": whole, "chosen": chosen, "implementation": implementation}
        blocks = BlockSizes(min(logps.shape[0], 8), min(logps.shape[1], 128))
        loss, sums = grpo_loss(*arrays, settings=settings, block_sizes=blocks, **options)
        return factor * loss, (loss, sums)

    return jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))


def computed(implementation: str, x: Case, settings: LossSettings, leave_out: tuple[str, ...] = (), factor: float = 1.0) -> Any:
    """(loss, sums, slope by logps, slope by whole), compiled; the kernel interpreted. `factor` times the loss is differentiated."""
    given = {name: None if name in leave_out else jnp.asarray(array) for name, array in x.items()}
    arguments = (given.pop("logps"), given.pop("whole"), given, jnp.float32(factor))
    with interpreted(implementation):
        (_, (loss, sums)), slopes = jax.tree.map(np.asarray, program(implementation, settings)(*arguments))
    return loss, sums, *slopes


def clipped(ratio: np.ndarray, a: np.ndarray, s: LossSettings) -> tuple[np.ndarray, np.ndarray]:
    """-min(min(ρ,δ)·A, clip(ρ)·A) and its derivative by log ρ."""
    free = np.minimum(ratio, np.inf if s.delta is None else s.delta) * a
    held = np.clip(ratio, 1 - s.epsilon, 1 + s.epsilon_high) * a
    moves = np.where(free <= held, free == ratio * a, held == ratio * a)
    return -np.minimum(free, held), np.where(moves, -ratio * a, 0)


def expected(x: Case, s: LossSettings, leave_out: tuple[str, ...] = ()) -> Any:
    """By the formulas, slopes worked out by hand; as `computed` returns it."""
    mask, zero = x["mask"], np.zeros(x["mask"].shape)
    given: Case = {
        name: None if name in leave_out else np.where(mask, x[name], 0.0).astype(np.float64) for name in x if name in NAMES
    }
    logps, weights = given["logps"], given["weights"]
    old = logps if given["old"] is None else given["old"]
    whole = logps if given["whole"] is None else given["whole"]
    of_rows = x["advantages"].ndim == 1
    a = np.where(mask.any(1) if of_rows else mask, x["advantages"], 0.0).astype(np.float64)
    a = a[:, None] if of_rows else a
    log_ratio = np.clip(logps - old, -80, 80)
    tokens, factor, outside = np.maximum(mask.sum(1, keepdims=True), 1), np.ones(mask.shape), None
    if s.importance_cap is not None or s.importance_floor is not None:
        log_weight = old - given["sampler"]
        if s.importance_mode.startswith("sequence"):
            log_weight = log_weight.sum(1, keepdims=True) + zero
        weight, floor, cap = np.exp(np.clip(log_weight, -80, 80)), s.importance_floor or 0, s.importance_cap or np.inf
        outside = ((weight < floor) | (weight > cap)) & mask
        factor = np.where(outside, 0, weight) if s.importance_mode.endswith("mask") else np.clip(weight, floor, cap)
    if s.loss in ("clip_cov", "geo_mean"):
        factor = factor * x["chosen"]
    if s.off_policy_threshold is not None:
        drift = (given["sampler"] - logps).sum(1, keepdims=True) / tokens
        factor = factor * ~((a < 0) & (drift > s.off_policy_threshold))
    of_row = s.loss in ("gspo", "luspo", "geo_mean")
    base = given["sampler"] if s.loss in ("vespo", "dppo_tv", "dppo_kl") and given["sampler"] is not None else old
    inside = np.abs(logps - base) < 80
    low, high = zero > 0, zero > 0
    if s.loss == "geo_mean":
        low, high = (a < 0) & (log_ratio < -s.epsilon), (a > 0) & (log_ratio > s.epsilon_high)
        log_ratio, inside = np.where(high, s.epsilon_high, np.where(low, -s.epsilon, log_ratio)), inside & ~low & ~high
    ratio = np.exp(log_ratio.sum(1, keepdims=True) / tokens + zero if of_row else log_ratio)
    if s.loss == "geo_mean":
        term, slope = -ratio * a, -ratio * a * inside
    elif s.loss == "kl_cov":
        held = ~x["chosen"]
        term, slope = -ratio * a + held * np.abs(log_ratio), (-ratio * a + held * np.sign(log_ratio)) * inside
    elif s.loss == "vespo":
        log_weight = np.clip(np.clip(logps - base, -80, 80).sum(1, keepdims=True), -80, 80)
        k, scale = np.where(a >= 0, 2, 3), np.where(a >= 0, 3, 2)
        slope = -np.exp(k * log_weight + scale * (1 - np.exp(log_weight))) * a + zero
        term = slope * logps
    elif s.loss.startswith("dppo"):
        p, q, ratio = np.exp(logps), np.exp(base), np.exp(np.clip(logps - base, -80, 80))
        rest_p, rest_q = np.maximum(1 - p, 1e-7), np.maximum(1 - q, 1e-7)
        apart = np.abs(p - q) if s.loss == "dppo_tv" else q * np.log(q / p) + rest_q * np.log(rest_q / rest_p)
        low = (a < 0) & (logps < base) & (apart > s.epsilon)
        high = (a > 0) & (logps > base) & (apart > s.epsilon_high)
        term, slope = -ratio * a * ~(low | high), -ratio * a * ~(low | high) * inside
    elif s.loss in ("reinforce", "gpg"):
        term, slope = -a * logps, -a + zero
    elif s.loss == "cispo":
        slope = -np.minimum(ratio, s.epsilon_max) * a
        term, high = slope * logps, ratio > s.epsilon_max
    elif s.loss == "sapo":
        tau = np.where(a > 0, 1.0, 1.05)
        gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
        term, slope = -4 / tau * gate * a, -4 * ratio * gate * (1 - gate) * a * inside
    else:
        term, slope = clipped(ratio, a, s)
        slope = slope * inside
        low = (a < 0) & (ratio < 1 - s.epsilon)
        high = ((a > 0) & (ratio > 1 + s.epsilon_high)) | ((a < 0) & (ratio > (s.delta or np.inf)))
    slope = slope * ((weights * factor).sum(1, keepdims=True) / tokens if of_row else weights * factor)
    policy_loss = (weights * factor * term).sum()
    sums = {
        "tokens": mask.sum(),
        "clipped_low": (low & mask).sum(),
        "clipped_high": (high & mask).sum(),
        "policy_loss": policy_loss,
    }
    loss, d_logps, d_whole = policy_loss, np.where(mask, slope, 0), zero
    if given["ref"] is not None:
        d = given["ref"] - whole
        bounded = np.clip(d, -80, 80)
        k3 = np.exp(bounded) - bounded - 1
        sums["kl"] = (k3 * mask).sum()
        limit = 40 if s.kl == "k3_corrected" else 80
        bounded, inside = np.clip(d, -limit, limit), np.abs(logps - old) < limit
        by_k3, token_ratio = (1 - np.exp(bounded)) * (np.abs(d) < limit), np.exp(np.clip(logps - old, -limit, limit))
        k3 = np.exp(bounded) - bounded - 1
        value = {"k1": -d, "k2": d * d / 2, "k3": k3, "k3_corrected": token_ratio * k3}[s.kl]
        by_whole = {"k1": np.ones(d.shape), "k2": -d, "k3": by_k3, "k3_corrected": token_ratio * by_k3}[s.kl]
        loss = loss + s.beta * (weights * value).sum()
        d_whole = s.beta * weights * by_whole
        if s.kl == "k3_corrected":
            d_logps = d_logps + s.beta * weights * value * inside
    if given["sampler"] is not None:
        difference = np.abs(old - given["sampler"]) * mask
        sums |= {"logp_difference": difference.sum(), "logp_difference_max": difference.max()}
    if outside is not None:
        sums["importance_outside"] = outside.sum()
    return (loss, sums, d_logps + d_whole, None) if given["whole"] is None else (loss, sums, d_logps, d_whole)


NAMES = ("logps", "old", "ref", "sampler", "whole", "weights")


def assert_equal(got: Any, right: Any, x: Case) -> None:
    """Float32 against float64: sums of n terms to a few roundings of their absolute sum, slopes to a few of their own size."""
    loss, sums, *slopes = got
    right_loss, right_sums, *right_slopes = right
    assert set(sums) == set(right_sums)
    size = max(abs(right_loss), np.abs(right_slopes[0]).sum())
    np.testing.assert_allclose(loss, right_loss, rtol=0, atol=5e-6 * size)
    for name, value in right_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=5e-6, atol=5e-6 * size if name == "policy_loss" else 1e-6, err_msg=name)
    for slope, right_slope in zip(slopes, right_slopes, strict=True):
        assert (slope is None) == (right_slope is None)
        if slope is not None:
            assert np.all(slope[~x["mask"]] == 0)
            np.testing.assert_allclose(slope, right_slope, rtol=2e-5, atol=1e-6 * np.abs(right_slope).max(initial=1e-9))


SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"loss": "bnpo", "delta": 1.5, "beta": 0.3, "kl": "k1"}, ("sampler", "whole")),
    ({"loss": "dr_grpo", "importance_cap": 1.2, "beta": 0.3, "kl": "k2"}, ()),
    ({"loss": "grpo", "delta": 1.4, "importance_cap": 0.9, "beta": 0.3, "kl": "k3"}, ()),
    ({"loss": "dapo", "importance_cap": 1.2, "beta": 0.3, "kl": "k3_corrected"}, ()),
    ({"loss": "gspo", "beta": 0.3, "epsilon": 0.02, "kl": "k3_corrected"}, ("sampler",)),
    ({"loss": "gspo", "delta": 1.3, "importance_cap": 1.2, "beta": 0.3, "epsilon": 0.02, "epsilon_high": 0.03}, ("whole",)),
    ({"loss": "gspo"}, ("ref", "sampler", "whole")),
    ({"loss": "cispo", "importance_cap": 1.2, "beta": 0.3, "kl": "k1"}, ("whole",)),
    ({"loss": "cispo"}, ("ref", "sampler")),
    ({"loss": "sapo", "importance_cap": 1.2, "beta": 0.3}, ()),
    ({"loss": "reinforce", "importance_cap": 1.2, "beta": 0.3, "kl": "k2"}, ("old", "whole")),
    ({"loss": "reinforce"}, ("sampler",)),
    ({"loss": "reinforce", "beta": 0.3, "kl": "k3_corrected"}, ("sampler", "whole")),
    ({"loss": "dapo", "importance_mode": "token_mask", "importance_floor": 0.7, "importance_cap": 1.4}, ("ref", "whole")),
    ({"loss": "luspo", "importance_floor": 0.7, "epsilon": 0.02}, ("ref", "whole")),
    (
        {"loss": "grpo", "importance_mode": "sequence_mask", "importance_floor": 0.02, "importance_cap": 2.0, "beta": 0.3},
        ("whole",),
    ),
    ({"loss": "geo_mean", "importance_mode": "sequence_truncate", "importance_floor": 0.5, "importance_cap": 2.0, "beta": 0.3}, ()),
    ({"loss": "cispo", "importance_cap": 1.2, "off_policy_threshold": 0.02}, ("ref", "whole")),
    ({"loss": "gpg", "off_policy_threshold": 0.02}, ("old", "ref", "whole")),
    ({"loss": "vespo", "beta": 0.3}, ("whole",)),
    ({"loss": "clip_cov", "beta": 0.3}, ("sampler", "whole")),
    ({"loss": "kl_cov", "importance_cap": 1.2}, ("ref", "whole")),
    ({"loss": "dppo_tv", "off_policy_threshold": 0.02}, ("ref", "whole")),
    ({"loss": "dppo_kl"}, ("ref", "sampler", "whole")),
    ({"loss": "dapo", "epsilon_high": 0.28}, ("old", "ref", "sampler", "whole")),
]


def named(value: Any) -> str:
    return (
        "-".join(f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in value.values())
        if isinstance(value, dict)
        else ""
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("settings", "leave_out"), SETTINGS, ids=named)
def test_loss_sums_and_slopes(settings: dict[str, Any], leave_out: tuple[str, ...], implementation: str) -> None:
    s = LossSettings(**{"epsilon": 0.15, "epsilon_high": 0.25, "epsilon_max": 1.3, **settings})
    x = case(*RAGGED)
    assert_equal(computed(implementation, x, s, leave_out), expected(x, s, leave_out), x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (16, 1), (2, 131)], ids=str)
def test_odd_sizes(size: tuple[int, int], implementation: str) -> None:
    x, s = case(*size), LossSettings(loss="gspo", beta=0.2)
    assert_equal(computed(implementation, x, s, ("sampler", "whole")), expected(x, s, ("sampler", "whole")), x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_may_have_their_own_advantages(implementation: str) -> None:
    x, s = case(*RAGGED), LossSettings(loss="dapo", delta=1.5, importance_cap=1.2, beta=0.3)
    own = np.random.default_rng(8).normal(size=RAGGED).astype(np.float32)
    own[~x["mask"]] = np.nan
    assert_equal(computed(implementation, x | {"advantages": own}, s), expected(x | {"advantages": own}, s), x)


@pytest.mark.parametrize("settings", [{"loss": "gspo"}, {"loss": "vespo"}, {"off_policy_threshold": 0.1}], ids=named)
def test_a_ratio_of_the_row_takes_one_advantage_a_row(settings: dict[str, Any]) -> None:
    x = case(4, 7)
    arrays = (x["logps"], x["old"], x["ref"], np.ones((4, 7), np.float32), x["mask"], x["weights"])
    with pytest.raises(ValueError, match=r"advantages has shape \(4, 7\): .* needs \[N\]"):
        grpo_loss(*arrays, settings=LossSettings(**settings), sampler_logps=x["sampler"])


def test_block_sizes_are_what_a_tpu_takes() -> None:
    for rows, length in [(64, 1024), (64, 20_480), (7, 5), (13, 1187), (300, 1), (5, 5000)]:
        blocks = choose_block_sizes(rows, length)
        assert blocks.rows % 32 == 0 or blocks.rows == rows
        assert blocks.tokens % 128 == 0 or blocks.tokens == length
        assert blocks.rows * blocks.tokens <= BLOCK_TOKENS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", ["reinforce", "grpo", "gspo", "cispo", "sapo"])
def test_nothing_trained_is_zero_and_policies_far_apart_give_numbers(loss: str, implementation: str) -> None:
    s = LossSettings(loss=loss, beta=0.1, delta=3.0, importance_cap=2.0)
    empty = case(4, 7) | {"mask": np.zeros((4, 7), bool)}
    value, sums, slope, _ = computed(implementation, empty, s, ("whole",))
    assert value == 0
    assert all(total == 0 for total in sums.values())
    assert not slope.any()
    for shift in (-300.0, 300.0):
        near = case(4, 7)
        far = near | {"old": near["old"] + np.float32(shift), "ref": near["ref"] - np.float32(shift)}
        value, sums, slope, _ = computed(implementation, far, s, ("whole",))
        assert np.isfinite([value, *sums.values()]).all()
        assert np.isfinite(slope).all()
        right = expected(far, s, ("whole",))
        # e⁸⁰ of a float32 argument: 80 roundings of 4e-6 each.
        np.testing.assert_allclose(value, right[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(slope, right[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_old_left_out_is_the_policy_itself_and_the_cotangent_counts(implementation: str) -> None:
    x, s = case(4, 7), LossSettings(loss="gspo", beta=0.1)
    left_out = computed(implementation, x, s, ("old", "sampler", "whole"))
    given = computed(implementation, x | {"old": x["logps"]}, s, ("sampler", "whole"), factor=-3.0)
    assert left_out[0] == given[0]
    np.testing.assert_allclose(-3 * left_out[2], given[2], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_slopes_are_all_that_the_backward_pass_keeps_and_only_the_policy_has_them(implementation: str) -> None:
    x = {name: jnp.asarray(array) for name, array in case(4, 7).items()}
    s = LossSettings(loss="grpo", beta=0.1, importance_cap=2.0)

    def loss_of(x: Case) -> Any:
        arrays = (x["logps"], x["old"], x["ref"], x["advantages"], case(4, 7)["mask"], x["weights"])
        return grpo_loss(*arrays, settings=s, sampler_logps=x["sampler"], whole_logps=x["whole"], implementation=implementation)

    del x["mask"]
    with interpreted(implementation):
        (again, pull, _), (value, _) = jax.jit(lambda x: (jax.vjp(loss_of, x, has_aux=True), loss_of(x)))(x)
        (gradient,) = jax.jit(pull)(jnp.float32(1))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size > 1) == [(4, 7), (4, 7)]
    assert float(value) == pytest.approx(float(again), rel=1e-6)
    for name, slope in gradient.items():  # the value alone is computed without slopes
        assert np.any(np.asarray(slope)) == (name in ("logps", "whole")), name


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_the_kernel_has_no_race(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two blocks of rows, three of tokens."""
    x, s = case(*RAGGED), LossSettings(loss=loss, beta=0.2)
    arrays = [jnp.asarray(x[name]) for name in ("logps", "old", "ref", "advantages", "mask", "weights")]

    def loss_of(logps: Any) -> Any:
        return grpo_loss(logps, *arrays[1:], settings=s, implementation="mosaic_tpu", block_sizes=BlockSizes(8, 128))[0]

    with no_race(capsys):
        slope = jax.block_until_ready(jax.jit(jax.grad(loss_of))(arrays[0]))
    right = expected(x, s, ("sampler", "whole"))[2]
    np.testing.assert_allclose(slope, right, rtol=2e-5, atol=1e-6 * np.abs(right).max())


@pytest.mark.parametrize(
    ("chip", "shape", "losses"),
    list(
        zip(
            CHIPS,
            (SHORT, LONG, SHORT, Shape(13, 1187)),
            (("cispo", "gspo"), ("dapo", "gspo"), ("reinforce", "dapo", "sapo"), ("gspo", "geo_mean", "vespo", "dppo_kl")),
            strict=True,
        )
    ),
    ids=str,
)
def test_on_a_tpu_no_array_is_stored_but_the_slopes(
    chips: dict[str, Any], chip: str, shape: Shape, losses: tuple[str, ...]
) -> None:
    """In the compiled program, of losses with everything that can be on; the mask's copy is the one temporary array.

    For a v5p, libtpu 0.0.50 also counts what it fetches into vector memory before the kernel: up to three float32 arrays.
    """

    def array(*size: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    def slopes_of(logps: Any, whole: Any, old: Any, ref: Any, sampler: Any, advantages: Any, mask: Any, weights: Any) -> Any:
        def loss_of(logps: Any, whole: Any, loss: str) -> Any:
            s = LossSettings(loss=loss, beta=0.1, delta=3.0, importance_cap=2.0)
            arrays = (logps, old, ref, advantages, mask, weights)
            return grpo_loss(*arrays, settings=s, sampler_logps=sampler, whole_logps=whole, implementation="mosaic_tpu")

        of = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        return [of(functools.partial(loss_of, loss=loss))(logps, whole) for loss in losses]

    tokens, flags = array(shape.rows, shape.length), array(shape.rows, shape.length, dtype=jnp.bool_)
    memory = compiled_for(chips, chip, slopes_of, *[tokens] * 5, array(shape.rows), flags, tokens)
    print(f"{chip} {shape} {losses}: temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    prefetched = 3 * 4 * shape.rows * shape.length if chip == "v5p" and V5P_TAKES_MORE else 0
    assert memory.temp_size_in_bytes <= prefetched + 2 * shape.rows * shape.length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": np.zeros(3)}, r"logps has shape \(3,\): it must be \[N, C\]"),
        ({"weights": np.zeros((3, 2))}, r"weights has shape \(3, 2\)"),
        ({"advantages": np.zeros(3)}, r"advantages has shape \(3,\): it must be \[N\]"),
        ({"sampler_logps": None}, "sampler_logps is None, but importance_cap is 2"),
        ({"ref_logps": None}, "ref_logps is None, but beta is 0.1"),
        ({"implementation": "cuda"}, "implementation 'cuda' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arrays: Case = {name: np.zeros((2, 3)) for name in ("logps", "old_logps", "ref_logps", "sampler_logps", "weights")}
    arrays |= {"advantages": np.zeros(2), "completion_mask": np.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(arrays | change), settings=LossSettings(beta=0.1, importance_cap=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ppo"}, "loss is 'ppo': choose from reinforce"),
        ({"kl": "k4"}, "kl is 'k4': choose from k1"),
        ({"beta": -1.0}, "beta is -1"),
        ({"epsilon": 1.0}, "epsilon is 1"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1"),
        ({"epsilon_max": 0.0}, "epsilon_max is 0"),
        ({"delta": 1.1}, r"delta is 1.1: use more than 1 \+ epsilon_high = 1.2"),
        ({"importance_cap": 0.0}, "importance_cap is 0"),
        ({"importance_cap": 2.0, "importance_floor": 2.0}, "importance_floor is 2: use a positive number below importance_cap"),
        ({"importance_floor": 0.0}, "importance_floor is 0"),
        ({"importance_mode": "clip"}, "importance_mode is 'clip': choose from token_truncate"),
        ({"off_policy_threshold": 0.0}, "off_policy_threshold is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**change)
