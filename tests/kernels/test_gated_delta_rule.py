"""`gated_delta_rule` against NumPy in float64, every implementation; TPU kernels interpreted, and compiled for TPUs.

Most tests have rows of the same shape, so that each implementation is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_oracle import NAMES, delta_by_the_book, delta_inputs
from jax.experimental import pallas as pl
from kernel_checks import compiled_for, no_race
from packed_rows import CASES, UNEQUAL, Case, Sequence, group, key_ranges
from plain_oracles import quick_compiling

from grpo_kernels import KeyRanges, gated_delta_rule, gated_delta_step, plan_delta_rule, prompt_ranges
from grpo_kernels.ops.gated_delta_rule import BlockSizes, DeltaPlan, choose_block_sizes
from grpo_kernels.ops.gated_delta_rule.shapes import QWEN3_5_4B, QWEN3_6_27B, Shape
from grpo_kernels.ops.gated_delta_rule.triangular import unit_lower_inverse
from grpo_kernels.target import Target, tracing_for

IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
MIXED = Case((((5, (13,)), (1, (2, 1, 1)), (9, ()), (3, (9,))), ((20, (12, 11)),)), 46, kv_heads=2, queries=2)
PACKED = [MIXED, *(pytest.param(case, marks=pytest.mark.slow) for case in (UNEQUAL, *CASES[1:4], CASES[5]))]
SMALL = BlockSizes(8, 2)
"""Sequences begin and end within chunks and at their edges, and have several."""

ARGUMENTS = ("q", "k", "v", "log_decay", "beta", "initial")


@functools.cache
def program(implementation: str, blocks: BlockSizes) -> Any:
    """Ranges and arrays → the results and gradients of `NAMES`."""

    def run(ranges: KeyRanges, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        plan = plan_delta_rule(ranges, prompts=True, implementation=implementation, block_sizes=blocks)

        def rule(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
            *tokens, initial = arguments
            return gated_delta_rule(*tokens, plan=plan, initial_state=initial)

        results, pullback = jax.vjp(rule, *(arrays[name] for name in ARGUMENTS))
        return dict(zip(NAMES, (*results, *pullback((arrays["d_out"], arrays["d_final"]))), strict=True))

    return jax.jit(run)


def agrees(got: dict[str, jax.Array], expected: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    """Sums are of up to 100 terms of about 1."""
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run by JAX's plain interpreter, which is faster than the TPU's."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    with quick_compiling():
        yield


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_values_and_gradients(case: Case, implementation: str) -> None:
    """Rows of several prompts and completions of any length, and padding; heads of keys serve one head of values or several."""
    arrays = delta_inputs(case)
    agrees(program(implementation, SMALL)(key_ranges(case), arrays), delta_by_the_book(case, arrays))


def text(start: int, length: int, shared: int) -> Sequence:
    """A sequence behind a prompt of that many tokens at the row's start."""
    own, none = np.arange(start, start + length), np.arange(0)
    return Sequence(own=own, prompt=np.arange(shared), asking=none, queries=none)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_before_and_between_sequences(implementation: str) -> None:
    """One row begins with padding, the other has some behind its prompt and behind a completion."""
    rows = [[text(30, 16, 0)], [text(0, 6, 0), text(10, 7, 6), text(19, 9, 6)]]
    numbers = np.zeros((4, 2, MIXED.tokens), np.int32)
    for b, texts in enumerate(rows):
        for one in texts:
            numbers[1, b, one.own] = one.prompt.size
            numbers[2, b, one.own], numbers[3, b, one.own] = one.own[0], one.own + 1
    arrays = delta_inputs(MIXED)
    agrees(program(implementation, SMALL)(KeyRanges(*map(jnp.asarray, numbers)), arrays), delta_by_the_book(MIXED, arrays, rows))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_padding_keeps_the_state(implementation: str) -> None:
    arrays = delta_inputs(MIXED)
    ranges = KeyRanges(*(np.asarray(x) * np.array([[0], [1]], np.int32) for x in key_ranges(MIXED)))
    got = program(implementation, SMALL)(ranges, arrays)
    np.testing.assert_array_equal(got["final"][0], arrays["initial"][0])
    np.testing.assert_array_equal(got["d_initial"][0], arrays["d_final"][0])
    assert not any(np.any(got[name][0]) for name in NAMES if name not in ("final", "d_initial"))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize("blocks", [SMALL, pytest.param(BlockSizes(32, 2), marks=pytest.mark.slow)], ids=str)
def test_decays_of_any_size_and_keys_that_repeat(implementation: str, blocks: BlockSizes) -> None:
    """Decays from 1 to exp(-10⁴), which is 0 in float32; all keys alike with β = 1, where each value replaces the one before."""
    arrays = delta_inputs(MIXED)
    rng = np.random.default_rng(0)
    decays = jnp.asarray(-(10.0 ** rng.uniform(-8, 4, arrays["log_decay"].shape)), jnp.float32)
    alike = np.broadcast_to(np.asarray(arrays["k"])[:, :1], arrays["k"].shape)
    replacing = {"k": jnp.asarray(alike), "beta": jnp.ones_like(arrays["beta"]), "log_decay": jnp.zeros_like(decays)}
    for change in ({"log_decay": decays}, replacing):
        changed = arrays | change
        agrees(program(implementation, blocks)(key_ranges(MIXED), changed), delta_by_the_book(MIXED, changed), 5e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("size", [2, 64, 128])
def test_the_inverse_of_a_triangular_matrix(size: int) -> None:
    """Random, and all ones below the diagonal: its inverse has -1 next to the diagonal alone, its powers grow to 10³⁶ at 128."""
    rng = np.random.default_rng(size)
    ones = np.tril(np.ones((size, size)), -1)
    for matrix in (ones, ones * rng.uniform(-1, 1, ones.shape) / np.sqrt(size)):
        got = jax.jit(unit_lower_inverse)(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(got, np.linalg.inv(np.eye(size) + matrix), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "implementation", ["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "mosaic_tpu"))]
)
def test_bfloat16(implementation: str) -> None:
    """Operands of products with states and added values are rounded to bfloat16, 2⁻⁹ each, and so are results; of the norm."""
    arrays = delta_inputs(MIXED, "bfloat16")
    got = program(implementation, SMALL)(key_ranges(MIXED), arrays)
    expected = delta_by_the_book(MIXED, arrays)
    for name in NAMES:
        assert got[name].dtype == (jnp.bfloat16 if name in ("out", "dq", "dk", "dv") else jnp.float32)
        off = np.linalg.norm(np.asarray(got[name], np.float64) - expected[name])
        assert off < 1e-2 * np.linalg.norm(expected[name]), name


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_a_group_may_be_split(implementation: str) -> None:
    """A completion's result does not depend on the others; gradients of the prompt are sums over rows with a copy of it each."""
    p, c = 18, 13
    own = (slice(p, p + c), slice(p + c, p + 2 * c))
    case = dataclasses.replace(MIXED, rows=(group(p, c, 2), group(p, c, 2)))
    of_parts = dataclasses.replace(MIXED, rows=(group(p, c, 1), group(p, c, 1)))
    arrays = delta_inputs(case)
    arrays = {name: np.array(x) for name, x in arrays.items()}
    arrays["d_out"][:, :p], arrays["d_final"][:] = 0, 0
    whole = program(implementation, SMALL)(key_ranges(case), arrays)

    def part(name: str, x: np.ndarray) -> np.ndarray:
        """Row 0 of an array: the prompt with the first completion, and with the second."""
        if name in ("initial", "d_final"):
            return np.stack([x[0], x[0]])
        rows = [np.concatenate([x[0, :p], x[0, one]]) for one in own]
        return np.pad(np.stack(rows), ((0, 0), (0, case.tokens - p - c), *((0, 0),) * (x.ndim - 2)))

    parts = program(implementation, SMALL)(key_ranges(of_parts), {name: part(name, x) for name, x in arrays.items()})
    whole, parts = jax.tree.map(np.asarray, (whole, parts))
    np.testing.assert_allclose(whole["final"][0], parts["final"][1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole["d_initial"][0], parts["d_initial"].sum(axis=0), rtol=0, atol=1e-5)
    for name in set(NAMES) - {"final", "d_initial"}:
        for one, at in enumerate(own):
            np.testing.assert_allclose(whole[name][0, at], parts[name][one, p : p + c], rtol=0, atol=1e-5, err_msg=name)
        shared = parts[name][0, :p] if name == "out" else parts[name][:, :p].sum(axis=0)
        np.testing.assert_allclose(whole[name][0, :p], shared, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("interpreter")
def test_prefill_in_pieces_and_decoding_go_on_from_the_state() -> None:
    """Rows of 24 and 17 tokens at once; 12 and 12 of them, then the others; then one more token at a time."""
    case = Case((((24, ()),), ((17, ()),)), 24, kv_heads=2, queries=2)
    arrays = delta_inputs(case)
    tokens = [np.asarray(arrays[name]) for name in ARGUMENTS[:5]]

    @jax.jit
    def prefill(parts: list[Any], lengths: jax.Array, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        ranges = prompt_ranges(lengths, parts[0].shape[1])
        plan = plan_delta_rule(ranges, prompts=False, implementation="xla", block_sizes=BlockSizes(4, 2))
        return gated_delta_rule(*parts, plan=plan, initial_state=state)

    out, final = map(np.asarray, prefill(tokens, jnp.array([24, 17]), None))
    first, half = prefill([x[:, :12] for x in tokens], jnp.array([12, 12]), jnp.zeros_like(arrays["initial"]))
    second, ended = prefill([x[:, 12:] for x in tokens], jnp.array([12, 5]), half)
    np.testing.assert_allclose(first, out[:, :12], rtol=0, atol=1e-6)
    np.testing.assert_allclose(second, out[:, 12:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ended, final, rtol=0, atol=1e-5)
    step, state = jax.jit(gated_delta_step), half
    for at in range(12, 24):
        rows = 2 if at < 17 else 1
        one, after = step(*(x[:, at] for x in tokens), state=state)
        np.testing.assert_allclose(np.asarray(one)[:rows], out[:rows, at], rtol=0, atol=1e-5)
        state = np.concatenate([np.asarray(after)[:rows], np.asarray(state)[rows:]])
    np.testing.assert_allclose(state, final, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_under_shard_map(implementation: str) -> None:
    """Rows and heads are split over a mesh, the plan is each device's own; gradients are taken outside."""
    arrays = delta_inputs(MIXED)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, heads = jax.sharding.PartitionSpec("fsdp"), jax.sharding.PartitionSpec("fsdp", None, "tensor")
    states = jax.sharding.PartitionSpec("fsdp", "tensor")

    def plan(ranges: KeyRanges) -> DeltaPlan:
        return plan_delta_rule(ranges, prompts=True, implementation=implementation, block_sizes=SMALL)

    @jax.jit
    def gradients(ranges: KeyRanges, arguments: list[jax.Array]) -> list[jax.Array]:
        planned = jax.shard_map(plan, mesh=mesh, in_specs=(rows,), out_specs=rows, check_vma=False)(ranges)

        def loss(arguments: list[jax.Array]) -> jax.Array:
            inputs = (*(heads,) * 5, rows, states)
            rule = jax.shard_map(gated_delta_rule, mesh=mesh, in_specs=inputs, out_specs=(heads, states), check_vma=False)
            q, k, v, log_decay, beta, initial = arguments
            out, final = rule(q, k, v, log_decay, beta, planned, initial)
            return jnp.sum(out * arrays["d_out"]) + jnp.sum(final * arrays["d_final"])

        return jax.grad(loss)(arguments)

    got = gradients(key_ranges(MIXED), [arrays[name] for name in ARGUMENTS])
    expected = program(implementation, SMALL)(key_ranges(MIXED), arrays)
    for name, one in zip(NAMES[2:], got, strict=True):
        np.testing.assert_allclose(one, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_kernels_have_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case((((11, (8, 5)),), ((3, ()),)), 32, queries=2)
    arrays = delta_inputs(case)
    with no_race(capsys), quick_compiling():
        got = jax.tree.map(np.asarray, program.__wrapped__("mosaic_tpu", SMALL)(key_ranges(case), arrays))
    agrees(got, delta_by_the_book(case, arrays))


def compiled_arguments(shape: Shape, tokens: int) -> tuple[Any, ...]:
    """Shapes of a row in bfloat16, heads next to each other as a layer's products return them."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((1, tokens, *size), dtype)

    keys, values = array(shape.key_heads * shape.key_dim), array(shape.value_heads * shape.value_dim)
    numbers = array(shape.value_heads, dtype=jnp.float32)
    return KeyRanges(*[array(dtype=jnp.int32)] * 4), (keys, keys, values, numbers, numbers), values


def layer(implementation: str, shape: Shape) -> Any:
    """(Ranges, arguments, gradient of the result) → result and gradients, of such shapes."""

    def run(ranges: KeyRanges, arguments: tuple[jax.Array, ...], d_out: jax.Array) -> Any:
        plan = plan_delta_rule(ranges, prompts=True, implementation=implementation)

        def rule(q: jax.Array, k: jax.Array, v: jax.Array, *numbers: jax.Array) -> jax.Array:
            keys, values = (shape.key_heads, shape.key_dim), (shape.value_heads, shape.value_dim)
            heads = [x.reshape(*x.shape[:2], *size) for x, size in ((q, keys), (k, keys), (v, values))]
            return gated_delta_rule(*heads, *numbers, plan=plan)[0].reshape(v.shape)

        out, pullback = jax.vjp(rule, *arguments)
        return out, pullback(d_out)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape"), [("v5e", QWEN3_6_27B), ("v6e", QWEN3_5_4B), ("v4", QWEN3_6_27B)], ids=str)
def test_on_a_tpu_only_states_of_blocks_are_kept(chips: dict[str, Any], chip: str, shape: Shape) -> None:
    """Forward and backward of 8,192 tokens, compiled; an array [T, T] would be 4 sizes of q."""
    tokens = 8192
    memory = compiled_for(chips, chip, layer("mosaic_tpu", shape), *compiled_arguments(shape, tokens))
    q = 2 * tokens * shape.key_heads * shape.key_dim
    print(f"{chip} {shape}: temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB, {memory.temp_size_in_bytes / q:.2f} × q")
    with tracing_for(Target("tpu", 0 if chip == "v4" else 2**27)):
        blocks = tokens // choose_block_sizes(tokens, "mosaic_tpu").tokens
    states = 2 * 4 * blocks * shape.value_heads * shape.key_dim * shape.value_dim
    assert memory.temp_size_in_bytes < states + q // 4
    assert chip == "v4" or memory.temp_size_in_bytes < 2 * q


@pytest.mark.slow
def test_plain_jax_takes_memory_in_proportion_to_the_tokens() -> None:
    """Forward and backward of 4,096 tokens in float32 take less than one array [T, T]."""
    shape, tokens = Shape(1, 2, 8, 8), 4096
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), compiled_arguments(shape, tokens))
    with quick_compiling():
        memory = jax.jit(layer("xla", shape)).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    print(f"temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB")
    assert memory.temp_size_in_bytes < 4 * tokens**2


def test_block_sizes_follow_the_row_and_the_chip() -> None:
    assert choose_block_sizes(8192, "xla") == BlockSizes(64, 8)
    assert choose_block_sizes(100, "xla") == BlockSizes(64, 2)
    assert choose_block_sizes(9, "xla") == BlockSizes(16, 1)
    assert choose_block_sizes(1, "xla") == BlockSizes(2, 1)
    with tracing_for(Target("tpu", 2**27)):
        assert choose_block_sizes(8192, "mosaic_tpu") == BlockSizes(128, 8)
        assert choose_block_sizes(300, "mosaic_tpu") == BlockSizes(128, 3)
    with tracing_for(Target("tpu")):
        assert choose_block_sizes(8192, "mosaic_tpu") == BlockSizes(128, 4)
    with pytest.raises(ValueError, match="make chunk a power of two"):
        BlockSizes(48, 2)


def test_what_does_not_fit_is_refused() -> None:
    undecorated = gated_delta_rule.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    case = Case((((3, (2,)),),), 5, queries=2)
    plan = jax.jit(functools.partial(plan_delta_rule, prompts=True, implementation="xla"))(key_ranges(case))
    arrays = {name: np.asarray(x) for name, x in delta_inputs(case).items()}
    given = {name: jnp.asarray(arrays[name]) for name in ARGUMENTS[:5]} | {"initial_state": None, "plan": plan}
    for change, message in (
        ({"k": arrays["k"][..., :4]}, r"k \(1, 5, 1, 4\)"),
        ({"v": jnp.bfloat16(arrays["v"])}, "float32, float32, bfloat16"),
        ({"beta": arrays["beta"][:, :, :1]}, r"beta \(1, 5, 1\)"),
        ({"initial_state": arrays["initial"][:, :1]}, r"the state is float32 \(1, 1, 8, 4\)"),
        ({name: arrays[name][:, :4] for name in ARGUMENTS[:5]}, "the plan is for 1 rows of 5 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            undecorated(**(given | jax.tree.map(jnp.asarray, change)))
    with pytest.raises(ValueError, match="'mosaic_gpu' is unknown"):
        plan_delta_rule(key_ranges(case), prompts=True, implementation="mosaic_gpu")
    unchecked = plan_delta_rule.__wrapped__  # type: ignore[attr-defined]  # as above
    with pytest.raises(ValueError, match=r"ranges have shapes \[\(1, 4\)"):
        unchecked(key_ranges(case)._replace(prompt_start=jnp.zeros((1, 4), jnp.int32)), prompts=True)
