"""`group_attention` against NumPy in float64, every implementation; TPU kernels interpreted, and compiled for TPUs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from kernel_checks import CHIPS, compiled_for, no_race, on_chips
from packed_rows import CASES, UNEQUAL, Case, asked, by_the_book, group, inputs, key_ranges, visible_blocks
from plain_oracles import quick_compiling

from grpo_kernels import NO_WINDOW, group_attention
from grpo_kernels.ops.group_attention import (
    AttentionPlan,
    BlockSizes,
    KeyRanges,
    Limits,
    choose_block_sizes,
    plan_attention,
    prompt_ranges,
)
from grpo_kernels.ops.group_attention.block_pairs import ALL_SEEN, PAIR_BITS, most_pairs
from grpo_kernels.ops.group_attention.shapes import EVEN, GEMMA_3_4B, GEMMA_3_12B, QWEN3_8B, Shape
from grpo_kernels.target import Target, tracing_for

IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]


def planned(case: Case, window: Any, implementation: str, *, small: bool = True, blocks: BlockSizes | None = None) -> AttentionPlan:
    """The plan of a case; blocks small enough for sequences to have several where nothing else is said."""
    blocks = blocks or (BlockSizes(*case.blocks) if implementation == "mosaic_tpu" else BlockSizes(8, 8))
    return plan_attention(
        key_ranges(case),
        case.limits,
        keys=case.tokens,
        kv_heads=case.kv_heads,
        heads_of_key=case.queries,
        window=window,
        implementation=implementation,
        block_sizes=blocks if small else None,
    )


@functools.cache
def program(case: Case, implementation: str, *, small: bool = True, blocks: BlockSizes | None = None) -> Any:
    """(window, q, k, v, d_out) → result, dq, dk, dv."""

    def run(window: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        plan = planned(case, window, implementation, small=small, blocks=blocks)
        out, pullback = jax.vjp(functools.partial(group_attention, plan=plan, softcap=case.softcap), q, k, v)
        return out, *pullback(d_out)

    return jax.jit(run)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run by JAX's plain interpreter, which is faster than the TPU's."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    with quick_compiling():
        yield


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, implementation: str) -> None:
    """Without a window and with windows of any size; 0 hides every key from every query. All sums are over fewer than 100 terms."""
    arrays = inputs(case)
    for window in (NO_WINDOW, 10, 3, 1, 0):
        got = program(case, implementation)(jnp.int32(window), *arrays)
        for name, one, expected in zip(("out", "dq", "dk", "dv"), got, by_the_book(case, window, *arrays), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=2e-5, err_msg=f"{name}, window {window}")
    assert not any(np.any(x) for x in got)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_largest_and_smallest_scores_neither_overflow_nor_vanish(implementation: str) -> None:
    """The third query sees two keys alike at a score of 1e8, and one at -1e8."""
    keys = jnp.array([1e4, -1e4, 1e4], jnp.float32)[None, :, None, None]
    values = jnp.array([1.0, 7.0, 2.0], jnp.float32)[None, :, None, None]
    queries = jnp.full((1, 3, 1, 1, 1), 1e4, jnp.float32)
    case = Case((((3, ()),),), 3)
    out, *gradients = program(case, implementation)(jnp.int32(NO_WINDOW), queries, keys, values, jnp.ones_like(queries))
    assert out[0, :, 0, 0, 0].tolist() == [1.0, 1.0, 1.5]
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """Weights are rounded to bfloat16 before they meet the values, and results are: 2⁻⁹ each, of the norm."""
    arrays = inputs(UNEQUAL, "bfloat16")
    got = program(UNEQUAL, implementation)(jnp.int32(7), *arrays)
    for one, expected in zip(got, by_the_book(UNEQUAL, 7, *arrays), strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(one, np.float64) - expected) < 6e-3 * np.linalg.norm(expected)


def test_a_group_may_be_split() -> None:
    """A completion's result does not depend on the others; the keys' gradients are sums over the parts.

    Sequences are whole blocks, so that both sum in the same order.
    """
    p, c = 24, 16
    case = Case((group(p, c, 2),), p + 2 * c, kv_heads=2, queries=2)
    q, k, v, d_out = inputs(case)
    d_out = d_out.at[:, :p].set(0)
    window = jnp.int32(9)
    whole = program(case, "xla")(window, q, k, v, d_out)
    one = dataclasses.replace(case, rows=(group(p, c, 1),), tokens=p + c)
    parts = [
        program(one, "xla")(window, *(jnp.concatenate([x[:, :p], x[:, own]], axis=1) for x in (q, k, v, d_out)))
        for own in (slice(p, p + c), slice(p + c, None))
    ]
    for number, array in enumerate(whole):
        own = np.concatenate([part[number][:, p:] for part in parts], axis=1)
        np.testing.assert_allclose(array[:, p:], own, rtol=0, atol=1e-6)
        if number >= 2:
            np.testing.assert_allclose(array[:, :p], sum(part[number][:, :p] for part in parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_loop_of_known_length_gives_the_same(case: Case) -> None:
    """On a GPU every row makes as many visits as the longest may need; those beyond the list add nothing, to the last bit."""
    arrays = (jnp.int32(10), *inputs(case))
    with quick_compiling():
        with tracing_for(Target("gpu")):
            planned_for_gpu = program.__wrapped__(case, "xla")
            text = planned_for_gpu.lower(*arrays).compile().as_text()
            fixed = planned_for_gpu(*arrays)
        others = program.__wrapped__(case, "xla")(*arrays)
    assert text.count(" while(") == text.count("known_trip_count")
    for one, other in zip(fixed, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("window", [NO_WINDOW, 10, 0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_blocks_on_a_cpu(case: Case, window: int) -> None:
    """Every pair of blocks that see each other is visited once: in a large block, or alone. Values and gradients are the same."""
    blocks = BlockSizes(4, 4, 12, 8)
    plan = planned(case, window, "xla", blocks=blocks)
    some = np.any(visible_blocks(case, window, (4, 4))[0], axis=0)
    visits = np.zeros(some.shape, np.int32)
    assert plan.by_query is not None
    assert (plan.large is not None) == (asked(case) >= 12 and case.tokens >= 8)
    for listed, tall, wide in ((plan.large, 3, 2), (plan.by_query, 1, 1)):
        if listed is None:
            continue
        for number in np.asarray(listed.pairs)[: int(listed.count[0])] % ALL_SEEN:
            row, column = divmod(int(number), 2**PAIR_BITS)
            part = visits[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            assert listed is plan.by_query or 2 * np.sum(some[row * tall :, column * wide :][:tall, :wide]) > tall * wide
            part += 1
    np.testing.assert_array_equal(visits[some], 1)
    assert visits.max() <= 1
    arrays = inputs(case)
    with quick_compiling():
        got = program(case, "xla", blocks=blocks)(jnp.int32(window), *arrays)
    for name, one, expected in zip(("out", "dq", "dk", "dv"), got, by_the_book(case, window, *arrays), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=2e-5, err_msg=name)


def test_the_kernels_have_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case((((11, (8, 5)),),), 32, queries=2, blocks=(8, 8), softcap=3.0)
    arrays = inputs(case)
    with no_race(capsys), quick_compiling():
        got = jax.tree.map(np.asarray, program(case, "mosaic_tpu")(jnp.int32(12), *arrays))
    for one, expected in zip(got, by_the_book(case, 12, *arrays), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [NO_WINDOW, pytest.param(20, marks=pytest.mark.slow), 1])
def test_only_blocks_that_see_something_are_visited(case: Case, by_key: bool, window: int) -> None:
    """The list has every pair of blocks with a key that counts, one more for an outer block without any, and no other."""
    plan = planned(case, window, "mosaic_tpu")
    listed = plan.by_key if by_key else plan.by_query
    assert listed is not None
    pairs, count = np.asarray(listed.pairs), int(listed.count[0])
    assert np.all(pairs[:count] >= 0)
    assert np.all(pairs[count:] == -1)
    number = pairs[:count] % ALL_SEEN
    outer, inner = number >> PAIR_BITS, number % 2**PAIR_BITS
    some, every = visible_blocks(case, window, case.blocks)
    b, rows, columns = some.shape
    row, queries, keys = np.nonzero(some)
    expected = {(one * rows + query, one * columns + key) for one, query, key in zip(row, queries, keys, strict=True)}
    got = list(zip(*((inner, outer) if by_key else (outer, inner)), strict=True))
    without = b * (columns if by_key else rows) - np.count_nonzero(some.any(axis=1 if by_key else 2))
    assert np.all(np.diff(outer) >= 0)
    assert set(outer) == set(range(b * (columns if by_key else rows)))
    assert len(set(got)) == len(got)
    assert expected <= set(got)
    assert len(got) == len(expected) + without
    fully = {pair for pair, whole in zip(got, pairs[:count] >= ALL_SEEN, strict=True) if whole}
    assert fully == {(one * rows + q, one * columns + k) for one, q, k in zip(*np.nonzero(every), strict=True)}


def test_a_list_is_never_too_short() -> None:
    """Random rows that keep to limits have at most as many pairs as `most_pairs` says."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        groups = tuple((int(rng.integers(1, 20)), tuple(map(int, rng.integers(1, 30, rng.integers(0, 5))))) for _ in range(4))
        tokens = sum(prompt + sum(own) for prompt, own in groups) + int(rng.integers(0, 9))
        blocks = int(rng.choice([4, 8, 16])), int(rng.choice([4, 8, 16]))
        case = Case((groups,), tokens, blocks=blocks, last=bool(rng.integers(2)))
        some, _ = visible_blocks(case, int(rng.choice([NO_WINDOW, 6])), blocks)
        assert np.count_nonzero(some) <= most_pairs(asked(case), tokens, blocks, case.limits)


def test_block_sizes_follow_the_heads_and_the_device() -> None:
    assert choose_block_sizes(4096, 4096, 4, 1, "xla", 64) == BlockSizes(64, 64, 1024, 128)
    assert choose_block_sizes(4096, 4096, 128, 4, "xla", 128) == BlockSizes(32, 32, 256, 128)
    assert choose_block_sizes(4096, 4096, 9, 3, "xla", 64) == BlockSizes(64, 64, 384, 128)
    assert choose_block_sizes(500, 4096, 4, 2, "xla", 64) == BlockSizes(64, 64)
    assert choose_block_sizes(4096, 4096, 8, 2, "xla", 8) == BlockSizes(64, 64)
    with pytest.raises(ValueError, match="large blocks that are not multiples"):
        BlockSizes(64, 64, 100, 128)
    assert choose_block_sizes(9, 30, 4, 1, "xla") == BlockSizes(9, 30)
    with tracing_for(Target("gpu")):
        assert choose_block_sizes(4096, 4096, 32, 4, "xla") == BlockSizes(256, 256)
    assert choose_block_sizes(9216, 9216, 32, 4, "mosaic_tpu") == BlockSizes(256, 512)
    assert choose_block_sizes(9216, 9216, 32, 2, "mosaic_tpu") == BlockSizes(512, 512)
    assert choose_block_sizes(900, 300, 14, 7, "mosaic_tpu") == BlockSizes(128, 256)


@pytest.mark.parametrize(
    ("chip", "shape", "softcap"),
    on_chips(zip(CHIPS, (QWEN3_8B, GEMMA_3_12B, QWEN3_8B, GEMMA_3_4B), (None, 50.0, None, None), strict=True)),
    ids=str,
)
def test_on_a_tpu_there_are_no_scores(chips: dict[str, Any], chip: str, shape: Shape, softcap: float | None) -> None:
    """Forward and backward, compiled: heads are read and written where products have them, without an array in another order."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    groups = group(EVEN.prompt, EVEN.completion, EVEN.generations)
    tokens = EVEN.prompt + EVEN.generations * EVEN.completion
    case = Case((groups,), tokens, shape.kv_heads, shape.queries, softcap=softcap)
    heads = {"q": (shape.kv_heads, shape.queries), "k": (shape.kv_heads,)}
    queries, keys = (array(1, case.tokens, math.prod(sizes) * shape.head_dim) for sizes in heads.values())
    run = program(case, "mosaic_tpu", small=False)

    def of_products(window: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        """Heads next to each other, as products return and take them."""
        apart = [x.reshape(*x.shape[:2], *heads[kind], shape.head_dim) for x, kind in ((q, "q"), (k, "k"), (v, "k"), (d_out, "q"))]
        return [x.reshape(*x.shape[:2], -1) for x in run(window, *apart)]

    memory = compiled_for(chips, chip, of_products, array(dtype=jnp.int32), queries, keys, keys, queries)
    size = 2 * queries.size
    print(f"{chip} {shape}: temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB, {memory.temp_size_in_bytes / size:.2f} × q")
    assert memory.temp_size_in_bytes < 0.5 * size  # statistics of the queries, and no array of theirs
    assert memory.temp_size_in_bytes < 4 * shape.kv_heads * shape.queries * EVEN.generations * EVEN.completion**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 8, 1, 1, 5))}, r"q \(2, 8, 1, 1, 5\)"),
        ({"v": jnp.zeros((2, 8, 1, 4), jnp.bfloat16)}, "bfloat16"),
        ({"q": jnp.zeros((2, 6, 1, 1, 4))}, "the plan is for 2 rows of 8 queries and 8 keys"),
        ({"softcap": 0.0}, "softcap 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    keys = jnp.zeros((2, 8, 1, 4))
    plan = planned(Case((((8, ()),), ((3, (2,)),)), 8), 1, "xla")
    given: dict[str, Any] = {"q": keys[:, :, :, None], "k": keys, "v": keys, "plan": plan}
    undecorated = group_attention.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(given | change))


def test_a_plan_refuses_what_does_not_fit() -> None:
    case = Case((((3, (2,)),),), 5)
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        planned(case, 1, "tpu")
    ranges = key_ranges(case)
    options: dict[str, Any] = {"kv_heads": 1, "heads_of_key": 1, "window": 1}
    undecorated = plan_attention.__wrapped__  # type: ignore[attr-defined]  # as above
    with pytest.raises(ValueError, match=r"key ranges have shapes \[\(1, 4\)"):
        undecorated(ranges._replace(prompt_start=jnp.zeros((1, 4), jnp.int32)), case.limits, keys=5, **options)
    with pytest.raises(ValueError, match="keys is 0"):
        undecorated(ranges, case.limits, keys=0, **options)


def test_a_row_too_long_for_one_list_of_blocks_is_refused() -> None:
    tokens = 512 + 64 * 32_768
    ranges = KeyRanges(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 4)
    options: dict[str, Any] = {"keys": tokens, "kv_heads": 1, "heads_of_key": 4, "window": 1, "implementation": "mosaic_tpu"}
    with pytest.raises(ValueError, match=r"lower train\.micro_batch_tokens"):
        jax.eval_shape(functools.partial(plan_attention, limits=Limits(1, 512, 32_768), **options), ranges)


def test_the_key_ranges_of_prompts() -> None:
    """Two prompts of 3 and 1 tokens in rows of 4; padding sees nothing."""
    ranges = prompt_ranges(jnp.array([3, 1], jnp.int32), 4)
    assert ranges.own_end.tolist() == [[1, 2, 3, 0], [1, 0, 0, 0]]
    assert not any(np.any(x) for x in (ranges.prompt_start, ranges.prompt_end, ranges.own_start))
