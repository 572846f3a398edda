"""The rollout's memory on an H200, compiled without one: `make test-gpu-compile`."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from compiled_rollout import assert_nothing_is_copied_at_every_token, assert_nothing_is_stored_twice, line, segment_memory

from grpo_jax.rollout.decode import gpu_options


@pytest.mark.parametrize("refilled", [False, True])
def test_a_prompt_is_stored_once_and_nothing_is_copied(refilled: bool, h200: Any) -> None:
    memory = segment_memory(h200, refilled=refilled, options=gpu_options("none"))
    print(line(f"H200, refilled={refilled}", memory))
    assert_nothing_is_stored_twice(memory)
    if tuple(map(int, jax.__version__.split(".")[:3])) >= (0, 11, 2):  # before, XLA copies each layer's part of all arrays
        assert_nothing_is_copied_at_every_token(memory)
