"""Memory of an update of Llama-3.1-8B at a context of 20,480 tokens on a v6e, compiled without the chip."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_rollout import LLAMA_8B, size_of
from compiled_update import base_of, batch_of, lowered_update

from grpo_jax.config import LoraConfig
from grpo_jax.fit.scratch import scratch_counted
from grpo_jax.fit.targets import TPUS
from grpo_kernels.target import Target, tracing_for

PROMPT, COMPLETION = 512, 19_968
TOKENS = PROMPT + COMPLETION
GB = 10**9


def lowered(chip: Any, quantization: str) -> Any:
    """Lowers an update of one group of eight completions, one per micro-batch."""
    return lowered_update(
        LLAMA_8B,
        batch_of(1, 8, PROMPT, COMPLETION),
        chip,
        micro_batch=(1, 1),
        lora=LoraConfig(rank=32),
        implementation="mosaic_tpu",
        quantization=quantization,
    )


def arrays(program: Any) -> set[tuple[tuple[int, ...], str]]:
    """Returns shapes and dtypes of all arrays of a lowered program."""
    found = re.findall(r"tensor<((?:\d+x)*)(\w+)>", program.as_text())
    return {(tuple(int(number) for number in dims.split("x") if number), kind) for dims, kind in found}


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_no_logits_no_scores_and_no_dense_copy_of_a_quantised_weight(chips: Any, quantization: str) -> None:
    spec, found = LLAMA_8B, arrays(lowered(chips["v6e"], quantization))
    shapes = {shape for shape, _ in found}
    # Tokens are one sequence (the prompt and the completion without its last token) or its predicting tokens.
    tokens = {TOKENS, TOKENS - 1, COMPLETION, COMPLETION + 1, PROMPT + COMPLETION}
    long = {shape for shape in shapes if any(size in tokens for size in shape)}
    assert any(spec.width in shape for shape in long), "the hidden states are found"
    assert not {shape for shape in long if spec.vocab in shape}
    assert not {shape for shape in long if sum(size in tokens for size in shape) > 1}
    matrices = set(spec.linear_shapes().values())
    dense = {shape for shape, kind in found if kind in ("bf16", "f32") and shape[-2:] in matrices}
    assert bool(dense) == (quantization == "none")


@pytest.mark.slow
def test_an_update_from_a_four_bit_base_fits_into_twenty_gigabytes(chips: Any) -> None:
    program, chip = lowered(chips["v6e"], "int4"), TPUS["v6e"]
    with tracing_for(Target("tpu", chip.vector_memory_bytes)), scratch_counted() as (options, scratch_of):
        compiled = program.compile(compiler_options=options)
        scratch = scratch_of(compiled)
    memory = compiled.memory_analysis()
    inputs = LLAMA_8B.layers * TOKENS * LLAMA_8B.width * 2
    print(
        f"arguments {memory.argument_size_in_bytes / GB:.2f} GB, scratch memory {scratch / GB:.2f} GB "
        f"({memory.temp_size_in_bytes / GB:.2f} by the compiler's sum), of it the layers' inputs {inputs / GB:.2f} GB"
    )
    assert memory.argument_size_in_bytes >= size_of(base_of(LLAMA_8B, "bfloat16", "int4")) / 2
    assert inputs < scratch <= memory.temp_size_in_bytes
    assert memory.argument_size_in_bytes + scratch < 20 * GB


def test_scratch_memory_holds_what_must_be_alive_at_once(chips: Any) -> None:
    """The first product is needed until the end; the compiler's own sum is never too small."""
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=chips["v6e"])

    def chain(x: jax.Array) -> jax.Array:
        y = jnp.sin(x) @ x
        return jnp.cos(y) @ x @ y

    with tracing_for(Target("tpu", TPUS["v6e"].vector_memory_bytes)), scratch_counted() as (options, scratch_of):
        compiled = jax.jit(chain).lower(x).compile(compiler_options=options)
        scratch = scratch_of(compiled)
    assert scratch >= x.size * x.dtype.itemsize
    assert scratch <= compiled.memory_analysis().temp_size_in_bytes
