"""Compares updates on meshes of eight CPU devices with one device's. A program, because JAX makes devices at the start.

`python tests/support/mesh_update.py CASE/MESH...` prints one JSON object for each: the differences of loss and gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import time
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from padded_batches import PaddedBatch
from plain_oracles import quick_compiling

from grpo_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, RolloutConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.step import train_step
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.parameters import init_params, lora_specs, param_specs
from grpo_jax.models.spec import ModelSpec, Rope
from grpo_jax.models.transformer import Transformer
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Frozen
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantize_params

COLLECTIVE = re.compile(
    r" = (\(?.*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
ALONE = re.compile(r"replica_groups=(?:\[\d+,1\]<=|\{\{\d+\}[,}]|mesh\[[^\]]*'tensor'=1\] \{'tensor'\})")
"""Groups of one device, as different versions of XLA write them."""
B, G, P, C = 16, 2, 5, 6
LORA = LoraConfig(rank=2)
SPEC = ModelSpec(
    family="qwen3",
    vocab=96,
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
    qkv_bias=True,
    qk_norm=True,
    sandwich=True,
    init_std=0.2,
)


def keep_gradient() -> optax.GradientTransformation:
    """Makes an optimiser that changes nothing and stores the gradient as its state."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


def batch_of(spec: ModelSpec, *, equal_groups: int) -> PaddedBatch:
    """Makes a random batch; the first `equal_groups` groups have equal rewards."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, P + 1, B).astype(np.int32)
    rewards = rng.normal(size=(B, G)).astype(np.float32)
    rewards[:equal_groups] = 1.0
    mask = np.arange(C)[None, :] < rng.integers(1, C + 1, B * G)[:, None]
    return PaddedBatch(
        prompt_ids=np.where(np.arange(P)[None, :] < lengths[:, None], rng.integers(1, spec.vocab, (B, P)), 0).astype(np.int32),
        prompt_lengths=lengths,
        completion_ids=np.where(mask, rng.integers(1, spec.vocab, (B * G, C)), 0).astype(np.int32),
        completion_mask=mask,
        sampler_logprobs=np.where(mask, rng.normal(-5, 0.5, mask.shape), 0).astype(np.float32),
        rewards=rewards,
        valid=rng.random((B, G)) < 0.95,
    )


def learner_of(
    spec: ModelSpec,
    layout: Layout | None,
    *,
    full: bool,
    objective: dict[str, Any],
    remat: Any,
    unroll: bool,
    rollout: dict[str, Any],
    implementation: str | None,
) -> Learner:
    """Makes the learner of a case."""
    model = Transformer(spec, jnp.dtype(jnp.float32), LORA.scale, remat, unroll, implementation, layout)
    return Learner(
        model=model,
        objective=ObjectiveConfig(**{"beta": 0.04, "importance_cap": 2.0} | objective),
        optimizer=keep_gradient(),
        learning_rate=lambda _: jnp.float32(1),
        full=full,
        temperature=0.9,
        max_completion_length=C,
        truncation=Truncation.of(RolloutConfig(**rollout), (1, 2)),
    )


def update(spec: ModelSpec, layout: Layout | None, how: dict[str, Any]) -> tuple[dict[str, float], Any, str]:
    """Runs an update; returns metrics, gradient, and the compiled program."""
    options = {"micro": B, "full": False, "objective": {}, "remat": "none", "unroll": False, "rollout": {}, "implementation": None}
    quantization, equal = how.get("quantization", "none"), how.get("equal_groups", 3)
    options |= {name: value for name, value in how.items() if name in options}
    micro = options.pop("micro")
    learner = learner_of(spec, layout, **options)
    params = init_params(spec, jax.random.key(0), jnp.float32)
    params = params if quantization == "none" else quantize_params(spec, params, quantization)
    adapters = init_lora(spec, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters)
    full = options["full"]
    started: Any = jax.tree.map(jnp.copy, params) if full else adapters
    frozen = Frozen({} if full else params, params if full else {})
    batch = batch_of(spec, equal_groups=equal).packed((micro, G), layout, skips=learner.skips)
    if layout is not None:
        check_mesh(layout, spec)
        axes = model_axes(spec)
        started, frozen = layout.put_tree(started, axes), layout.put_tree(frozen, axes)
    state = learner.init(started)
    compiled = jax.jit(functools.partial(train_step, learner), donate_argnums=0).lower(state, batch, frozen).compile()
    after, packed = compiled(state, batch, frozen)
    if layout is not None:
        shardings = layout.tree(after, model_axes(spec))
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), after, shardings)), "moved"
    return packed.to_dict(), jax.device_get(after.opt_state), compiled.as_text()


UNTIED = dataclasses.replace(SPEC, tied=False, sandwich=False, attention_softcap=20.0, final_softcap=10.0)
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x4": (1, 1, 4), "2x2x2": (2, 2, 2)}
BANNED = {"min_completion_length": 2}
CASES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "lora": (SPEC, {}),
    "micro": (UNTIED, {"micro": 8, "remat": "layer", "quantization": "int8", "rollout": BANNED}),
    "full": (UNTIED, {"full": True, "unroll": True, "objective": {"num_iterations": 2}}),
    "bonus": (SPEC, {"objective": {"beta": 0.0, "entropy_coef": 0.1, "entropy_target": 9.0}}),
    "beta0": (
        SPEC,
        {"micro": 4, "objective": {"beta": 0.0, "scale_rewards": "batch"}, "equal_groups": 9, "rollout": BANNED | {"top_p": 0.9}},
    ),
}


def entries_of(spec: ModelSpec, layout: Layout | None, how: dict[str, Any]) -> list[int]:
    """Returns how many entries a micro-batch of each size has, on all row shards."""
    batch = batch_of(spec, equal_groups=how.get("equal_groups", 3)).packed((how.get("micro", B), G), layout)
    return [part.completions[0].size for part in batch.micro_batches]


def distance(got: Any, expected: Any) -> float:
    """Returns the norm of the difference divided by the norm."""
    one, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def collectives(text: str) -> list[tuple[str, list[int]]]:
    """Returns name and dimensions of every result of a collective, without those in groups of one device, which move nothing."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match is not None and ALONE.search(line) is None:
            for shape in re.finditer(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], [int(number) for number in shape[1].split(",") if number]))
    return found


def main() -> None:
    """Prints the differences."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    wanted = [argument.split("/") for argument in sys.argv[1:]]
    for name, (spec, how) in CASES.items():
        meshes = [mesh for case, mesh in wanted if case == name]
        if not meshes:
            continue
        start = time.perf_counter()
        metrics, gradient = update(spec, None, how)[:2]
        seconds = [time.perf_counter() - start]
        for mesh in meshes:
            start = time.perf_counter()
            layout = make_layout(MeshConfig(*MESHES[mesh]))
            own, gradients, text = update(spec, layout, how)
            seconds.append(time.perf_counter() - start)
            found = {
                "case": name,
                "mesh": mesh,
                "loss": abs(own["loss"] - metrics["loss"]),
                "gradient": distance(gradients, gradient),
                "metrics": {key: [own[key], metrics[key]] for key in metrics},
                "collectives": collectives(text) if mesh == "1x8x1" else None,
                "entries": entries_of(spec, layout, how),
                "weights": [p.shape for p in param_specs(spec).values()],
                "adapters": [p.shape for p in lora_specs(spec, LORA.rank, LORA.target_names).values()],
                "seconds": seconds,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with quick_compiling():
        main()
