"""Compares experts on meshes of eight CPU devices with one device. A separate program: JAX creates devices once per process.

`python tests/support/expert_mesh.py` prints one JSON object per line: the case, and the difference of an update's loss and
gradients, or of a decoding step's hidden states, from one device's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from mesh_update import MESHES, SPEC, distance, update  # isort: skip - makes the devices, before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
from plain_oracles import quick_compiling

from grpo_jax.config import ConfigError, MeshConfig
from grpo_jax.models import moe
from grpo_jax.models.parameters import init_params
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import Layout
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.quantize import quantize_params

EXPERTS = dataclasses.replace(SPEC, family="qwen3_moe", sandwich=False, ffw=24, experts=8, experts_per_token=3)
MIXTRAL = dataclasses.replace(EXPERTS, family="mixtral", tied=False, experts=4, experts_per_token=2, ffw=32)
CASES: dict[str, tuple[tuple[str, ...], ModelSpec, dict[str, Any]]] = {
    "lora": (tuple(MESHES), EXPERTS, {}),
    "again, int8": (("2x2x2",), MIXTRAL, {"micro": 8, "remat": "layer", "quantization": "int8"}),
    "full": (("2x2x2",), MIXTRAL, {"full": True}),
}


@functools.cache
def layout_of(mesh: str) -> Layout | None:
    """The layout of a mesh by its name."""
    return make_layout(MeshConfig(*MESHES[mesh]))


def decoding_step(layout: Layout | None, quantization: str, shared: bool) -> np.ndarray:
    """Output [16, 1, D] of one layer's experts for one token of each of 16 slots; `shared` gives all slots the same token."""
    params = init_params(EXPERTS, jax.random.key(0), jnp.float32)
    params = params if quantization == "none" else quantize_params(EXPERTS, params, quantization)
    names = ("router", "gate_proj", "up_proj", "down_proj")
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[1]), {name: params["layers"][name] for name in names})
    x = np.random.default_rng(0).normal(size=(16, 1, EXPERTS.width)).astype(np.float32)
    if shared:
        x = np.repeat(x[:1], 16, axis=0)
    return np.asarray(decoding_program(layout)(x, layer))


@functools.cache
def decoding_program(layout: Layout | None) -> Any:
    """Jitted (x, one layer's weights) → output of its experts."""
    decoding = None if layout is None else layout.decoding
    return jax.jit(lambda x, layer: moe.mix_experts(EXPERTS, x, layer, 1.0, None, decoding)[0])


def print_updates() -> None:
    """Prints the updates: every case on its meshes."""
    for name, (meshes, spec, how) in CASES.items():
        metrics, gradient, _ = update(spec, None, how)
        for mesh in meshes:
            own, gradients = update(spec, layout_of(mesh), how)[:2]
            found = {"case": name, "mesh": mesh, "loss": abs(own["loss"] - metrics["loss"])}
            print(json.dumps(found | {"gradient": distance(gradients, gradient)}), flush=True)


def print_steps() -> None:
    """Prints the decoding steps: slots with different experts, and slots that all select those of one device."""
    for quantization in ("none", "int8"):
        for shared in (False, True):
            alone = decoding_step(None, quantization, shared)
            for mesh in ("1x1x4", "2x2x2"):
                case = f"step, {quantization}, {'one choice' if shared else 'many'}"
                got = decoding_step(layout_of(mesh), quantization, shared)
                print(json.dumps({"case": case, "mesh": mesh, "hidden": distance(got, alone)}), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        check_mesh(layout_of("1x1x4"), dataclasses.replace(EXPERTS, experts=6))
    except ConfigError as error:
        print(json.dumps({"case": "refused", "mesh": "1x1x4", "error": str(error)}), flush=True)
    with quick_compiling():
        print_steps()
        print_updates()
