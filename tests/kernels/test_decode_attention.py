"""`decode_attention` against one softmax in NumPy in float64, every implementation; its TPU kernel interpreted, and compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_checks import CHIPS, compiled_for, decode_shapes, no_race, on_chips
from plain_oracles import array_sizes, quick_compiling

from grpo_kernels import NO_WINDOW, KVCache, SlotMap, decode_attention
from grpo_kernels.ops.decode_attention import BlockSizes, choose_block_sizes, join_keys_and_values, mosaic_tpu, separate
from grpo_kernels.ops.decode_attention.mosaic_gpu import refusal
from grpo_kernels.ops.decode_attention.shapes import EIGHT_B, GEMMA_3_12B, Shape
from grpo_kernels.target import Target, tracing_for

K, DH, SEGMENT = 2, 16, 4


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@dataclass(frozen=True)
class Case:
    """Sizes of a test. Blocks have 8 columns here, so that arrays have several, the last of them not always whole.

    Attributes:
        prompt_slots: each slot's prompt; None where they lie in order.
        base: tokens of each slot's past.
        format: of the KV cache.
    """

    queries: int = 4
    lengths: tuple[int, ...] = (12, 3)
    prompt: int = 12
    prompt_slots: tuple[int, ...] | None = None
    base: tuple[int, ...] = (8, 8, 8, 8)
    past_blocks: tuple[int, ...] = (4, 4, 8)
    step: int = 2
    window: int = NO_WINDOW
    softcap: float | None = None
    format: str = "auto"
    dtype: str = "float32"
    width: int = DH


ANYWHERE = Case(
    prompt_slots=(2, 0, 2, 0), lengths=(12, 3, 1), base=(0, 16, 4, 12), past_blocks=(4, 12), window=11, softcap=2.0, format="int8"
)
CASES = {
    "in order": Case(base=(4, 4, 4, 4), past_blocks=(8,), dtype="bfloat16"),
    "no past": Case(base=(0, 0), past_blocks=(), step=0, queries=9),
    "one query": Case(prompt_slots=(1, 0), base=(12, 4), past_blocks=(12,), queries=1, window=15),
    "anywhere": ANYWHERE,
    "only itself": Case(window=1),
    "int4, narrow heads": Case(base=(4, 4, 4, 4), past_blocks=(8,), dtype="bfloat16", format="int4"),
    "int4, three groups": dataclasses.replace(ANYWHERE, format="int4", width=80),
    "int4, groups of 32": Case(format="int4", width=64, window=1),
    "int4, heads of 64": Case(base=(0, 8), past_blocks=(8,), dtype="bfloat16", format="int4", width=64),
    "int4, heads of 128": Case(base=(0, 8), past_blocks=(8,), dtype="bfloat16", format="int4", width=128),
}


TRANSPOSED = KVCache(jnp.zeros((4, K, DH, SEGMENT)), jnp.zeros((4, K, SEGMENT, DH)), transposed=True)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cache(seed: int, case: Case, texts: int, size: int, *, transposed: bool = False) -> tuple[KVCache, list[np.ndarray]]:
    """Random keys and values, and the values that they stand for in float64, [texts, K, size, Dh]."""
    arrays = [normal(seed + n, texts, K, size, case.width) for n in range(2)]
    if case.format == "auto":
        rounded = [jnp.asarray(x, case.dtype) for x in arrays]
        k = jnp.swapaxes(rounded[0], -1, -2) if transposed else rounded[0]
        return KVCache(k, rounded[1], transposed=transposed), [np.asarray(x, np.float64) for x in rounded]
    if case.format == "int4":
        return int4_cache(seed, arrays)
    numbers = [np.clip(np.round(x * 40), -127, 127).astype(np.int8) for x in arrays]
    scales = [np.exp(normal(seed + n, texts, K, size) / 4) / 40 for n in range(2, 4)]
    k = np.swapaxes(numbers[0], -1, -2) if transposed else numbers[0]
    held = KVCache(*(jnp.asarray(x) for x in (k, numbers[1], *scales)), transposed=transposed)
    return held, [x.astype(np.float64) * scale[..., None] for x, scale in zip(numbers, scales, strict=True)]


def int4_cache(seed: int, arrays: list[np.ndarray]) -> tuple[KVCache, list[np.ndarray]]:
    """Packs a key's and a value's element as the lower and the upper half of a byte; scales of both signs, one for 32 elements."""
    k, v = (np.clip(np.round(x * 3), -8, 7).astype(np.int64) for x in arrays)
    packed = ((v % 16) * 16 + k % 16).astype(np.uint8).view(np.int8)
    texts, kv, size, width = k.shape
    held, values = [], []
    for n, numbers in enumerate((k, v)):
        scale = normal(seed + 2 + n, texts, kv, -(-width // 32), size)
        rounded = jnp.asarray(np.sign(scale) * np.exp(scale / 4) / 3, jnp.bfloat16)
        held.append(rounded.reshape(texts, -1, size))
        of_element = np.asarray(rounded, np.float64)[:, :, np.arange(width) // 32]  # [texts, K, Dh, size]
        values.append(numbers * np.swapaxes(of_element, -1, -2))
    return KVCache(None, jnp.asarray(packed), *held), values


def slot_map_of(prompt_slots: tuple[int, ...], prompts: int) -> SlotMap:
    """Slot indices are assigned from the last slot on, and no slot has index 0 of the last prompt."""
    slot_indices = [
        len([x for x in prompt_slots[n + 1 :] if x == prompt_slot]) + (prompt_slot == prompts - 1)
        for n, prompt_slot in enumerate(prompt_slots)
    ]
    table = np.full((prompts, max(slot_indices) + 1), len(prompt_slots) - 1)
    table[prompt_slots, slot_indices] = np.arange(len(prompt_slots))
    return SlotMap(*(jnp.asarray(x, jnp.int32) for x in (prompt_slots, table, slot_indices)))


def problem(case: Case, *, transposed: bool = False) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments, and the result in float64."""
    slots, prompts = len(case.base), len(case.lengths)
    prompt_slots = case.prompt_slots or tuple(np.arange(slots) // (slots // prompts))
    q = jnp.asarray(2 * normal(0, slots, K, case.queries, case.width), case.dtype)
    prefix, prefix_values = cache(10, case, prompts, case.prompt, transposed=transposed)
    past_blocks = [cache(20 + 10 * n, case, slots, size, transposed=transposed) for n, size in enumerate(case.past_blocks)]
    segment_cache, own_values = cache(90, case, slots, SEGMENT, transposed=transposed)
    arguments: dict[str, Any] = {
        "q": q,
        "prefix": prefix,
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "past_blocks": [past_block for past_block, _ in past_blocks],
        "segment_cache": segment_cache,
        "base": jnp.asarray(case.base, jnp.int32),
        "step": jnp.int32(case.step),
        "window": jnp.int32(case.window),
        "slot_map": None if case.prompt_slots is None else slot_map_of(case.prompt_slots, prompts),
    }
    out = np.zeros(q.shape)
    for slot, (prompt_slot, base) in enumerate(zip(prompt_slots, case.base, strict=True)):
        past = [np.concatenate([x[n][slot] for _, x in past_blocks], axis=1)[:, :base] for n in range(2)] if past_blocks else []
        seen = []
        for n in range(2):
            parts = [prefix_values[n][prompt_slot, :, : case.lengths[prompt_slot]], *past[n : n + 1]]
            seen.append(np.concatenate([*parts, own_values[n][slot, :, : case.step + 1]], axis=1)[:, -case.window :])
        k, v = seen
        scores = np.einsum("krd,kxd->krx", np.asarray(q[slot], np.float64), k)
        scores = scores if case.softcap is None else case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[slot] = np.einsum("krx,kxd->krd", weights / weights.sum(axis=-1, keepdims=True), v)
    return arguments, out


def stacked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The cache arrays as those of the second of two layers."""
    names = ("prefix", "past_blocks", "segment_cache")
    layers = jax.tree.map(lambda x: jnp.stack([x[::-1], x]), {name: arguments[name] for name in names})
    return arguments | layers | {"layer": jnp.int32(1)}


def attention(implementation: str, case: Case, arguments: dict[str, Any]) -> np.ndarray:
    """Compiled, with small blocks."""
    options: dict[str, Any] = {"softcap": case.softcap, "implementation": implementation, "block_sizes": BlockSizes(8, 8)}
    return np.asarray(jax.jit(functools.partial(decode_attention, **options))(**arguments).astype(jnp.float32))


def tolerance(case: Case) -> float:
    """Float32: scores reach 30. bfloat16: weights and the result are rounded to 8 bits, values reach 3."""
    return 2e-2 if case.dtype == "bfloat16" else 2e-5


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("name", "transposed"), [(name, transposed) for name in CASES for transposed in (False, True)[: 1 + ("int4" not in name)]]
)
def test_one_token_sees_its_prompt_its_past_and_this_segment(name: str, transposed: bool, implementation: str) -> None:
    case = CASES[name]
    arguments, expected = problem(case, transposed=transposed)
    np.testing.assert_allclose(attention(implementation, case, arguments), expected, rtol=0, atol=tolerance(case))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_joined_keys_and_values_of_a_segment_are_read_as_separate_ones(implementation: str) -> None:
    arguments, expected = problem(CASES["in order"])
    joined = join_keys_and_values(arguments["segment_cache"])
    jax.tree.map(np.testing.assert_array_equal, separate(joined), arguments["segment_cache"])
    got = attention(implementation, CASES["in order"], arguments | {"segment_cache": joined})
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(CASES["in order"]))
    with pytest.raises(ValueError, match="keys and values of prefix are joined; only those of segment_cache"):
        decode_attention(**arguments | {"prefix": join_keys_and_values(arguments["prefix"])})


@pytest.mark.parametrize(
    "name",
    [
        *("in order", "no past", "one query", "anywhere", "int4, narrow heads", "int4, three groups", "int4, groups of 32"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4, heads of 64", "int4, heads of 128")),
    ],
)
def test_the_kernel_gives_the_same_and_has_no_race(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And reads no memory that nothing was written to, which the interpreter fills with NaN."""
    case = CASES[name]
    arguments, expected = problem(case)
    with no_race(capsys):
        got = attention("mosaic_tpu", case, stacked(arguments))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(case))


HOPPER = {
    "in order": Case(
        queries=2, lengths=(48, 17), prompt=48, base=(16, 64, 33, 48), past_blocks=(16, 64), step=2, dtype="bfloat16", width=64
    ),
    "no past": Case(queries=9, lengths=(32,), prompt=32, base=(0, 0), past_blocks=(), step=0, dtype="bfloat16", width=64),
    "anywhere": Case(
        prompt_slots=(2, 0, 2, 0),
        lengths=(32, 3, 1),
        prompt=32,
        base=(0, 48, 5, 16),
        past_blocks=(16, 32),
        dtype="bfloat16",
        width=64,
    ),
}


NEW_ENOUGH = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax 0.11.2")


@NEW_ENOUGH
@pytest.mark.parametrize(("name", "joined"), [*((name, False) for name in HOPPER), ("in order", True)])
def test_the_kernels_for_nvidia_give_the_same_and_have_no_race(
    name: str, joined: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 64 and a segment of 16 columns, the least that is multiplied at once; of the second of two layers."""
    for constant, value in (("SEGMENT", 16), ("K", 2 if joined else 1)):
        monkeypatch.setitem(globals(), constant, value)
    case = HOPPER[name]
    arguments, expected = problem(case)
    if joined:
        arguments["segment_cache"] = join_keys_and_values(arguments["segment_cache"])
    arguments = stacked(arguments) | {"window": NO_WINDOW}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = decode_attention(**arguments, implementation="mosaic_gpu")
    assert "RACE" not in capsys.readouterr().out.upper()
    np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), expected, rtol=0, atol=tolerance(case))


@NEW_ENOUGH
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(), "must be bfloat16"),
        (Case(dtype="bfloat16"), "wide, not 16"),
        (Case(dtype="bfloat16", format="int4"), "keys and values must be bfloat16, not int4"),
    ],
)
def test_the_kernel_for_nvidia_says_what_it_cannot_compute(case: Case, message: str) -> None:
    arguments, _ = problem(case)
    with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot compute this: .*{message}.*use 'xla'"):
        decode_attention(**arguments, implementation="mosaic_gpu")


@NEW_ENOUGH
def test_reasons_not_to_take_the_kernel_for_nvidia() -> None:
    q, keys = jnp.zeros((4, 2, 4, 64), jnp.bfloat16), jnp.zeros((4, 2, 32, 64), jnp.bfloat16)
    cache, odd = KVCache(keys, keys), KVCache(keys[:, :, :24], keys[:, :, :24])
    assert refusal(q, [cache], NO_WINDOW, None) is None
    for arguments, reason in (
        ((q, [cache], jnp.int32(NO_WINDOW), None), "no windows"),
        ((q, [cache], 1024, None), "no windows"),
        ((q, [cache], NO_WINDOW, 30.0), "no soft cap"),
        ((q, [odd], NO_WINDOW, None), "multiple of 16"),
        ((jnp.zeros((4, 2, 65, 64), jnp.bfloat16), [cache], NO_WINDOW, None), "at most 64"),
    ):
        assert reason in str(refusal(*arguments))


def test_one_layer_of_several_is_read() -> None:
    arguments, expected = problem(ANYWHERE)
    np.testing.assert_allclose(attention("xla", ANYWHERE, stacked(arguments)), expected, rtol=0, atol=tolerance(ANYWHERE))


def test_only_filled_blocks_are_fetched() -> None:
    """Blocks are fetched where the index changes. A grid begins with some block, here of slot 0, which is empty."""
    base, past_blocks = np.array([0, 28, 4, 0, 20, 8]), (8, 20)
    ends = np.stack([np.clip(base - start, 0, size) for start, size in zip((0, 8), past_blocks, strict=True)])
    ranges = mosaic_tpu.column_ranges(jnp.zeros_like(ends, jnp.int32), jnp.asarray(ends, jnp.int32))
    parts, steps = mosaic_tpu.grid_steps(past_blocks, 8)
    found = []
    for part in parts:
        index = functools.partial(mosaic_tpu.block_index(part, 5), layer=np.zeros(1, np.int32), ranges=ranges)
        numbers = [jnp.asarray(x.ravel(), jnp.int32) for x in np.mgrid[: len(base), :steps]]
        where = jax.jit(jax.vmap(index))(*numbers)
        pairs = [(int(text), int(block)) for text, block in zip(where[1], where[3], strict=True)]
        found.append([pair for n, pair in enumerate(pairs) if n == 0 or pair != pairs[n - 1]])
    assert found[0] == [(0, 0), (1, 0), (2, 0), (4, 0), (5, 0)]
    assert found[1] == [(0, 0), (1, 0), (1, 1), (1, 2), (4, 0), (4, 1)]


def test_a_slot_takes_one_grid_step_where_no_array_is_larger_than_a_block() -> None:
    parts, steps = mosaic_tpu.grid_steps((64, 64, 128, 256, 512, 1024, 32), 512)
    assert [(part.block, part.blocks) for part in parts] == [(64, 1), (64, 1), (128, 1), (256, 1), (512, 1), (512, 2), (32, 1)]
    assert steps == 2
    assert mosaic_tpu.grid_steps((*EIGHT_B.past_blocks, EIGHT_B.segment), 512)[1] == 1


def test_a_tpu_with_less_vector_memory_gets_smaller_blocks() -> None:
    """Of an 8B model: a prompt's column has 4 KiB and 512 rows of scores. Two buffers and four arrays of 1,024 take 16 MiB."""
    for memory, blocks in ((16, BlockSizes(512, 512)), (64, BlockSizes(1024, 512)), (128, BlockSizes(1024, 512))):
        with tracing_for(Target("tpu", memory * 2**20)):
            assert choose_block_sizes(2048, (64, 64, 128, 256, 512, 32), 4096, 8, 4, 8) == blocks


@pytest.mark.parametrize(
    ("chip", "shape", "kv_format"),
    on_chips(
        [
            *zip(CHIPS, (GEMMA_3_12B, GEMMA_3_12B, EIGHT_B, EIGHT_B), ("auto", "int8", "auto", "int8"), strict=True),
            ("v5e", EIGHT_B, "int4"),
            ("v6e", GEMMA_3_12B, "int4"),
        ]
    ),
    ids=str,
)
def test_on_a_tpu_there_are_neither_scores_nor_copies(chips: dict[str, Any], chip: str, shape: Shape, kv_format: str) -> None:
    """In the compiled program, at the sizes of published models.

    Where they are arguments, scales of the segment cache have a layout without padding, and are copied into rows of 128. In a
    rollout the program makes them itself, in the right layout.
    """
    program = functools.partial(decode_attention, softcap=50.0, implementation="mosaic_tpu")
    memory = compiled_for(chips, chip, program, **decode_shapes(shape, 24, kv_format=kv_format))
    print(f"{chip} {shape} {kv_format}: temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    heads = shape.kv_heads * shape.queries
    scores = 4 * shape.slots * heads * (shape.prompt + sum(shape.past_blocks) + shape.segment)
    layer = memory.argument_size_in_bytes / 24
    of_head = {"auto": 0, "int8": 2, "int4": 2 * shape.width // 32}[kv_format]
    scales = 2 * 24 * shape.slots * shape.kv_heads * 128 * of_head
    # A v5p keeps queries and the prefix's output, of rows padded to 8, in device memory instead of vector memory.
    of_queries = 12 * shape.slots * shape.kv_heads * 8 * shape.width if chip == "v5p" else 0
    assert memory.temp_size_in_bytes < min(scores, layer) / 4 + scales + of_queries


def test_the_traced_program_holds_no_array_of_heads_by_keys() -> None:
    given = decode_shapes(GEMMA_3_12B, 2)
    arguments = jax.tree.leaves(given)
    largest = array_sizes(jax.make_jaxpr(functools.partial(decode_attention, implementation="mosaic_tpu"))(**given))
    assert largest <= max(x.size for x in arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((4, K, DH))}, r"q is float32 \(4, 2, 16\)"),
        ({"q": jnp.zeros((4, K, 4, DH), jnp.int8)}, "q is int8"),
        ({"base": jnp.zeros((5,), jnp.int32)}, r"base \(5,\)"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, "4 slots are no multiple of 3"),
        ({"segment_cache": KVCache(jnp.zeros((4, K, 4, 8)), jnp.zeros((4, K, 4, 8)))}, "segment_cache"),
        ({"prefix": KVCache(jnp.zeros((4, K, 4, DH)), jnp.zeros((4, K, 4, DH)))}, "prefix"),
        ({"past_blocks": [KVCache(*[jnp.zeros((4, K, 4, DH), jnp.int8)] * 2)]}, r"past_blocks\[0\] is int8"),
        ({"past_blocks": [int4_cache(0, [normal(n, 4, K, 4, DH) for n in range(2)])[0]]}, r"past_blocks\[0\] has the format int4"),
        ({"layer": jnp.int32(0)}, "prefix"),
        ({"segment_cache": TRANSPOSED, "implementation": "mosaic_tpu"}, "transposed"),
        ({"implementation": "tpu"}, "unknown"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments, _ = problem(Case())
    undecorated = decode_attention.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_scale": None}, r"prefix is int4 with scales None; they are \[4, 12\]"),
        ({"v_scale": jnp.zeros((2, K, 12), jnp.bfloat16)}, r"prefix is int4 with scales \(2, 12\); they are \[4, 12\]"),
        ({"v": jnp.zeros((2, K, 12, 64))}, "prefix is float32; keep it as float32, or as int8 or int4 with scales"),
        ({"transposed": True}, "prefix is int4 and transposed"),
    ],
)
def test_an_int4_cache_that_is_not_one_is_refused(change: dict[str, Any], message: str) -> None:
    arguments, _ = problem(CASES["int4, groups of 32"])
    undecorated = decode_attention.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**arguments | {"prefix": dataclasses.replace(arguments["prefix"], **change)})
