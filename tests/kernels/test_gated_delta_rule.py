"""`gated_delta_rule` against NumPy in float64, every implementation; TPU kernels interpreted, and compiled for TPUs."""

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
from kernel_checks import CHIPS, compiled_for, no_race, on_chips
from packed_rows import CASES, UNEQUAL, Case, Sequence, group, key_ranges
from plain_oracles import quick_compiling

from grpo_kernels import KeyRanges, gated_delta_rule, gated_delta_step, plan_delta_rule, prompt_ranges
from grpo_kernels.ops.gated_delta_rule import BlockSizes, DeltaPlan, choose_block_sizes
from grpo_kernels.ops.gated_delta_rule.triangular import unit_lower_inverse

IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
PACKED = [UNEQUAL, *CASES[1:4], CASES[5]]
SMALL = BlockSizes(8, 2)
"""Sequences begin and end within chunks, at their edges, and have several."""


def planned(ranges: KeyRanges, implementation: str, *, prompts: bool = True, blocks: BlockSizes | None = SMALL) -> DeltaPlan:
    return plan_delta_rule(ranges, prompts=prompts, implementation=implementation, block_sizes=blocks)


@functools.cache
def program(implementation: str, *, prompts: bool = True, blocks: BlockSizes | None = SMALL) -> Any:
    """Ranges and arrays → the results and gradients of `NAMES`."""

    def run(ranges: KeyRanges, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        plan = planned(ranges, implementation, prompts=prompts, blocks=blocks)

        def rule(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
            *tokens, initial = arguments
            return gated_delta_rule(*tokens, plan, initial)

        arguments = [arrays[name] for name in ("q", "k", "v", "log_decay", "beta", "initial")]
        results, pullback = jax.vjp(rule, *arguments)
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
    agrees(program(implementation)(key_ranges(case), arrays), delta_by_the_book(case, arrays))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_before_and_between_sequences(implementation: str) -> None:
    """One row begins with padding, the other has some behind its prompt."""
    case = Case((((5, ()),), ((6, (7, 9)),)), 33, queries=2)
    rows = [
        [Sequence(own=np.arange(28, 33), prompt=np.arange(0), asking=np.arange(0), queries=np.arange(0))],
        [
            Sequence(own=np.arange(start, start + length), prompt=np.arange(shared), asking=np.arange(0), queries=np.arange(0))
            for start, length, shared in ((0, 6, 0), (10, 7, 6), (17, 9, 6))
        ],
    ]
    numbers = np.zeros((4, 2, 33), np.int32)
    for b, texts in enumerate(rows):
        for text in texts:
            numbers[1, b, text.own] = text.prompt.size
            numbers[2, b, text.own], numbers[3, b, text.own] = text.own[0], text.own + 1
    arrays = delta_inputs(case)
    got = program(implementation)(KeyRanges(*map(jnp.asarray, numbers)), arrays)
    agrees(got, delta_by_the_book(case, arrays, rows))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_decays_of_any_size_and_keys_that_repeat(implementation: str) -> None:
    """Decays from 1 to exp(-10⁴), which is 0 in float32; and all keys alike with β = 1, where each value replaces the one before."""
    case = Case((group(40, 30, 2),), 100, queries=2)
    arrays = delta_inputs(case)
    rng = np.random.default_rng(0)
    hard = -(10.0 ** rng.uniform(-8, 4, arrays["log_decay"].shape))
    same = jnp.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    run = program(implementation, blocks=BlockSizes(32, 2))
    for change in (
        {"log_decay": jnp.asarray(hard, jnp.float32)},
        {"k": same, "beta": jnp.ones_like(arrays["beta"]), "log_decay": jnp.zeros_like(arrays["log_decay"])},
    ):
        changed = arrays | change
        agrees(run(key_ranges(case), changed), delta_by_the_book(case, changed), 5e-5)


@pytest.mark.parametrize("size", [2, 64, 128])
def test_the_inverse_of_a_triangular_matrix(size: int) -> None:
    """Random, and all ones below the diagonal: its inverse is -1 next to the diagonal, its powers grow to 10³⁶ at 128."""
    rng = np.random.default_rng(size)
    ones = np.tril(np.ones((size, size)), -1)
    for matrix in (ones, ones * rng.uniform(-1, 1, ones.shape) / np.sqrt(size)):
        got = unit_lower_inverse(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(got, np.linalg.inv(np.eye(size) + matrix), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """Operands of products with states and added values are rounded to bfloat16, 2⁻⁹ each, and so are results; of the norm."""
    arrays = delta_inputs(UNEQUAL, "bfloat16")
    got = program(implementation)(key_ranges(UNEQUAL), arrays)
    expected = delta_by_the_book(UNEQUAL, arrays)
    for name in NAMES:
        assert got[name].dtype == (jnp.bfloat16 if name in ("out", "dq", "dk", "dv") else jnp.float32)
        off = np.linalg.norm(np.asarray(got[name], np.float64) - expected[name])
        assert off < 1e-2 * np.linalg.norm(expected[name]), name


@pytest.mark.usefixtures("interpreter")
def test_a_group_may_be_split() -> None:
    """A completion's result does not depend on the others; gradients of the prompt are sums over rows with a copy of it each."""
    p, c = 21, 13
    case = Case((group(p, c, 2),), p + 2 * c, kv_heads=2, queries=2)
    arrays = delta_inputs(case)
    arrays |= {"d_out": arrays["d_out"].at[:, :p].set(0), "d_final": jnp.zeros_like(arrays["d_final"])}
    whole = program("xla")(key_ranges(case), arrays)
    parts = []
    for own in (slice(p, p + c), slice(p + c, None)):
        one = {
            name: x if "ini" in name or "fin" in name else jnp.concatenate([x[:, :p], x[:, own]], axis=1)
            for name, x in arrays.items()
        }
        parts.append(program("xla")(key_ranges(Case((group(p, c, 1),), p + c)), one))
    for name in NAMES:
        if name in ("final", "d_initial"):
            expected = parts[1][name] if name == "final" else parts[0][name] + parts[1][name]
            np.testing.assert_allclose(whole[name], expected, rtol=0, atol=1e-5, err_msg=name)
            continue
        own = np.concatenate([part[name][:, p:] for part in parts], axis=1)
        np.testing.assert_allclose(whole[name][:, p:], own, rtol=0, atol=1e-5, err_msg=name)
        shared = parts[0][name][:, :p] if name == "out" else parts[0][name][:, :p] + parts[1][name][:, :p]
        np.testing.assert_allclose(whole[name][:, :p], shared, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("interpreter")
def test_prefill_in_pieces_and_decoding_go_on_from_the_state() -> None:
    """Rows of 19 and 11 tokens at once; 12 and 5 of them, then the others; then one more token at a time."""
    case = Case((((19, ()),), ((11, ()),)), 19, kv_heads=2, queries=2)
    arrays = delta_inputs(case)
    names = ("q", "k", "v", "log_decay", "beta")
    tokens = [arrays[name] for name in names]

    @jax.jit
    def prefill(parts: list[jax.Array], lengths: list[int], state: jax.Array) -> tuple[jax.Array, jax.Array]:
        ranges = prompt_ranges(jnp.asarray(lengths), parts[0].shape[1])
        return gated_delta_rule(*parts, planned(ranges, "xla", prompts=False), state)

    out, final = prefill(tokens, [19, 11], arrays["initial"])
    first, state = prefill([x[:, :12] for x in tokens], [12, 5], arrays["initial"])
    np.testing.assert_allclose(first[0], out[0, :12], rtol=0, atol=1e-6)
    np.testing.assert_allclose(first[1, :5], out[1, :5], rtol=0, atol=1e-6)
    rest = [jnp.stack([x[0, 12:19], jnp.pad(x[1, 5:11], ((0, 1), *((0, 0),) * (x.ndim - 2)))]) for x in tokens]
    second, ended = prefill(rest, [7, 6], state)
    np.testing.assert_allclose(ended, final, rtol=0, atol=1e-5)
    np.testing.assert_allclose(second[0], out[0, 12:], rtol=0, atol=1e-5)
    step = jax.jit(gated_delta_step)
    for at in range(7):
        one, after = step(*(x[:, at] for x in rest), state)
        state = jnp.where((jnp.arange(2) < (2 if at < 6 else 1))[:, None, None, None], after, state)
        np.testing.assert_allclose(one[: 2 if at < 6 else 1], second[: 2 if at < 6 else 1, at], rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_a_row_of_padding_keeps_the_state(implementation: str) -> None:
    case = Case((((3, ()),), ((9, (20,)),)), 40)
    arrays = delta_inputs(case)
    ranges = key_ranges(case)
    ranges = KeyRanges(*(x.at[0].set(0) for x in ranges))
    got = program(implementation)(ranges, arrays)
    np.testing.assert_array_equal(got["final"][0], arrays["initial"][0])
    np.testing.assert_array_equal(got["d_initial"][0], arrays["d_final"][0])
    assert not any(np.any(got[name][0]) for name in NAMES if name not in ("final", "d_initial"))


def test_the_kernels_have_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case((((11, (8, 5)),), ((3, ()),)), 32, queries=2)
    arrays = delta_inputs(case)
    with no_race(capsys), quick_compiling():
        got = jax.tree.map(np.asarray, program.__wrapped__("mosaic_tpu")(key_ranges(case), arrays))
    agrees(got, delta_by_the_book(case, arrays))
