"""`group_attention` on a Hopper GPU, on a CPU: the merge with plain parts, and the interpreted backward kernels, against NumPy.

tokamax's forward kernel has machine instructions that JAX's interpreter does not know; `tests/gpu_compile` compiles it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import interpreted_for_gpu
from packed_rows import CASES, UNEQUAL, Case, asked, by_the_book, inputs, key_ranges, visible_blocks
from plain_oracles import quick_compiling

from grpo_kernels import NO_WINDOW, group_attention
from grpo_kernels.ops.group_attention import BlockSizes, plan_attention, stand_ins
from grpo_kernels.ops.group_attention.gpu_tiles import LOG2_E, ROWS, TILE
from grpo_kernels.ops.group_attention.key_ranges import within_window
from grpo_kernels.ops.group_attention.mosaic_gpu import Kernels, group_attention_mosaic_gpu, plan_tiles
from grpo_kernels.target import Target, tracing_for

SEVERAL = Case((((70, (50, 30)), (20, (40,)), (5, ())), ((150, (90,)),)), 250, queries=2)
"""Tiles of 128 tokens with two prompts, a prompt of two tiles, and padding."""

LAST = Case((((60, (70, 20)), (30, (44,))),), 224, queries=2, softcap=3.0, last=True)
SHORT = Case((((60, (40, 20)),),), 128)
HOPPER = Target("gpu", compute_capability=(9, 0))


def seen(start: jax.Array, end: jax.Array, keys: int) -> jax.Array:
    """[B, 1, N, T], True = the key is in the query's range."""
    at = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    return ((at >= start[:, :, None]) & (at < end[:, :, None]))[:, None]


def scores_of(q: jax.Array, k: jax.Array, softcap: float | None) -> jax.Array:
    """[B, H, N, T] in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), precision="highest")
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def plain_forward(q: Any, k: Any, v: Any, start: Any, end: Any, softcap: float | None) -> tuple[jax.Array, jax.Array]:
    """A part in plain JAX; an empty one is 0, with a log-sum-exp of -inf."""
    scores = jnp.where(seen(start, end, k.shape[1]), scores_of(q, k, softcap), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.maximum(total, 1e-30), v, precision="highest")
    return out, (top + jnp.log(jnp.maximum(total, 1e-30)))[..., 0]


def plain_backward(q: Any, k: Any, v: Any, d_out: Any, of_query: Any, bounds: Any, tiles: Any, softcap: float | None) -> Any:
    """Gradients from the merged log-sum-exp, as the kernels are to compute them: every product is written out."""
    repeats = q.shape[2] // k.shape[2]
    visible = seen(bounds[:, 0], bounds[:, 1], k.shape[1]) | seen(bounds[:, 2], bounds[:, 3], k.shape[1])
    scores = scores_of(q, k, softcap)
    weights = jnp.where(visible, jnp.exp2(scores * LOG2_E - of_query[:, :, 0, :, None]), 0.0)
    product = functools.partial(jnp.einsum, precision="highest")
    d_weights = product("bqhd,bkhd->bhqk", d_out, jnp.repeat(v, repeats, axis=2))
    d_scores = weights * (d_weights - of_query[:, :, 1, :, None]) * (1.0 if softcap is None else 1 - (scores / softcap) ** 2)

    def of_keys(x: jax.Array) -> jax.Array:
        return x.reshape(*k.shape[:3], repeats, -1).sum(axis=3)

    dq = product("bhqk,bkhd->bqhd", d_scores, jnp.repeat(k, repeats, axis=2))
    return dq, of_keys(product("bhqk,bqhd->bkhd", d_scores, q)), of_keys(product("bhqk,bqhd->bkhd", weights, d_out))


@functools.cache
def program(case: Case, forward: Any, backward: Any) -> Any:
    """(window, q, k, v, d_out) → result, dq, dk, dv."""

    def run(window: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        bounds = within_window(key_ranges(case), window)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            tiles, prompts = plan_tiles(bounds, case.tokens), case.limits.prompt > 0
            kernels = Kernels(forward, backward)
            return group_attention_mosaic_gpu(q, k, v, bounds, tiles, case.softcap, prompts=prompts, kernels=kernels)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    return jax.jit(run)


@pytest.mark.parametrize("case", [*CASES, LAST], ids=str)
def test_the_merge_of_two_parts(case: Case) -> None:
    """With windows of any size; 0 hides every key from every query. All sums are over fewer than 200 terms."""
    arrays = inputs(case)
    for window in (NO_WINDOW, 10, 1, 0):
        got = program(case, plain_forward, plain_backward)(jnp.int32(window), *arrays)
        for name, one, expected in zip(("out", "dq", "dk", "dv"), got, by_the_book(case, window, *arrays), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=2e-5, err_msg=f"{name}, window {window}")
    assert not any(np.any(x) for x in got)


def test_a_merge_of_parts_that_differ_by_their_largest_exponent() -> None:
    """The prompt's scores are 1e4 above or below the completion's: one part has all the weight, and nothing overflows."""
    case = Case((((2, (2, 2)),),), 6)
    q, k, v, d_out = inputs(case, head_dim=1)
    for sign in (1, -1):
        k = k.at[:, :2].set(sign * 100.0).at[:, 2:].set(sign * -100.0)
        q = jnp.full_like(q, 100.0)
        out, *gradients = program(case, plain_forward, plain_backward)(jnp.int32(NO_WINDOW), q, k, v, d_out)
        np.testing.assert_allclose(out, by_the_book(case, NO_WINDOW, q, k, v, d_out)[0], rtol=1e-6, atol=1e-6)
        assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize(
    ("case", "head_dim", "window"), [(SEVERAL, 64, NO_WINDOW), (LAST, 128, 40), (SHORT, 256, 30)], ids=["64", "128", "256"]
)
def test_the_backward_kernels_interpreted(case: Case, head_dim: int, window: int) -> None:
    """Weights and their gradients are rounded to bfloat16 before they meet vectors, and results are: 2⁻⁹ each, of the norm."""
    from grpo_kernels.ops.group_attention.mosaic_gpu_backward import backward

    arrays = [x / 2 for x in inputs(case, "bfloat16", head_dim)]
    with interpreted_for_gpu(), quick_compiling():
        run = program.__wrapped__(case, plain_forward_rounded, backward)
        got = jax.tree.map(np.asarray, run(jnp.int32(window), *arrays))
    for name, one, expected in zip(("out", "dq", "dk", "dv"), got, by_the_book(case, window, *arrays), strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(one, np.float64) - expected) / np.linalg.norm(expected)
        assert error < 6e-3, name
    padding = sum(map(sum, [(prompt, *own) for prompt, own in case.rows[0]]))
    assert not any(np.any(x[0, padding:]) for x in got)


def plain_forward_rounded(q: Any, k: Any, v: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """A part computed in float32 and rounded, as the kernel's results are."""
    out, lse = plain_forward(*(x.astype(jnp.float32) for x in (q, k, v)), *rest)
    return out.astype(q.dtype), lse


@pytest.mark.parametrize("case", [SEVERAL, LAST, Case((((300, ()), (40, (200, 90))),), 700)], ids=["several", "last", "alone"])
@pytest.mark.parametrize("window", [NO_WINDOW, 50, 0])
def test_every_block_that_sees_something_is_visited_once(case: Case, window: int) -> None:
    """Of the blocks between, only those that a range of the tile crosses are visited besides."""
    tiles = plan_tiles(within_window(key_ranges(case), window), case.tokens)
    queries, keys = (-(-n // TILE) * TILE for n in (asked(case), case.tokens))

    def whole_tiles(seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        rows, columns = queries // size[0], keys // size[1]
        return np.pad(seen, ((0, 0), (0, rows - seen.shape[1]), (0, columns - seen.shape[2])))

    some, every = (whole_tiles(x, (TILE, ROWS)) for x in visible_blocks(case, window, (TILE, ROWS)))
    for b, tile in np.ndindex(some.shape[:2]):
        first, count, second, more = np.asarray(tiles.keys)[b, tile]
        visited = [*range(first, first + count), *range(second, second + more)]
        assert len(set(visited)) == len(visited) >= 1
        assert set(np.flatnonzero(some[b, tile])) <= set(visited) <= set(range(keys // ROWS))
        if not some[b, tile].any():
            assert visited == [0]
    np.testing.assert_array_equal(np.asarray(tiles.keys_whole), every)
    some, every = (whole_tiles(x, (ROWS, TILE)) for x in visible_blocks(case, window, (ROWS, TILE)))
    for b, tile in np.ndindex(some.shape[0], some.shape[2]):
        first, count = np.asarray(tiles.queries)[b, tile]
        present = np.flatnonzero(some[b, :, tile])
        expected = (present[0], present[-1] - present[0] + 1) if present.size else (0, 1)
        assert (first, count) == expected
    np.testing.assert_array_equal(np.swapaxes(tiles.queries_whole, 1, 2), every)


def planned(implementation: str | None, **named: Any) -> Any:
    """A plan of `UNEQUAL`, in the shapes that the kernels take unless something else is said."""
    named = {"head_dim": 128, "dtype": jnp.bfloat16} | named
    options = {"keys": 44, "kv_heads": 2, "heads_of_key": 2, "window": 8, "implementation": implementation}
    return jax.eval_shape(lambda: plan_attention(key_ranges(UNEQUAL), UNEQUAL.limits, **options, **named))


@pytest.fixture
def tokamax_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Python 3.12 and tokamax installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))


@pytest.mark.usefixtures("tokamax_is_there")
def test_none_takes_the_kernels_where_they_run() -> None:
    with tracing_for(HOPPER):
        assert planned(None).implementation == "mosaic_gpu"
        assert planned(None, dtype=jnp.float32).implementation == "xla"
        assert planned(None, head_dim=96).implementation == "xla"
        assert planned(None, head_dim=None).implementation == "xla"
    for other in (Target("gpu"), Target("gpu", compute_capability=(8, 0)), Target("cpu")):
        with tracing_for(other):
            assert planned(None).implementation == "xla"


def test_an_absent_gpu_is_planned_with_the_kernels_that_it_would_run() -> None:
    """Also where tokamax is not installed: stand-ins take the kernels' arrays, and plain JAX's blocks of scores do not exist."""
    absent = Target("gpu", compute_capability=(9, 0), stand_ins=True)
    with tracing_for(absent):
        assert planned(None).implementation == "mosaic_gpu"
        assert planned(None, dtype=jnp.float32).implementation == "xla"
    with tracing_for(Target("gpu", compute_capability=(8, 0), stand_ins=True)):
        assert planned(None).implementation == "xla"
    q, k, v, d_out = inputs(SEVERAL, "bfloat16", 64)
    run = program.__wrapped__(SEVERAL, stand_ins.forward, stand_ins.backward)
    results = jax.eval_shape(run, jnp.int32(NO_WINDOW), q, k, v, d_out)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in (q, q, k, v)]


@pytest.mark.usefixtures("tokamax_is_there")
@pytest.mark.parametrize(
    ("target", "named", "message"),
    [
        (Target("cpu"), {}, r"compute capability 9\.0 \(H100, H200\), and this is cpu"),
        (Target("gpu", compute_capability=(8, 9)), {}, r"and this is a GPU of compute capability 8\.9"),
        (HOPPER, {"head_dim": 96}, "heads of 64, 128, 256 elements, not 96"),
        (HOPPER, {"dtype": jnp.float32}, "takes bfloat16, not float32"),
        (HOPPER, {"block_sizes": BlockSizes(64, 64)}, "leave block_sizes out"),
    ],
)
def test_a_named_implementation_says_why_it_does_not_run(target: Target, named: dict[str, Any], message: str) -> None:
    with tracing_for(target), pytest.raises(ValueError, match=message):
        planned("mosaic_gpu", **named)


@pytest.mark.usefixtures("tokamax_is_there")
def test_a_plan_without_shapes_refuses_them_later() -> None:
    with tracing_for(HOPPER):
        plan = planned("mosaic_gpu", head_dim=None, dtype=None)
        q, k, v, _ = inputs(UNEQUAL, head_dim=64)
        with pytest.raises(ValueError, match="takes bfloat16, not float32"):
            group_attention(q, k, v, plan)


def test_without_tokamax_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with tracing_for(HOPPER), pytest.raises(ValueError, match=r"pip install 'grpo-jax\[cuda\]'"):
        planned("mosaic_gpu")


def test_with_an_older_python_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 9))
    with tracing_for(HOPPER), pytest.raises(ValueError, match=r"Python 3\.12 or newer; this is 3\.11"):
        planned("mosaic_gpu")
