"""`quantized_matmul` against NumPy in float64, every implementation and format; its TPU kernel interpreted and compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding
from plain_oracles import array_sizes, quick_compiling

from grpo_kernels.ops.quantized_matmul import QuantizedWeight, pallas_tpu, quantize, quantized_matmul, quantized_shapes, xla
from grpo_kernels.ops.quantized_matmul.formats import NF4
from grpo_kernels.ops.quantized_matmul.shapes import PUBLISHED, ROWS
from grpo_kernels.target import Target, tracing_for

FORMATS = ["int8", "int4", "nf4"]
IMPLEMENTATIONS = ["reference", "gpu", "tpu"]
SIZES = [(1, 192, 80), (140, 576, 200)]  # T, I and O; the last in ragged blocks of each
CHIPS = ["v5e", "v6e"]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 rows and outputs, and 128 or 512 inputs; parts of 128 outputs, and of 128 inputs, in float32."""
    monkeypatch.setattr(pallas_tpu, "ROWS", 128)
    monkeypatch.setattr(xla, "PART_BYTES", 2**17)


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


def both(implementation: str, x: jax.Array, w: QuantizedWeight, dy: jax.Array, transpose: bool = False) -> tuple[Any, Any]:
    """The product, and the gradient of its product with dy; compiled, Pallas kernels interpreted."""

    @jax.jit
    def run(x: jax.Array, w: QuantizedWeight, dy: jax.Array) -> Any:
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, transpose=transpose, implementation=implementation), x)
        return y, back(dy)[0]

    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else contextlib.nullcontext():
        return jax.tree.map(np.asarray, run(x, w, dy))


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """float32: rounding of sums. bfloat16: one rounding of W and one of the result (2^-9 each) beside exact products."""
    assert got.dtype == jnp.dtype(dtype)
    size = np.sqrt(np.mean(np.square(want)))
    error = np.abs(got.astype(np.float64) - want)
    assert np.sqrt(np.mean(np.square(error))) / size < (1e-6 if dtype == "float32" else 3e-3)
    assert error.max() / size < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation: str, form: str) -> None:
    for t, i, o in SIZES:
        x, w, dy = inputs(t, i, o, form, "float32")
        y, dx = both(implementation, x, w, dy)
        assert_close(y, np.asarray(x, np.float64) @ dense(w), "float32")
        assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "float32")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str, form: str) -> None:
    x, w, dy = inputs(16, 576, 200, form, "bfloat16")
    y, dx = both(implementation, x, w, dy)
    assert_close(y, np.asarray(x, np.float64) @ dense(w), "bfloat16")
    assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "bfloat16")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transposed(implementation: str) -> None:
    x, w, dy = inputs(5, 576, 200, "int4", "float32")
    y, dx = both(implementation, dy, w, x, transpose=True)
    assert_close(y, np.asarray(dy, np.float64) @ dense(w).T, "float32")
    assert_close(dx, np.asarray(x, np.float64) @ dense(w), "float32")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "gpu"])
def test_groups_of_any_size_run_everywhere_but_in_the_kernel(implementation: str, form: str) -> None:
    """A width of 172 has groups of 86 or 43; one of 48 is a single group."""
    for i in (172, 48):
        x, w, dy = inputs(3, i, 20, form, "float32")
        y, dx = both(implementation, x, w, dy)
        assert_close(y, np.asarray(x, np.float64) @ dense(w), "float32")
        assert_close(dx, np.asarray(dy, np.float64) @ dense(w).T, "float32")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_kernel_has_no_race(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of rows and two to five blocks of inputs and outputs; the interpreter prints the races that it finds."""
    x, w, dy = inputs(140, 576, 200, form, "float32")
    for transpose in (False, True):
        program = jax.jit(functools.partial(quantized_matmul, transpose=transpose, implementation="tpu"))
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            got = np.asarray(program(dy if transpose else x, w))
        given = np.asarray(dy if transpose else x, np.float64)
        assert_close(got, given @ (dense(w).T if transpose else dense(w)), "float32")
    assert "RACE" not in capsys.readouterr().out.upper()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(1024, 640), (256, 64)])  # in parts, and whole
def test_four_bits_cut_as_bytes_are_the_same_numbers(
    shape: tuple[int, int], transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it, on this machine."""
    monkeypatch.setattr(xla, "PART_BYTES", 2**19)
    rng = np.random.default_rng(3)
    w = quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), "int4")
    x = jnp.asarray(rng.normal(size=(5, shape[1 if transpose else 0])), jnp.float32)
    here = xla.quantized_matmul_xla(x, w, transpose)
    with tracing_for(Target("gpu")):
        traced = jax.make_jaxpr(lambda x, w: xla.quantized_matmul_xla(x, w, transpose))(x, w)
        there = xla.quantized_matmul_xla(x, w, transpose)
    assert "bitcast_convert_type" in str(traced)
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_dense_is_kept_for_the_backward_pass(form: str) -> None:
    """The residuals are the quantised weight's own arrays, and the XLA form's parts are no larger than it says."""
    x, w = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), quantized_shapes(form, (4096, 14336))
    for implementation in ("tpu", "gpu"):
        function = functools.partial(quantized_matmul, implementation=implementation)
        _, kept = jax.eval_shape(lambda x, w, f=function: jax.vjp(lambda x: f(x, w), x), x, w)
        sizes = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)}
        assert sizes == {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(w)}
    if form != "int8":
        assert array_sizes(jax.make_jaxpr(function)(x, w)) <= xla.PART_BYTES // 2 < 4096 * 14336 / 4


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [("Llama-3.1-8B up", "nf4", ROWS[0]), ("Llama-3.1-8B up", "int4", ROWS[1]), ("Qwen2.5-1.5B down", "int4", ROWS[1])],
)
def test_on_a_tpu_the_weight_is_read_as_it_is(
    chips: dict[str, SingleDeviceSharding], chip: str, name: str, form: str, rows: int
) -> None:
    """Value and gradient in one program: 4 bits a number come in, and nothing but the codebook is stored on the way.

    The gradient at one matrix is the product at its counterpart (up, down), so half of the published shapes say it all.
    """
    shape = PUBLISHED[name]
    w = quantized_shapes(form, (shape.inputs, shape.outputs))
    x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (shape.inputs, shape.outputs))

    def run(x: Any, w: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, implementation="tpu"), x)
        return y, back(dy)

    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chips[chip]), (x, w, dy))
    told: Any = jax.jit(run).lower(*placed).compile().memory_analysis()
    print(f"{chip} {shape} {form} T={rows}: temporaries {told.temp_size_in_bytes / 2**20:.2f} MiB")
    assert told.temp_size_in_bytes < 2**17
    numbers = shape.inputs * shape.outputs
    assert told.argument_size_in_bytes < 0.55 * numbers + 2 * 2 * rows * (shape.inputs + shape.outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 4, 5))}, r"x \(3, 4, 5\)"),
        ({"x": jnp.zeros((3, 65))}, r"x \(3, 65\).*\[T, I\]"),
        ({"x": jnp.zeros((3, 64)), "transpose": True}, r"x \(3, 64\).*\[T, O\]"),
        ({"x": jnp.zeros((3, 64), jnp.float16)}, "float16"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int4), jnp.ones((3, 8)))}, r"scale \(3, 8\)"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int16), jnp.ones((1, 8)))}, "int16"),
        ({"implementation": "triton"}, "triton"),
        ({"w": QuantizedWeight(jnp.zeros((64, 8), jnp.int4), jnp.ones((2, 8))), "implementation": "tpu"}, "groups of 32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": jnp.zeros((3, 64)), "w": QuantizedWeight(jnp.zeros((64, 8), jnp.int8), jnp.ones((1, 8)))}
    undecorated = quantized_matmul.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=message):
        undecorated(**(given | change))
