"""Runs whose rollouts have devices of their own, on eight CPU devices. A program: devices are made at the start.

`python tests/support/rollout_mesh_run.py FOLDER PART...` prints one JSON object with these parts.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import additions, arrays, assert_same_arrays, build_model, records, run, saved_weights, settings, tiny_model

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grpo_jax.policy import Policy
from grpo_jax.rollout.loop import LoopState, RolloutLoop
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.weights import gather_weights
from grpo_jax.run.saved import load_run
from grpo_jax.runtime.mesh import make_layout, make_rollout_layout
from grpo_jax.runtime.mesh_copies import copied_to_mesh
from grpo_jax.runtime.programs import Program
from grpo_jax.tools.plan import json_of, make_plan, rows_of
from grpo_jax.weights.axes import model_axes

ONE = {"data": 1, "fsdp": 1}
OWN = {"data": 2, "fsdp": 2, "rollout": {"data": 2, "tensor": 2}}
"""Adapters are gathered over fsdp and split over tensor on their way."""
PAIR = {"fsdp": 1, "rollout": {"data": 1}}
STEPS = 4
LONG_SECONDS = 120.0
"""More than any machine needs; a wait that lasts so long has failed."""


def config_of(folder: Path, mesh: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """Four steps of four prompts with staleness 1, each rollout in two segments."""
    train = {"prompts_per_step": 4, "steps": STEPS, "max_staleness": 1, "save_every": 2, "keep_checkpoints": 9, "eval_every": 2}
    base: dict[str, Any] = {"model": {"path": str(model_folder(folder.parent))}, "data": {"eval_size": 3}, "mesh": mesh}
    base |= {"rollout": {"segment": 4}, "objective": {"beta": 0.1}} | sections
    return Config.from_dict(settings(folder, **base | {"train": train | sections.get("train", {})}))


def model_folder(place: Path) -> Path:
    """The tiny model with a vocabulary that two devices can share; one folder for all runs, as a run resumes only with its own."""
    folder = place / "model"
    return folder if folder.is_dir() else build_model(folder, vocab_size=264)


def by_tokens(completion_ids: list[list[int]]) -> list[float]:
    """A reward that hardly ever gives two completions the same."""
    return [sum(ids) % 997 / 997 for ids in completion_ids]


def outcome(folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run left: curve, completions, evaluations, and the sum of its adapters."""
    names = ("loss", "entropy", "grad_norm", "kl_divergence", "sampling/staleness", "clip_ratio/region")
    return {
        "curve": [[step[name] for name in names] for step in history],
        "compile_seconds": [step["compile_seconds"] for step in history],
        "completions": [row["completion"] for row in records(folder / "completions.jsonl")],
        "evaluations": [[line["accuracy"], line["reward/mean"]] for line in records(folder / "evaluations.jsonl")],
        "weights": [float(np.abs(leaf).sum()) for _, leaf in sorted(arrays(load_run(folder)[1].variables).items())],
    }


def trained(folder: Path, mesh: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A run."""
    finished = run(config_of(folder, mesh, **sections), reward_funcs=by_tokens)
    printed = [line for line in finished.printed.splitlines() if "mesh" in line]
    return outcome(folder, finished.result.history) | {"printed": printed}


def in_flight(folder: Path) -> dict[str, Any]:
    """A run whose every update is made between two segments of the next step's rollout, or it does not go on."""
    began, updated = ([threading.Event() for _ in range(STEPS)] for _ in range(2))
    number_of, order, made = dict[int, int](), list[str](), list[int]()
    real_sample, real_collect, real_call = Sampler.sample, RolloutLoop.collect, Program.__call__

    def sample(self: Sampler, *arguments: Any, **named: Any) -> Any:
        number_of[threading.get_ident()] = named.get("step", 0) if threading.current_thread().name == "rollout" else 0
        return real_sample(self, *arguments, **named)

    def collect(self: RolloutLoop, state: LoopState) -> None:
        number = number_of[threading.get_ident()]
        if number:
            order.append(f"rollout {number}")
            began[number].set()
            assert updated[number - 1].wait(LONG_SECONDS), "no update is made while the next step is sampled"
        real_collect(self, state)

    def call(self: Program, *arguments: Any, **static: Any) -> Any:
        if self.name != "update":
            return real_call(self, *arguments, **static)
        number = len(made)
        made.append(number)
        if number + 1 < STEPS:
            assert began[number + 1].wait(LONG_SECONDS), "the next step is not sampled while an update is made"
        results = jax.block_until_ready(real_call(self, *arguments, **static))
        order.append(f"update {number}")
        updated[number].set()
        return results

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sampler, "sample", sample)
        patched.setattr(RolloutLoop, "collect", collect)
        patched.setattr(Program, "__call__", call)
        return trained(folder, OWN) | {"order": order}


def resumed(folder: Path) -> dict[str, Any]:
    """A run, and the same one interrupted in step 3, while step 4 is sampled, with a checkpoint of step 2, and continued."""
    calls = list[int]()

    @functools.wraps(by_tokens)
    def stopping(completion_ids: list[list[int]]) -> list[float]:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_tokens(completion_ids)

    whole, parts = (config_of(folder / name, OWN, data={"eval_size": 0}) for name in ("whole", "parts"))
    run(whole, reward_funcs=by_tokens)
    with pytest.raises(KeyboardInterrupt):
        run(parts, reward_funcs=stopping)
    threads = [thread.name for thread in threading.enumerate() if thread.name == "rollout"]
    run(parts, reward_funcs=by_tokens, resume=True)
    assert_same_arrays(saved_weights(folder / "whole"), saved_weights(folder / "parts"))
    completions = [(folder / name / "completions.jsonl").read_bytes() for name in ("whole", "parts")]
    return {"completions": completions[0] == completions[1], "threads": threads}


def copies(folder: Path) -> dict[str, Any]:
    """Weights in int8 and adapters of several meshes on others, copied while nothing can be read on the host."""
    found: dict[str, Any] = {}

    def refused(_: Any) -> Any:
        raise AssertionError("an array was read on the host")

    for name, mesh in {
        "fsdp to copies": {"data": 1, "fsdp": 4, "rollout": {"data": 4}},
        "fsdp to tensor": {"data": 2, "fsdp": 2, "rollout": {"data": 1, "tensor": 2}},
        "tensor to tensor": {"data": 1, "fsdp": 2, "tensor": 2, "rollout": {"data": 2, "tensor": 2}},
        "tensor to copies": {"data": 1, "fsdp": 2, "tensor": 2, "rollout": {"data": 3}},
        "one to one": {"fsdp": 1, "rollout": {"data": 1}},
    }.items():
        settings = MeshConfig(**mesh)
        source, target = make_layout(settings), make_rollout_layout(settings)
        assert target is not None
        policy = Policy.from_pretrained(model_folder(folder), lora=LoraConfig(rank=4), quantization="int8", mesh=MeshConfig(**mesh))
        assert policy.layout == source
        axes = model_axes(policy.spec)
        before = jax.tree.leaves(policy.on_host(policy.variables))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ArrayImpl, "_value", property(refused))
            copied = {part: copied_to_mesh(tree, source, target, axes) for part, tree in policy.variables.items()}
            jax.block_until_ready(copied)
            if name == "fsdp to copies":  # what JAX does by itself
                with pytest.raises(AssertionError, match="read on the host"):
                    jax.device_put(policy.params, target.sharding())
            jax.block_until_ready(gather_weights(source, policy.spec, policy.variables))  # as a rollout on the same devices does
        after = jax.tree.leaves(target.get(copied))
        devices = {device.id for leaf in jax.tree.leaves(copied) for device in leaf.sharding.device_set}
        found[name] = {
            "same": all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)),
            "devices": sorted(devices),
            "largest_share": max(leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(copied)),
        }
    return found


def planned(folder: Path) -> dict[str, Any]:
    """What `plan` says of two devices that sample and four that update, and the bytes of the frozen base on one of each."""
    mesh = {"data": 1, "fsdp": 4, "rollout": {"data": 1, "tensor": 2}}
    made = make_plan(config_of(folder / "run", mesh, model={"path": str(model_folder(folder))}), "cpu")
    policy = Policy.from_pretrained(model_folder(folder), lora=LoraConfig(rank=4), mesh=MeshConfig(**mesh))
    layout = make_rollout_layout(MeshConfig(**mesh))
    assert layout is not None
    copied = copied_to_mesh(policy.params, policy.layout, layout, model_axes(policy.spec))

    def bytes_of(tree: Any) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    return json_of(made) | {"shown": dict(rows_of(made))["mesh"], "base_bytes": [bytes_of(policy.params), bytes_of(copied)]}


def refusals(folder: Path) -> list[str]:
    """What is said of a mesh of the rollout that does not fit."""
    said = []
    policy = Policy.from_pretrained(tiny_model(), lora=LoraConfig(rank=4, alpha=8.0), mesh=MeshConfig(fsdp=8))
    for mesh, given in (
        ({"rollout": {"data": 4, "tensor": 2}}, {}),
        ({"data": 4, "fsdp": 2, "rollout": {"data": 2}}, {}),
        ({"rollout": {"tensor": 4}}, {}),
        ({"rollout": {"data": 2}}, {"policy": policy, "dataset": additions()}),
    ):
        try:
            run(config_of(folder, mesh), reward_funcs=by_tokens, **given)
        except ConfigError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    place = Path(sys.argv[1])
    full, auto = {"lora": {"rank": 0}}, {"train": {"micro_batch_tokens": "auto"}}
    parts: dict[str, Callable[[], Any]] = {
        "refusals": lambda: refusals(place / "refused"),
        "one": lambda: trained(place / "one", ONE),
        "own": lambda: in_flight(place / "own"),
        "resumed": lambda: resumed(place / "resumed"),
        "full": lambda: [trained(place / "full", ONE, **full), trained(place / "pair", PAIR, **full | auto)],
        "copies": lambda: copies(place / "copies"),
        "planned": lambda: planned(place / "planned"),
    }
    with quick_compiling(), shared_programs():
        print(json.dumps({name: parts[name]() for name in sys.argv[2:]}))
