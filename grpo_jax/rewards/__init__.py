"""Reward functions: their interface, the built-in ones, and the scoring of a batch on the host. Imports no JAX.

`protocol` defines the interface, `builtin` the ready-made functions, `resolve` finds functions by name, `scoring` adds values.
`runner` decides where a function runs: in this process (`calling`) or in one of its own (`pool`, `worker_process`, `worker`).
`answers` reads the final number of a text. `code` runs a completion's code, confined by `sandbox`. `judge` asks a language
model.
"""

from grpo_jax.rewards.builtin import (
    BUILTINS,
    code_execution,
    exact_match,
    llm_judge,
    math_verify,
    number_match,
    overlong_penalty,
    regex_format,
    repetition_penalty,
    tag_format,
)
from grpo_jax.rewards.protocol import Failure, NamedFunction, RewardError, RewardFunction, ScoredBatch, check_functions
from grpo_jax.rewards.resolve import resolve_functions
from grpo_jax.rewards.runner import RewardRunner, runner_of
from grpo_jax.rewards.scoring import check_failed, correct, failure_lines, reward_metrics, score, warning_lines

__all__ = [
    "BUILTINS",
    "Failure",
    "NamedFunction",
    "RewardError",
    "RewardFunction",
    "RewardRunner",
    "ScoredBatch",
    "check_failed",
    "check_functions",
    "code_execution",
    "correct",
    "exact_match",
    "failure_lines",
    "llm_judge",
    "math_verify",
    "number_match",
    "overlong_penalty",
    "regex_format",
    "repetition_penalty",
    "resolve_functions",
    "reward_metrics",
    "runner_of",
    "score",
    "tag_format",
    "warning_lines",
]
