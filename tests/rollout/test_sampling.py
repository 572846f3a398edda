"""Sampling from logits: which tokens stay, which token is drawn, and how often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import log_softmax, quick_compiling, staying_tokens
from scipy.stats import chisquare

from grpo_jax.rollout.sampling import NEAR_LOGITS, Thresholds, draw, sample_inverse_cdf, truncate
from grpo_kernels import Target, tracing_for

OFF = (0, 1.0, 0.0)
jit_truncate, jit_draw, jit_inverse = jax.jit(truncate), jax.jit(draw), jax.jit(sample_inverse_cdf)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def thresholds(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Thresholds:
    return Thresholds(jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def staying(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[list[int]]:
    """Returns the ids of the tokens that stay, row by row."""
    mask = np.asarray(jit_truncate(jnp.asarray(logits, jnp.float32), thresholds(top_k, top_p, min_p)))
    return [np.flatnonzero(row).tolist() for row in mask]


def test_top_k_keeps_the_k_largest_and_all_that_tie_with_the_last() -> None:
    logits = np.array([[1.0, 4.0, 2.0, 3.0], [2.0, 2.0, 1.0, 2.0], [-1.0, -2.0, -3.0, -2.0]])
    assert staying(logits, top_k=1) == [[1], [0, 1, 3], [0]]
    assert staying(logits, top_k=2) == [[1, 3], [0, 1, 3], [0, 1, 3]]
    assert staying(logits, top_k=4) == staying(logits, top_k=99) == staying(logits) == [[0, 1, 2, 3]] * 3


def test_top_p_keeps_the_smallest_set_with_that_probability() -> None:
    logits = np.log([[0.1, 0.5, 0.15, 0.25]])
    assert staying(logits, top_p=0.4) == [[1]]
    assert staying(logits, top_p=0.51) == [[1, 3]]
    assert staying(logits, top_p=0.76) == [[1, 2, 3]]
    assert staying(logits, top_p=0.95) == staying(logits, top_p=1.0) == [[0, 1, 2, 3]]
    assert staying(logits, top_p=1e-9) == [[1]]
    assert staying(np.zeros((1, 4)), top_p=0.5) == [[0, 1, 2, 3]]  # ties stay together


def test_min_p_is_a_share_of_the_most_probable() -> None:
    logits = np.log([[0.05, 0.5, 0.2, 0.25]])
    assert staying(logits, min_p=0.45) == [[1, 3]]
    assert staying(logits, min_p=0.35) == [[1, 2, 3]]
    assert staying(logits, min_p=1.0) == [[1]]


def test_top_p_counts_what_top_k_left() -> None:
    # Of 0.4 and 0.3 the first is 4/7 = 0.571 of what is left: that is at least 0.55, which 0.4 is not.
    assert staying(np.log([[0.4, 0.3, 0.2, 0.1]]), top_k=2, top_p=0.55) == [[0]]


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 300])
def test_what_stays_is_what_sorting_says(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = np.concatenate(
        [
            rng.normal(size=(3, vocabulary)),
            rng.normal(size=(2, vocabulary)) * 20 - 50,
            rng.integers(-2, 3, (3, vocabulary)),  # many ties
            np.where(rng.random((2, vocabulary)) < 0.5, -np.inf, rng.normal(size=(2, vocabulary))),
        ]
    ).astype(np.float32)
    logits[-2:, 0] = 0.5
    for top_k, top_p, min_p in itertools.product((0, 1, 5), (1.0, 0.93, 0.31), (0.0, 0.07)):
        expected = [np.flatnonzero(staying_tokens(row, top_k, top_p, min_p) & (row > -np.inf)).tolist() for row in logits]
        got = staying(logits, top_k, top_p, min_p)
        assert [[i for i in row if logits[n, i] > -np.inf] for n, row in enumerate(got)] == expected, (top_k, top_p, min_p)


@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1187])
def test_a_token_is_where_the_running_sum_passes_the_number(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    weights = (rng.random((400, vocabulary)) * (rng.random((400, vocabulary)) < 0.7)).astype(np.float32)
    weights[:, vocabulary // 2] += 0.1
    uniform = rng.random(400).astype(np.float32)
    got = np.asarray(jit_inverse(jnp.asarray(weights), jnp.asarray(uniform))[0])
    running = np.cumsum(weights.astype(np.float64), axis=1)
    target = uniform.astype(np.float64) * running[:, -1]
    expected = np.array([np.searchsorted(row, t, side="right") for row, t in zip(running, target, strict=True)])
    assert np.all(weights[np.arange(400), got] > 0)
    close = np.abs(running - target[:, None]).min(axis=1) < 1e-5 * running[:, -1]  # next to the border rounding decides
    assert np.array_equal(got[~close], expected[~close])
    assert close.mean() < 0.05


@pytest.mark.parametrize("vocabulary", [1, 2, 128, 129, 400])
@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0))), 1.0])
def test_the_ends_of_the_unit_interval_give_tokens_with_weight(vocabulary: int, uniform: float) -> None:
    rng = np.random.default_rng(1)
    for start, stop in ((0, vocabulary), (vocabulary // 3, vocabulary // 3 + 1), (0, max(1, vocabulary // 2))):
        weights = np.zeros((3, vocabulary), np.float32)
        weights[:, start:stop] = rng.random((3, stop - start)).astype(np.float32) + 0.05
        got = np.asarray(jit_inverse(jnp.asarray(weights), jnp.full((3,), uniform, jnp.float32))[0])
        assert np.all((got >= start) & (got < stop))


@pytest.mark.parametrize("settings", [OFF, (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.3), (6, 0.8, 0.05)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_frequencies_and_log_probabilities_are_those_of_the_truncated_distribution(
    settings: tuple[int, float, float], temperature: float
) -> None:
    draws = 20_000
    logits = np.array([0.3, -1.0, 2.0, 1.1, -0.4, 0.9, 1.6, -2.5], np.float32)
    uniform = jnp.asarray(np.random.default_rng(3).random(draws), jnp.float32)
    table = jnp.broadcast_to(jnp.asarray(logits)[None, :], (draws, len(logits)))
    ids, logps, _ = jit_draw(table, uniform, jnp.float32(temperature), None if settings == OFF else thresholds(*settings))
    scaled = logits.astype(np.float64) / temperature
    expected = log_softmax(np.where(staying_tokens(scaled, *settings), scaled, -np.inf))
    np.testing.assert_allclose(logps, expected[np.asarray(ids)], rtol=0, atol=1e-6)
    counts = np.bincount(np.asarray(ids), minlength=len(logits))
    possible = expected > -np.inf
    assert np.all(counts[~possible] == 0)
    if possible.sum() > 1:
        assert chisquare(counts[possible], draws * np.exp(expected[possible])).pvalue > 1e-3


def test_greedy_takes_the_most_probable_at_temperature_one_untruncated() -> None:
    logits = np.random.default_rng(4).normal(size=(50, 30)).astype(np.float32) * 3
    for cut in (None, thresholds(2, 0.3, 0.2)):
        ids, logps, _ = jit_draw(jnp.asarray(logits), jnp.full((50,), 0.999, jnp.float32), jnp.float32(0), cut)
        assert np.array_equal(ids, logits.argmax(axis=1))
        np.testing.assert_allclose(logps, log_softmax(logits).max(axis=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_never_drawn(temperature: float) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(1000, 131)).astype(np.float32)
    logits[:, ::2] = -np.inf
    logits[0, 1:] = -np.inf
    logits[0, 0] = -3.0
    for cut in (None, thresholds(0, 0.9, 0.0), thresholds(100, 1.0, 0.0)):
        ids, logps, _ = jit_draw(jnp.asarray(logits), jnp.asarray(rng.random(1000), jnp.float32), jnp.float32(temperature), cut)
        assert np.all(np.asarray(ids)[1:] % 2 == 1)
        assert (int(ids[0]), float(logps[0])) == (0, 0.0)
        assert np.all(np.isfinite(logps))


@pytest.mark.parametrize("temperature", [1e-4, 100.0])
def test_extreme_temperatures_give_numbers(temperature: float) -> None:
    logits = np.random.default_rng(6).normal(size=(100, 50)).astype(np.float32) * 30
    ids, logps, _ = jit_draw(jnp.asarray(logits), jnp.linspace(0, 0.999, 100), jnp.float32(temperature), thresholds(0, 0.99, 0.0))
    assert np.all(np.isfinite(logps))
    if temperature < 1:
        assert np.array_equal(ids, logits.argmax(axis=1))


def test_one_token_leaves_no_choice() -> None:
    ids, logps, _ = jit_draw(jnp.array([[-7.0]]), jnp.array([0.3]), jnp.float32(1), thresholds(3, 0.5, 0.5))
    assert (int(ids[0]), float(logps[0])) == (0, 0.0)


def draws(logits: np.ndarray, uniform: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Draws from logits [V] with many random numbers; returns tokens and whether each draw was a near-tie."""
    table = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None, :], (len(uniform), len(logits)))
    ids, _, close = jit_draw(table, jnp.asarray(uniform, jnp.float32), jnp.float32(temperature), None)
    return np.asarray(ids), np.asarray(close)


@pytest.mark.parametrize("vocabulary", [2, 5, 60])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_draw_near_a_border_is_close_and_others_are_not(vocabulary: int, temperature: float) -> None:
    """How far a border moves is measured by adding normal noise of deviation `NEAR_LOGITS` to the logits, many times."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=vocabulary) * temperature
    scaled = logits.astype(np.float32).astype(np.float64) / temperature
    borders = np.cumsum(np.exp(log_softmax(scaled)))[:-1]
    moved = np.cumsum(np.exp(log_softmax(scaled + NEAR_LOGITS * rng.normal(size=(2000, vocabulary)))), axis=1)[:, :-1]
    deviation = (moved - borders).std(axis=0)
    some = np.flatnonzero(deviation > 2e-6)  # below this, float32 rounding of a sum near 1 dominates
    assert len(some) >= vocabulary // 2
    gap = np.diff(np.concatenate([[0], borders, [1]]))
    for border in some:
        for side, room in ((-1, gap[border]), (1, gap[border + 1])):
            numbers = borders[border] + side * deviation[border] * np.array([0.3, 0.8, 6.0])
            ids, close = draws(logits, numbers, temperature)
            if room > 20 * deviation.max():  # else another border is close
                assert close.tolist() == [True, True, False]
                assert set(ids) == {border + (side > 0)}


def test_the_ends_of_the_unit_interval_are_no_borders() -> None:
    _, close = draws(np.array([0.5, 0.1, 0.3]), np.array([0.0, 1e-7, 1 - 1e-7]))
    assert not close.any()
    assert not draws(np.array([0.5]), np.array([0.0, 0.5]))[1].any()


def test_two_most_probable_tokens_that_nearly_tie_are_close_when_greedy() -> None:
    number = np.array([0.4])
    for gap, near in ((5e-5, True), (0.0, True), (2e-4, False), (1.0, False)):
        ids, close = draws(np.array([-1.0, 2.0, 0.5, 2.0 - gap]), number, 0.0)
        assert (ids.tolist(), close.tolist()) == ([1], [near])
    ids, close = draws(np.array([1.0, 1.0, 3.0, 0.0]), number, 0.0)  # the tie is not among the first
    assert (ids.tolist(), close.tolist()) == ([2], [False])
    assert not draws(np.array([1.0, -np.inf, -np.inf]), number, 0.0)[1].any()


@pytest.mark.parametrize("cut", [(2, 1.0, 0.0), (0, 0.7, 0.0)])
def test_a_tie_between_a_token_that_stays_and_one_that_goes_is_close(cut: tuple[int, float, float]) -> None:
    """With other rounding the other of the two stays, and here it is the one that is drawn."""
    logits = np.array([2.0, 1.0 - 5e-5, 1.0, -3.0], np.float32)
    assert staying(logits[None], *cut) == [[0, 2]]
    assert staying(logits[None] + [[0, 1e-4, 0, 0]], *cut) == [[0, 1]]
    ids, _, close = jit_draw(jnp.asarray(logits[None]), jnp.array([0.9]), jnp.float32(1), thresholds(*cut))
    assert (ids.tolist(), close.tolist()) == ([2], [True])


@pytest.mark.parametrize("cut", [(2, 1.0, 0.0), (0, 0.7, 0.0)])
def test_a_tie_at_the_border_is_not_close_where_the_draw_stays_the_same(cut: tuple[int, float, float]) -> None:
    logits = np.array([2.0, 1.0 - 5e-5, 1.0, -3.0], np.float32)
    ids, _, close = jit_draw(jnp.asarray(logits[None]), jnp.array([0.3]), jnp.float32(1), thresholds(*cut))
    assert (ids.tolist(), close.tolist()) == ([0], [False])


def test_a_token_at_the_border_of_min_p_is_close_where_it_matters() -> None:
    logits = np.array([[1.0, 1.0 + np.log(0.1) + 5e-5, -4.0], [1.0, 1.0 + np.log(0.1) - 5e-5, -4.0]], np.float32)
    assert staying(logits, 0, 1.0, 0.1) == [[0, 1], [0]]
    for number, near in ((0.95, True), (0.5, False)):
        ids, _, close = jit_draw(jnp.asarray(logits), jnp.full((2,), number, jnp.float32), jnp.float32(1), thresholds(0, 1.0, 0.1))
        assert (ids.tolist(), close.tolist()) == ([int(near), 0], [near, near])


@pytest.mark.parametrize(
    "cut", [(5, 0.9, 0.0), *(pytest.param(cut, marks=pytest.mark.slow) for cut in ((3, 1.0, 0.0), (0, 0.8, 0.0)))]
)
def test_draws_that_small_changes_of_the_logits_alter_are_close(cut: tuple[int, float, float]) -> None:
    """Rows in which two adjacent logits nearly tie are drawn again after small changes: a draw that changes was a near-tie."""
    rng = np.random.default_rng(3)
    rows, vocabulary = 4000, 8
    logits = np.sort(rng.normal(size=(rows, vocabulary)), axis=1).astype(np.float32)
    column = rng.integers(1, vocabulary, size=rows)
    logits[np.arange(rows), column] = logits[np.arange(rows), column - 1] + np.float32(3e-5)
    logits = rng.permuted(logits, axis=1)
    uniform = rng.random(rows).astype(np.float32)
    first, _, close = jit_draw(jnp.asarray(logits), jnp.asarray(uniform), jnp.float32(1), thresholds(*cut))
    differs = np.zeros(rows, bool)
    for _ in range(20):
        moved = logits + rng.normal(size=logits.shape).astype(np.float32) * np.float32(2e-5)
        again = jit_draw(jnp.asarray(moved), jnp.asarray(uniform), jnp.float32(1), thresholds(*cut))[0]
        differs |= np.asarray(again) != np.asarray(first)
    assert differs.sum() > 50
    assert not (differs & ~np.asarray(close)).any()
    assert np.asarray(close).mean() < 0.2


@pytest.mark.parametrize("cut", [None, (5, 0.7, 0.05)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_on_a_gpu_no_branch_is_waited_for_and_the_draws_are_the_same(
    cut: tuple[int, float, float] | None, temperature: float
) -> None:
    rng = np.random.default_rng(5)
    logits, uniform = jnp.asarray(rng.normal(size=(400, 50)), jnp.float32), jnp.asarray(rng.random(400), jnp.float32)
    thresholds = None if cut is None else Thresholds(jnp.int32(cut[0]), jnp.float32(cut[1]), jnp.float32(cut[2]))
    arguments = (logits, uniform, jnp.float32(temperature), thresholds)
    expected = draw(*arguments)
    with tracing_for(Target("gpu")):
        got = jax.jit(draw)(*arguments)
        assert "cond" not in str(jax.make_jaxpr(draw)(*arguments))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # one was compiled as a whole
