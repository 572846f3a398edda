"""Runs on eight CPU devices: `train`, `sft`, `Policy` and a resumed run with a mesh. A program: devices are made at the start.

`python tests/support/mesh_run.py FOLDER PART...` prints one JSON object with these parts: curves, completions and
log-probabilities, of one device and of meshes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import additions, arrays, build_model, records, run, settings, tiny_model

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grpo_jax.policy import Policy
from grpo_jax.run.saved import load_run
from grpo_jax.training import sft

ONE, FOUR, SPREAD = {"data": 1, "fsdp": 1}, {"data": 2, "fsdp": 2}, {"data": 2, "fsdp": -1}
ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
IDS = [[5, 6, 7], [8, 9], [10]]


def config_of(folder: Path, mesh: dict[str, int], **sections: dict[str, Any]) -> Config:
    """Two steps of eight prompts, a checkpoint after each."""
    train = {"prompts_per_step": 8, "save_every": 1, "keep_checkpoints": 3} | sections.pop("train", {})
    return Config.from_dict(settings(folder, train=train, mesh=mesh, **sections))


def curve(history: list[dict[str, Any]]) -> list[list[float]]:
    """Loss, entropy and gradient norm of each step."""
    return [[step[name] for name in ("loss", "entropy", "grad_norm")] for step in history]


def trained(folder: Path, mesh: dict[str, int]) -> dict[str, Any]:
    """A run with adapters: its curve, tokens and what it printed; and its policy, read back."""
    finished = run(config_of(folder, mesh, data={"eval_size": 3}))
    _, policy = load_run(folder)
    return {
        "curve": curve(finished.result.history),
        "compile_seconds": [step["compile_seconds"] for step in finished.result.history],
        "completions": [row["completion"] for row in records(folder / "completions.jsonl")],
        "printed": [line for line in finished.printed.splitlines() if "mesh" in line],
        "logprobs": [row.tolist() for row in policy.logprobs(IDS, IDS)],
        "evaluations": [line["accuracy"] for line in records(folder / "evaluations.jsonl")],
        "adapter": float(np.abs(np.asarray(jax.device_get(policy.adapters["layers"]["q_proj"]["b"]))).sum()),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """One step on eight devices, the second on four; the end of it read on one."""
    held_out = {"eval_size": 3}
    run(config_of(folder, SPREAD, train={"steps": 1}, data=held_out))
    four = run(config_of(folder, FOUR, data=held_out), resume=True).result
    one = run(config_of(folder, ONE, data=held_out), resume=True).result
    adapters = [arrays(result.policy.adapters) for result in (four, one)]
    devices = [{len(leaf.sharding.device_set) for leaf in jax.tree.leaves(result.policy.adapters)} for result in (four, one)]
    same = [adapters[0][name].tobytes() == adapters[1][name].tobytes() for name in adapters[0]]
    return {"curve": curve(one.history), "same": same, "devices": [max(sizes) for sizes in devices]}


def mini_batches(folder: Path) -> dict[str, Any]:
    """Two updates a step on one device, on eight, and on eight and then four; the reference and the bonus's weight change too."""
    sections = {"objective": {"beta": 0.1, "entropy_coef": 0.01, "entropy_target": 9.0}}
    changing = {"prompts_per_step": 16, "updates_per_rollout": 2, "reference_every": 1, "reference_mix": 0.5}

    def of(name: str, mesh: dict[str, int], *, resume: bool = False, **train: Any) -> Any:
        return run(config_of(folder / name, mesh, train=changing | train, **sections), resume=resume).result

    of("resumed", SPREAD, steps=1)
    results = [of("one", ONE), of("spread", SPREAD, micro_batch_tokens="auto"), of("resumed", FOUR, resume=True)]
    return {
        "curves": [curve(result.history) for result in results],
        "kl": [[step["kl_divergence"] for step in result.history] for result in results],
        "weights": [[step["entropy_coef"] for step in result.history] for result in results],
    }


def four_bits(folder: Path, mesh: dict[str, int]) -> dict[str, Any]:
    """A run on an int4 base."""
    model = {"path": str(build_model(folder / "model", vocab_size=264)), "quantization": "int4"}
    finished = run(config_of(folder / "run", mesh, model=model))
    return {
        "curve": curve(finished.result.history),
        "completions": [row["completion"] for row in records(folder / "run" / "completions.jsonl")],
    }


def supervised(folder: Path, mesh: dict[str, int]) -> list[list[float]]:
    """A warm-up of every weight."""
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in additions()]
    return curve(sft(config_of(folder, mesh, lora={"rank": 0}), dataset=rows).history)


def refusals(folder: Path) -> list[str]:
    """What is said of a mesh that does not fit."""
    said = []
    policy = Policy.from_pretrained(tiny_model(), lora=LoraConfig(rank=4, alpha=8.0), mesh=MeshConfig(fsdp=2))
    for mesh, train, given in (
        ({"fsdp": 8}, {"prompts_per_step": 4}, {}),
        ({"tensor": 4, "fsdp": 2}, {}, {}),
        ({"fsdp": 16}, {}, {}),
        ({"fsdp": 4}, {}, {"policy": policy}),
    ):
        try:
            run(config_of(folder, mesh, train=train), **given)
        except ConfigError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    place = Path(sys.argv[1])
    parts: dict[str, Callable[[], Any]] = {
        "refusals": lambda: refusals(place / "refused"),
        "one": lambda: trained(place / "one", ONE),
        "auto": lambda: trained(place / "auto", {}),
        "shards": lambda: trained(place / "shards", {"fsdp": -1}),
        "spread": lambda: trained(place / "spread", SPREAD),
        "resumed": lambda: resumed(place / "resumed"),
        "mini_batches": lambda: mini_batches(place / "mini-batches"),
        "four_bits": lambda: [four_bits(place / name, mesh) for name, mesh in (("int4-one", ONE), ("int4-spread", ALL_AXES))],
        "supervised": lambda: [supervised(place / name, mesh) for name, mesh in (("sft-one", ONE), ("sft-spread", SPREAD))],
    }
    with quick_compiling(), shared_programs():
        print(json.dumps({name: parts[name]() for name in sys.argv[2:]}))
