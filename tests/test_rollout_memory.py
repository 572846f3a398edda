"""The rollout's memory on a v6e, compiled without one, at the shapes of an 8B model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from compiled_rollout import assert_nothing_is_copied_at_every_token, assert_nothing_is_there_twice, line, segment_memory


@pytest.fixture(scope="module")
def v6e() -> Iterator[Any]:
    """One v6e that is not there. Programs for it can be written to the cache on disk, but not read without one."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the libtpu wheel, which is for Linux on x86-64")
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield SingleDeviceSharding(topologies.get_topology_desc("v6e:2x2", "tpu").devices[0])
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_a_prompt_is_held_once_and_nothing_is_copied(v6e: Any) -> None:
    memory = segment_memory(v6e, refilled=True, implementation="tpu")
    print(line("v6e, refilled", memory))
    assert_nothing_is_there_twice(memory)
    assert_nothing_is_copied_at_every_token(memory)
