"""What an update of Llama-3.1-8B at a context of 20,480 tokens holds on a v6e, compiled without one."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import pytest

from compiled_rollout import LLAMA_8B, size_of
from compiled_update import base_of, batch_of, lowered_update
from grpo_jax.config import LoraConfig

PROMPT, COMPLETION = 512, 19_968
TOKENS = PROMPT + COMPLETION
GB = 10**9


def lowered(chip: Any, quantization: str) -> Any:
    """One group of eight completions, of which one at a time goes through the model."""
    return lowered_update(
        LLAMA_8B,
        batch_of(1, 8, PROMPT, COMPLETION),
        chip,
        micro_batch=(1, 1),
        lora=LoraConfig(rank=32),
        implementation="tpu",
        quantization=quantization,
    )


def arrays(program: Any) -> set[tuple[tuple[int, ...], str]]:
    """Shapes and number formats of all arrays of a lowered program."""
    found = re.findall(r"tensor<((?:\d+x)*)(\w+)>", program.as_text())
    return {(tuple(int(number) for number in dims.split("x") if number), kind) for dims, kind in found}


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_no_logits_no_scores_and_no_dense_copy_of_a_quantised_weight(chips: Any, quantization: str) -> None:
    spec, found = LLAMA_8B, arrays(lowered(chips["v6e"], quantization))
    shapes = {shape for shape, _ in found}
    # Tokens go by one sequence (prompt and completion but its last token) or by its predicting tokens.
    tokens = {TOKENS, TOKENS - 1, COMPLETION, COMPLETION + 1, PROMPT + COMPLETION}
    long = {shape for shape in shapes if any(size in tokens for size in shape)}
    assert any(spec.width in shape for shape in long), "the hidden states are found"
    assert not {shape for shape in long if spec.vocab in shape}
    assert not {shape for shape in long if sum(size in tokens for size in shape) > 1}
    matrices = set(spec.linear_shapes().values())
    dense = {shape for shape, kind in found if kind in ("bf16", "f32") and shape[-2:] in matrices}
    assert bool(dense) == (quantization == "none")


def test_an_update_from_a_four_bit_base_fits_into_twenty_gigabytes(chips: Any) -> None:
    """With the libtpu of jax 0.10, 0.0.42, it does not: that one keeps the layers' inputs twice (24.1 GB measured)."""
    memory = lowered(chips["v6e"], "int4").compile().memory_analysis()
    inputs = LLAMA_8B.layers * TOKENS * LLAMA_8B.width * 2
    print(
        f"arguments {memory.argument_size_in_bytes / GB:.2f} GB, temporaries {memory.temp_size_in_bytes / GB:.2f} GB, "
        f"of them the layers' inputs {inputs / GB:.2f} GB"
    )
    assert memory.argument_size_in_bytes >= size_of(base_of(LLAMA_8B, "bfloat16", "int4")) / 2
    version = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    twice = inputs if version < (0, 0, 52) else 0
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 20 * GB + twice
