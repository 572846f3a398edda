"""`head_logprob` against NumPy in float64, every implementation; its TPU kernel interpreted here, and compiled for TPUs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import CHIPS, MIB, V5P_TAKES_MORE, compiled_for, interpreted, no_race, on_chips
from plain_oracles import array_sizes, log_softmax, quick_compiling

from grpo_kernels import head_logprob
from grpo_kernels.ops.head_logprob import BlockSizes, choose_block_sizes, frozen, trained
from grpo_kernels.ops.head_logprob.shapes import GEMMA_2_2B, GEMMA_3_4B, LAPTOP, LLAMA_3_8B, QWEN3_8B, Shape
from grpo_kernels.target import Target, tracing_for

T, H, V = 23, 16, 1187  # a prime vocabulary, and tokens that no tile of 5 divides
CASES = [(T, None, 0.7), (T, 3.0, 1.6), (1, None, 1.0), (1, 3.0, 1.0)]  # tokens, soft cap, temperature
IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
NAMES: list[str] = ["logp", "entropy", "lse"]
SMALL = {name: BlockSizes(128 if name == "mosaic_tpu" else 5, 256) for name in IMPLEMENTATIONS}
"""Several tiles of tokens and chunks of the vocabulary, the last ones ragged."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def inputs(tokens: int = T, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(tokens, H)), dtype)
    w = jnp.asarray(rng.normal(size=(V, H)), dtype)
    return x, w, jnp.asarray(rng.integers(0, V, tokens), jnp.int32)


def oracle(x: Any, w: Any, ids: Any, softcap: float | None, temperature: float) -> dict[str, np.ndarray]:
    """By the textbook, float64: s = cap(x Wᵀ)/τ, p = softmax(s), H = −Σ p log p, and derivatives with respect to the raw logits."""
    x, w, ids = np.asarray(x, np.float64), np.asarray(w, np.float64), np.asarray(ids)
    raw = x @ w.T
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    slope = np.ones_like(raw) if softcap is None else 1 - np.tanh(raw / softcap) ** 2
    logp = log_softmax(capped / temperature)
    p = np.exp(logp)
    entropy = -(p * logp).sum(axis=1)
    one_hot = np.eye(len(w))[ids]
    return {
        "logp": logp[np.arange(len(ids)), ids],
        "entropy": entropy,
        "lse": np.log(np.exp(capped / temperature).sum(axis=1)),
        "d_logp": (one_hot - p) * slope / temperature,
        "d_lse": p * slope / temperature,
        "d_entropy": -p * (logp + entropy[:, None]) * slope / temperature,
    }


def directions(tokens: int, *names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {name: rng.normal(size=tokens).astype(np.float32) for name in names or NAMES}


def outcome(
    x: jax.Array, w: jax.Array, ids: jax.Array, *alongs: dict[str, np.ndarray], implementation: str, **options: Any
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """The outputs, and gradients with respect to x and w of their sums along directions.

    Blocks are small where nothing else is said. Without a gradient the outputs come from another program, which must agree.
    """
    options = {"implementation": implementation, "block_sizes": SMALL[implementation]} | options

    def program(x: jax.Array, w: jax.Array, ids: jax.Array) -> Any:
        alone = head_logprob(x, w, ids, **options)
        if not alongs:
            return alone, alone, []
        outputs, back = jax.vjp(lambda x, w: head_logprob(x, w, ids, **options), x, w)
        vectors = [tuple(jnp.asarray(along.get(name, np.zeros(len(x), np.float32))) for name in NAMES) for along in alongs]
        return alone, outputs, [back(vector) for vector in vectors]

    with interpreted(implementation):
        alone, outputs, pulled = jax.jit(program)(x, w, ids)
    for one, other in zip(alone, outputs, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)
    assert all((dx.dtype, dw.dtype) == (x.dtype, w.dtype) for dx, dw in pulled)
    named = dict(zip(NAMES, map(np.asarray, outputs), strict=True))
    return named, [(np.asarray(dx, np.float64), np.asarray(dw, np.float64)) for dx, dw in pulled]


def assert_near(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], *names: str) -> None:
    """Logits up to 20: float32 keeps 2e-6 of them."""
    for name in names or NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5)


def raw_gradient(expected: dict[str, np.ndarray], along: dict[str, np.ndarray]) -> np.ndarray:
    return np.sum([along[name][:, None] * expected[f"d_{name}"] for name in along], axis=0)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "softcap", "temperature"), CASES)
def test_a_frozen_head(tokens: int, softcap: float | None, temperature: float, implementation: str) -> None:
    x, w, ids = inputs(tokens)
    expected = oracle(x, w, ids, softcap, temperature)
    alongs = [directions(tokens, "logp"), directions(tokens)]
    options: dict[str, Any] = {"softcap": softcap, "implementation": implementation, "temperature": jnp.float32(temperature)}
    got, pulled = outcome(x, w, ids, *alongs, **options)
    assert_near(got, expected)
    for along, (dx, dw) in zip(alongs, pulled, strict=True):
        told = {name: vector for name, vector in along.items() if name != "entropy"}  # which has no gradient
        assert relative(dx, raw_gradient(expected, told) @ np.asarray(w, np.float64)) < 1e-5
        assert np.all(dw == 0)


def test_a_branch_keeps_the_tokens_rows_where_it_would_copy_the_head() -> None:
    x, w, ids = inputs(7)

    def back(keep_rows: bool) -> Any:
        def values(x: jax.Array, needed: jax.Array) -> jax.Array:
            def head(x: jax.Array) -> jax.Array:
                return head_logprob(x, w, ids, implementation="xla", block_sizes=SMALL["xla"], keep_rows=keep_rows)[0]

            return jnp.sum(jax.lax.cond(needed, head, lambda x: jnp.zeros((7,)), x))

        return lambda x, needed: jax.vjp(lambda x: values(x, needed), x)[1]

    needed = jnp.array(True)
    kept = [jax.make_jaxpr(back(keep_rows))(x, needed).jaxpr.outvars for keep_rows in (False, True)]
    assert [w.shape in [variable.aval.shape for variable in variables] for variables in kept] == [True, False]
    (expected,), (got,) = (jax.jit(back(keep_rows))(x, needed)(jnp.float32(1)) for keep_rows in (False, True))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("tokens", "softcap", "temperature"), CASES)
def test_a_trained_head(tokens: int, softcap: float | None, temperature: float, implementation: str) -> None:
    x, w, ids = inputs(tokens)
    expected, along = oracle(x, w, ids, softcap, temperature), directions(tokens)
    options: dict[str, Any] = {"softcap": softcap, "implementation": implementation, "temperature": temperature}
    got, [(dx, dw)] = outcome(x, w, ids, along, head_trainable=True, **options)
    assert_near(got, expected)
    d_raw = raw_gradient(expected, along)
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 1e-5
    assert relative(dw, d_raw.T @ np.asarray(x, np.float64)) < 1e-5


def test_for_a_tpu_too_a_trained_head_is_plain() -> None:
    """Not interpreted, so that a Pallas kernel would raise."""
    x, w, ids = inputs()

    def of_entropy(name: str) -> Any:
        return jax.jit(jax.grad(lambda x: jnp.sum(head_logprob(x, w, ids, head_trainable=True, implementation=name)[1])))(x)

    np.testing.assert_array_equal(of_entropy("mosaic_tpu"), of_entropy("xla"))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str, softcap: float | None) -> None:
    """Held to float64 on the same rounded numbers: products are exact in float32, and only probabilities and results rounded."""
    x, w, ids = inputs(dtype=jnp.bfloat16)
    expected = oracle(x.astype(jnp.float32), w.astype(jnp.float32), ids, softcap, 1.0)
    alongs = [directions(T, "logp"), directions(T, "lse"), directions(T, "logp", "lse")]
    got, pulled = outcome(x, w, ids, *alongs, softcap=softcap, implementation=implementation)
    assert_near(got, expected)
    for along, (dx, _) in zip(alongs, pulled, strict=True):
        assert relative(dx, raw_gradient(expected, along) @ np.asarray(w, np.float64)) < 3e-3


def test_bfloat16_where_the_head_trains() -> None:
    """Gradients of the logits are rounded to 8 bits, then results."""
    x, w, ids = inputs(dtype=jnp.bfloat16)
    expected, along = oracle(x.astype(jnp.float32), w.astype(jnp.float32), ids, None, 1.0), directions(T)
    d_raw = raw_gradient(expected, along)
    _, [(dx, dw)] = outcome(x, w, ids, along, head_trainable=True, implementation="xla")
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 5e-3
    assert relative(dw, d_raw.T @ np.asarray(x, np.float64)) < 5e-3


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_a_sure_token_keeps_the_digits_of_its_gradient(implementation: str) -> None:
    """Each token by itself, in bfloat16, where 1 − p is about 1e-3 and W[y] − E_p[W] would be a difference of near numbers."""
    x, w, ids = inputs(dtype=jnp.bfloat16)
    w = w.at[ids].set((x.astype(jnp.float32) * 1.2).astype(jnp.bfloat16))
    expected = oracle(x.astype(jnp.float32), w.astype(jnp.float32), ids, None, 1.0)
    _, [(dx, _)] = outcome(x, w, ids, {"logp": np.ones(T, np.float32)}, implementation=implementation)
    exact = expected["d_logp"] @ np.asarray(w, np.float64)
    assert np.sum(expected["logp"] > -2e-3) > 3
    assert np.max(np.linalg.norm(dx - exact, axis=1) / np.linalg.norm(exact, axis=1)) < 6e-3


@pytest.mark.parametrize("trainable", [False, True])
def test_block_sizes_change_nothing(trainable: bool) -> None:
    """The chosen sizes, other sizes, and for a frozen head the kernel's chosen sizes."""
    x, w, ids = inputs()
    others = [("xla", BlockSizes(22, 1152))] + [("mosaic_tpu", None)] * (not trainable)

    def everything(implementation: str, blocks: BlockSizes | None) -> Any:
        options: dict[str, Any] = {"temperature": 0.7, "head_trainable": trainable, "block_sizes": blocks}
        return outcome(x, w, ids, directions(T), implementation=implementation, **options)

    chosen = everything("xla", None)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), everything(*other), chosen)


@pytest.mark.parametrize(("implementation", "trainable"), [("xla", False), ("xla", True), ("mosaic_tpu", False)])
def test_extreme_logits_neither_overflow_nor_give_nan(implementation: str, trainable: bool) -> None:
    x, w, ids = inputs()
    got, pulled = outcome(x * 1e3, w, ids, directions(T), head_trainable=trainable, implementation=implementation)
    assert all(np.all(np.isfinite(a)) for a in (*got.values(), *pulled[0]))
    assert got["entropy"].min() >= 0
    assert got["logp"].max() <= 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_is_no_row_of_the_head_has_no_probability(implementation: str) -> None:
    x, w, ids = inputs()
    ids = ids.at[:3].set(jnp.array([-1, V, V + 300], jnp.int32))
    expected, along = oracle(x, w, ids % V, None, 1.0), directions(T, "lse")
    got, [(dx, _)] = outcome(x, w, ids, along, implementation=implementation)
    assert np.all(np.isneginf(got["logp"][:3]))
    assert_near(got, expected, "entropy", "lse")
    assert relative(dx, raw_gradient(expected, along) @ np.asarray(w, np.float64)) < 1e-5


def test_the_kernel_has_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of tokens, three blocks of the vocabulary."""
    x, w, ids = inputs(140)
    along = jnp.asarray(directions(140)["logp"])
    options: dict[str, Any] = {"implementation": "mosaic_tpu", "block_sizes": BlockSizes(128, 512)}
    with no_race(capsys):
        dx = jax.block_until_ready(jax.jit(jax.grad(lambda x: jnp.sum(along * head_logprob(x, w, ids, **options)[0])))(x))
    exact = along[:, None] * (oracle(x, w, ids, None, 1.0)["d_logp"] @ np.asarray(w, np.float64))
    assert relative(np.asarray(dx, np.float64), np.asarray(exact)) < 1e-5


def test_a_head_on_four_devices(repository: Path) -> None:
    """Every implementation, against the reference on one device."""
    paths = os.pathsep.join([str(repository / "kernels"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(repository / "tests" / "support" / "vocabulary_parallel.py")]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_backward_pass_of_a_frozen_head_talks_to_no_other_device() -> None:
    """It runs where there is no axis to talk along."""
    numbers, vectors = jnp.ones((T,)), jnp.ones((T, H))
    kept = (vectors, vectors[:0], vectors, jnp.zeros((T,), jnp.int32), numbers, numbers, jnp.float32(1))
    options = frozen.HeadOptions("xla", None, "model", (SMALL["xla"], SMALL["xla"]))
    assert frozen.frozen_head_backward(options, kept, (numbers, numbers, numbers))[0].shape == (T, H)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize("trainable", [False, True])
def test_there_is_never_an_array_of_tokens_by_vocabulary(trainable: bool, implementation: str) -> None:
    tokens, vocabulary, width = 8192, 32768, 8
    sizes: list[tuple[tuple[int, ...], Any]] = [
        ((tokens, width), "float32"),
        ((vocabulary, width), "float32"),
        ((tokens,), "int32"),
    ]
    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes]

    def scalar(x: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
        outputs = head_logprob(x, w, ids, head_trainable=trainable, implementation=implementation)
        return sum((jnp.sum(numbers) for numbers in outputs), jnp.float32(0))

    traced = jax.make_jaxpr(jax.grad(scalar, argnums=(0, 1)))(*shapes)
    assert array_sizes(traced) <= trained.CHUNK_LOGITS < tokens * vocabulary / 16


def arguments_of(shape: Shape, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    x, w = (jax.ShapeDtypeStruct((rows, shape.width), dtype) for rows in (shape.tokens, shape.vocabulary))
    return x, w, jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)


def value_and_gradient(x: Any, w: Any, ids: Any, **options: Any) -> Any:
    return jax.value_and_grad(lambda x: jnp.sum(head_logprob(x, w, ids, **options)[0]))(x)


def test_on_a_cpu_it_takes_a_twentieth_of_the_memory() -> None:
    def temporaries(name: str) -> int:
        program = jax.jit(functools.partial(value_and_gradient, implementation=name))
        return program.lower(*arguments_of(LAPTOP, jnp.float32)).compile().memory_analysis().temp_size_in_bytes

    own, plain = temporaries("xla"), temporaries("reference")
    print(f"{LAPTOP}: temporaries {own / MIB:.0f} MiB, plain {plain / MIB:.0f}")
    assert own < plain / 20


@pytest.mark.parametrize(
    ("chip", "shape"), on_chips(zip(CHIPS, (QWEN3_8B, LLAMA_3_8B, GEMMA_3_4B, GEMMA_2_2B), strict=True)), ids=str
)
def test_on_a_tpu_a_gradient_takes_the_kept_vector_and_no_more(chips: dict[str, Any], chip: str, shape: Shape) -> None:
    """Next to one [T, H] array in bfloat16 a few values a token.

    From libtpu 0.0.50 on the SparseCore gathers the tokens' rows of W into one more [T, H] array: on a v5p, and on a v6e from a
    vocabulary of 256,000.
    """
    gradient = functools.partial(value_and_gradient, implementation="mosaic_tpu", softcap=shape.softcap)
    memory = compiled_for(chips, chip, gradient, *arguments_of(shape, jnp.bfloat16))
    gathers = chip == "v5p" or (chip == "v6e" and shape.vocabulary >= 256_000)
    arrays = 2 if gathers and V5P_TAKES_MORE else 1
    assert memory.temp_size_in_bytes < arrays * 2 * shape.tokens * shape.width + MIB


def test_on_a_tpu_values_take_no_temporaries_and_odd_sizes_compile(chips: dict[str, Any]) -> None:
    alone = functools.partial(head_logprob, implementation="mosaic_tpu")
    assert compiled_for(chips, "v6e", alone, *arguments_of(QWEN3_8B, jnp.bfloat16)).temp_size_in_bytes == 0
    gradient = functools.partial(value_and_gradient, implementation="mosaic_tpu", softcap=3.0)
    odd = arguments_of(Shape(1, 64, 1187), jnp.float32)
    assert compiled_for(chips, "v5e", gradient, *odd).temp_size_in_bytes < MIB


def test_a_tpu_with_less_vector_memory_gets_smaller_blocks() -> None:
    sizes = []
    for memory in (16, 64, 128):
        with tracing_for(Target("tpu", memory * MIB)):
            sizes.append(choose_block_sizes(8192, 4096, 151_936, 2, "mosaic_tpu", with_mean=True))
    assert sizes == [BlockSizes(128, 256), BlockSizes(512, 512), BlockSizes(512, 1024)]
    assert 12 * MIB > 128 * 4096 * (2 * 2 + 4 + 2 * 2) + 2 * 2 * 256 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"w": jnp.zeros((7, 5))}, r"w \(7, 5\)"),
        ({"x": jnp.zeros((0, 4)), "ids": jnp.zeros((0,), jnp.int32)}, "empty"),
        ({"ids": jnp.zeros((2,), jnp.int32)}, r"ids \(2,\)"),
        ({"w": jnp.zeros((7, 4), jnp.bfloat16)}, "bfloat16"),
        ({"implementation": "tpu"}, "unknown"),
        ({"implementation": "mosaic_tpu"}, "interpret"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": jnp.zeros((3, 4)), "w": jnp.zeros((7, 4)), "ids": jnp.zeros((3,), jnp.int32)} | change
    undecorated = head_logprob.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**given)
