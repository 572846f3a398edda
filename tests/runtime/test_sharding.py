"""The rules: every array has exactly one, and what does not fit a mesh is said before anything is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_rollout import LLAMA_8B
from compiled_update import base_of
from jax.sharding import AbstractMesh, PartitionSpec
from padded_batches import shapes_of

from grpo_jax.config import ConfigError, LoraConfig, MeshConfig, OptimConfig
from grpo_jax.learner.optim import make_optimizer
from grpo_jax.models.parameters import param_specs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.mesh import check_prompts, make_layout, mesh_micro_batch, mesh_sizes, resolve_mesh
from grpo_jax.runtime.sharding import BATCH_AXES, MESH_AXES, RULES, Layout, ShardingError
from grpo_jax.types import Frozen, TrainState
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.mesh_choice import choose_mesh


def layout_of(data: int, fsdp: int, tensor: int) -> Layout:
    """Of devices that are not there."""
    mesh: Any = AbstractMesh((data, fsdp, tensor), MESH_AXES)
    return Layout(mesh)


def adapters_of(spec: ModelSpec) -> Any:
    """Shapes of adapters of rank 16 on everything."""
    return jax.eval_shape(lambda: init_lora(spec, LoraConfig(rank=16), jax.random.key(0)))


def test_a_logical_axis_becomes_the_mesh_axes_of_its_rule() -> None:
    layout = layout_of(2, 2, 2)
    assert layout.spec("rows", "tokens") == PartitionSpec(("data", "fsdp"), None)
    assert layout.spec("layers", "embed", "heads") == PartitionSpec(None, "fsdp", "tensor")
    assert layout.spec("vocab", "embed") == PartitionSpec("tensor", "fsdp")
    assert layout.decoding.spec("vocab", "embed") == PartitionSpec("tensor", None)
    assert layout.decoding.spec("slots", "kv_heads") == PartitionSpec(("data", "fsdp"), "tensor")
    assert (layout.rows, layout.tensor) == (4, 2)
    assert hash(layout) == hash(layout_of(2, 2, 2))
    assert set(MESH_AXES) == {axis for axes in RULES.values() for axis in axes}


def test_two_dimensions_on_one_mesh_axis_and_an_unknown_axis_are_refused() -> None:
    with pytest.raises(ShardingError, match=r"\('heads', 'ffw'\) put two dimensions on one mesh axis"):
        layout_of(2, 2, 2).spec("heads", "ffw")
    with pytest.raises(ShardingError, match=r"axis 'depth' has no rule; the rules are prompts, rows"):
        layout_of(2, 2, 2).spec("depth")


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "nf4"])
def test_every_array_of_an_update_has_one_rule(quantization: str) -> None:
    """Weights, adapters, both moments of the optimiser, its counts, the reference, the batch."""
    layout, table = layout_of(2, 4, 4), model_axes(LLAMA_8B)
    adapters = adapters_of(LLAMA_8B)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type] - a shape
        trainable=adapters,
        opt_state=jax.eval_shape(make_optimizer(OptimConfig(), 10).init, adapters),
    )
    frozen = Frozen(base=base_of(LLAMA_8B, jnp.bfloat16, quantization), reference=adapters)
    for tree, rules in ((state, table), (frozen, table), (shapes_of(8, 4, 16, 16, (8, 4), 8), BATCH_AXES)):
        shardings = layout.tree(tree, rules)
        assert jax.tree.structure(shardings) == jax.tree.structure(tree)
    lora = layout.tree(state, table)
    kernel = lora.trainable["layers"]["q_proj"]
    moments = lora.opt_state[1][0]
    assert kernel["a"].spec == PartitionSpec(None, "fsdp", None)
    assert kernel["b"].spec == PartitionSpec(None, None, "tensor")
    assert moments.mu["layers"]["q_proj"] == moments.nu["layers"]["q_proj"] == kernel
    assert moments.count.spec == PartitionSpec()
    down = layout.tree(frozen, table).base["layers"]["down_proj"]["kernel"]
    parts = [down] if quantization == "none" else [down.values, down.scale]
    specs = [PartitionSpec(None, "tensor", "fsdp")] * len(parts)
    if quantization == "int8":
        specs[1] = PartitionSpec(None, None, "fsdp")  # one scale for all inputs
    assert [part.spec for part in parts] == specs


def test_an_array_without_a_rule_or_with_two_is_named() -> None:
    layout, table = layout_of(1, 8, 1), model_axes(LLAMA_8B)
    leaf = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    with pytest.raises(ShardingError, match=r"^opt/layers/q_proj/gamma: exactly one rule .* there is none"):
        layout.tree({"opt": {"layers": {"q_proj": {"gamma": leaf}}}}, table)
    with pytest.raises(ShardingError, match=r"^embed/embedding: exactly one rule .* there is several"):
        layout.tree({"embed": {"embedding": leaf}}, table | {("embedding",): ("vocab", "embed")})
    with pytest.raises(ShardingError, match=r"^layers/q_proj/a has shape \(32, 64\), and its rule says \('layers', 'embed', "):
        layout.tree({"layers": {"q_proj": {"a": leaf}}}, table)
    odd = jax.ShapeDtypeStruct((128, 36), jnp.float32)
    with pytest.raises(
        ShardingError, match=r"^embed/embedding has shape \(128, 36\), and 36 does not divide by 8 .*mesh\.fsdp smaller"
    ):
        layout.tree({"embed": {"embedding": odd}}, table)


def test_every_parameter_divides_or_the_mesh_is_refused() -> None:
    check_mesh(None, LLAMA_8B)
    check_mesh(layout_of(1, 8, 8), LLAMA_8B)
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 16: the model's kv_heads are 8, .* use 8, or another divisor of 8"):
        check_mesh(layout_of(1, 1, 16), LLAMA_8B)
    odd = dataclasses.replace(LLAMA_8B, vocab=50257)
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 2: the model's vocab are 50257, .* use 1, or another divisor"):
        check_mesh(layout_of(1, 1, 2), odd)
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is 3: the model's embed are 4096, .* use 1, or another divisor of 4096"):
        check_mesh(layout_of(1, 3, 1), LLAMA_8B)
    with pytest.raises(
        ConfigError, match=r"mesh\.fsdp is 64: layers/q_proj/kernel in int4 has 32 groups .* use 32, .* or model\.quant"
    ):
        check_mesh(layout_of(1, 64, 1), LLAMA_8B, "int4")
    check_mesh(layout_of(1, 64, 1), LLAMA_8B, "int8")
    sizes = {axis for p in param_specs(LLAMA_8B).values() for axis in p.axes}
    assert sizes <= RULES.keys()


def test_sizes_of_the_mesh_fit_the_devices() -> None:
    assert mesh_sizes(MeshConfig(), 8) == (1, 8, 1)
    assert mesh_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == (2, 2, 2)
    assert mesh_sizes(MeshConfig(1, 1, 4), 8) == (1, 1, 4)
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 3: mesh\.fsdp is -1 .* the 8 devices do not divide by 3"):
        mesh_sizes(MeshConfig(tensor=3), 8)
    with pytest.raises(ConfigError, match=r"mesh is .*: these sizes ask for 16 devices and there are 8"):
        mesh_sizes(MeshConfig(2, 4, 2), 8)
    with pytest.raises(ConfigError, match=r"mesh\.data is 0: use a number of devices, or -1"):
        MeshConfig(data=0)
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is -1: only one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_auto_leaves_what_is_given_as_it_is() -> None:
    """The third of the sizes of eight devices is `tensor`; `whole` matters only where nothing but `tensor` is given."""
    given = {
        (8, 1, 1): {"data": -1},
        (2, 4, 1): {"data": 2},
        (1, 4, 1): {"fsdp": 4},
        (1, 8, 1): {"fsdp": -1},
        (4, 2, 1): {"data": -1, "fsdp": 2},
        (1, 1, 8): {"tensor": -1},
    }
    for sizes, values in given.items():
        for whole in (False, True):
            assert mesh_sizes(resolve_mesh(MeshConfig(**values), whole=whole), 8) == sizes
    assert mesh_sizes(resolve_mesh(MeshConfig(tensor=2), whole=True), 8) == (4, 1, 2)
    assert mesh_sizes(resolve_mesh(MeshConfig(tensor=2)), 8) == (1, 4, 2)


@pytest.mark.parametrize(
    ("gib", "options", "sizes", "why"),
    [
        (31.24, {}, (8, 1, 1), "copies, because the frozen weights take 14.96 GiB, at most half of a device's 31.24"),
        (29.0, {}, (1, 8, 1), "shards, because the frozen weights take 14.96 GiB, more than half of a device's 29.00"),
        (15.75, {"mesh": MeshConfig(tensor=2)}, (4, 1, 2), "copies, because the frozen weights take 7.48 GiB, at most half of"),
        (15.75, {"quantization": "int4"}, (8, 1, 1), "copies, because the frozen weights take 5.31 GiB, at most half of"),
        (200.0, {"adapters": False}, (1, 8, 1), "shards, because every weight is trained"),
        (None, {}, (1, 8, 1), "shards, because the memory of a device is not known"),
        (200.0, {"mesh": MeshConfig(fsdp=4)}, (1, 4, 1), ""),
        (200.0, {"mesh": MeshConfig(fsdp=-1)}, (1, 8, 1), ""),
        (15.0, {"mesh": MeshConfig(data=-1)}, (8, 1, 1), ""),
    ],
)
def test_whole_weights_where_half_of_the_memory_has_room_for_them(
    gib: float | None, options: dict[str, Any], sizes: tuple[int, int, int], why: str
) -> None:
    """Llama-3.1-8B: 8,030,261,248 weights, in int4 6,979,321,856 of them of half a byte and 1/64 for scales: 14.96, 5.31 GiB."""
    chosen: dict[str, Any] = {"mesh": MeshConfig(), "dtype": "bfloat16", "quantization": "none", "adapters": True} | options
    choice = choose_mesh(spec=LLAMA_8B, limit_bytes=None if gib is None else int(gib * 2**30), **chosen)
    assert mesh_sizes(choice.mesh, 8) == sizes
    assert choice.why.startswith(why)
    assert bool(choice.why) == bool(why)


def test_one_device_has_no_layout() -> None:
    assert make_layout(MeshConfig(), jax.devices()[:1]) is None
    assert make_layout(MeshConfig(fsdp=1)) is None


def test_prompts_are_spread_evenly_over_the_row_shards() -> None:
    layout = layout_of(2, 4, 2)
    check_prompts(layout, 16, 8)
    check_prompts(layout, 16, None)
    check_prompts(layout, 16, "auto")
    check_prompts(None, 3, 1)
    with pytest.raises(ConfigError, match=r"train\.prompts_per_step is 12: .* data · fsdp = 8 shards: use a multiple of 8"):
        check_prompts(layout, 12, None)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_prompts is 12: .* use a multiple of 8, or a smaller mesh"):
        check_prompts(layout, 24, 12)
    check_prompts(layout, 16, 2)
    with pytest.raises(ConfigError, match=r"train.prompts_per_step / train.updates_per_rollout is 4: .* use a multiple of 8"):
        check_prompts(layout, 4, None, updates=2)
    assert [mesh_micro_batch(layout, size) for size in (2, 8, 16)] == [8, 8, 16]  # one on each shard at least
    assert mesh_micro_batch(None, 2) == 2
