"""`group_advantages`, every implementation, against NumPy in float64; its TPU kernel interpreted, and compiled for TPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import CHIPS, V5P_TAKES_MORE, interpreted, no_race
from plain_oracles import quick_compiling

from grpo_jax.fit.scratch import scratch_counted
from grpo_jax.fit.targets import TPUS
from grpo_kernels import group_advantages
from grpo_kernels.ops.group_advantages import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_advantages.shapes import PUBLISHED, Shape
from grpo_kernels.target import Target, tracing_for

IMPLEMENTATIONS = ["reference", "xla", "mosaic_tpu"]
SCALES = ["group", "batch", "none"]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def case(groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, NaN where not valid, and valid ones. Of the first groups: equal rewards, one valid, none, equal where valid."""
    rng = np.random.default_rng(groups + size)
    rewards = rng.normal(size=(groups, size)).astype(np.float32)
    valid = rng.random((groups, size)) < 0.8
    if groups >= 4:
        rewards[0], valid[0] = 0.7, True
        valid[1], valid[2] = np.arange(size) == 1, False
        rewards[3], valid[3] = np.where(np.arange(size) < size // 2, 0.1, rewards[3]), np.arange(size) < size // 2
    rewards[~valid] = np.nan
    return rewards, valid


def expected(rewards: np.ndarray, valid: np.ndarray, scale: str, eps: float) -> np.ndarray:
    """Group by group, float64."""
    out, everything = np.zeros(rewards.shape), rewards[valid].astype(np.float64)
    for row, ok in enumerate(valid):
        group = rewards[row, ok].astype(np.float64)
        if len(group) >= 2 and group.max() > group.min():
            deviation = {"group": np.std(group, ddof=1) + eps, "none": 1.0}
            divisor = np.std(everything, ddof=1) + eps if scale == "batch" else deviation[scale]
            out[row, ok] = (group - group.mean()) / divisor
    return out


def computed(implementation: str, rewards: Any, valid: Any, **options: Any) -> np.ndarray:
    """Compiled; the kernel is interpreted."""
    program = jax.jit(functools.partial(group_advantages, implementation=implementation, **options))
    with interpreted(implementation):
        return np.asarray(program(jnp.asarray(rewards), valid=jnp.asarray(valid)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(13, 2), (5, 16), (1, 7), (3, 1), (8, 131)], ids=str)
def test_advantages(size: tuple[int, int], scale: str, implementation: str) -> None:
    """Two tiles of groups where there are more than 8. Float32 of numbers near 1."""
    rewards, valid = case(*size)
    got = computed(implementation, rewards, valid, scale=scale, eps=1e-4, block_sizes=BlockSizes(min(size[0], 8)))
    np.testing.assert_allclose(got, expected(rewards, valid, scale, 1e-4), rtol=1e-5, atol=1e-6)
    assert np.all(got[~valid] == 0)
    assert np.all(got[:4] == 0) or size[0] < 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_rewards_are_exactly_zero_and_nan_is_not_hidden(implementation: str) -> None:
    rewards = np.array([[0.7] * 8, [1e30] * 8, [np.nan] + [1.0] * 7, [0.0] * 7 + [1.0]], np.float32)
    got = computed(implementation, rewards, np.full((4, 8), True), scale="group", eps=1e-8)
    assert np.all(got[:2] == 0)
    assert np.isnan(got[2]).all()
    assert np.isfinite(got[3]).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_split_over_devices_has_one_deviation(scale: str) -> None:
    rewards, valid = case(8, 5)
    whole = computed("reference", rewards, valid, scale=scale)
    split = functools.partial(group_advantages, scale=scale, axis_name="device", implementation="reference")
    halves = jax.vmap(lambda rewards, valid: split(rewards, valid=valid), axis_name="device")
    parts = jax.jit(halves)(jnp.asarray(rewards).reshape(2, 4, 5), jnp.asarray(valid).reshape(2, 4, 5))
    np.testing.assert_allclose(parts.reshape(8, 5), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_under_shard_map(scale: str) -> None:
    rewards, valid = case(4, 3)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec("fsdp")

    def of_a_device(rewards: Any, valid: Any) -> Any:
        return group_advantages(rewards, scale=scale, valid=valid, axis_name="fsdp", implementation="mosaic_tpu")

    program = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=(part, part), out_specs=part, check_vma=False))
    with interpreted("mosaic_tpu"):
        got = np.asarray(program(jnp.asarray(rewards), jnp.asarray(valid)))
    np.testing.assert_allclose(got, expected(rewards, valid, scale, 1e-4), rtol=1e-5, atol=1e-6)


def test_the_kernel_has_no_race(capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiles of groups."""
    rewards, valid = case(13, 5)
    program = jax.jit(functools.partial(group_advantages, implementation="mosaic_tpu", block_sizes=BlockSizes(8)))
    with no_race(capsys):
        got = np.asarray(program(rewards, valid=valid))
    np.testing.assert_allclose(got, expected(rewards, valid, "group", 1e-4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_has_a_gradient(implementation: str) -> None:
    rewards = jnp.asarray([[0.0, 1.0, 3.0]], jnp.float32)
    with interpreted(implementation):
        gradient = jax.jit(jax.grad(lambda r: jnp.sum(jnp.square(group_advantages(r, implementation=implementation)))))(rewards)
    assert np.all(np.asarray(gradient) == 0)


def test_block_sizes_are_what_a_tpu_takes() -> None:
    for shape in (*PUBLISHED.values(), Shape(5, 7), Shape(100_000, 8)):
        groups = choose_block_sizes(shape.groups, shape.size).groups
        assert groups % 8 == 0 or groups == shape.groups
        assert 4 * groups * max(shape.size, 128) <= 2**17


@pytest.mark.parametrize(("chip", "scale"), list(zip(CHIPS, ("group", "batch", "none", "batch"), strict=True)))
def test_it_compiles_for_a_tpu(chips: dict[str, Any], scale: str, chip: str) -> None:
    """For the batch's deviation XLA takes 80 to 112 KiB by its version.

    A v5p copies rewards and result into rows of 128, and with libtpu 0.0.50 the mask too, twice a byte an entry.
    """
    shape = PUBLISHED["1024x64"]

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((shape.groups, shape.size), dtype, sharding=chips[chip])

    program = jax.jit(functools.partial(group_advantages, scale=scale, implementation="mosaic_tpu"))
    with tracing_for(Target("tpu", TPUS[chip].vector_memory_bytes)), scratch_counted() as (options, scratch_of):
        lowered = program.lower(array(jnp.float32), valid=array(jnp.bool_))
        temporaries = scratch_of(lowered.compile(compiler_options=options))
    print(f"{chip} {shape} {scale}: temporaries {temporaries / 1024:.0f} KiB")
    copies = (2 * 4 + 2 * V5P_TAKES_MORE) * shape.groups * 128 + 2**15 if chip == "v5p" else 0
    assert temporaries <= copies + (128 * 1024 if scale == "batch" else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.zeros(3)}, r"rewards has shape \(3,\): it must be \[B, G\]"),
        ({"valid": np.ones((3, 2), bool)}, r"valid has shape \(3, 2\)"),
        ({"scale": "row"}, "scale is 'row': choose from group"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"implementation": "cuda"}, "implementation 'cuda' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(**({"rewards": np.zeros((2, 3))} | change))
