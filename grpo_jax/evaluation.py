"""Accuracy on the held-out part: greedy, and pass@k.

Enters: a sampler and its parameters, the held-out prompts, the reward functions. Leaves: shares of problems solved. A
    completion is right where the function that `rewards.accuracy` names gives at least `rewards.accuracy_threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError
from grpo_jax.data import PromptSource
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.policy import Policy
from grpo_jax.rewards import NamedFunction, check_functions, correct, resolve_functions
from grpo_jax.rewards.across_processes import score_together
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import evaluation_slots
from grpo_jax.run import Display
from grpo_jax.run.saved import load_run
from grpo_jax.types import Params


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out prompts.

    Attributes:
        accuracy: share of problems whose greedy completion is right; of samples, where several were drawn.
        problems: number of problems.
        reward_mean: mean weighted reward of the completions that have one.
        pass_at_k: share of problems for which at least one of the k samples is right; None for greedy.
    """

    accuracy: float
    problems: int
    reward_mean: float
    pass_at_k: float | None = None


def evaluate_held_out(
    sampler: Sampler,
    variables: Params,
    source: PromptSource,
    functions: Sequence[NamedFunction],
    tokenizer: Tokenizer,
    config: Config,
    *,
    samples: int | None = None,
) -> Evaluation | None:
    """Completes every held-out prompt and scores the completions.

    Args:
        samples: completions drawn of each prompt at the run's temperature; None takes one greedy completion.

    Returns:
        None where nothing is held out.
    """
    problems = len(source.held_out)
    if problems == 0:
        return None
    k = 1 if samples is None else samples
    temperature = 0.0 if samples is None else config.rollout.temperature
    slots = sampler.spread(evaluation_slots(config, problems, k))
    settings = replace(config.rollout, num_generations=k, temperature=temperature, slots=slots)
    (batch,) = source.held_out_batches(problems)
    rollout = sampler.sample(variables, batch.prompt_ids, settings, seed=config.train.seed, indices=batch.indices)
    scored = score_together(
        functions,
        config.rewards.weights,
        prompts=batch.prompts,
        completions=[tokenizer.decode(ids) for ids in rollout.completion_ids],
        completion_ids=rollout.completion_ids,
        columns=batch.columns,
        timeout_seconds=config.rewards.timeout_seconds,
        max_failed_share=config.rewards.max_failed_share,
    )
    right = correct(scored, config.rewards.accuracy, config.rewards.accuracy_threshold).reshape(problems, k)
    mean = float(np.mean(scored.rewards[scored.valid])) if scored.valid.any() else float("nan")
    pass_at_k = None if samples is None else float(np.mean(right.any(axis=1)))
    return Evaluation(float(np.mean(right)), problems, mean, pass_at_k)


def evaluate_run(config: Config | None = None, *, run_dir: str | Path | None = None, pass_k: int = 8) -> dict[str, Any]:
    """Evaluates a model of a config, or the last state of a run, and shows the result.

    Returns:
        `accuracy`, `pass_at_k`, `pass_k`, `reward_mean` and `held_out_problems`.

    Raises:
        ConfigError: nothing is held out, or settings are missing.
    """
    if run_dir is not None:
        config, policy = load_run(run_dir)
    else:
        if config is None or config.model.path is None:
            raise ConfigError("model.path: null; give a model folder or a hub id, or a run")
        policy = policy_of_config(config)
    display = Display(config.train.quiet)
    functions = resolve_functions(config.rewards.functions, max_completion_length=config.rollout.max_completion_length)
    tokenizer = policy.need_tokenizer()
    source = PromptSource.build(config, tokenizer, only_held_out=True)
    if len(source.held_out) == 0:
        raise ConfigError("data.eval_size: 0; nothing is held out: set it, or data.eval_split or data.eval_path")
    check_functions(functions, reward_columns(source, config), config.rewards.weights, config.rewards.accuracy)
    sampler = policy.sampler.announced(display.compiling)
    with display.busy(f"greedy completions of {len(source.held_out)} problems"):
        greedy = evaluate_held_out(sampler, policy.variables, source, functions, tokenizer, config)
    with display.busy(f"{pass_k} samples of each"):
        sampled = evaluate_held_out(sampler, policy.variables, source, functions, tokenizer, config, samples=pass_k)
    assert greedy is not None and sampled is not None
    result = {
        "accuracy": greedy.accuracy,
        "pass_at_k": sampled.pass_at_k,
        "pass_k": pass_k,
        "sampled_accuracy": sampled.accuracy,
        "reward_mean": greedy.reward_mean,
        "held_out_problems": greedy.problems,
    }
    display.note(
        f"greedy accuracy {greedy.accuracy:.1%}, pass@{pass_k} {sampled.pass_at_k:.1%}, mean of samples {sampled.accuracy:.1%}, "
        f"greedy reward {greedy.reward_mean:.3f}, {greedy.problems} held-out problems"
    )
    return result


def policy_of_config(config: Config) -> Policy:
    """The policy that a config starts from."""
    assert config.model.path is not None
    return Policy.from_pretrained(
        config.model.path,
        lora=config.lora,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        revision=config.model.revision,
        seed=config.train.seed,
        mesh=config.mesh,
    )


def reward_columns(source: PromptSource, config: Config) -> list[str]:
    """Names of the columns that reach the rewards."""
    table = source.train.table if len(source.train) else source.held_out.table
    return [name for name in table.columns if name != config.data.prompt_column]
