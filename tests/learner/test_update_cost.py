"""Operations of an update, counted from the compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_rollout import LLAMA_8B
from compiled_update import lowered_update
from hlo_costs import matmul_operations
from jax.sharding import SingleDeviceSharding
from padded_batches import shapes_of
from plain_oracles import quick_compiling

from grpo_jax.config import LoraConfig

LAYERS, GENERATIONS, TOKENS = 4, 8, 1024
SPEC = dataclasses.replace(LLAMA_8B, layers=LAYERS, windows=(None,) * LAYERS, rope_of_layer=(0,) * LAYERS)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def test_operations_of_products_are_counted_with_loops_multiplied_out() -> None:
    def program(x: Any, w: Any) -> Any:
        def body(x: Any, _: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ w), None

        with jax.named_scope("loop"):
            x = jax.lax.scan(body, x, None, length=7)[0]
        with jax.named_scope("after"):
            return jnp.einsum("ti,tj->ij", x, x) @ w

    t, n = 40, 64
    text = jax.jit(program).lower(jnp.zeros((t, n)), jnp.zeros((n, n))).compile().as_text()
    loop, after = 7 * 2 * t * n * n, 2 * t * n * n + 2 * n**3
    assert matmul_operations(text) == loop + after
    assert matmul_operations(text, lambda op_name: "loop" in op_name) == loop
    assert matmul_operations(text, lambda op_name: "after" in op_name) == after


def own_product(op_name: str) -> bool:
    """Tells whether a product is of the policy, and not between queries, keys and values."""
    return "reference" not in op_name and not ("attention" in op_name and "_proj" not in op_name)


@pytest.mark.parametrize(("remat", "most"), [("none", 4.6), ("selective", 4.75), ("layer", 6.7)])
def test_an_update_multiplies_with_each_weight_no_more_often_than_needed(remat: str, most: float) -> None:
    """Forward and gradient of the hidden states: 4 operations a weight and token; the layers' second forward: 2 more.

    The adapters' own products come on top. The head computes completion tokens only.
    """
    batch = shapes_of(1, GENERATIONS, TOKENS, TOKENS, (1, GENERATIONS), one_size=True)
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    lowered = lowered_update(SPEC, batch, cpu, lora=LoraConfig(rank=16), remat=remat)
    text = lowered.compile().as_text()
    tokens, completions = TOKENS * (1 + GENERATIONS), TOKENS * GENERATIONS
    layers = LAYERS * sum(rows * columns for rows, columns in SPEC.linear_shapes().values())
    head = SPEC.vocab * SPEC.width
    counted = matmul_operations(text, own_product)
    reference = matmul_operations(text, lambda op_name: "reference" in op_name and "_proj" in op_name)
    print(f"remat {remat}: {counted / tokens / (layers + head):.2f} N a token")
    assert counted <= most * tokens * (layers + head)
    # The head on all tokens, or a prompt that is computed again for each completion, would exceed this.
    passes = 4 if remat == "none" else 6
    assert counted <= 1.12 * (passes * tokens * layers + 4 * completions * head)
    assert reference <= 2 * tokens * layers
