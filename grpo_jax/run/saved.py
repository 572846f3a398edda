"""Runs that are on disk: reads back the policy of the newest checkpoint and exports it for other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.run.best import best_checkpoint
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.runtime.memory import least_limit_bytes
from grpo_jax.runtime.mesh import make_layout
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.hub import push_folder
from grpo_jax.weights.mesh_choice import choose_mesh
from grpo_jax.weights.model_card import RunFacts
from grpo_jax.weights.publish import usage_of, write_export
from grpo_jax.weights.quantize import quantization_of
from grpo_jax.weights.usage import Kind


def checkpoint_values(policy: Policy, supervised: bool) -> dict[str, Any]:
    """What a checkpoint stores next to the arrays, so that `load_run` can build the run's policy again."""
    return {
        "model": str(policy.folder.resolve()),
        "name": policy.name,
        "dtype": str(policy.dtype),
        "quantization": quantization_of(policy.params),
        "lora": None if policy.lora is None else asdict(policy.lora),
        "supervised": supervised,
        "chat_template": None if policy.tokenizer is None else policy.tokenizer.own_template,
    }


def load_run(run_dir: str | Path, *, best: bool = False) -> tuple[Config, Policy]:
    """Reads the settings of a run and the policy of its newest checkpoint.

    Args:
        best: take the checkpoint of the best evaluation instead (`train.best_metric`); `train.keep_best` has kept it.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: it has no complete checkpoint.
    """
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run: {folder} holds no config.yaml, so it is not the folder of a run")
    config = Config.from_yaml(folder / "config.yaml")
    with Checkpointer(folder / "checkpoints", keep=None) as checkpoints:
        step = best_checkpoint(folder, config.train.best_metric) if best else None
        values = checkpoints.host(step)
        for line in checkpoints.damaged:
            print(f"warning: {line}; an older checkpoint is read", file=sys.stderr)
        lora = None if values["lora"] is None else LoraConfig(**values["lora"])
        source = values["model"] if Path(values["model"]).is_dir() else values["name"]
        mesh = available_mesh(config, read_folder_spec(find_model(source)), adapters=lora is not None)
        base = Policy.from_pretrained(source, dtype=values["dtype"], quantization=values.get("quantization", "none"), mesh=mesh)
        policy = replace(base, name=values["name"], lora=lora, adapters=None if lora is None else {})
        template = values.get("chat_template")
        if template is not None and policy.tokenizer is not None:
            policy = replace(policy, tokenizer=policy.tokenizer.with_chat_template(template))
        trainable = checkpoints.restore_part("trainable", lambda tree: shardings_of(policy, tree), step)
    return config, policy.with_trained(trainable)


def shardings_of(policy: Policy, tree: Any) -> Any:
    """Where the trained arrays of a policy live."""
    if policy.layout is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, tree)
    return policy.layout.tree(tree, model_axes(policy.spec))


def available_mesh(config: Config, spec: ModelSpec, *, adapters: bool) -> MeshConfig:
    """The mesh of a run if this machine has its devices; else one over all devices here, or over one. Without `auto`.

    Devices of `mesh.rollout` are not set aside, as nothing is updated.
    """
    for setting in (replace(config.mesh, rollout=None), MeshConfig()):
        limit, model = least_limit_bytes(), config.model
        options: dict[str, Any] = {"dtype": model.dtype, "quantization": model.quantization, "adapters": adapters}
        mesh = choose_mesh(setting, spec, limit_bytes=limit, **options).mesh
        try:
            check_mesh(make_layout(mesh), spec)
        except ConfigError:
            continue
        return mesh
    return MeshConfig(fsdp=1)


def export_run(
    run_dir: str | Path,
    out: str | Path,
    format: Kind,
    *,
    best: bool = False,
    gguf_type: str | None = None,
    repo: str | None = None,
    private: bool | None = None,
    note: Callable[[str], None] | None = None,
) -> list[str]:
    """Writes a checkpoint of a run for other programs, with a model card, and uploads it where `repo` is given.

    Args:
        best: the checkpoint of the best evaluation; see `load_run`.
        format: a PEFT adapter, a whole model, or one of them as GGUF.
        gguf_type: of `gguf` alone; None is f16.
        repo: hub id `owner/name` to upload to.
        private: of a new repository; None is the account's own default.
        note: called with what is different in other programs, and where it was uploaded.

    Returns:
        The lines that serve and load it.

    Raises:
        ConfigError: an argument that does not belong to the format.
        ModelError: an adapter is asked for, and the run trained every weight; or another program cannot compute the model.
        HubError: it could not be uploaded; the folder is written.
    """
    if private is not None and repo is None:
        raise ConfigError("--private is for a new repository: give --push_to_hub, or leave it out")
    if gguf_type is not None and format != "gguf":
        raise ConfigError(f"--gguf_type is {gguf_type!r}: it is for --format gguf alone; leave it out")
    _, policy = load_run(run_dir, best=best)
    folder = write_export(policy, out, format, facts=RunFacts.of(run_dir), gguf_type=gguf_type, repo=repo, note=note)
    if repo is not None:
        address = push_folder(folder, repo, private=private, message=f"Upload {format} with grpo_jax")
        if note is not None:
            note(f"uploaded to {address}")
    return usage_of(policy, folder, format, gguf_type)
