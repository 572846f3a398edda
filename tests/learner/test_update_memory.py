"""Memory of an update of Llama-3.1-8B at a context of 20,480 tokens on a v6e, compiled without the chip."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_rollout import LLAMA_8B, size_of
from compiled_update import base_of, lowered_update
from padded_batches import shapes_of

from grpo_jax.config import LoraConfig
from grpo_jax.fit.scratch import scratch_counted
from grpo_jax.fit.targets import TPUS
from grpo_jax.models.spec import ModelSpec
from grpo_kernels.target import tracing_for

PROMPT, COMPLETION = 512, 19_968
TOKENS = PROMPT + COMPLETION
GB = 10**9
TWO_LAYERS = dataclasses.replace(
    LLAMA_8B, layers=2, width=256, ffw=512, heads=4, kv_heads=2, vocab=1024, windows=(None, None), rope_of_layer=(0, 0)
)


def lowered(chip: Any, quantization: str, spec: ModelSpec = LLAMA_8B, completion: int = COMPLETION) -> Any:
    """Lowers an update of one group of eight completions, one per micro-batch."""
    return lowered_update(
        spec,
        shapes_of(1, 8, PROMPT, completion, (1, 1)),
        chip,
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
@pytest.mark.parametrize(
    ("spec", "completion", "most"),
    [(TWO_LAYERS, 512, GB // 30), pytest.param(LLAMA_8B, COMPLETION, 20 * GB, marks=pytest.mark.slow)],
    ids=["two layers", "8B"],
)
def test_an_update_from_a_four_bit_base_fits(chips: Any, spec: ModelSpec, completion: int, most: int) -> None:
    """Llama-3.1-8B at 20,480 tokens into 20 GB; two narrow layers at 1,024 tokens into 33 MB."""
    program, chip = lowered(chips["v6e"], "int4", spec, completion), TPUS["v6e"]
    with tracing_for(chip.target), scratch_counted() as (options, scratch_of):
        compiled = program.compile(compiler_options=options)
        scratch = scratch_of(compiled)
    memory = compiled.memory_analysis()
    inputs = spec.layers * (PROMPT + completion) * spec.width * 2
    print(
        f"arguments {memory.argument_size_in_bytes / GB:.2f} GB, scratch memory {scratch / GB:.2f} GB "
        f"({memory.temp_size_in_bytes / GB:.2f} by the compiler's sum), of it the layers' inputs {inputs / GB:.2f} GB"
    )
    assert memory.argument_size_in_bytes >= size_of(base_of(spec, "bfloat16", "int4")) / 2
    assert inputs < scratch <= memory.temp_size_in_bytes
    assert memory.argument_size_in_bytes + scratch < most


def test_scratch_memory_holds_what_must_be_alive_at_once(chips: Any) -> None:
    """The first product is needed until the end; the compiler's own sum is never too small."""
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=chips["v6e"])

    def chain(x: jax.Array) -> jax.Array:
        y = jnp.sin(x) @ x
        return jnp.cos(y) @ x @ y

    with tracing_for(TPUS["v6e"].target), scratch_counted() as (options, scratch_of):
        compiled = jax.jit(chain).lower(x).compile(compiler_options=options)
        scratch = scratch_of(compiled)
    assert scratch >= x.size * x.dtype.itemsize
    assert scratch <= compiled.memory_analysis().temp_size_in_bytes
