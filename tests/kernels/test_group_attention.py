"""`group_attention` against NumPy in float64, every implementation; TPU kernels interpreted, and compiled for TPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from kernel_checks import CHIPS, compiled_for, no_race
from plain_oracles import quick_compiling

from grpo_kernels import NO_WINDOW, group_attention
from grpo_kernels.ops.group_attention import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_attention.block_pairs import PAIR_BITS, GroupBlocks, list_block_pairs
from grpo_kernels.ops.group_attention.shapes import EVEN, GEMMA_3_4B, GEMMA_3_12B, QWEN3_8B, Shape
from grpo_kernels.target import Target, tracing_for


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a test.

    Attributes:
        lengths: tokens of each prompt.
        blocks: queries and keys in a block of the TPU kernels; `xla` takes blocks of 8.
        prompts: most prompts at once.
        last: the last token of each prompt is its one query.
    """

    lengths: tuple[int, ...]
    generations: int
    prompt: int
    completion: int
    kv_heads: int = 1
    queries: int = 1
    blocks: tuple[int, int] = (16, 16)
    softcap: float | None = None
    last: bool = False
    prompts: int = 2

    @property
    def tokens(self) -> int:
        return self.prompt + self.generations * self.completion


IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
UNEQUAL = Case((20, 13), 2, 20, 12, kv_heads=2, queries=2, softcap=2.0, blocks=(8, 16))
CASES = [
    UNEQUAL,
    Case((1, 5), 1, 5, 13, queries=4, blocks=(16, 8)),
    Case((9, 4), 16, 9, 5, prompts=1),
    Case((17, 3), 0, 17, 0, queries=2),
    Case((6, 3), 2, 6, 9, queries=2, last=True),
    Case((3,), 1, 3, 1),
]


def inputs(case: Case, dtype: str = "float32", head_dim: int = 8) -> tuple[jax.Array, ...]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(case.tokens)
    b, asked = len(case.lengths), case.tokens - case.prompt + 1 if case.last else case.tokens
    queries, keys = (b, asked, case.kv_heads, case.queries, head_dim), (b, case.tokens, case.kv_heads, head_dim)
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in (queries, keys, keys, queries))


def by_the_book(case: Case, window: int, *arrays: jax.Array) -> tuple[np.ndarray, ...]:
    """Result, dq, dk and dv; one text after another, each with its prompt in front, one head after another."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    p, c, cap = case.prompt, case.completion, case.softcap
    shift = case.tokens - q.shape[1]
    for b, length in enumerate(case.lengths):
        of_prompt = np.arange(length)
        texts = [(np.array([length - 1]) if case.last else np.arange(p), np.array([0]) if case.last else np.arange(p), of_prompt)]
        for g in range(case.generations):
            own = p + g * c + np.arange(c)
            texts.append((length + np.arange(c), own - shift, np.concatenate([of_prompt, own])))
        for q_at, rows, keys in texts:
            distance = q_at[:, None] - np.arange(len(keys))[None, :]
            sees = (distance >= 0) & (distance < window)
            for h, r in np.ndindex(case.kv_heads, case.queries):
                one, many, values, d_one = q[b, rows, h, r], k[b, keys, h], v[b, keys, h], d_out[b, rows, h, r]
                scores = one @ many.T
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.where(sees, np.exp(scores - scores.max()), 0)
                weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
                result = weights @ values
                d_scores = weights * (d_one @ values.T - (d_one * result).sum(axis=1, keepdims=True))
                d_scores *= 1 if cap is None else 1 - (scores / cap) ** 2
                out[b, rows, h, r], dq[b, rows, h, r] = result, d_scores @ many
                dk[b, keys, h] += d_scores.T @ one
                dv[b, keys, h] += weights.T @ d_one
    return out, dq, dk, dv


def block_sizes(case: Case, implementation: str) -> BlockSizes:
    """Blocks small enough for texts to have several, and for `xla` one prompt at a time; it has larger blocks of shared keys."""
    if implementation == "mosaic_tpu":
        return BlockSizes(*case.blocks, prompts=case.prompts)
    return BlockSizes(8, 8, prompts=1, prompt=8, shared_keys=16)


@functools.cache
def program(case: Case, implementation: str, *, small: bool = True) -> Any:
    """(window, q, k, v, d_out) → result, dq, dk, dv; small blocks where nothing else is said."""

    def run(window: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        attend = functools.partial(
            group_attention,
            prompt_lengths=jnp.array(case.lengths, jnp.int32),
            prompt_width=case.prompt,
            generations=case.generations,
            window=window,
            softcap=case.softcap,
            implementation=implementation,
            block_sizes=block_sizes(case, implementation) if small else None,
        )
        out, pullback = jax.vjp(attend, q, k, v)
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
    case = Case((3,), 0, 3, 0)
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
    """A completion's result does not depend on the others; the keys' gradients are sums over the parts."""
    case = dataclasses.replace(UNEQUAL, softcap=None)
    p, half = case.prompt, case.prompt + case.completion
    q, k, v, d_out = inputs(case)
    d_out = d_out.at[:, :p].set(0)
    window = jnp.int32(9)
    whole = program(case, "xla")(window, q, k, v, d_out)
    one = dataclasses.replace(case, generations=1)
    parts = [
        program(one, "xla")(window, *(jnp.concatenate([x[:, :p], x[:, own]], axis=1) for x in (q, k, v, d_out)))
        for own in (slice(p, half), slice(half, None))
    ]
    for number, array in enumerate(whole):
        own = np.concatenate([part[number][:, p:] for part in parts], axis=1)
        np.testing.assert_allclose(array[:, p:], own, rtol=0, atol=1e-6)
        if number >= 2:
            np.testing.assert_allclose(array[:, :p], sum(part[number][:, :p] for part in parts), rtol=0, atol=1e-5)


def test_the_kernels_have_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case((11,), 2, 16, 8, queries=2, blocks=(8, 8), softcap=3.0)
    arrays = inputs(case)
    with no_race(capsys), quick_compiling():
        got = jax.tree.map(np.asarray, program(case, "mosaic_tpu")(jnp.int32(12), *arrays))
    for one, expected in zip(got, by_the_book(case, 12, *arrays), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [NO_WINDOW, 20, 1])
def test_blocks_that_see_nothing_are_not_visited(by_key: bool, window: int) -> None:
    """The list has every pair of blocks with a key that counts, each block of queries or keys, and hardly more."""
    blocks, lengths = GroupBlocks(40, 30, 3, 8, 16), np.array([40, 5])
    pairs = list_block_pairs(blocks, jnp.asarray(lengths, jnp.int32), jnp.int32(window), by_key=by_key)
    listed = np.asarray(pairs.pairs)[: int(pairs.count)]
    assert np.all(np.asarray(pairs.pairs)[int(pairs.count) :] == -1)
    assert len(set(listed)) == len(listed)
    outer, inner = listed >> PAIR_BITS, listed % 2**PAIR_BITS
    assert np.all(np.diff(outer) >= 0)
    assert set(outer) == set(range(2 * (blocks.k_blocks if by_key else blocks.q_blocks)))

    prompt, own = blocks.padded(40), blocks.padded(30)
    at = np.arange(blocks.tokens)
    text = np.where(at < prompt, -1, (at - prompt) // own)
    required = set()
    for b, length in enumerate(lengths):
        position = np.where(at < prompt, at, length + (at - prompt) % own)
        distance = position[:, None] - position[None, :]
        sees = (distance >= 0) & (distance < window)
        sees &= np.where(at < prompt, at < length, text[:, None] == text[None, :])
        queries, keys = np.nonzero(sees)
        required |= set(zip(b * blocks.q_blocks + queries // 8, b * blocks.k_blocks + keys // 16, strict=True))
    got = set(zip(*((inner, outer) if by_key else (outer, inner)), strict=True))
    assert required <= got
    assert len(got - required) <= 2 * blocks.q_blocks


def test_blocks_fit_the_texts() -> None:
    def chosen(prompt: int, completion: int, generations: int, queries: int) -> tuple[int, int]:
        blocks = choose_block_sizes(prompt, completion, generations, 2, queries, "mosaic_tpu")
        return blocks.queries, blocks.keys

    assert chosen(1024, 1023, 8, 4) == (256, 512)
    assert chosen(512, 19_968, 8, 2) == (512, 512)
    assert chosen(100, 130, 8, 7) == (128, 128)
    for completion in range(1, 3000, 97):
        padded = GroupBlocks(600, completion, 4, *chosen(600, completion, 4, 4)).tokens
        assert padded - 600 - 4 * completion <= max(5 * 127, (600 + 4 * completion) / 8)


def test_blocks_of_a_cpu_and_a_gpu() -> None:
    """Rows of scores of one prompt are K·R heads, times G for its completions; a text's blocks do not depend on the prompts."""
    assert choose_block_sizes(512, 128, 8, 4, 1, "xla") == BlockSizes(64, 64, prompts=2, prompt=64, shared_keys=128)
    assert choose_block_sizes(512, 128, 16, 8, 2, "xla") == BlockSizes(32, 32, prompts=1, prompt=64, shared_keys=32)
    with tracing_for(Target("gpu")):
        assert choose_block_sizes(1024, 1024, 8, 8, 4, "xla") == BlockSizes(128, 128, prompts=1, prompt=256, shared_keys=128)


@pytest.mark.parametrize(
    ("chip", "shape", "softcap"),
    list(zip(CHIPS, (QWEN3_8B, GEMMA_3_12B, QWEN3_8B, GEMMA_3_4B), (None, 50.0, None, None), strict=True)),
    ids=str,
)
def test_on_a_tpu_there_are_no_scores(chips: dict[str, Any], chip: str, shape: Shape, softcap: float | None) -> None:
    """Forward and backward, compiled: a few arrays of the queries' size, those of the arguments with heads first."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    case = Case((EVEN.prompt,), EVEN.generations, EVEN.prompt, EVEN.completion, shape.kv_heads, shape.queries, softcap=softcap)
    queries = array(1, case.tokens, shape.kv_heads, shape.queries, shape.head_dim)
    keys = array(1, case.tokens, shape.kv_heads, shape.head_dim)
    run = program(case, "mosaic_tpu", small=False)
    memory = compiled_for(chips, chip, run, array(dtype=jnp.int32), queries, keys, keys, queries)
    size = 2 * queries.size
    print(f"{chip} {shape}: temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB, {memory.temp_size_in_bytes / size:.1f} × q")
    arguments = 2 * (2 * queries.size + 2 * keys.size)
    assert memory.temp_size_in_bytes < 1.6 * arguments  # 4 × q where four queries share a key
    assert memory.temp_size_in_bytes < 4 * shape.kv_heads * shape.queries * EVEN.generations * EVEN.completion**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 8, 1, 1, 5))}, r"q \(2, 8, 1, 1, 5\)"),
        ({"v": jnp.zeros((2, 8, 1, 4), jnp.bfloat16)}, "bfloat16"),
        ({"prompt_lengths": jnp.zeros((3,), jnp.int32)}, r"prompt_lengths \(3,\)"),
        ({"prompt_width": 9}, "prompt_width 9"),
        ({"generations": 3}, "3 completions"),
        ({"generations": 0}, "0 completions"),
        ({"q": jnp.zeros((2, 6, 1, 1, 4))}, "6 queries"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"implementation": "tpu"}, "'tpu' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    keys = jnp.zeros((2, 8, 1, 4))
    given: dict[str, Any] = {"q": keys[:, :, :, None], "k": keys, "v": keys, "prompt_lengths": jnp.ones((2,), jnp.int32)}
    given |= {"prompt_width": 4, "generations": 2, "window": 1}
    undecorated = group_attention.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(given | change))


def test_a_group_too_large_for_one_list_of_blocks_is_refused() -> None:
    trace = functools.partial(group_attention, prompt_width=512, generations=64, window=1, implementation="mosaic_tpu")
    keys = jax.ShapeDtypeStruct((1, 512 + 64 * 32_768, 1, 128), jnp.bfloat16)
    queries = jax.ShapeDtypeStruct((1, keys.shape[1], 1, 4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"lower train\.micro_batch_completions"):
        jax.eval_shape(trace, queries, keys, keys, jax.ShapeDtypeStruct((1,), jnp.int32))
