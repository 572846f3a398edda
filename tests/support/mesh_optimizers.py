"""Compares updates by each optimiser, and of DoRA's adapters with replayed experts, on eight CPU devices with one device's.

`python tests/support/mesh_optimizers.py CASE...` prints one JSON object for each: the distances of the change of what is trained
and of the optimiser's state after two updates, the metrics of both, and which arrays of the state are sharded. A program of
its own: JAX makes devices at its start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from functools import partial
from typing import Any

from mesh_update import MESHES, SPEC, UNTIED, B, C, G, batch_of, distance  # isort: skip - makes the devices, before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
import optax
from padded_batches import PaddedBatch
from plain_oracles import quick_compiling

from grpo_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, OptimConfig
from grpo_jax.learner.eight_bit import EightBitState, decoded
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import apply_gradient, make_optimizer
from grpo_jax.learner.rows import Recorded
from grpo_jax.learner.sharded import state_shardings
from grpo_jax.learner.step import train_step
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Frozen, TrainState
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.lora_start import with_start

UPDATES = 2
MESH = "2x2x2"
WIDE = dataclasses.replace(UNTIED, width=128, ffw=128)
"""Its matrices are factored, which takes 128 rows and columns."""
EXPERTS = dataclasses.replace(SPEC, family="qwen3_moe", sandwich=False, ffw=24, experts=8, experts_per_token=3)
DORA = LoraConfig(rank=2, use_dora=True, targets=["q_proj", "o_proj"])

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon"},
    "adafactor": {"name": "adafactor", "b1": 0.9},
    "lion": {"name": "lion"},
    "factored": {"moments": "factored"},
    "int8": {"moments": "int8"},
}
"""Optimisers whose updates of given gradients are compared."""

MODEL = "dora, replay, int8"
"""The case of `trained`."""


def recorded_of(spec: ModelSpec, batch: PaddedBatch) -> Recorded:
    """Experts drawn at random for every token: not those that the routers would select."""
    rng = np.random.default_rng(1)
    ends = np.asarray(batch.completion_mask).sum(axis=1)
    tokens = np.asarray(batch.prompt_lengths).repeat(G) + ends - 1
    shape = spec.layers, spec.experts_per_token

    def of_completion(count: int) -> np.ndarray:
        drawn = rng.permuted(np.tile(np.arange(spec.experts), (count, spec.layers, 1)), axis=-1)
        return drawn[..., : spec.experts_per_token].astype(np.uint8)

    drawn = [of_completion(int(count)) for count in tokens]
    for group in range(0, len(drawn), G):  # completions share their prompt's tokens
        first = int(batch.prompt_lengths[group // G])
        for own in drawn[group + 1 : group + G]:
            own[: first - 1] = drawn[group][: first - 1]
    return Recorded(drawn, shape, np.uint8, replays=True)


def optimizer_of(settings: dict[str, Any]) -> optax.GradientTransformation:
    """The optimiser of these settings, which decays weights."""
    return make_optimizer(OptimConfig(learning_rate=0.01, weight_decay=0.1, **settings), UPDATES)


def optimized(settings: dict[str, Any], layout: Layout | None) -> tuple[Any, Any, list[Any]]:
    """Updates every weight by given gradients; returns the change, the values of the state, and the formats of its arrays."""
    started: Any = init_params(WIDE, jax.random.key(0), jnp.float32)
    before, optimizer = jax.device_get(started), optimizer_of(settings)
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), before) for _ in range(UPDATES)]

    def start(params: Any) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def step(state: TrainState, gradient: Any) -> TrainState:
        return apply_gradient(optimizer, state, gradient, jnp.float32(1))[0]

    placed = None
    if layout is not None:
        axes = model_axes(WIDE)
        started, gradients = layout.put_tree(started, axes), [layout.put_tree(own, axes) for own in gradients]
        placed = state_shardings(jax.eval_shape(start, started), layout, axes)
    state, update = jax.jit(start, out_shardings=placed)(started), jax.jit(step, out_shardings=placed)
    for gradient in gradients:
        state = update(state, gradient)
    return changes(state, before), whole(jax.device_get(state.opt_state)), arrays_of(state)


def trained(layout: Layout | None) -> tuple[Any, Any, list[Any], list[dict[str, float]]]:
    """Updates DoRA's adapters by AdamW with 8-bit moments, experts replayed; returns as `optimized`, and the metrics."""
    model = Transformer(EXPERTS, jnp.dtype(jnp.float32), DORA.scale, "none", False, None, layout)
    objective = ObjectiveConfig(beta=0.0, importance_cap=2.0)
    learner = Learner(model, objective, optimizer_of(OPTIMIZERS["int8"]), lambda _: jnp.float32(0), False, 0.9, C)
    params = init_params(EXPERTS, jax.random.key(0), jnp.float32)
    started = adapters_of(params)
    before, frozen = jax.device_get(started), Frozen(params, {})
    padded = batch_of(EXPERTS, equal_groups=3)
    batch = padded.packed((B, G), layout, skips=learner.skips, recorded=recorded_of(EXPERTS, padded))
    if layout is not None:
        check_mesh(layout, EXPERTS)
        axes = model_axes(EXPERTS)
        started, frozen = layout.put_tree(started, axes), layout.put_tree(frozen, axes)
    state, step, metrics = learner.init(started), jax.jit(partial(train_step, learner)), []
    for _ in range(UPDATES):
        state, packed = step(state, batch, frozen)
        metrics.append(packed.to_dict())
    return changes(state, before), whole(jax.device_get(state.opt_state)), arrays_of(state), metrics


def adapters_of(params: Any) -> Any:
    """Adapters that are not 0, so that all of their gradients are there."""
    adapters = with_start(EXPERTS, DORA, params, init_lora(EXPERTS, DORA, jax.random.key(1)), np.asarray)
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters)


def changes(state: TrainState, before: Any) -> Any:
    """What the updates added to what is trained."""
    return jax.tree.map(lambda new, old: new - old, jax.device_get(state.trainable), before)


def whole(state: Any) -> list[Any]:
    """The values of a state's arrays, codes decoded; without counts."""

    def of(part: Any) -> Any:
        return jax.tree.map(decoded, part.stored, part.scales) if isinstance(part, EightBitState) else part

    values = jax.tree.leaves(jax.tree.map(of, state, is_leaf=lambda part: isinstance(part, EightBitState)))
    return [value for value in values if jnp.issubdtype(value.dtype, jnp.floating)]


def arrays_of(state: TrainState) -> list[Any]:
    """Format, shape, and whether it is sharded, of the optimiser's arrays."""
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    return [[str(x.dtype), list(x.shape), not x.sharding.is_fully_replicated] for x in arrays]


def main() -> None:
    """Prints the comparisons."""
    layout = make_layout(MeshConfig(*MESHES[MESH]))
    for name in sys.argv[1:]:
        start = time.process_time()
        one, other = [(*optimized(OPTIMIZERS[name], own), []) if name != MODEL else trained(own) for own in (None, layout)]
        found = {
            "case": name,
            "change": distance(other[0], one[0]),
            "state": distance(other[1], one[1]),
            "moved": min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[0])),
            "arrays": other[2],
            "metrics": [[own, expected] for own, expected in zip(other[3], one[3], strict=True)],
            "cpu_seconds": time.process_time() - start,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with quick_compiling():
        main()
