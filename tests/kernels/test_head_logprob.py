"""`head_logprob` against NumPy in float64, every implementation; its TPU kernel interpreted here, and compiled for the chips."""

from __future__ import annotations

import contextlib
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
from jax.experimental.pallas import tpu as pltpu
from plain_oracles import array_sizes, log_softmax, quick_compiling

from grpo_kernels.ops.head_logprob import frozen, head_logprob, pallas_tpu, trained, xla
from grpo_kernels.ops.head_logprob.shapes import GEMMA_2_2B, GEMMA_3_4B, LAPTOP, LLAMA_3_8B, QWEN3_8B, Shape

T, H, V = 23, 16, 1187  # a prime vocabulary, and tokens that no tile of 5 divides
CASES = [(T, None, 0.7), (T, 3.0, 1.6), (1, None, 1.0), (1, 3.0, 1.0)]  # tokens, soft cap, temperature
IMPLEMENTATIONS = ["reference", "gpu", "tpu"]
NAMES: list[str] = ["logp", "entropy", "lse"]
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of tokens and chunks of the vocabulary, the last ones ragged."""
    set_tiles(monkeypatch, 5, 256)


def set_tiles(monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int) -> None:
    monkeypatch.setattr(xla, "tile_tokens", lambda: tokens)
    monkeypatch.setattr(xla, "VOCABULARY", vocabulary)
    monkeypatch.setattr(trained, "VOCABULARY", vocabulary)
    monkeypatch.setattr(pallas_tpu, "tile_and_block", lambda *_: (128, vocabulary))


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


def interpreted(implementation: str | None) -> Any:
    return pltpu.force_tpu_interpret_mode() if implementation == "tpu" else contextlib.nullcontext()


def outcome(
    x: jax.Array, w: jax.Array, ids: jax.Array, *alongs: dict[str, np.ndarray], **options: Any
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """The outputs, and gradients with respect to x and w of their sums along directions.

    Without a gradient the outputs come from another program, which is held to the same numbers.
    """

    def program(x: jax.Array, w: jax.Array, ids: jax.Array) -> Any:
        alone = head_logprob(x, w, ids, **options)
        if not alongs:
            return alone, alone, []
        outputs, back = jax.vjp(lambda x, w: head_logprob(x, w, ids, **options), x, w)
        vectors = [tuple(jnp.asarray(along.get(name, np.zeros(len(x), np.float32))) for name in NAMES) for along in alongs]
        return alone, outputs, [back(vector) for vector in vectors]

    with interpreted(options.get("implementation")):
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


@pytest.mark.usefixtures("_small_tiles")
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


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("implementation", ["reference", "gpu"])
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

    np.testing.assert_array_equal(of_entropy("tpu"), of_entropy("gpu"))


@pytest.mark.usefixtures("_small_tiles")
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


@pytest.mark.usefixtures("_small_tiles")
def test_bfloat16_where_the_head_trains() -> None:
    """Gradients of the logits are rounded to 8 bits, then results."""
    x, w, ids = inputs(dtype=jnp.bfloat16)
    expected, along = oracle(x.astype(jnp.float32), w.astype(jnp.float32), ids, None, 1.0), directions(T)
    d_raw = raw_gradient(expected, along)
    _, [(dx, dw)] = outcome(x, w, ids, along, head_trainable=True)
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 5e-3
    assert relative(dw, d_raw.T @ np.asarray(x, np.float64)) < 5e-3


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
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
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, trainable: bool) -> None:
    """The kernel's are others in the tests above, in that of races, and where nothing is set."""
    x, w, ids = inputs()

    def everything(implementation: str) -> Any:
        return outcome(x, w, ids, directions(T), temperature=0.7, head_trainable=trainable, implementation=implementation)

    whole = everything("gpu")
    others = [] if trainable else [everything("tpu")]
    set_tiles(monkeypatch, 22, 1152)
    others.append(everything("gpu"))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, whole)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("implementation", "trainable"), [("gpu", False), ("gpu", True), ("tpu", False)])
def test_extreme_logits_neither_overflow_nor_give_nan(implementation: str, trainable: bool) -> None:
    x, w, ids = inputs()
    got, pulled = outcome(x * 1e3, w, ids, directions(T), head_trainable=trainable, implementation=implementation)
    assert all(np.all(np.isfinite(a)) for a in (*got.values(), *pulled[0]))
    assert got["entropy"].min() >= 0
    assert got["logp"].max() <= 0


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_is_no_row_of_the_head_has_no_probability(implementation: str) -> None:
    x, w, ids = inputs()
    ids = ids.at[:3].set(jnp.array([-1, V, V + 300], jnp.int32))
    expected, along = oracle(x, w, ids % V, None, 1.0), directions(T, "lse")
    got, [(dx, _)] = outcome(x, w, ids, along, implementation=implementation)
    assert np.all(np.isneginf(got["logp"][:3]))
    assert_near(got, expected, "entropy", "lse")
    assert relative(dx, raw_gradient(expected, along) @ np.asarray(w, np.float64)) < 1e-5


def test_the_kernel_has_no_race(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of tokens, three blocks of the vocabulary; the interpreter prints the races that it finds."""
    monkeypatch.setattr(pallas_tpu, "tile_and_block", lambda *_: (128, 512))
    x, w, ids = inputs(140)
    along = jnp.asarray(directions(140)["logp"])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        dx = jax.jit(jax.grad(lambda x: jnp.sum(along * head_logprob(x, w, ids, implementation="tpu")[0])))(x)
    exact = along[:, None] * (oracle(x, w, ids, None, 1.0)["d_logp"] @ np.asarray(w, np.float64))
    assert relative(np.asarray(dx, np.float64), np.asarray(exact)) < 1e-5
    assert "RACE" not in capsys.readouterr().out.upper()


def test_a_head_on_four_devices(repository: Path) -> None:
    """Every implementation, against the reference on one device."""
    paths = os.pathsep.join([str(repository / "kernels"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, str(repository / "tests" / "vocabulary_parallel.py")]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_backward_pass_of_a_frozen_head_talks_to_no_other_device() -> None:
    """It runs where there is no axis to talk along."""
    numbers, vectors = jnp.ones((T,)), jnp.ones((T, H))
    kept = (vectors, vectors[:0], vectors, jnp.zeros((T,), jnp.int32), numbers, numbers, jnp.float32(1))
    how = frozen.How("gpu", None, "model")
    assert frozen.frozen_head_backward(how, kept, (numbers, numbers, numbers))[0].shape == (T, H)


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
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


def temporary_bytes(program: Any, shape: Shape, dtype: Any, sharding: Any = None) -> int:
    x = jax.ShapeDtypeStruct((shape.tokens, shape.width), dtype, sharding=sharding)
    w = jax.ShapeDtypeStruct((shape.vocabulary, shape.width), dtype, sharding=sharding)
    ids = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32, sharding=sharding)
    memory: Any = jax.jit(program).lower(x, w, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes


def value_and_gradient(x: Any, w: Any, ids: Any, **options: Any) -> Any:
    return jax.value_and_grad(lambda x: jnp.sum(head_logprob(x, w, ids, **options)[0]))(x)


def values_and_kept(x: Any, w: Any, ids: Any, **options: Any) -> Any:
    return jax.vjp(lambda x: head_logprob(x, w, ids, **options), x)


def test_on_a_cpu_it_takes_a_twentieth_of_the_memory() -> None:
    own, plain = (
        temporary_bytes(functools.partial(value_and_gradient, implementation=name), LAPTOP, jnp.float32)
        for name in (None, "reference")
    )
    print(f"{LAPTOP}: temporaries {own / MIB:.0f} MiB, plain {plain / MIB:.0f}")
    assert own < plain / 20


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "shape", [QWEN3_8B, LLAMA_3_8B, GEMMA_3_4B, GEMMA_2_2B], ids=["Qwen3-8B", "Llama-3.1-8B", "Gemma-3-4B", "Gemma-2-2B"]
)
def test_on_a_tpu_values_and_what_is_kept_take_no_temporaries(chips: dict[str, Any], chip: str, shape: Shape) -> None:
    if shape == GEMMA_2_2B and chip == "v5e":
        pytest.skip("the soft cap once")
    program = functools.partial(values_and_kept, implementation="tpu", softcap=shape.softcap)
    assert temporary_bytes(program, shape, jnp.bfloat16, chips[chip]) == 0


def test_on_a_tpu_a_gradient_takes_the_kept_vector_and_no_more(chips: dict[str, Any]) -> None:
    """Beside one [T, H] array in bfloat16 a few numbers a token; and nothing where no gradient is wanted."""
    gradient = functools.partial(value_and_gradient, implementation="tpu")
    alone = functools.partial(head_logprob, implementation="tpu")
    kept = 2 * QWEN3_8B.tokens * QWEN3_8B.width
    assert temporary_bytes(gradient, QWEN3_8B, jnp.bfloat16, chips["v6e"]) < kept + MIB
    assert temporary_bytes(alone, QWEN3_8B, jnp.bfloat16, chips["v6e"]) == 0


@pytest.mark.parametrize("tokens", [1, 300])
def test_on_a_tpu_odd_sizes_compile(chips: dict[str, Any], tokens: int) -> None:
    program = functools.partial(value_and_gradient, implementation="tpu", softcap=3.0)
    assert temporary_bytes(program, Shape(tokens, 64, 1187), jnp.float32, chips["v5e"]) < MIB


def test_an_older_tpu_gets_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A v4 has 16 MiB of vector memory."""
    tile, block = pallas_tpu.tile_and_block(8192, 4096, 151_936, 2, True, 12 * MIB)
    needed = tile * 4096 * (2 * 2 + 4 + 2 * 2) + 2 * 2 * block * 4096
    assert (tile, block) == (128, 256)
    assert needed < 12 * MIB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"w": jnp.zeros((7, 5))}, r"w \(7, 5\)"),
        ({"x": jnp.zeros((0, 4)), "ids": jnp.zeros((0,), jnp.int32)}, "empty"),
        ({"ids": jnp.zeros((2,), jnp.int32)}, r"ids \(2,\)"),
        ({"w": jnp.zeros((7, 4), jnp.bfloat16)}, "bfloat16"),
        ({"implementation": "xla"}, "xla"),
        ({"implementation": "tpu"}, "interpret"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": jnp.zeros((3, 4)), "w": jnp.zeros((7, 4)), "ids": jnp.zeros((3,), jnp.int32)} | change
    undecorated = head_logprob.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**given)
