"""The start of a run: joins processes, checks mesh and run folder, reads tokenizer and weights. Compiles nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jax

from grpo_jax.config import Config, resolved_settings
from grpo_jax.config.checks import require
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import read_template_file
from grpo_jax.policy import Policy
from grpo_jax.run.display import Display
from grpo_jax.run.folder import RunFolder
from grpo_jax.runtime import distributed
from grpo_jax.runtime.compilation_cache import use_compilation_cache
from grpo_jax.runtime.memory import in_host_memory, least_limit_bytes
from grpo_jax.runtime.mesh import check_prompts, make_layout, make_rollout_layout
from grpo_jax.runtime.out_of_memory import explaining_memory
from grpo_jax.runtime.sharding import Layout
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.mesh_choice import choose_run_mesh

SLOW_GPU_ROLLOUTS_BEFORE = (0, 11, 2)
"""XLA of older jax versions copies a rollout's weights and KV cache at every token on a GPU."""

NO_STOP_LINE = (
    "neither the model nor its tokenizer names an end-of-sequence token, so every completion has "
    "rollout.max_completion_length tokens; set eos_token_id in generation_config.json, or rollout.stop"
)

NO_ADAPTERS_LINE = (
    "policy: it has no adapters, so every weight is trained; for LoRA give Policy.from_pretrained(..., lora=LoraConfig(rank=16))"
)


def begin(config: Config, sources: Mapping[str, str] | None, *, resume: bool) -> Display:
    """Joins the processes that the settings name, checks mesh and run folder, and shows the settings.

    Raises:
        ConfigError, RunFolderError: they do not fit the devices, the processes or the run.
    """
    if config.distributed.explicit:
        distributed.start(config.distributed)
    layout = make_layout(config.mesh)
    train = config.train
    make_rollout_layout(config.mesh)
    check_prompts(layout, train.prompts_per_update, train.micro_batch_prompts, train.updates_per_rollout)
    RunFolder.check(config.train.run_dir, config, resume=resume)
    distributed.check_shared(Path(config.train.run_dir))
    display = Display(config.train.quiet, silent=not distributed.is_main())
    display.settings(resolved_settings(config, sources or {}))
    use_compilation_cache(config.train.compilation_cache)
    if jax.default_backend() == "gpu" and jax.__version_info__ < SLOW_GPU_ROLLOUTS_BEFORE:
        display.warning(
            f"jax {jax.__version__} on a GPU copies all weights, keys and values at every sampled token (23 GiB with an 8B model); "
            "install jax 0.11.2 or newer, which needs Python 3.12"
        )
    return display


def read_tokenizer(config: Config, display: Display) -> Tokenizer | None:
    """The tokenizer of the model that a config names; checks that mesh and lengths fit the model, and downloads no weights."""
    assert config.model.path is not None
    with display.busy(f"looking for {config.model.path}"):
        folder = find_model(config.model.path, config.model.revision, weights=False)
        spec = read_folder_spec(folder)
        spec.check_rollout(config.rollout)
        spec.check_routers(config.rollout, config.objective)
        check_mesh(make_layout(choose_run_mesh(config, spec, least_limit_bytes()).mesh), spec)
        check_mesh(make_rollout_layout(config.mesh), spec, config.model.quantization, "mesh.rollout")
        tokenizer, file = Tokenizer.from_folder(folder), config.data.chat_template_file
        return tokenizer if tokenizer is None or file is None else tokenizer.with_chat_template(read_template_file(file))


def with_steps(config: Config, rows: int, display: Display) -> Config:
    """The settings with the steps that `train.epochs` makes of so many training rows, rounded up; the same where it is null.

    Raises:
        ConfigError: `train.steps` is given too, and is another number.
    """
    train = config.train
    if train.epochs is None:
        return config
    steps = math.ceil(Fraction(str(train.epochs)) * rows / train.prompts_per_step)
    fix = f"train.epochs {train.epochs:g} of {rows} rows are {steps} steps: leave out one of the two"
    require(train.steps in (0, steps), "train.steps", train.steps, fix)
    display.note(f"train.epochs: {train.epochs:g} passes over {rows} rows are {steps} steps")
    return replace(config, train=replace(train, steps=steps))


def placed_policy(config: Config, policy: Policy | None, display: Display) -> Policy:
    """The policy that a run starts from, on its mesh, which is shown; with `optim.offload` its adapters in the host's memory."""
    assert config.model.path is not None
    if policy is None:
        folder = find_model(config.model.path, config.model.revision, weights=False)
        choice = choose_run_mesh(config, read_folder_spec(folder), least_limit_bytes())
        with display.busy(f"reading {config.model.path}"), explaining_memory("reading the weights"):
            policy = Policy.from_config(replace(config, mesh=choice.mesh))
    else:
        choice = choose_run_mesh(config, policy.spec, least_limit_bytes())
        if policy.adapters is None:
            display.note(NO_ADAPTERS_LINE)
    policy.spec.check_rollout(config.rollout)
    policy.spec.check_routers(config.rollout, config.objective)
    policy.need_tokenizer()
    if not policy.stop_ids and not config.rollout.stop:
        display.warning(NO_STOP_LINE)
    layout = make_layout(choice.mesh)
    if layout is not None:
        display.note(mesh_line(layout, choice.why))
    policy = policy.placed(layout)
    return replace(policy, adapters=in_host_memory(policy.adapters)) if config.optim.offload else policy


def mesh_line(layout: Layout, why: str, name: str = "mesh") -> str:
    """Says which mesh a run has, on which devices, and why `auto` chose it."""
    sizes, kind = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items()), jax.devices()[0].device_kind
    processes = f" in {jax.process_count()} processes" if distributed.is_multiprocess() else ""
    devices = f"{layout.mesh.size} of {jax.device_count()} devices ({kind}){processes}"
    return f"{name}: {sizes}; {devices}" + (f"; auto chose {why}" if why else "")
