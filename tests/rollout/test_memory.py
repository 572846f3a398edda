"""Memory of the rollout on a v6e at the shapes of an 8B model, compiled without the chip."""

from __future__ import annotations

from typing import Any

import pytest
from compiled_rollout import assert_nothing_is_copied_at_every_token, assert_nothing_is_stored_twice, line, segment_memory


@pytest.mark.slow
def test_a_prompt_is_stored_once_and_nothing_is_copied(chips: Any) -> None:
    memory = segment_memory(chips["v6e"], refilled=True, implementation="mosaic_tpu")
    print(line("v6e, refilled", memory))
    assert_nothing_is_stored_twice(memory)
    assert_nothing_is_copied_at_every_token(memory)


@pytest.mark.slow
def test_a_quantised_layer_is_read_in_place_from_its_stack(chips: Any) -> None:
    """Sliced before the kernel, 3.7 GiB of int4 values and scales were copied at every token; as whole stacks still more."""
    memory = segment_memory(chips["v6e"], refilled=False, implementation="mosaic_tpu", quantization="int4", past_sizes=(512,))
    print(line("v6e, int4", memory))
    assert memory.copied < memory.weights / 1000
