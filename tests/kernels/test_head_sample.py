"""`head_sample` against NumPy in float64, every implementation; its TPU kernels interpreted here, and compiled for TPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import CHIPS, compiled_for, interpreted, no_race
from plain_oracles import array_sizes, log_softmax, quick_compiling

from grpo_kernels import Draws, head_sample
from grpo_kernels.ops.head_sample import BlockSizes
from grpo_kernels.ops.head_sample.shapes import PUBLISHED, Shape

H = 16
IMPLEMENTATIONS = ["reference", "mosaic_tpu"]
SIZES = [(5, 1187), (1, 1187), (16, 384), (5, 128), (5, 100)]  # rows and vocabulary, which 128 divides or not


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@functools.cache
def inputs(rows: int, vocabulary: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(rows + vocabulary)
    x = jnp.asarray(rng.normal(size=(rows, H)), dtype)
    w = jnp.asarray(rng.normal(size=(vocabulary, H)) * 0.5, dtype)
    return x, w, jnp.asarray(rng.random(rows), jnp.float32)


def drawn(implementation: str, *arrays: jax.Array, temperature: float = 1.0, **options: Any) -> Draws:
    """Compiled; Pallas kernels are interpreted."""
    program = jax.jit(functools.partial(head_sample, implementation=implementation, **options))
    with interpreted(implementation):
        return jax.tree.map(np.asarray, program(*arrays, temperature=jnp.float32(temperature)))


def scaled_logits(x: Any, w: Any, temperature: float, softcap: float | None = None) -> np.ndarray:
    """By the textbook, float64; at temperature 1 where greedy."""
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    return logits / (temperature or 1.0)


def assert_right(got: Draws, scaled: np.ndarray, uniform: Any, greedy: bool) -> None:
    """Tokens where the running sum of probabilities passes the number; those at a border may be either one."""
    logp = log_softmax(scaled)
    p = np.exp(logp)
    running = np.cumsum(p, axis=1)
    number = np.asarray(uniform, np.float64)[:, None]
    expected = scaled.argmax(axis=1) if greedy else (running <= number).sum(axis=1)
    clear = np.full(len(p), True) if greedy else np.abs(running - number).min(axis=1) > 1e-5
    assert np.array_equal(got.ids[clear], expected[clear])
    assert clear.mean() > 0.7
    np.testing.assert_allclose(got.logp, logp[np.arange(len(p)), got.ids], rtol=0, atol=1e-5)
    entropy = -(p * np.where(p > 0, logp, 0)).sum(axis=1)
    np.testing.assert_allclose(got.entropy, entropy, rtol=0, atol=1e-5)
    assert got.logp.max() < 1e-6
    assert got.entropy.min() >= 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_tokens_and_their_log_probabilities(implementation: str, rows: int, vocabulary: int) -> None:
    x, w, uniform = inputs(rows, vocabulary)
    for temperature in (1.3, 0.0):
        got = drawn(implementation, x, w, uniform, temperature=temperature)
        assert_right(got, scaled_logits(x, w, temperature), uniform, temperature == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("softcap", "temperature", "dtype"), [(3.0, 0.7, "float32"), (None, 0.7, "bfloat16"), (2.0, 0.0, "bfloat16")]
)
def test_soft_cap_and_bfloat16(implementation: str, softcap: float | None, temperature: float, dtype: str) -> None:
    """Products of bfloat16 numbers are exact in float32, so the tolerance stays."""
    x, w, uniform = inputs(16, 384, dtype)
    got = drawn(implementation, x, w, uniform, temperature=temperature, softcap=softcap)
    assert_right(got, scaled_logits(x, w, temperature, softcap), uniform, temperature == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_banned_tokens_are_not_drawn_by_the_rows_that_may_not(implementation: str) -> None:
    """The banned ones are the most probable; one row may draw only a token in the vocabulary's tail."""
    rows, vocabulary = 16, 300
    x, w, uniform = inputs(rows, vocabulary)
    ids = (0, 131, 299)
    w = w.at[jnp.array(ids)].set(4 * x[0])
    banned = np.arange(rows) % 2 == 0
    for temperature in (0.7, 0.0):
        options: dict[str, Any] = {"banned_ids": (*ids, 300), "banned": jnp.asarray(banned), "temperature": temperature}
        got = drawn(implementation, x, w, uniform, **options)
        scaled = scaled_logits(x, w, temperature)
        scaled[np.ix_(banned, ids)] = -np.inf
        assert_right(got, scaled, uniform, temperature == 0)
    all_but_one = {"banned_ids": tuple(range(299)), "banned": jnp.ones((rows,), bool)}
    got = drawn(implementation, x, w, uniform, **all_but_one)
    assert np.all(got.ids == 299)
    assert np.abs(got.logp).max() < 1e-5
    assert np.abs(got.entropy).max() < 1e-5
    assert not got.close.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_first_of_the_most_probable_is_taken_where_they_tie(implementation: str) -> None:
    x, w, uniform = inputs(5, 384)
    for tied in ((7, 9), (200, 300), (40, 383)):  # in a group, and across groups
        same = w.at[jnp.array(tied)].set(3 * x[2])
        got = drawn(implementation, x, same, uniform, temperature=0.0)
        assert (got.ids[2], got.close[2]) == (tied[0], True)


def test_both_implementations_draw_the_same_tokens_and_see_the_same_near_ties() -> None:
    """600 numbers for one distribution, in three tiles of rows; nearness large enough that some are close."""
    rows, vocabulary = 600, 1187
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(vocabulary, H)) * 0.5, jnp.float32)
    x = jnp.broadcast_to(jnp.asarray(rng.normal(size=(1, H)), jnp.float32), (rows, H))
    uniform = jnp.asarray((np.arange(rows) + 0.5) / rows, jnp.float32)
    plain, kernel = (drawn(name, x, w, uniform, near=1e-2) for name in IMPLEMENTATIONS)
    assert np.array_equal(plain.ids[~plain.close], kernel.ids[~plain.close])
    assert np.mean(plain.ids == kernel.ids) > 0.99
    assert 10 < plain.close.sum() < 300
    assert np.mean(plain.close == kernel.close) > 0.99
    assert len(set(kernel.ids // 128)) == 10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_far_apart_give_numbers(implementation: str) -> None:
    x, w, uniform = inputs(5, 384)
    got = drawn(implementation, x * 1e3, w, uniform, temperature=1e-2)
    assert np.array_equal(got.ids, scaled_logits(x, w, 1.0).argmax(axis=1))
    for nats in (got.logp, got.entropy):
        np.testing.assert_allclose(nats, 0, rtol=0, atol=0.1)  # numbers near a million are 0.06 apart in float32


def test_the_kernels_have_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of rows, three blocks of the vocabulary."""
    x, w, uniform = inputs(140, 600)
    program = jax.jit(functools.partial(head_sample, implementation="mosaic_tpu", block_sizes=BlockSizes(128, 256)))
    with no_race(capsys):
        got: Draws = jax.tree.map(np.asarray, program(x, w, uniform, temperature=jnp.float32(1)))
    assert_right(got, scaled_logits(x, w, 1.0), uniform, greedy=False)


@pytest.mark.parametrize(("chip", "shape"), list(zip(CHIPS, [*PUBLISHED.values(), PUBLISHED["Gemma-3-4B"]], strict=True)), ids=str)
def test_on_a_tpu_there_are_no_logits(chips: dict[str, Any], chip: str, shape: Shape) -> None:
    """In the compiled program, at the sizes of published models. The rows of W that are read twice are not stored either."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    program = functools.partial(head_sample, banned_ids=(1, shape.vocabulary - 1), implementation="mosaic_tpu")
    hidden, head = array(shape.rows, shape.width), array(shape.vocabulary, shape.width)
    numbers, flags = array(shape.rows, dtype=jnp.float32), array(shape.rows, dtype=jnp.bool_)
    memory = compiled_for(chips, chip, program, hidden, head, numbers, temperature=array(dtype=jnp.float32), banned=flags)
    print(f"{chip} {shape}: temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    logits = 4 * shape.rows * shape.vocabulary
    # A few numbers for each group of 128 tokens. The 128 rows of W that each row reads again would be `gathered` bytes.
    gathered = 2 * shape.rows * 128 * shape.width
    assert memory.temp_size_in_bytes < logits / 10 < gathered


def test_the_traced_program_holds_no_array_of_rows_by_vocabulary() -> None:
    rows, vocabulary = 64, 32_768
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((rows, H), (vocabulary, H), (rows,))]
    trace = jax.make_jaxpr(functools.partial(head_sample, temperature=jnp.float32(1), implementation="mosaic_tpu"))
    assert array_sizes(trace(*shapes)) <= 1024 * rows < rows * vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"w": jnp.zeros((7, 5))}, r"w \(7, 5\)"),
        ({"uniform": jnp.zeros((2,))}, r"uniform \(2,\)"),
        ({"w": jnp.zeros((7, 4), jnp.bfloat16)}, "bfloat16"),
        ({"banned_ids": (-1,)}, "banned_ids"),
        ({"implementation": "xla"}, "xla"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": jnp.zeros((3, 4)),
        "w": jnp.zeros((7, 4)),
        "uniform": jnp.zeros((3,)),
        "temperature": jnp.float32(1),
    }
    undecorated = head_sample.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(given | change))
