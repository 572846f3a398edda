"""`quantized_matmul` against NumPy in float64, every implementation and format; its TPU kernel interpreted and compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import V5P_TAKES_MORE, compiled_for, interpreted, no_race, on_chips
from plain_oracles import array_sizes, quick_compiling

from grpo_kernels import QuantizedWeight, dequantize, quantize, quantized_matmul, quantized_shapes, weight_bytes
from grpo_kernels.ops.quantized_matmul import BlockSizes, choose_block_sizes, moved_bytes, xla
from grpo_kernels.ops.quantized_matmul.block_sizes import PART_BYTES
from grpo_kernels.ops.quantized_matmul.formats import NF4
from grpo_kernels.ops.quantized_matmul.shapes import PUBLISHED, ROWS
from grpo_kernels.target import Target, tracing_for

FORMATS = ["int8", "int4", "nf4"]
IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
SIZES = [(1, 192, 80), (140, 576, 200)]  # T, I and O; the last in ragged blocks of each


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def small_blocks(implementation: str, w: QuantizedWeight) -> BlockSizes:
    """Blocks of 128 rows and outputs, and of 128 inputs; those of the kernel have eight groups of inputs."""
    inputs = min(w.shape[0], max(128, 8 * w.group)) if implementation == "mosaic_tpu" else 128
    return BlockSizes(128, inputs if w.group < w.shape[0] else min(128, w.shape[0]), min(128, w.shape[1]))


@functools.cache
def inputs(t: int, i: int, o: int, form: str, dtype: str) -> tuple[jax.Array, QuantizedWeight, jax.Array]:
    """x [T, I], the weight and dy [T, O]."""
    rng = np.random.default_rng(t + i + o)
    w = jax.jit(quantize, static_argnums=1)(jnp.asarray(rng.normal(size=(i, o)) * 0.05, jnp.float32), form)
    return jnp.asarray(rng.normal(size=(t, i)), dtype), w, jnp.asarray(rng.normal(size=(t, o)), dtype)


def dense(w: QuantizedWeight) -> np.ndarray:
    """By the definition, float64: step or codebook entry, times the scale of its group."""
    values, scale = np.asarray(w.values).astype(np.int64), np.asarray(w.scale).astype(np.float64)
    numbers = np.array(NF4)[values] if w.values.dtype == jnp.uint4 else values.astype(np.float64)
    return numbers * np.repeat(scale, numbers.shape[0] // scale.shape[0], axis=0)


def both(
    implementation: str, x: jax.Array, w: QuantizedWeight, dy: jax.Array, *, transpose: bool = False, blocks: Any = small_blocks
) -> tuple[Any, Any]:
    """The product, and the gradient of its product with dy; compiled, Pallas kernels interpreted."""
    options = {"transpose": transpose, "implementation": implementation, "block_sizes": blocks and blocks(implementation, w)}

    @jax.jit
    def run(x: jax.Array, w: QuantizedWeight, dy: jax.Array) -> Any:
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, **options), x)
        return y, back(dy)[0]

    with interpreted(implementation):
        return jax.tree.map(np.asarray, run(x, w, dy))


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """float32: rounding of sums. bfloat16: one rounding of W and one of the result (2^-9 each) beside exact products."""
    assert got.dtype == jnp.dtype(dtype)
    size = np.sqrt(np.mean(np.square(want)))
    error = np.abs(got.astype(np.float64) - want)
    assert np.sqrt(np.mean(np.square(error))) / size < (1e-6 if dtype == "float32" else 3e-3)
    assert error.max() / size < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation: str, form: str) -> None:
    for t, i, o in SIZES:
        x, w, dy = inputs(t, i, o, form, "float32")
        y, dx = both(implementation, x, w, dy)
        assert_close(y, np.asarray(x, np.float64) @ dense(w), "float32")
        assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "float32")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str, form: str) -> None:
    x, w, dy = inputs(16, 576, 200, form, "bfloat16")
    y, dx = both(implementation, x, w, dy)
    assert_close(y, np.asarray(x, np.float64) @ dense(w), "bfloat16")
    assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "bfloat16")


@pytest.mark.parametrize("generation", [5, 6])
@pytest.mark.parametrize(("form", "rows", "width"), [("int4", 3, 576), ("int4", 20, 1024), ("int4", 70, 1024), ("nf4", 5, 576)])
def test_newer_chips_have_other_instructions(form: str, rows: int, width: int, generation: int) -> None:
    """Groups of 64 and 128; rows for which products are scaled on both chips, on one of them, and on none."""
    x, w, dy = inputs(rows, width, 200, form, "bfloat16")
    with tracing_for(Target("tpu", generation=generation)):
        y, dx = both("mosaic_tpu", x, w, dy)
    assert_close(y, np.asarray(x, np.float64) @ dense(w), "bfloat16")
    assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "bfloat16")


def test_a_tpu_reads_int8_through_xla_where_rows_are_few() -> None:
    def kernels(form: str, rows: int, **options: Any) -> bool:
        w, x = quantized_shapes(form, (256, 128)), jax.ShapeDtypeStruct((rows, 128 if options else 256), jnp.bfloat16)
        with tracing_for(Target("tpu")):
            return "pallas_call" in str(jax.make_jaxpr(functools.partial(quantized_matmul, **options))(x, w))

    assert not kernels("int8", 256)
    assert kernels("int8", 257)
    assert kernels("int8", 1, transpose=True)
    assert kernels("int4", 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transposed(implementation: str) -> None:
    x, w, dy = inputs(5, 576, 200, "int4", "float32")
    y, dx = both(implementation, dy, w, x, transpose=True)
    assert_close(y, np.asarray(dy, np.float64) @ dense(w).T, "float32")
    assert_close(dx, np.asarray(x, np.float64) @ dense(w), "float32")


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_a_stack(implementation: str, form: str) -> None:
    """Value and gradient, for a layer that only the program knows; the backward pass keeps the stack and no layer of its own."""
    x, w, dy = inputs(5, 192, 80, form, "float32")
    _, other, _ = inputs(6, 192, 80, form, "float32")
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), other, w, other)

    def run(x: jax.Array, stack: QuantizedWeight, layer: jax.Array) -> Any:
        return jax.vjp(lambda x: quantized_matmul(x, stack, layer=layer, implementation=implementation), x)

    with interpreted(implementation):
        y, dx = jax.jit(lambda *given: (lambda y, back: (y, back(dy)[0]))(*run(*given)))(x, stack, jnp.int32(1))
    assert_close(np.asarray(y), np.asarray(x, np.float64) @ dense(w), "float32")
    assert_close(np.asarray(dx), np.asarray(dy, np.float64) @ dense(w).T, "float32")
    _, kept = jax.eval_shape(run, x, stack, jnp.int32(1))
    assert {leaf.shape for leaf in jax.tree.leaves(kept)} == {stack.values.shape, stack.scale.shape, ()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_groups_of_any_size_run_everywhere_but_in_the_kernel(implementation: str, form: str) -> None:
    """A width of 172 has groups of 86 or 43; one of 48 is a single group."""
    for i in (172, 48):
        x, w, dy = inputs(3, i, 20, form, "float32")
        y, dx = both(implementation, x, w, dy, blocks=None)
        assert_close(y, np.asarray(x, np.float64) @ dense(w), "float32")
        assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "float32")


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_kernel_has_no_race(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of rows and two to five blocks of inputs and outputs."""
    x, w, dy = inputs(140, 576, 200, form, "float32")
    blocks = small_blocks("mosaic_tpu", w)
    for transpose in (False, True):
        options: dict[str, Any] = {"transpose": transpose, "implementation": "mosaic_tpu", "block_sizes": blocks}
        with no_race(capsys):
            got = np.asarray(jax.jit(functools.partial(quantized_matmul, **options))(dy if transpose else x, w))
        given = np.asarray(dy if transpose else x, np.float64)
        assert_close(got, given @ (dense(w).T if transpose else dense(w)), "float32")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [128, 1024])  # in parts, and whole
def test_four_bits_sliced_as_bytes_are_the_same_values(size: int, transpose: bool) -> None:
    """As a GPU does it, on this machine."""
    rng = np.random.default_rng(3)
    w = quantize(jnp.asarray(rng.normal(size=(1024, 640)), jnp.float32), "int4")
    x = jnp.asarray(rng.normal(size=(5, 640 if transpose else 1024)), jnp.float32)
    program = functools.partial(xla.quantized_matmul_xla, transpose=transpose, blocks=BlockSizes(5, size, min(size, 640)))
    here = program(x, w)
    with tracing_for(Target("gpu")):
        traced = jax.make_jaxpr(program)(x, w)
        there = program(x, w)
    assert "bitcast_convert_type" in str(traced)
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_dense_is_kept_for_the_backward_pass(form: str) -> None:
    """The residuals are the quantised weight's own arrays, and the XLA form's parts are no larger than it says."""
    x, w = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), quantized_shapes(form, (4096, 14336))
    for implementation in ("mosaic_tpu", "xla"):
        function = functools.partial(quantized_matmul, implementation=implementation)
        _, kept = jax.eval_shape(lambda x, w, f=function: jax.vjp(lambda x: f(x, w), x), x, w)
        sizes = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)}
        assert sizes == {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(w)}
    if form != "int8":
        assert array_sizes(jax.make_jaxpr(function)(x, w)) <= PART_BYTES // 2 < 4096 * 14336 / 4


@pytest.mark.parametrize(
    ("chip", "name", "form", "rows"),
    on_chips(
        [
            ("v4", "Llama-3.1-8B up", "int8", ROWS[0]),
            ("v4", "Llama-3.1-8B up", "int4", ROWS[0]),
            ("v4", "Qwen2.5-1.5B down", "nf4", ROWS[0]),
            ("v5e", "Llama-3.1-8B up", "int4", ROWS[1]),
            ("v5p", "Qwen2.5-1.5B down", "int4", ROWS[1]),
            ("v5p", "Qwen2.5-1.5B down", "nf4", ROWS[0]),
            ("v6e", "Llama-3.1-8B up", "nf4", ROWS[0]),
            ("v6e", "Llama-3.1-8B up", "int8", ROWS[1]),
        ]
    ),
)
def test_on_a_tpu_the_weight_is_read_in_place(chips: dict[str, Any], chip: str, name: str, form: str, rows: int) -> None:
    """Value and gradient in one program: the quantised values are read, and nothing but the codebook is stored on the way.

    On a v5p libtpu 0.0.50 takes up to 256 KiB.

    The gradient at one matrix is the product at its counterpart (up, down), so half of the published shapes suffice.
    """
    shape = PUBLISHED[name]
    w = quantized_shapes(form, (shape.inputs, shape.outputs))
    x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (shape.inputs, shape.outputs))

    def run(x: Any, w: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, implementation="mosaic_tpu"), x)
        return y, back(dy)

    memory = compiled_for(chips, chip, run, x, w, dy)
    print(f"{chip} {shape} {form} T={rows}: temporaries {memory.temp_size_in_bytes / 2**20:.2f} MiB")
    assert memory.temp_size_in_bytes < (2**18 if chip == "v5p" and V5P_TAKES_MORE else 2**17)
    value_bytes = shape.inputs * shape.outputs * (1.05 if form == "int8" else 0.55)
    assert memory.argument_size_in_bytes < value_bytes + 2 * 2 * rows * (shape.inputs + shape.outputs)


def test_a_tpu_with_less_vector_memory_gets_fewer_rows() -> None:
    w = quantized_shapes("int4", (4096, 14_336))
    for memory, rows in ((16, 512), (64, 2048), (128, 2048)):
        with tracing_for(Target("tpu", memory * 2**20)):
            assert choose_block_sizes(2048, w, 2, "mosaic_tpu") == BlockSizes(rows, 1024, 1024)


@pytest.mark.parametrize(
    ("target", "shape", "form", "implementation", "element_bytes", "scales"),
    [
        (Target("gpu"), (4096, 14336), "int8", None, 1, 4 * 14336),
        (Target("gpu"), (4096, 14336), "int4", None, 0.5 + 2 + 2, 2 * 32 * 14336),
        (Target("gpu"), (4096, 14336), "nf4", None, 0.5 + 2 + 2, 2 * 64 * 14336),
        (Target("gpu"), (4096, 14336), "int8", "reference", 1 + 2 + 2, 4 * 14336),
        (Target("tpu"), (4096, 14336), "int8", None, 1, 4 * 14336),
        (Target("tpu"), (4096, 14336), "int4", None, 0.5, 2 * 32 * 14336),
        (Target("tpu"), (4096, 14336), "nf4", None, 0.5, 2 * 64 * 14336),
        (Target("tpu"), (4000, 512), "int4", None, 0.5 + 2 + 2, 2 * 32 * 512),  # groups of 125: not the kernel's
    ],
)
def test_what_a_product_moves_for_its_weight(
    target: Target, shape: tuple[int, int], form: str, implementation: str | None, element_bytes: float, scales: int
) -> None:
    """In bfloat16: values, the dense weight written and read where there is one, and scales."""
    w = quantized_shapes(form, shape)
    with tracing_for(target):
        moved = moved_bytes(w, 64, 2, implementation)
    assert moved == element_bytes * shape[0] * shape[1] + scales


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"x": jnp.zeros((3, 65))}, r"x \(3, 65\).*\[T, I\]"),
        ({"x": jnp.zeros((3, 64)), "transpose": True}, r"x \(3, 64\).*\[T, O\]"),
        ({"x": jnp.zeros((3, 64), jnp.float16)}, "float16"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int4), jnp.ones((3, 8)))}, r"scale \(3, 8\)"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int16), jnp.ones((1, 8)))}, "int16"),
        ({"layer": jnp.int32(0)}, r"w \(64, 8\) do not fit; .* w \[L, I, O\]"),
        ({"w": QuantizedWeight(jnp.zeros((2, 64, 8), jnp.int8), jnp.ones((3, 1, 8))), "layer": jnp.int32(0)}, r"scale \(3, 1, 8\)"),
        ({"implementation": "triton"}, "triton"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int4), jnp.ones((2, 8))), "implementation": "mosaic_tpu"}, "groups of 32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": jnp.zeros((3, 64)), "w": QuantizedWeight(jnp.zeros((64, 8), jnp.int8), jnp.ones((1, 8)))}
    undecorated = quantized_matmul.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(given | change))


FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_is_the_specifications_rounding() -> None:
    """The scale is 2^(⌊log2 max⌋ - 2); ties go to an even last bit: 0.25 to 0, 0.75 to 1, 2.5 to 2, 3.5 and 5 to 4."""
    w = np.zeros((32, 3), np.float32)
    w[:9, 0] = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -7.5]  # the largest is in [4, 8): a scale of 1; 7.5 is out of range: 6
    w[:3, 1] = [-3 * 2.0**-20, 2.0**-20, 0.1 * 2.0**-20]
    q = jax.jit(quantize, static_argnums=1)(jnp.asarray(w), "mxfp4")
    assert (q.format, q.group, q.scale.dtype) == ("mxfp4", 32, jnp.uint8)
    assert np.asarray(q.scale)[0, :2].tolist() == [127, 127 - 21]
    got = np.asarray(dequantize(q))
    assert got[:9, 0].tolist() == [4, 0, 1, 1, 2, 2, 4, 4, -6]
    assert (got[:3, 1] * 2.0**20).tolist() == [-3, 1, 0]
    assert not got[:, 2].any()


def test_values_in_mxfp4_stay_exactly_what_they_are() -> None:
    """Whatever scale they are stored with, also one that is larger than the group needs."""
    rng = np.random.default_rng(5)
    values, scales = FP4_VALUES[rng.integers(0, 16, (96, 50))], 2.0 ** rng.integers(-30, 20, (3, 50))
    values[:32, :10] = np.clip(values[:32, :10], -1.5, 1.5)
    values[32:64, 10:20] = np.sign(values[32:64, 10:20]) * 0.5
    w = (values * np.repeat(scales, 32, axis=0)).astype(np.float32)
    q = jax.jit(quantize, static_argnums=1)(jnp.asarray(w, jnp.bfloat16), "mxfp4")
    np.testing.assert_array_equal(np.asarray(dequantize(q)), w)
    assert weight_bytes(q) == 96 * 50 // 2 + 3 * 50


def test_products_with_mxfp4_and_what_it_is_refused_for() -> None:
    rng = np.random.default_rng(6)
    w = quantize(jnp.asarray(rng.normal(size=(64, 24)), jnp.float32), "mxfp4")
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 64), (5, 24)))
    dense_w = FP4_VALUES[np.asarray(w.values).astype(int)] * np.repeat(2.0 ** (np.asarray(w.scale).astype(int) - 127), 32, axis=0)
    for implementation in ("reference", "xla"):
        y, dx = both(implementation, x, w, dy, blocks=None)
        assert_close(y, np.asarray(x, np.float64) @ dense_w, "float32")
        assert_close(dx, np.asarray(dy, np.float64) @ dense_w.T, "float32")
    with pytest.raises(ValueError, match="mxfp4 is for experts"):
        quantized_matmul(x, w, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="gate: its input width 48 is no multiple of 32"):
        quantized_shapes("mxfp4", (48, 8), "gate")
