"""Helpers of the tests of `grpo_kernels`: interpreted TPU kernels, and programs compiled for TPUs that are absent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from grpo_jax.fit.targets import TPUS
from grpo_kernels import KVCache, SlotMap
from grpo_kernels.ops.decode_attention import GROUP
from grpo_kernels.ops.decode_attention.shapes import Shape
from grpo_kernels.target import tracing_for

CHIPS = ["v4", "v5e", "v5p", "v6e"]
MIB = 2**20
V5P_TAKES_MORE = jax.__version_info__ >= (0, 12)
"""Whether the libtpu that comes with this jax (0.0.50) needs more on a v5p than 0.0.42; kernels/README.md has the amounts."""


def on_chips(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Cases whose first value is a chip; those of a v6e are quick tests, the others slow ones."""
    return [pytest.param(*row, marks=[] if row[0] == "v6e" else [pytest.mark.slow]) for row in rows]


def interpreted(implementation: str | None) -> AbstractContextManager[Any]:
    """Interprets Pallas kernels where the implementation is one."""
    return pltpu.force_tpu_interpret_mode() if implementation == "mosaic_tpu" else contextlib.nullcontext()


@contextlib.contextmanager
def no_race(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Interprets Pallas kernels with a detector of races, which prints the races that it finds.

    It also fills memory that nothing was written to with NaN.
    """
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE" not in capsys.readouterr().out.upper()


def compiled_for(
    chips: dict[str, SingleDeviceSharding], chip: str, program: Callable[..., Any], *arguments: Any, **named: Any
) -> Any:
    """Compiles a program for a chip, with block sizes for its vector memory; returns the memory that it takes."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chips[chip])

    placed, placed_names = jax.tree.map(place, (arguments, named))
    with tracing_for(TPUS[chip].target):
        return jax.jit(program).lower(*placed, **placed_names).compile().memory_analysis()


def decode_shapes(shape: Shape, layers: int, *, kv_format: str = "auto") -> dict[str, Any]:
    """Arguments of `decode_attention` of one layer of several, with a KV cache of that format."""

    def array(*size: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype)

    def blank(texts: int, size: int) -> KVCache:
        own = (layers, texts, shape.kv_heads, size)
        wide = array(*own, shape.width, dtype=jnp.bfloat16 if kv_format == "auto" else jnp.int8)
        if kv_format == "auto":
            return KVCache(wide, wide)
        groups = shape.kv_heads * (1 if kv_format == "int8" else -(-shape.width // GROUP))
        scales = [array(layers, texts, groups, size, dtype=jnp.bfloat16)] * 2
        return KVCache(wide if kv_format == "int8" else None, wide, *scales)

    return {
        "q": array(shape.slots, shape.kv_heads, shape.queries, shape.width, dtype=jnp.bfloat16),
        "prefix": blank(shape.prompts, shape.prompt),
        "lengths": array(shape.prompts),
        "past_blocks": [blank(shape.slots, size) for size in shape.past_blocks],
        "segment_cache": blank(shape.slots, shape.segment),
        "base": array(shape.slots),
        "step": array(),
        "window": array(),
        "layer": array(),
        "slot_map": SlotMap(array(shape.slots), array(shape.prompts, shape.slots // shape.prompts), array(shape.slots)),
    }
