"""`group_attention` on an H200, compiled to machine code without one: `make test-gpu-compile`."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from grpo_kernels import NO_WINDOW, group_attention
from grpo_kernels.ops.group_attention import KeyRanges, Limits, plan_attention
from grpo_kernels.ops.group_attention.block_sizes import GPU_SCORES
from grpo_kernels.ops.group_attention.shapes import (
    EVEN,
    GEMMA_3_12B,
    LLAMA_3_8B,
    LONG_ALONE,
    QWEN2_5_05B,
    QWEN3_8B,
    Lengths,
    Shape,
)
from grpo_kernels.target import Target, tracing_for

KIB = 2**10
SHARED_MEMORY = 227 * KIB
FORWARD = "flash_attention_sm90"


@pytest.fixture
def hopper(h200: SingleDeviceSharding) -> Iterator[SingleDeviceSharding]:
    """An absent H200 with what Pallas asks of a device while it traces."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip(f"Pallas kernels for GPUs need jax 0.12 or newer to compile without one; this is {jax.__version__}")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), tracing_for(Target("gpu", compute_capability=(9, 0))):
        yield h200


def compiled(
    shape: Shape, lengths: Lengths, implementation: str | None, device: SingleDeviceSharding, softcap: float | None = None
) -> Any:
    """One layer, forward and backward: (ranges, window, q, k, v, d_out) → result and gradients."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=device)

    rows, tokens = lengths.prompts, lengths.prompt + lengths.generations * lengths.completion
    limits = Limits(1, lengths.prompt, max(lengths.prompt, lengths.completion))

    def run(ranges: KeyRanges, window: Any, q: Any, k: Any, v: Any, d_out: Any) -> Any:
        plan = plan_attention(
            ranges,
            limits,
            keys=tokens,
            kv_heads=shape.kv_heads,
            heads_of_key=shape.queries,
            window=window,
            head_dim=shape.head_dim,
            dtype=q.dtype,
            implementation=implementation,
        )
        out, pullback = jax.vjp(functools.partial(group_attention, plan=plan, softcap=softcap), q, k, v)
        return out, pullback(d_out)

    ranges = KeyRanges(*[array(rows, tokens, dtype=jnp.int32)] * 4)
    queries = array(rows, tokens, shape.kv_heads, shape.queries, shape.head_dim)
    keys = array(rows, tokens, shape.kv_heads, shape.head_dim)
    return jax.jit(run).lower(ranges, array(dtype=jnp.int32), queries, keys, keys, queries).compile()


def bytes_of_arguments(shape: Shape, lengths: Lengths) -> int:
    """Of q, k, v and the gradient of the result."""
    tokens = lengths.prompts * (lengths.prompt + lengths.generations * lengths.completion)
    return 2 * 2 * tokens * shape.kv_heads * shape.head_dim * (shape.queries + 1)


@pytest.mark.parametrize(("shape", "lengths"), [(QWEN3_8B, EVEN), (GEMMA_3_12B, EVEN), (QWEN3_8B, LONG_ALONE)], ids=str)
def test_scores_exist_one_block_at_a_time(shape: Shape, lengths: Lengths, h200: Any) -> None:
    """Plain JAX, forward and backward: a few arrays of the queries' size, and a few blocks of scores."""
    program = compiled(shape, lengths, "xla", h200)
    temporaries = program.memory_analysis().temp_size_in_bytes
    arguments = bytes_of_arguments(shape, lengths)
    print(f"H200 {shape} {lengths}: {temporaries / 2**20:.0f} MiB, {temporaries / arguments:.1f} × q, k, v and the gradient")
    assert temporaries < 2 * arguments + 6 * 4 * GPU_SCORES
    heads = shape.kv_heads * shape.queries
    assert temporaries < 4 * heads * lengths.generations * lengths.completion**2  # of the completions alone
    # Without a known length the host waits for the GPU at every turn.
    text = program.as_text()
    assert text.count(" while(") == text.count("known_trip_count") >= 2


@pytest.mark.parametrize(
    ("shape", "measured_mib"), [(LLAMA_3_8B, 5), (GEMMA_3_12B, 2), (QWEN2_5_05B, 2)], ids=["Llama-3.1-8B", "Gemma-3-12B", "Qwen2.5"]
)
def test_what_plans_compile_needs_what_the_kernels_need(shape: Shape, measured_mib: int, h200: Any) -> None:
    """The kernels' own programs need that many MiB of temporaries (kernels/README.md); a plan's may differ by arrays of a token."""
    temporaries = compiled(shape, EVEN, None, h200).memory_analysis().temp_size_in_bytes
    tokens = EVEN.prompts * (EVEN.prompt + EVEN.generations * EVEN.completion)
    of_queries = 4 * tokens * shape.kv_heads * shape.queries  # a float32 value for each query and head
    print(f"H200 {shape}: {temporaries / 2**20:.2f} MiB, an array of a value a query is {of_queries / 2**20:.2f}")
    assert abs(temporaries - measured_mib * 2**20) < 3 * of_queries


def read_dump(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of each kernel's spills and shared memory, from the compiler's dump: {kernel: {"spills": ..., "shared": ...}}."""
    found: dict[str, dict[str, int]] = {}
    for what, suffix, number in (
        ("spills", ".ptxas", r"(\d+) bytes spill"),
        ("shared", ".resources.txt", r"smem_scratch_bytes=(\d+)"),
    ):
        for report in folder.glob(f"*{suffix}"):
            numbers = [int(n) for n in re.findall(number, report.read_text())]
            assert numbers, report
            found.setdefault(re.sub(rf"_\d+{suffix}$", "", report.name), {})[what] = max(numbers)
    return found


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed; Python 3.12 and newer have it")
@pytest.mark.parametrize(
    ("shape", "softcap", "spills"),
    [(LLAMA_3_8B, None, 0), (GEMMA_3_12B, None, 48), (QWEN2_5_05B, None, 0), (QWEN3_8B, 30.0, 32)],
    ids=["Llama-3.1-8B", "Gemma-3-12B", "Qwen2.5-0.5B", "soft cap"],
)
def test_the_kernels(
    shape: Shape, softcap: float | None, spills: int, hopper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the program, spill hardly a register, and need a few arrays of the queries' size; `spills` is bytes a thread."""
    for name, value in {"TO": str(tmp_path), "PTXAS": "1", "RESOURCES": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
    program = compiled(shape, EVEN, None, hopper, softcap)
    kernels = read_dump(tmp_path)
    temporaries, arguments = program.memory_analysis().temp_size_in_bytes, bytes_of_arguments(shape, EVEN)
    print(
        f"H200 {shape} {softcap=}: temporaries {temporaries / 2**20:.0f} MiB, {temporaries / arguments:.2f} × arguments; {kernels}"
    )
    of_keys = ["dk_dv"] if shape.head_dim <= 128 else ["dk", "dv"]
    assert set(kernels) == {FORWARD, *(f"group_attention_{name}" for name in ("dq", *of_keys))}
    text = program.as_text()
    assert all(kernel in text for kernel in kernels)
    assert " while(" not in text
    assert temporaries < 2 * arguments
    for kernel in kernels.values():
        assert kernel["spills"] <= spills
        assert kernel["shared"] <= SHARED_MEMORY


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed; Python 3.12 and newer have it")
def test_prompts_alone_take_one_part(hopper: Any) -> None:
    """In prefill no query sees a prompt besides its own: tokamax's kernel runs once."""

    def run(ranges: KeyRanges, q: Any, k: Any, v: Any) -> Any:
        options: dict[str, Any] = {"kv_heads": 8, "heads_of_key": 4, "window": NO_WINDOW, "head_dim": 128, "dtype": q.dtype}
        return group_attention(q, k, v, plan_attention(ranges, Limits(0, 0, 512), keys=512, **options))

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=hopper)

    keys = array(4, 512, 8, 128)
    ranges = KeyRanges(*[array(4, 512, dtype=jnp.int32)] * 4)
    text = jax.jit(run).lower(ranges, array(4, 512, 8, 4, 128), keys, keys).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and FORWARD in line]
    assert len(calls) == 1
