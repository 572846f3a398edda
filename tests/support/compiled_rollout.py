"""Memory of a rollout's segment at the shapes of Llama-3.1-8B, from XLA's compiler for a chip or a mesh that need not exist."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import LoraConfig, RolloutConfig
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import SlotState, decode_segment
from grpo_jax.rollout.kv_cache import empty_cache, empty_past_block, write_segment
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.weights import decoding_model, prepared_shapes
from grpo_jax.runtime.sharding import Layout
from grpo_jax.weights.axes import decoding_axes
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import abstract_weights

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
CACHE_AXES = ("layers", "slots", "kv_heads")
PROMPTS, GENERATIONS, PROMPT_TOKENS, SEGMENT_TOKENS, PAST_BLOCKS = 8, 8, 2048, 32, (32, 32, 32, 32, 128, 256, 512)


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled segment, and of the program that appends it to the past.

    Attributes:
        arguments, temporaries: of the segment, as the compiler reports.
        in_place, written_temporaries: of the appending; in_place is what its results share with its arguments.
        weights, prefix, past, segment_cache, logits: of known arrays. prefix: one copy per prompt.
        copied: copies of weights, prefix and past at every token, for all layers.
        passed: the largest result of a collective, without sums over devices.
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
    """Returns the bytes of a tree of shapes; per device where they have a sharding."""

    def shape(leaf: Any) -> tuple[int, ...]:
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Segment:
    """A compiled segment and the shapes of its arguments."""

    compiled: Any
    weights: Any
    prompts: PrefilledPrompts
    past_blocks: tuple[Any, ...]
    segment_cache: Any
    number: Any


def compiled_segment(
    device: Any,
    *,
    refilled: bool,
    kv_dtype: str = "auto",
    options: dict[str, Any] | None = None,
    implementation: str | None = None,
    rank: int | None = 32,
    past_sizes: tuple[int, ...] = PAST_BLOCKS,
    prepared: dict[str, bool] | None = None,
    quantization: str = "none",
) -> Segment:
    """Compiles a segment of 64 slots: 8 prompts of 2,048 tokens, 8 completions each, up to 1,024 tokens of each in the past.

    Args:
        device: a sharding on the chip, or the layout of a mesh.
        refilled: free slots take completions of any prompt.
        options: for XLA's compiler.
        implementation: of the kernels; None chooses by the device of this process, which is not the one compiled for.
        rank: of the adapters; must differ from a device's slots, or what a layer computes would be counted as copies of adapters.
            None has no adapters.
        past_sizes: tokens per slot of each past block.
        prepared: settings of `prepare_weights`; None decodes with the weights of training.
        quantization: of the layers' matrices.
    """
    layout = device if isinstance(device, Layout) else None

    def on(tree: Any, *axes: str | None) -> Any:
        sharding = device if layout is None else layout.sharding(axes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    model = Transformer(LLAMA_8B, jnp.dtype("bfloat16"), 2.0, implementation=implementation, layout=layout)
    variables = {"params": abstract_weights(LLAMA_8B, jnp.bfloat16, quantization)}
    if rank is not None:
        lora = jax.eval_shape(lambda: init_lora(LLAMA_8B, LoraConfig(rank=rank), jax.random.key(0)))
        variables["lora"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), lora)
    if prepared is not None:
        variables = prepared_shapes(model, variables, unroll=False, **prepared)
        model = decoding_model(model)
    weights = on(variables)
    if layout is not None:
        shardings = layout.decoding.tree(weights, decoding_axes(LLAMA_8B))
        weights = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), weights, shardings)
    slots = PROMPTS * GENERATIONS

    def past(sizes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(empty_past_block(LLAMA_8B, jnp.bfloat16, slots, size, kv_dtype=kv_dtype, unroll=False) for size in sizes)

    cache = on(
        jax.eval_shape(lambda: empty_cache((LAYERS, PROMPTS, KV_HEADS, PROMPT_TOKENS, HEAD_DIM), jnp.bfloat16, kv_dtype=kv_dtype)),
        *CACHE_AXES,
    )
    hidden: Any = jax.ShapeDtypeStruct((PROMPTS, WIDTH), jnp.bfloat16)
    lengths: Any = jax.ShapeDtypeStruct((PROMPTS,), jnp.int32)
    prompts = PrefilledPrompts(cache, *on((lengths, hidden), "prompts"))
    past_blocks, segment_cache = (
        on(jax.eval_shape(lambda sizes=sizes: past(sizes)), *CACHE_AXES) for sizes in (past_sizes, (SEGMENT_TOKENS,))
    )
    number: Any = on(jax.ShapeDtypeStruct((slots,), jnp.int32), "slots")
    flag: Any = on(jax.ShapeDtypeStruct((slots,), jnp.bool_), "slots")
    table = on(jax.ShapeDtypeStruct((PROMPTS, GENERATIONS), jnp.int32), "prompts") if refilled else None
    controls = on(jax.eval_shape(lambda: controls_of(RolloutConfig(), 0, 0)))
    program = jax.jit(functools.partial(decode_segment, model, (1, 2), length=SEGMENT_TOKENS))
    compiled = program.lower(
        weights, prompts, past_blocks, SlotState(*[number] * 7, live=flag, begins=flag), table, controls
    ).compile(compiler_options=options)
    return Segment(compiled, weights, prompts, past_blocks, segment_cache[0], number)


def segment_memory(device: Any, *, refilled: bool, **settings: Any) -> Memory:
    """Compiles a segment, and the program that appends it to the past; see `compiled_segment`."""
    layout = device if isinstance(device, Layout) else None
    segment = compiled_segment(device, refilled=refilled, **settings)
    compiled, weights, prompts, past_blocks = segment.compiled, segment.weights, segment.prompts, segment.past_blocks
    slots = PROMPTS * GENERATIONS
    writing = jax.jit(functools.partial(write_segment, together=not refilled, layout=layout), donate_argnums=(0,))
    analysis: Any = compiled.memory_analysis()
    written: Any = writing.lower(past_blocks, segment.segment_cache, segment.number).compile().memory_analysis()
    program_text = compiled.as_text() or ""
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        in_place=written.alias_size_in_bytes,
        written_temporaries=written.temp_size_in_bytes,
        weights=size_of(weights),
        prefix=size_of(prompts),
        past=size_of(past_blocks),
        segment_cache=size_of((segment.segment_cache,)),
        logits=4 * slots * VOCAB,
        copied=LAYERS * copied_bytes(program_text, (weights, prompts, past_blocks)),
        passed=max([0, *(size for kind, size in collectives(program_text) if kind != "all-reduce")]),
    )


def copied_bytes(program: str, arrays: Any) -> int:
    """Returns the bytes that one iteration of the loop over layers writes in the shape of one layer of the arrays, or of all."""
    loops = set(re.findall(r"body=%?([\w.\-]+)", program))
    found = re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    bodies = {name: body for name, body in found if name in loops}
    inner = {name for body in bodies.values() for name in re.findall(r"body=%?([\w.\-]+)", body)}
    array_shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(arrays)}
    shapes = {shape for shape in array_shapes if len(shape) > 2 and shape[0] == LAYERS}
    single = {(1, *shape[1:]) for shape in shapes} | {shape[1:] for shape in shapes}
    total = 0
    for name in inner:
        for kind, operation in re.findall(r" = (\(.*?\)|\S+) ([\w\-]+)\(", bodies[name]):
            # An array of all layers that is the result of another operation is written in place.
            copies = {"copy": shapes | single, "copy-done": shapes | single, "fusion": single, "fusion-done": single}
            for bits, sizes in re.findall(r"[a-z]+(\d+)\[([\d,]+)\]", kind):
                shape = tuple(map(int, sizes.split(",")))
                total += math.prod(shape) * int(bits) // 8 * (shape in copies.get(operation, ()))
    return total


def collectives(program: str) -> list[tuple[str, int]]:
    """Returns the collectives of a compiled program: kind, and bytes of the result on a device."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf" = (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program):
        arrays = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", shapes)
        found.append(
            (kind, sum(int(bits or 8) // 8 * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in arrays))
        )
    return found


def assert_nothing_is_stored_twice(memory: Memory) -> None:
    """The prefix is an argument, once per prompt; the past is written in place; temporaries contain neither."""
    assert memory.arguments - (memory.weights + memory.prefix + memory.past) < 2**20
    assert memory.in_place == memory.past
    # The segment cache and a few layers or rows; a copy of the prefix for each row would be 8 prefixes.
    assert memory.temporaries < memory.prefix / 2
    assert memory.written_temporaries < memory.segment_cache


def assert_nothing_is_copied_at_every_token(memory: Memory) -> None:
    """Copies are below a hundredth of what is read: XLA may put small arrays into faster memory."""
    assert memory.copied < (memory.weights + memory.prefix + memory.past) / 100


def line(name: str, memory: Memory) -> str:
    """Formats the memory in MiB."""
    parts = ("weights", "prefix", "past", "temporaries", "copied")
    return f"{name}: " + ", ".join(f"{part} {getattr(memory, part) / 2**20:,.0f} MiB" for part in parts)
