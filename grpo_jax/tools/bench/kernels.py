"""Counts the kernels that a rollout launches for a token, in the program that XLA's compiler for GPUs makes.

On a GPU it is the program that the benchmark ran. Elsewhere the same rollout is compiled for an H200, where the compiler for it is
installed: JAX's plugin for CUDA, which needs no GPU.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.targets import Machine, PlanError, machine_of
from grpo_jax.policy import Policy
from grpo_jax.rollout.future_calls import rollout_calls
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.tools.kernel_count import Loop, Module
from grpo_jax.tools.plan import uncached
from grpo_kernels.target import tracing_for

ABSENT_GPU = "h200"
"""The GPU that is compiled for where none is attached."""


@dataclass(frozen=True)
class TokenKernels:
    """Launches of one token of all slots, in the program that decodes a segment.

    Attributes:
        token: kernels of all layers, the head and the choice of the token.
        layer: kernels of one layer; None where the compiled program has no loop over layers.
        waits: loops of unknown length and branches in a token, for each of which the host waits.
        device: that it was compiled for.
    """

    token: int
    layer: int | None
    waits: int
    device: str


def count_kernels(config: Config, policy: Policy, sampler: Sampler, widths: Sequence[int]) -> TokenKernels | str:
    """Counts the kernels of a token.

    Args:
        sampler: has run a rollout.
        widths: that prompts are padded to.

    Returns:
        The count, or why there is none.
    """
    layers = policy.spec.layers
    if jax.default_backend() == "gpu":
        device = jax.devices()[0].device_kind
        counts = (kernels_of(program.as_text(), layers, device) for program in sampler.programs.decode_segment.executables)
        return max(counts, key=lambda count: count.token)
    try:
        text = compiled_segment(config, policy, machine_of(ABSENT_GPU), widths)
    except PlanError as error:
        return str(error)
    except RuntimeError as error:  # XLA's and its plugin's
        return f"the compiler for an {ABSENT_GPU.upper()} failed: {error}"
    return kernels_of(text, layers, f"{ABSENT_GPU.upper()} (not attached), jax {importlib.metadata.version('jax')}")


def compiled_segment(config: Config, policy: Policy, machine: Machine, widths: Sequence[int]) -> str:
    """Compiles the rollout's longest segment for a machine that need not be attached, from shapes; returns its HLO text."""
    with uncached(machine), tracing_for(machine.target):
        placement = placement_of(config, policy.spec, machine)
        shapes_only = replace(abstract_policy(config, policy.folder, policy.spec, placement), stop_ids=policy.stop_ids)
        sampler = Sampler.build(shapes_only.model, policy.stop_ids, quantization=config.model.quantization)
        rollout, variables = config.rollout, shapes_only.variables
        sampler.weight_settings(variables, machine.limit_bytes, rollout)
        shapes = sampler.shapes_for(rollout, config.train.prompts_per_step, widths, machine.limit_bytes)
        calls = rollout_calls(sampler, variables, rollout, shapes)
        *_, longest = (call for call in calls if call.program is sampler.programs.decode_segment)
        return longest.program.compiled(*longest.arguments, **longest.static).as_text()


def kernels_of(text: str, layers: int, device: str) -> TokenKernels:
    """Counts the kernels in the HLO text of a compiled segment.

    Args:
        layers: of the model.
    """
    loops = Module.parse(text, layers).loops
    token = max(loops, key=lambda loop: (layer_loop(loop, layers) is not None, loop.kernels))
    layer = layer_loop(token, layers)
    return TokenKernels(token.kernels, None if layer is None else layer.kernels, len(token.waits), device)


def layer_loop(token: Loop, layers: int) -> Loop | None:
    """Returns the loop over layers inside a loop over tokens."""
    return next((loop for loop in token.inner if loop.trip_count == layers), None)
