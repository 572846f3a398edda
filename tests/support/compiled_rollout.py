"""What a rollout's segment needs of a chip at the shapes of Llama-3.1-8B, from XLA's own compiler for that chip.

Enters: a device, or a mesh of several, that need not be there. Leaves: bytes on each, and the sizes that they are compared with.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import LoraConfig, RolloutConfig
from grpo_jax.models.spec import ModelSpec, Rope, abstract_params
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import SlotState, decode_segment
from grpo_jax.rollout.kv_cache import empty_cache, empty_past_block, write_segment
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.runtime.sharding import Layout
from grpo_jax.weights.axes import model_axes
from grpo_jax.weights.lora import init_lora

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 4096, 32, 8, 128, 128_256
LLAMA_8B = ModelSpec(
    family="llama",
    vocab=VOCAB,
    layers=LAYERS,
    width=WIDTH,
    ffw=14_336,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    norm_eps=1e-5,
    tied=False,
    windows=(None,) * LAYERS,
    ropes=(Rope(500_000.0),),
    rope_of_layer=(0,) * LAYERS,
    query_scale=HEAD_DIM**-0.5,
)
KEPT_AXES = ("layers", "slots", "kv_heads")
PROMPTS, GENERATIONS, PROMPT_TOKENS, SEGMENT_TOKENS, PAST_BLOCKS = 8, 8, 2048, 32, (32, 32, 32, 32, 128, 256, 512)


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled segment, and of its being written behind the past.

    Attributes:
        arguments, temporaries: of the segment, as the compiler says.
        in_place, written_temporaries: of the writing; in_place is what the results share with the arguments.
        weights, prefix, past, segment_cache, logits: of the arrays that are known beforehand. prefix: one copy a prompt.
        copied: written at every token to put weights, prefix and past somewhere else, for all layers.
        passed: the largest that one collective gives, but for sums over devices.
    """

    arguments: int
    temporaries: int
    in_place: int
    written_temporaries: int
    weights: int
    prefix: int
    past: int
    segment_cache: int
    logits: int
    copied: int
    passed: int


def size_of(tree: Any) -> int:
    """Bytes of a tree of shapes, on each device where they have a sharding."""

    def shape(leaf: Any) -> tuple[int, ...]:
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def segment_memory(
    device: Any,
    *,
    refilled: bool,
    int8: bool = False,
    options: dict[str, Any] | None = None,
    implementation: str | None = None,
    rank: int = 32,
) -> Memory:
    """Compiles a segment of 64 slots: 8 prompts of 2,048 tokens, 8 completions each, up to 1,024 tokens held of each.

    Args:
        device: a sharding on the chip, or the layout of a mesh of them.
        refilled: slots take completions of any prompt, as they come free.
        options: for XLA's compiler.
        implementation: of the kernels; None goes by the device of this process, which is not the one compiled for.
        rank: of the adapters; where it is the number of a device's slots, what a layer computes passes for copies of them.
    """
    layout = device if isinstance(device, Layout) else None

    def on(tree: Any, *axes: str | None) -> Any:
        sharding = device if layout is None else layout.sharding(axes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    model = Transformer(LLAMA_8B, jnp.dtype("bfloat16"), 2.0, implementation=implementation, layout=layout)
    lora = jax.eval_shape(lambda: init_lora(LLAMA_8B, LoraConfig(rank=rank), jax.random.key(0)))
    lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), lora)
    weights = on({"params": abstract_params(LLAMA_8B, jnp.bfloat16), "lora": lora})
    if layout is not None:
        lie = layout.decoding.tree(weights, model_axes(LLAMA_8B))
        weights = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), weights, lie)
    slots = PROMPTS * GENERATIONS

    def past(sizes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(empty_past_block(LLAMA_8B, jnp.bfloat16, slots, size, int8=int8, unroll=False) for size in sizes)

    cache = on(
        jax.eval_shape(lambda: empty_cache((LAYERS, PROMPTS, KV_HEADS, PROMPT_TOKENS, HEAD_DIM), jnp.bfloat16, int8=int8)), *KEPT_AXES
    )
    hidden: Any = jax.ShapeDtypeStruct((PROMPTS, WIDTH), jnp.bfloat16)
    lengths: Any = jax.ShapeDtypeStruct((PROMPTS,), jnp.int32)
    held = PrefilledPrompts(cache, *on((lengths, hidden), "prompts"))
    past_blocks, segment_cache = (
        on(jax.eval_shape(lambda sizes=sizes: past(sizes)), *KEPT_AXES) for sizes in (PAST_BLOCKS, (SEGMENT_TOKENS,))
    )
    number: Any = on(jax.ShapeDtypeStruct((slots,), jnp.int32), "slots")
    flag: Any = on(jax.ShapeDtypeStruct((slots,), jnp.bool_), "slots")
    table = on(jax.ShapeDtypeStruct((PROMPTS, GENERATIONS), jnp.int32), "prompts") if refilled else None
    controls = on(jax.eval_shape(lambda: controls_of(RolloutConfig(), 0, 0)))
    program = jax.jit(functools.partial(decode_segment, model, (1, 2), length=SEGMENT_TOKENS))
    compiled = program.lower(weights, held, past_blocks, SlotState(*[number] * 7, live=flag, begins=flag), table, controls).compile(
        compiler_options=options
    )
    writing = jax.jit(functools.partial(write_segment, together=not refilled, layout=layout), donate_argnums=(0,))
    told: Any = compiled.memory_analysis()
    written: Any = writing.lower(past_blocks, segment_cache[0], number).compile().memory_analysis()
    program_text = compiled.as_text() or ""
    return Memory(
        arguments=told.argument_size_in_bytes,
        temporaries=told.temp_size_in_bytes,
        in_place=written.alias_size_in_bytes,
        written_temporaries=written.temp_size_in_bytes,
        weights=size_of(weights),
        prefix=size_of(held),
        past=size_of(past_blocks),
        segment_cache=size_of(segment_cache),
        logits=4 * slots * VOCAB,
        copied=LAYERS * copied_bytes(program_text, (weights, held, past_blocks)),
        passed=max([0, *(size for kind, size in collectives(program_text) if kind != "all-reduce")]),
    )


def copied_bytes(program: str, arrays: Any) -> int:
    """Bytes that a turn of the compiled loop over the layers writes in the shape of one layer of the arrays, or of all layers."""
    loops = set(re.findall(r"body=%?([\w.\-]+)", program))
    found = re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    bodies = {name: body for name, body in found if name in loops}
    inner = {name for body in bodies.values() for name in re.findall(r"body=%?([\w.\-]+)", body)}
    held = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(arrays)}
    shapes = {shape for shape in held if len(shape) > 2 and shape[0] == LAYERS}
    single = {(1, *shape[1:]) for shape in shapes} | {shape[1:] for shape in shapes}
    total = 0
    for name in inner:
        for kind, operation in re.findall(r" = (\(.*?\)|\S+) ([\w\-]+)\(", bodies[name]):
            # An array of all layers that another operation gives is written in place.
            wanted = {"copy": shapes | single, "copy-done": shapes | single, "fusion": single, "fusion-done": single}
            for number, sizes in re.findall(r"[a-z]+(\d+)\[([\d,]+)\]", kind):
                shape = tuple(map(int, sizes.split(",")))
                total += math.prod(shape) * int(number) // 8 * (shape in wanted.get(operation, ()))
    return total


def collectives(program: str) -> list[tuple[str, int]]:
    """Collectives of a compiled program: their kinds, and the bytes that each gives on a device."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf" = (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program):
        arrays = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", shapes)
        found.append(
            (kind, sum(int(bits or 8) // 8 * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in arrays))
        )
    return found


def assert_nothing_is_there_twice(memory: Memory) -> None:
    """The prefix is an argument and counted once a prompt; the past is written in place; temporaries hold neither."""
    assert memory.arguments - (memory.weights + memory.prefix + memory.past) < 2**20
    assert memory.in_place == memory.past
    # The segment's own keys and values, and a few layers' or rows' worth; a copy of the prefix for each row would be 8 prefixes.
    assert memory.temporaries < memory.prefix / 2
    assert memory.written_temporaries < memory.segment_cache


def assert_nothing_is_copied_at_every_token(memory: Memory) -> None:
    """But for a hundredth of what has to be read: arrays of little size, which XLA may hold in faster memory."""
    assert memory.copied < (memory.weights + memory.prefix + memory.past) / 100


def line(name: str, memory: Memory) -> str:
    """One row for a person, in MiB."""
    parts = ("weights", "prefix", "past", "temporaries", "copied")
    return f"{name}: " + ", ".join(f"{part} {getattr(memory, part) / 2**20:,.0f} MiB" for part in parts)
