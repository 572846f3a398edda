"""The gated delta rule in NumPy: one token after another in float64, one sequence after another with its prompt in front."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from packed_rows import Case, Sequence, sequences

NAMES = ("out", "final", "dq", "dk", "dv", "d_log_decay", "d_beta", "d_initial")


def delta_inputs(case: Case, dtype: str = "float32", width: int = 8, wide: int = 4) -> dict[str, jax.Array]:
    """Arguments, and gradients of the result and of the final state; keys are of norm 1, decays from 1 to e⁻⁴."""
    rng = np.random.default_rng(case.tokens)
    rows, keys, values = len(case.rows), case.kv_heads, case.kv_heads * case.queries
    q, k = (rng.normal(size=(rows, case.tokens, keys, width)) for _ in range(2))
    heads = (rows, case.tokens, values)
    arrays = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(*heads, wide)),
        "log_decay": -np.exp(rng.uniform(-6, 1.4, heads)),
        "beta": rng.uniform(0, 1, heads),
        "initial": rng.normal(size=(rows, values, width, wide)),
        "d_out": rng.normal(size=(*heads, wide)),
        "d_final": rng.normal(size=(rows, values, width, wide)),
    }
    given = {"q", "k", "v", "d_out"}
    return {name: jnp.asarray(x, dtype if name in given else "float32") for name, x in arrays.items()}


def delta_by_the_book(case: Case, arrays: dict[str, jax.Array], rows: list[list[Sequence]] | None = None) -> dict[str, np.ndarray]:
    """Results and gradients; None for rows is those of the case."""
    x = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    into = dict(zip(NAMES, (x["v"], x["initial"], *(x[n] for n in ("q", "k", "v", "log_decay", "beta", "initial"))), strict=True))
    result = {name: np.zeros(array.shape) for name, array in into.items()}
    result["final"] += x["initial"]
    for b, texts in enumerate(rows or [sequences(case, row) for row in case.rows]):
        first = texts[0].own[0]
        for text in texts:
            at = np.concatenate([text.prompt, text.own])
            for h in range(x["v"].shape[2]):
                one_head(x, result, (b, h, h // case.queries), at, text.prompt.size, at[0] == first, text is texts[-1])
    return result


def one_head(
    x: dict[str, np.ndarray],
    result: dict[str, np.ndarray],
    index: tuple[int, int, int],
    at: np.ndarray,
    shared: int,
    from_initial: bool,
    last: bool,
) -> None:
    """A sequence of one head: the recurrence, then its gradient backwards. The first `shared` tokens are the prompt's."""
    b, h, kv = index
    q, k, v, g, beta = x["q"][b, at, kv], x["k"][b, at, kv], x["v"][b, at, h], x["log_decay"][b, at, h], x["beta"][b, at, h]
    d_out = np.where(np.arange(len(at))[:, None] < shared, 0, x["d_out"][b, at, h])
    state = x["initial"][b, h] if from_initial else np.zeros_like(x["initial"][b, h])
    decayed, surprises, states = [], [], []
    for t in range(len(at)):
        decayed.append(np.exp(g[t]) * state)
        surprises.append(v[t] - k[t] @ decayed[-1])
        state = decayed[-1] + np.outer(k[t], beta[t] * surprises[-1])
        states.append(state)
        if t >= shared:
            result["out"][b, at[t], h] = q[t] @ state
    d_state = np.zeros_like(state)
    if last:
        result["final"][b, h] = state
        d_state += x["d_final"][b, h]
    for t in reversed(range(len(at))):
        d_state = d_state + np.outer(q[t], d_out[t])
        d_added = k[t] @ d_state
        d_value = beta[t] * d_added
        d_decayed = d_state - np.outer(k[t], d_value)
        result["dq"][b, at[t], kv] += states[t] @ d_out[t]
        result["dk"][b, at[t], kv] += d_state @ (beta[t] * surprises[t]) - decayed[t] @ d_value
        result["dv"][b, at[t], h] += d_value
        result["d_beta"][b, at[t], h] += d_added @ surprises[t]
        result["d_log_decay"][b, at[t], h] += np.sum(decayed[t] * d_decayed)
        d_state = np.exp(g[t]) * d_decayed
    if from_initial:
        result["d_initial"][b, h] += d_state
