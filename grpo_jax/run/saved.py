"""A run that is on disk: its policy read back, and exported.

Enters: the folder of a run that has saved at least one checkpoint. Leaves: the policy of its newest checkpoint, or a folder
    that other tools load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig, TrainConfig, resolved_settings
from grpo_jax.learner.optim import make_optimizer
from grpo_jax.models.spec import ModelError, ModelSpec, abstract_params
from grpo_jax.policy import Policy
from grpo_jax.run import Display, RunFolder
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.runtime import distributed
from grpo_jax.runtime.sharding import check_prompts, make_layout
from grpo_jax.types import Params, TrainState
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantization_of


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        policy: the trained policy.
        history: one dict of metrics per step.
        summary: what summary.json holds.
        run_dir: the folder with everything that was written.
    """

    policy: Policy
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    run_dir: Path


def begin(config: Config, sources: Mapping[str, str] | None, *, resume: bool) -> Display:
    """Joins the processes that the settings name, checks mesh and run folder, and shows the settings. Compiles nothing.

    Raises:
        ConfigError, RunFolderError: they do not fit the devices, the processes or the run.
    """
    if config.distributed.explicit:
        distributed.start(config.distributed)
    layout = make_layout(config.mesh)
    check_prompts(layout, config.train.prompts_per_step, config.train.micro_batch_prompts)
    RunFolder.check(config.train.run_dir, config, resume=resume)
    distributed.check_shared(Path(config.train.run_dir))
    display = Display(config.train.quiet, silent=not distributed.is_main())
    display.settings(resolved_settings(config, sources or {}))
    if layout is not None:
        sizes, kind = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items()), jax.devices()[0].device_kind
        processes = f" in {jax.process_count()} processes" if distributed.several() else ""
        display.note(f"mesh: {sizes}; {layout.mesh.size} of {jax.device_count()} devices ({kind}){processes}")
    return display


def trainable_of(policy: Policy) -> Params:
    """What training changes, float32: the adapters, or every weight where there are none. A copy: the policy keeps its own."""
    source = policy.params if policy.adapters is None else policy.adapters

    def copied(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)

    if policy.layout is None:
        return copied(source)
    return jax.jit(copied, out_shardings=jax.tree.map(lambda x: x.sharding, source))(source)


def with_trained(policy: Policy, trainable: Params) -> Policy:
    """The policy after training."""
    if policy.adapters is None:
        return replace(policy, params=trainable, _sampler=[], _scorer=[])
    return replace(policy, adapters=trainable, _sampler=[], _scorer=[])


def settings_of(config: Config, policy: Policy) -> Config:
    """The settings with the model, adapters and mesh of a policy that was handed over: what is shown and kept is what is used.

    A policy on one device is spread over the settings' mesh.

    Raises:
        ConfigError: the settings ask for other adapters, or for another mesh than the policy is spread over.
    """
    own = policy.lora or LoraConfig(rank=0)
    if config.lora not in (LoraConfig(), own):
        raise ConfigError(f"lora: {config.lora} differs from the handed-over policy's {own}; leave one of them out")
    quantization: Any = quantization_of(policy.params)
    model = replace(config.model, path=policy.name, dtype=str(policy.dtype), quantization=quantization)
    mesh = config.mesh if policy.layout is None else policy.layout.config
    if config.mesh not in (MeshConfig(), mesh):
        raise ConfigError(f"mesh: {config.mesh} differs from the handed-over policy's {mesh}; leave one of them out")
    return replace(config, model=model, lora=own, mesh=mesh)


def updates_of(config: Config, supervised: bool) -> int:
    """Optimiser updates of the whole run."""
    return config.train.steps * (1 if supervised else config.objective.num_iterations)


def evaluates_after(train: TrainConfig, step: int) -> bool:
    """Whether the held-out part is evaluated after a step; 0 is before the first. The same for a run that was resumed."""
    return step in (0, train.steps) or (train.eval_every > 0 and step % train.eval_every == 0)


def saves_after(train: TrainConfig, step: int) -> bool:
    """Whether a checkpoint is saved after a step."""
    return step == train.steps or (train.save_every > 0 and step % train.save_every == 0)


def host_values(policy: Policy, supervised: bool) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays, so that the run's policy can be built again."""
    return {
        "model": str(policy.folder.resolve()),
        "name": policy.name,
        "dtype": str(policy.dtype),
        "quantization": quantization_of(policy.params),
        "lora": None if policy.lora is None else asdict(policy.lora),
        "supervised": supervised,
    }


def finish(
    policy: Policy,
    config: Config,
    folder: RunFolder,
    display: Display,
    *,
    held_out: int,
    seconds: float,
    compile_seconds: float,
) -> TrainResult:
    """Writes and shows the result of a run.

    Args:
        policy: the trained one; its adapters, where it has some, are written too.
        held_out: number of held-out problems.
        seconds: wall-clock time of the run, compiling included.
    """
    distributed.barrier("last step written")  # the others read what process 0 has written
    steps, evaluations = config.train.steps, folder.evaluations()
    files: dict[str, str] = {}
    if policy.adapters is not None:
        files[str(policy.save_adapter(folder.path / "adapter"))] = "the trained adapter, for PEFT, transformers and vLLM"
    summary = folder.write_summary(
        accuracy_before=evaluations[0]["accuracy"] if 0 in evaluations else None,
        accuracy_after=evaluations[steps]["accuracy"] if steps in evaluations else None,
        held_out_problems=held_out,
        seconds=seconds,
        steps=steps,
        compile_seconds=compile_seconds,
    )
    distributed.barrier("result written")
    display.report(summary, folder.written() | files)
    return TrainResult(policy, folder.history(), summary, folder.path)


def load_run(run_dir: str | Path) -> tuple[Config, Policy]:
    """The settings of a run and the policy of its newest checkpoint.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: it has no complete checkpoint.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run: {folder} holds no config.yaml, so it is not the folder of a run")
    config = Config.from_yaml(folder / "config.yaml")
    with Checkpointer(folder / "checkpoints", keep=None) as checkpoints:
        host = checkpoints.host()
        lora = None if host["lora"] is None else LoraConfig(**host["lora"])
        place = host["model"] if Path(host["model"]).is_dir() else host["name"]
        mesh = mesh_here(config, read_folder_spec(find_model(place)))
        base = Policy.from_pretrained(place, dtype=host["dtype"], quantization=host.get("quantization", "none"), mesh=mesh)
        policy = replace(base, name=host["name"], lora=lora)
        optimizer = make_optimizer(config.optim, updates_of(config, host["supervised"]))
        if lora is None:
            trainable: Any = abstract_params(policy.spec, jnp.float32)
        else:
            trainable = jax.eval_shape(lambda: init_lora(policy.spec, lora, jax.random.key(0)))
            policy = replace(policy, adapters=trainable)
        opt_state = jax.eval_shape(optimizer.init, trainable)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        abstract = TrainState(step, trainable, opt_state)
        if policy.layout is not None:
            places = policy.layout.tree(abstract, model_axes(policy.spec))
            abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)
        state, _ = checkpoints.restore(abstract)
    return config, with_trained(policy, state.trainable)


def mesh_here(config: Config, spec: ModelSpec) -> MeshConfig:
    """The mesh of a run where its devices are here; else all that are here, or one."""
    for mesh in (config.mesh, MeshConfig()):
        try:
            check_mesh(make_layout(mesh), spec)
        except ConfigError:
            continue
        return mesh
    return MeshConfig(fsdp=1)


def export_run(run_dir: str | Path, out: str | Path, format: Literal["adapter", "merged"]) -> Path:
    """Writes the newest checkpoint of a run as a PEFT adapter folder, or as a whole model.

    Raises:
        ModelError: an adapter is asked of a run that trained every weight.
    """
    _, policy = load_run(run_dir)
    if format == "merged":
        return policy.save_merged(out)
    if policy.adapters is None:
        raise ModelError(f"{run_dir} trained every weight, so there is no adapter: use --format merged")
    return policy.save_adapter(out)
