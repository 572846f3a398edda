"""Environments and tools: what answers the model between the turns of an episode. Nothing here imports JAX.

`protocol` is the interface. `tools` and `formats` make Python functions callable for the model, `tool_environment` answers its
calls. `verifiers` and `openenv` drive environments of these packages. `conversation` finds the tokens between turns, `pool` calls
environments beside the sampler, `resolve` finds what settings name. `rollout.environment_turns` drives the episodes of a step with
them.
"""

from grpo_jax.environments.arithmetic import calculator
from grpo_jax.environments.code_tool import python_tool
from grpo_jax.environments.number_guessing import NumberGuessing
from grpo_jax.environments.openenv import OpenEnv
from grpo_jax.environments.protocol import Environment, EnvironmentFactory, Message, Step
from grpo_jax.environments.verifiers import from_verifiers

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "Message",
    "NumberGuessing",
    "OpenEnv",
    "Step",
    "calculator",
    "from_verifiers",
    "python_tool",
]
