"""Fixtures of the tests that compile for GPUs that are absent."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from grpo_jax.fit.targets import machine_of
from grpo_kernels.target import tracing_for


@pytest.fixture(scope="module")
def h200() -> Iterator[SingleDeviceSharding]:
    """One H200 that is absent. Programs for it can be written to the cache on disk, but not read without one."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    machine = machine_of("h200")
    with tracing_for(machine.target):
        yield SingleDeviceSharding(machine.devices[0])
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
