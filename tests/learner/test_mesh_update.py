"""The update on a mesh is the update on one device: losses, gradients, collectives; and it compiles for four TPU chips.

The meshes have eight CPU devices, in a process of its own: `mesh_update.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_rollout import LLAMA_8B
from compiled_update import base_of
from padded_batches import shapes_of

from grpo_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, OptimConfig
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import make_optimizer
from grpo_jax.learner.step import train_step
from grpo_jax.models.transformer import Transformer
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.runtime.sharding import BATCH_AXES
from grpo_jax.types import Frozen
from grpo_jax.weights.axes import model_axes
from grpo_jax.weights.lora import init_lora

MEAN_TERM = 0.3
"""Below the mean size of a term of the loss: with rewards from a normal distribution, half of the advantages of a pair are 0.7, and
few groups have none."""

ROWS, COLUMNS = 32, 6
"""Completions of a step in `mesh_update.py`, and tokens of the longest."""

Results = dict[tuple[str, str], dict[str, Any]]

QUICK = [("lora", "1x8x1"), ("lora", "2x2x2")]
OTHERS = [("lora", "8x1x1"), ("lora", "1x1x4")] + [(name, "2x2x2") for name in ("micro", "full", "beta0", "bonus")]


def results_of(repository: Path, cases: list[tuple[str, str]]) -> Results:
    """Runs `mesh_update.py`; its results by case and mesh."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(repository / part) for part in ("", "kernels", "tests", "tests/support"))
    }
    program = [sys.executable, str(repository / "tests" / "support" / "mesh_update.py"), *map("/".join, cases)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print("\n".join(f"{row['case']} {row['mesh']}: {row['loss']:.1e} {row['gradient']:.1e} {row['seconds']}" for row in found))
    return {(row["case"], row["mesh"]): row for row in found}


@pytest.fixture(scope="module")
def results(repository: Path) -> Results:
    return results_of(repository, QUICK)


@pytest.fixture(scope="module")
def other_results(repository: Path) -> Results:
    return results_of(repository, OTHERS)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_a_mesh_gives_the_loss_and_the_gradients_of_one_device(case: tuple[str, str], request: pytest.FixtureRequest) -> None:
    """To 1e-6 of the mean term and 1e-5 of the norm: sums in another order, in float32."""
    found = request.getfixturevalue("results" if case in QUICK else "other_results")[case]
    assert found["loss"] <= 1e-6 * MEAN_TERM
    assert found["gradient"] <= 1e-5
    for name, (got, expected) in found["metrics"].items():
        assert math.isclose(got, expected, rel_tol=1e-5, abs_tol=1e-6), name


def test_an_update_over_fsdp_gathers_weights_and_adds_up_gradients(results: Results) -> None:
    """Otherwise only scalars, one for each entry or token of a completion, and the step's N advantages are moved.

    No logits, no hidden states, no token ids: log-probabilities come from packed rows, which have completions of any shard.
    """
    found = results["lora", "1x8x1"]
    weights, adapters = ({tuple(shape) for shape in found[name]} for name in ("weights", "adapters"))
    one_layer = {shape[1:] for shape in weights | adapters}

    def is_one_of(dims: list[int], shapes: set[tuple[int, ...]]) -> bool:
        return tuple(dims) in shapes or (dims[:1] == [1] and tuple(dims[1:]) in shapes)

    moved = found["collectives"]
    gathered = [dims for name, dims in moved if name == "all-gather"]
    reduced = [dims for name, dims in moved if name in ("all-reduce", "reduce-scatter")]
    assert len(gathered) + len(reduced) == len(moved)
    assert len(gathered) >= 2 * 7  # of each of the seven matrices, forward and backward
    for dims in gathered:
        scalars = dims in ([ROWS], [ROWS, COLUMNS], *([entries] for entries in found["entries"]))
        assert is_one_of(dims, weights | one_layer) or scalars, dims
    of_adapters = {shape[1:] for shape in adapters}
    assert sum(is_one_of(dims, of_adapters) for dims in reduced) >= 2 * 7
    for dims in reduced:
        assert dims == [] or is_one_of(dims, of_adapters | adapters), dims


@pytest.mark.slow
def test_an_update_compiles_for_four_tpu_chips(chips: Any) -> None:
    """With Pallas kernels, each on its chip's part; the base is int4, its groups sharded over both axes."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v6e:2x2", "tpu").devices
    layout = make_layout(MeshConfig(1, 2, 2), devices)
    assert layout is not None
    spec = dataclasses.replace(
        LLAMA_8B,
        layers=2,
        width=256,
        ffw=512,
        heads=4,
        kv_heads=2,
        head_dim=128,
        vocab=1024,
        windows=(None, 64),
        rope_of_layer=(0, 0),
    )
    model = Transformer(spec, jnp.dtype(jnp.bfloat16), 1.0, "layer", implementation="mosaic_tpu", layout=layout)
    optimizer = make_optimizer(OptimConfig(), 10)
    learner = Learner(model, ObjectiveConfig(beta=0.04), optimizer, lambda _: jnp.float32(1), False, 1.0, 128)
    adapters = jax.eval_shape(lambda: init_lora(spec, LoraConfig(rank=8), jax.random.key(0)))
    axes = model_axes(spec)

    def on(tree: Any, table: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout.tree(tree, table))

    state = on(jax.eval_shape(learner.init, adapters), axes)
    frozen = on(Frozen(base_of(spec, jnp.bfloat16, "int4"), {}), axes)
    batch = on(shapes_of(4, 2, 128, 128, (4, 2), 2), BATCH_AXES)
    lowered = jax.jit(functools.partial(train_step, learner), donate_argnums=0).lower(state, batch, frozen)
    text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") >= 4  # attention, head, loss, advantages
