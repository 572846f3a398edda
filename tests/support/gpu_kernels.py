"""Helpers of the tests of Pallas Mosaic GPU kernels: an interpreter that takes products of values in registers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest


@contextlib.contextmanager
def interpreted_for_gpu() -> Iterator[None]:
    """Interprets Mosaic GPU kernels on this CPU; skips where JAX has no interpreter for them.

    JAX 0.12.0's takes only products of two arrays in shared memory. Its detector of races cannot be used: it reports one in a
    pipeline of JAX's own that only reads its blocks.
    """
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks", reason="JAX interprets no GPU kernels")
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("JAX interprets no GPU kernels")
    product = interpreter.wgmma

    def with_registers(**named: Any) -> Any:
        a = np.asarray(named["a_allocation_key_as_array"])
        if a.ndim == 1:  # the key of an array in shared memory
            return product(**named)
        space = interpreter._get_shared_memory()
        thread, place = named["thread"], named["mesh_location"]
        info = memory.GPULoggingInfo(place, thread, named["source_info"])

        def read(name: str) -> tuple[Any, Any, np.ndarray]:
            key = memory.HostAllocationKey.from_array(named[f"{name}_allocation_key_as_array"])
            part = space.access(key, jax.tree.map(int, interpreter._remove_noop_transforms(named[f"{name}_transforms"])))
            return key, part, space.get_buffer_content(key, part, thread, logging_info=info)[0]

        _, _, b = read("b")
        key, part, total = read("acc")
        space.store_buffer_content(key, part, total + np.matmul(a, b, dtype=total.dtype), thread, logging_info=info)
        return named["token"]

    interpreter.wgmma = with_registers
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield
    finally:
        interpreter.wgmma = product
