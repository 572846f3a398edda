"""Compares rollouts on meshes of eight CPU devices with one device's. A program, because JAX makes devices at the start.

`python tests/support/mesh_sampler.py CASES` prints one JSON object per case: differences, near-ties, and the collectives of the
compiled segments.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from compiled_rollout import collectives
from episodes import Script, ScriptedTurns
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from plain_oracles import quick_compiling, tiny_policy
from rollouts import folded_numbers, nearness

from grpo_jax.config import LoraConfig, MeshConfig, RolloutConfig
from grpo_jax.models.attention import prefill_attend
from grpo_jax.models.embedding import head_matrix
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.transformer import Transformer, forward
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.sampling import NEAR_LOGITS
from grpo_jax.rollout.shapes import pad_rows
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params, Rollout
from grpo_jax.weights.axes import decoding_axes, model_axes
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantize_params
from grpo_kernels import head_sample
from grpo_kernels.numerics import soft_cap

LORA = LoraConfig(rank=2)
SPEC = ModelSpec(
    family="gemma2",
    vocab=288,  # three blocks of the draw on one device; on four devices each has part of a block
    layers=2,
    width=32,
    ffw=48,
    heads=8,
    kv_heads=4,
    head_dim=8,
    norm_eps=1e-6,
    tied=True,
    windows=(None, 4),
    ropes=(Rope(10000.0),),
    rope_of_layer=(0, 0),
    query_scale=8**-0.5,
    sandwich=True,
    attention_softcap=20.0,
    final_softcap=15.0,
    init_std=0.2,
)
G, LONGEST, SEGMENT = 3, 8, 4
STOPS = (2, 5, *range(10, 288, 9))
PROMPTS = tuple(tuple(int(x) for x in np.random.default_rng(n).integers(0, 288, 2 + n % 5)) for n in range(10))
SETTINGS = RolloutConfig(
    num_generations=G, max_completion_length=LONGEST, min_completion_length=2, temperature=0.7, segment=SEGMENT
)
LIMITS = tuple(int(x) for x in np.random.default_rng(0).integers(1, LONGEST + 1, len(PROMPTS) * G))
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x4": (1, 1, 4), "2x2x2": (2, 2, 2)}

COMBINED: dict[str, dict[str, Any]] = {
    "8x1x1 refill": {"mesh": "8x1x1", "slots": 8, "limits": LIMITS},
    "8x1x1 refill greedy": {"mesh": "8x1x1", "slots": 8, "temperature": 0.0, "dispatch_ahead": True},
    "1x8x1 all at once": {"mesh": "1x8x1", "dispatch_ahead": True},
    "2x2x2 int8, waiting": {"mesh": "2x2x2", "slots": 8, "kv_dtype": "int8", "refill": False},
    "2x2x2 top-p, quantised": {"mesh": "2x2x2", "slots": 8, "top_p": 0.8, "model": "int8", "limits": LIMITS},
    "2x2x2 experts, all at once, unrolled": {"mesh": "2x2x2", "unroll": True, "model": "experts"},
}
"""Few cases that have every axis of a mesh and every feature once."""

SEPARATE: dict[str, dict[str, Any]] = {
    **{f"{mesh} refill": {"mesh": mesh, "slots": 8, "limits": LIMITS} for mesh in ("1x8x1", "1x1x4", "2x2x2")},
    **{f"{mesh} refill greedy": {"mesh": mesh, "slots": 8, "temperature": 0.0} for mesh in ("1x8x1", "1x1x4", "2x2x2")},
    "2x2x2 all at once, unrolled": {"mesh": "2x2x2", "unroll": True},
    "8x1x1 three prompts": {"mesh": "8x1x1", "prompts": PROMPTS[:3]},
    "2x2x2 waiting": {"mesh": "2x2x2", "slots": 8, "refill": False},
    "2x2x2 int8": {"mesh": "2x2x2", "slots": 8, "kv_dtype": "int8"},
    "2x2x2 top-p": {"mesh": "2x2x2", "slots": 8, "top_p": 0.8},
    "2x2x2 quantised": {"mesh": "2x2x2", "slots": 8, "model": "int8"},
    "2x2x2 experts": {"mesh": "2x2x2", "slots": 8, "model": "experts"},
    "2x2x2 episodes": {"mesh": "2x2x2", "slots": 8, "episodes": 5, "max_completion_length": 28, "dispatch_ahead": True},
    "2x2x2 episodes, unrolled": {"mesh": "2x2x2", "slots": 8, "episodes": 1, "max_completion_length": 28, "unroll": True},
}
"""The features one by one."""

CASES = COMBINED | SEPARATE
"""By name: the mesh, settings of the rollout, and other differences."""


@functools.cache
def spec_of(model: str) -> ModelSpec:
    return dataclasses.replace(SPEC, experts=4, experts_per_token=2) if model == "experts" else SPEC


@functools.cache
def variables_of(model: str) -> Params:
    """Makes random weights and adapters, on one device."""
    spec = spec_of(model)
    params = init_params(spec, jax.random.key(0), jnp.float32)
    params = quantize_params(spec, params, model) if model == "int8" else params
    adapters = init_lora(spec, LORA, jax.random.key(1))
    return {"params": params, "lora": jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapters)}


@functools.cache
def layout_of(mesh: str | None) -> Layout | None:
    if mesh is None:
        return None
    data, fsdp, tensor = MESHES[mesh]
    return make_layout(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def placed(mesh: str | None, model: str) -> Params:
    """Returns the weights in the training layout."""
    layout, variables = layout_of(mesh), variables_of(model)
    if layout is None:
        return variables
    return {name: layout.put_tree(tree, model_axes(spec_of(model))) for name, tree in variables.items()}


@functools.cache
def sampler_of(mesh: str | None, model: str, unroll: bool) -> Sampler:
    return Sampler.build(
        Transformer(spec_of(model), jnp.dtype(jnp.float32), LORA.scale, unroll=unroll, layout=layout_of(mesh)), STOPS
    )


def sampler_for(mesh: str | None, how: dict[str, Any]) -> Sampler:
    return sampler_of(mesh, how.get("model", "dense"), how.get("unroll", False))


def rollout_of(mesh: str | None, how: dict[str, Any]) -> Rollout:
    """Runs a case on the mesh or on one device."""
    settings = dataclasses.replace(
        SETTINGS, **{name: value for name, value in how.items() if name in RolloutConfig.__dataclass_fields__}
    )
    sampler, prompts = sampler_for(mesh, how), how.get("prompts", PROMPTS)
    turns = None
    if "episodes" in how:  # answers take up to so many segments on the mesh, and come at once on one device
        script = Script(len(prompts) * G, answer=4, turn_tokens=5, first=2)
        turns = ScriptedTurns(script, how["episodes"] if mesh else 0)
    weights = placed(mesh, how.get("model", "dense"))
    return sampler.sample(weights, prompts, settings, seed=3, step=1, limits=how.get("limits"), turns=turns)


@functools.partial(jax.jit, static_argnums=0)
def next_logits(spec: ModelSpec, variables: Params, ids: jax.Array, length: jax.Array) -> jax.Array:
    """Computes logits [V] after a text, on one device and without a cache."""
    model = Transformer(spec, jnp.dtype(jnp.float32), LORA.scale)
    positions = jnp.arange(ids.shape[0], dtype=jnp.int32)[None, :]
    hidden, _, _ = forward(model, variables, ids[None], positions, prefill_attend(model, length[None], ids.shape[0]))
    logits = jnp.einsum("d,vd->v", hidden[0, length - 1], head_matrix(SPEC, variables["params"]))
    return soft_cap(logits, spec.final_softcap)


def is_near_tie(how: dict[str, Any], row: int, ids: Sequence[int], near: float) -> bool:
    """Tells whether logits that differ by `near` may give another token after `ids`, without rounding keys and values."""
    prompt, temperature = PROMPTS[row // G], how.get("temperature", SETTINGS.temperature)
    text = [*prompt, *ids]
    table = jnp.asarray(pad_rows([text], 8 + how.get("max_completion_length", LONGEST))[0])
    model = how.get("model", "dense")
    logits = np.asarray(next_logits(spec_of(model), variables_of(model), table, jnp.int32(len(text))), np.float64)
    if len(ids) < SETTINGS.min_completion_length:
        logits[list(STOPS)] = -np.inf
    names = np.array([(1, row // G, row % G, len(ids))], np.int32)
    number = float(folded_numbers(np.uint32(3), names)[0])  # type: ignore[arg-type] - NumPy serves as well
    return nearness(logits / (temperature or 1.0), number, temperature, near)[1]


def differences(how: dict[str, Any], got: Rollout, expected: Rollout) -> tuple[list[str], int]:
    """Returns differences, row by row up to a near-tie, and the number of near-ties.

    An int8 value so close to half a step that float32 rounds it the other way moves log-probabilities by 2e-4.
    """
    near = 10 * NEAR_LOGITS if how.get("kv_dtype") == "int8" else NEAR_LOGITS
    found, ties = [], 0
    for row, (ours, theirs) in enumerate(zip(got.completion_ids, expected.completion_ids, strict=True)):
        same = next((t for t, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        if same < max(len(ours), len(theirs)):
            near_tie = same < min(len(ours), len(theirs)) and is_near_tie(how, row, theirs[:same], near)
            ties += near_tie
            found += [] if near_tie else [f"row {row}: {ours} for {theirs}"]
        elif got.finish_reasons[row] != expected.finish_reasons[row]:
            found.append(f"row {row}: {got.finish_reasons[row]} for {expected.finish_reasons[row]}")
        apart = np.abs(got.logprobs[row][:same] - expected.logprobs[row][:same]).max(initial=0)
        if apart > near:
            found.append(f"row {row}: log-probabilities are {apart} apart")
    return found, ties


def misplaced(spec: ModelSpec, variables: Params, layout: Layout) -> list[str]:
    """Lists decoding weights that are sharded over fsdp, or not sharded over tensor as their axes say."""
    table, found = decoding_axes(spec), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        names = tuple("layers" if name.startswith("layers_") else name for name in names[1:])
        axes = table[names if names in table else names[:-1]][-leaf.ndim :]
        axes = tuple(None if size == 1 else axis for size, axis in zip(leaf.shape, axes, strict=True))
        if not leaf.sharding.is_equivalent_to(layout.decoding.sharding(axes), leaf.ndim):
            found.append(f"{'/'.join(names)}: {leaf.sharding.spec}")
    return found


def run(name: str) -> dict[str, Any]:
    """Compares a case on its mesh with one device with all slots."""
    how = CASES[name]
    sampler = sampler_for(how["mesh"], how)
    compiled = sampler.programs.decode_segment._compiled
    known = set(compiled)
    got = rollout_of(how["mesh"], how)
    alone = {key: value for key, value in how.items() if key not in ("slots", "refill", "unroll", "dispatch_ahead")}
    found, ties = differences(how, got, rollout_of(None, alone))
    layout = layout_of(how["mesh"])
    assert layout is not None
    segments = [collectives(compiled[key].as_text()) for key in set(compiled) - known or compiled]
    model = how.get("model", "dense")
    return {
        "differences": found,
        "near_ties": ties,
        "slots": got.slots,
        "tokens": sum(map(len, got.completion_ids)),
        "reasons": sorted(set(got.finish_reasons)),
        "weights": misplaced(spec_of(model), sampler.decoding_weights(placed(how["mesh"], model), RolloutConfig()), layout),
        "collectives": sorted({pair for segment in segments for pair in segment}),
    }


def draws() -> dict[str, Any]:
    """Compares `head_sample` with its vocabulary on four devices to one device: tokens that differ and are no near-ties."""
    layout = layout_of("1x1x4")
    assert layout is not None
    rng = np.random.default_rng(0)
    rows, vocabulary, banned_ids = 32, 4 * 297, (0, 131, 600, 1187, 4000)
    w = jnp.asarray(rng.normal(size=(vocabulary, 16)) * 0.5, jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, 16)), jnp.float32)
    w = w.at[jnp.array([7, 700])].set(3 * x[5])  # ties, on two devices
    uniform, banned = jnp.asarray(rng.random(rows), jnp.float32), jnp.asarray(np.arange(rows) % 2 == 0)
    options: dict[str, Any] = {"softcap": 8.0, "banned_ids": banned_ids, "near": 1e-3}

    def draw(x: Any, w: Any, u: Any, b: Any, t: Any, name: str, axis: str | None = None) -> Any:
        return head_sample(x, w, u, temperature=t, banned=b, vocab_axis=axis, implementation=name, **options)

    parts = (PartitionSpec(), PartitionSpec("tensor"), *[PartitionSpec()] * 3)
    on_one = jax.jit(functools.partial(draw, name="reference"))
    found: dict[str, Any] = {}
    for implementation in ("reference", "mosaic_tpu"):
        spread = jax.jit(layout.local(functools.partial(draw, axis="tensor", name=implementation), parts, PartitionSpec()))
        for temperature in (0.7, 0.0):
            given = (x, w, uniform, banned, jnp.float32(temperature))
            with pltpu.force_tpu_interpret_mode():
                got = jax.tree.map(np.asarray, spread(*given))
            alone = jax.tree.map(np.asarray, on_one(*given))
            same = got.ids == alone.ids
            found[f"{implementation} {temperature}"] = {
                "differ": int(np.sum(~same & ~alone.close)),
                "close": [int(alone.close.sum()), int((got.close != alone.close).sum())],
                "logp": float(np.abs(got.logp - alone.logp)[same].max()),
                "entropy": float(np.abs(got.entropy - alone.entropy).max()),
                "devices": len(set((got.ids // 297).tolist())),
                "tied": int(got.ids[5]),
            }
    return found


def generated() -> dict[str, Any]:
    """Compares `Policy.generate` of three prompts on eight devices with one device."""
    policy = tiny_policy("qwen2", LORA)
    options: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}
    alone, spread = (own.generate([[7, 30, 9], [11], [50, 6]], **options) for own in (policy, policy.placed(layout_of("8x1x1"))))
    ids = [[[one.ids for one in group] for group in groups] for groups in (alone, spread)]
    return {"same": ids[0] == ids[1]}


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    others = {"draws": draws, "generated": generated}
    with quick_compiling():
        for name in sys.argv[1:]:
            start = time.perf_counter()
            result = others[name]() if name in others else run(name)
            print(json.dumps({"case": name, "seconds": round(time.perf_counter() - start, 1), **result}), flush=True)
