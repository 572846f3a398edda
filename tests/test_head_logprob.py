"""`head_logprob` against NumPy in float64: values, gradients, odd sizes, every implementation; no [tokens, vocabulary] array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_kernels.head_logprob import head_logprob, xla
from plain_oracles import array_sizes, log_softmax, quick_compiling

T, H, V = 23, 16, 1187  # a prime vocabulary, and tokens that no chunk of 5 divides
CASES = [(None, 1.0), (None, 0.7), (3.0, 1.0), (3.0, 1.6)]
IMPLEMENTATIONS = ["reference", "xla"]
NAMES: list[str] = ["logp", "entropy", "lse"]


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


def directions(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {name: rng.normal(size=tokens).astype(np.float32) for name in ("logp", "entropy", "lse")}


def gradients(
    x: jax.Array, w: jax.Array, ids: jax.Array, along: dict[str, np.ndarray], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients with respect to x and w of the sum of the outputs, each times its direction."""

    def scalar(x: jax.Array, w: jax.Array) -> jax.Array:
        outputs: dict[str, jax.Array] = dict(zip(NAMES, head_logprob(x, w, ids, **options), strict=True))
        return sum((jnp.sum(outputs[name] * jnp.asarray(vector)) for name, vector in along.items()), jnp.float32(0))

    dx, dw = jax.jit(jax.grad(scalar, argnums=(0, 1)))(x, w)
    return np.asarray(dx, np.float64), np.asarray(dw, np.float64)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("softcap", "temperature"), CASES)
@pytest.mark.parametrize("tokens", [T, 1])
def test_values(
    monkeypatch: pytest.MonkeyPatch, tokens: int, softcap: float | None, temperature: float, implementation: Any
) -> None:
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 5 * V)
    x, w, ids = inputs(tokens)
    expected = oracle(x, w, ids, softcap, temperature)
    for trainable in (False, True):
        got = jax.jit(
            lambda x, w, trainable=trainable: head_logprob(
                x, w, ids, temperature=temperature, softcap=softcap, head_trainable=trainable, implementation=implementation
            )
        )(x, w)
        for name, values in zip(("logp", "entropy", "lse"), got, strict=True):
            assert values.dtype == jnp.float32
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5)  # logits up to 20: float32 keeps 2e-6 of them


@pytest.mark.parametrize(("softcap", "temperature"), CASES)
@pytest.mark.parametrize("tokens", [T, 1])
def test_gradients_of_a_frozen_head(
    monkeypatch: pytest.MonkeyPatch, tokens: int, softcap: float | None, temperature: float
) -> None:
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 5 * V)
    x, w, ids = inputs(tokens)
    along = {name: vector for name, vector in directions(tokens).items() if name != "entropy"}
    expected = oracle(x, w, ids, softcap, temperature)
    d_raw = along["logp"][:, None] * expected["d_logp"] + along["lse"][:, None] * expected["d_lse"]
    dx, dw = gradients(x, w, ids, along, temperature=temperature, softcap=softcap)
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 1e-5
    assert np.all(dw == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("softcap", "temperature"), CASES)
@pytest.mark.parametrize("tokens", [T, 1])
def test_gradients_of_a_trained_head(
    monkeypatch: pytest.MonkeyPatch, tokens: int, softcap: float | None, temperature: float, implementation: Any
) -> None:
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 5 * V)
    x, w, ids = inputs(tokens)
    along = directions(tokens)
    expected = oracle(x, w, ids, softcap, temperature)
    d_raw = np.sum([along[name][:, None] * expected[f"d_{name}"] for name in along], axis=0)
    options = {"temperature": temperature, "softcap": softcap, "head_trainable": True, "implementation": implementation}
    dx, dw = gradients(x, w, ids, along, **options)
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 1e-5
    assert relative(dw, d_raw.T @ np.asarray(x, np.float64)) < 1e-5


def test_a_frozen_head_gives_the_gradient_of_a_trained_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 5 * V)
    x, w, ids = inputs()
    along = {"logp": directions(T)["logp"]}
    frozen, _ = gradients(x, w, ids, along, temperature=0.7, softcap=3.0)
    trained, _ = gradients(x, w, ids, along, temperature=0.7, softcap=3.0, head_trainable=True)
    assert relative(frozen, trained) < 1e-6


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, trainable: bool) -> None:
    """Held to float64 on the same rounded numbers: logits are summed in float32, and only probabilities are rounded, to 8 bits."""
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 5 * V)
    x, w, ids = inputs(dtype=jnp.bfloat16)
    expected = oracle(x.astype(jnp.float32), w.astype(jnp.float32), ids, None, 1.0)
    logp, entropy, lse = head_logprob(x, w, ids, head_trainable=trainable)
    for got, name in ((logp, "logp"), (entropy, "entropy"), (lse, "lse")):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-4)
    along = {"logp": directions(T)["logp"]}
    dx, dw = gradients(x, w, ids, along, head_trainable=trainable)
    d_raw = along["logp"][:, None] * expected["d_logp"]
    assert relative(dx, d_raw @ np.asarray(w, np.float64)) < 0.01
    if trainable:
        assert relative(dw, d_raw.T @ np.asarray(x, np.float64)) < 0.01


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, ids = inputs()
    along = directions(T)

    def everything() -> tuple[Any, ...]:
        values = jax.jit(lambda x, w: head_logprob(x, w, ids, temperature=0.7))(x, w)
        return values, *gradients(x, w, ids, along, head_trainable=True)

    whole = everything()
    for logits in (1, T * V - 1):  # less than one token's logits still takes one token at a time
        monkeypatch.setattr(xla, "CHUNK_LOGITS", logits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), everything(), whole)


def test_extreme_logits_neither_overflow_nor_give_nan() -> None:
    x, w, ids = inputs()
    x = x * 1e3
    for trainable in (False, True):
        outputs = jax.jit(lambda x, w, trainable=trainable: head_logprob(x, w, ids, head_trainable=trainable))(x, w)
        dx, dw = gradients(x, w, ids, directions(T), head_trainable=trainable)
        assert all(np.all(np.isfinite(a)) for a in (*outputs, dx, dw))
        assert float(outputs[1].min()) >= 0


def test_temperature_may_be_traced() -> None:
    x, w, ids = inputs()
    got = jax.jit(lambda t: head_logprob(x, w, ids, temperature=t)[0])(jnp.float32(0.5))
    np.testing.assert_allclose(got, oracle(x, w, ids, None, 0.5)["logp"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_there_is_never_an_array_of_tokens_by_vocabulary(trainable: bool) -> None:
    tokens, vocabulary, width = 1024, 32768, 8
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )

    def scalar(x: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
        logp, entropy, lse = head_logprob(x, w, ids, head_trainable=trainable)
        return jnp.sum(logp) + jnp.sum(entropy) + jnp.sum(lse)

    gradient = jax.grad(scalar, argnums=(0, 1))
    assert array_sizes(jax.make_jaxpr(gradient)(*shapes)) <= 2 * xla.CHUNK_LOGITS < tokens * vocabulary
    memory: Any = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * tokens * vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"w": jnp.zeros((7, 5))}, r"w \(7, 5\)"),
        ({"ids": jnp.zeros((2,), jnp.int32)}, r"ids \(2,\)"),
        ({"w": jnp.zeros((7, 4), jnp.bfloat16)}, "bfloat16"),
        ({"implementation": "pallas"}, "pallas"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": jnp.zeros((3, 4)), "w": jnp.zeros((7, 4)), "ids": jnp.zeros((3,), jnp.int32)} | change
    undecorated = head_logprob.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**given)
