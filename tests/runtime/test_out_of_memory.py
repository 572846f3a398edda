"""A device without memory: the error names the program and the settings to change, and nothing is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.errors import JaxRuntimeError
from tiny_runs import additions, config_of, letters

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.runtime.out_of_memory import OutOfMemoryError, explaining_memory
from grpo_jax.runtime.programs import Program

XLA_SAYS = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nBufferAssignment: ..."


def exhausted(*_: Any, **__: Any) -> Any:
    raise JaxRuntimeError(XLA_SAYS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("update", ["train.micro_batch_tokens auto", "model.remat layer"]),
        ("rollout: prompts", ["rollout.slots", "optim.offload"]),
        ("reading the weights", ["model.quantization", "mesh"]),
        ("another program", ["train.micro_batch_tokens", "rollout.slots"]),
    ],
)
def test_the_error_names_what_was_computed_and_the_settings_to_change(name: str, settings: list[str]) -> None:
    with pytest.raises(OutOfMemoryError) as caught, explaining_memory(name):
        exhausted()
    said = str(caught.value)
    assert said.startswith(f"{name}: the device is out of memory")
    assert all(setting in said for setting in [*settings, "17179869184 bytes", "--resume", "grpo-jax plan"])
    assert cli.is_users(caught.value)


def test_a_program_that_finds_no_memory_is_called_once() -> None:
    calls: list[int] = []

    def observe(x: jax.Array) -> jax.Array:
        calls.append(1)
        return exhausted()

    with pytest.raises(OutOfMemoryError, match=r"^rollout: .*rollout\.slots"):
        Program("rollout", observe)(jnp.zeros(2))
    assert calls == [1]


def test_other_errors_of_xla_are_unchanged() -> None:
    with pytest.raises(JaxRuntimeError, match="INTERNAL"), explaining_memory("update"):
        raise JaxRuntimeError("INTERNAL: broken")


def test_a_run_ends_with_the_settings_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes where results are read, as on an accelerator: not from a program."""
    calls: list[int] = []

    def no_memory(*_: Any, **__: Any) -> Any:
        calls.append(1)
        return exhausted()

    monkeypatch.setattr("grpo_jax.rollout.sampler.Sampler.sample", no_memory)
    config = config_of(tmp_path / "run", data={"eval_size": 0})
    with pytest.raises(OutOfMemoryError, match=r"^a step: .*train\.micro_batch_tokens auto.*rollout\.slots"):
        gx.train(config, dataset=additions(), reward_funcs=letters)
    assert calls == [1]
