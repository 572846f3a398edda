"""Accuracy on the held-out part and on the sets of `eval.sets`: greedy with its interval, pass@k and majority@k.

A completion is right where `rewards.accuracy` gives `rewards.accuracy_threshold`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError, check_environment
from grpo_jax.data.evaluation_sets import evaluation_sets, main_rows
from grpo_jax.data.source import PromptSource
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.protocol import EnvironmentFactory
from grpo_jax.learner.reward_models import load_reward_models, with_reward_models
from grpo_jax.policy import Policy, with_template
from grpo_jax.rewards import (
    NamedFunction,
    RewardRunner,
    check_functions,
    correct,
    resolve_functions,
    reward_metrics,
    runner_of,
    warning_lines,
)
from grpo_jax.rewards.accuracy import majority_at, pass_at
from grpo_jax.rewards.across_processes import score_across_processes
from grpo_jax.rewards.normalization import sum_metrics
from grpo_jax.rollout.environment_turns import EpisodeDriver, reward_rows
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import RolloutShapes, evaluation_slots
from grpo_jax.run.display import Display
from grpo_jax.run.evaluations import OF_COMPLETIONS, Evaluation, evaluation_metrics, sample_counts
from grpo_jax.run.given_policy import config_with_policy
from grpo_jax.run.saved import load_run
from grpo_jax.run.step_metrics import length_metrics
from grpo_jax.runtime import distributed
from grpo_jax.runtime.compilation_cache import use_compilation_cache
from grpo_jax.types import Params


def evaluate_held_out(
    sampler: Sampler,
    variables: Params,
    source: PromptSource,
    functions: Sequence[NamedFunction],
    tokenizer: Tokenizer,
    config: Config,
    *,
    samples: int | None = None,
    shapes: RolloutShapes | None = None,
    runner: RewardRunner | None = None,
    display: Display | None = None,
    driver: EpisodeDriver | None = None,
) -> Evaluation | None:
    """Completes every held-out prompt and scores the completions.

    Args:
        samples: completions drawn of each prompt at the run's temperature; None takes one greedy completion.
        shapes: of the run's evaluations; None chooses them for these prompts.
        runner: calls the functions; None calls them in this process.
        display: shows failures of rewards, and what is waited for; None shows nothing.
        driver: of episodes; None where a completion is a single answer.

    Returns:
        None where nothing is held out.
    """
    problems = len(source.held_out)
    if problems == 0:
        return None
    k = 1 if samples is None else samples
    temperature = 0.0 if samples is None else config.rollout.temperature
    slots = sampler.round_up_slots(evaluation_slots(config, problems, k))
    settings = replace(config.rollout, num_generations=k, temperature=temperature, slots=slots)
    (batch,) = source.held_out_batches(problems)
    turns = None if driver is None else driver.begin(batch, k)
    ids = batch.prompt_ids if turns is None else turns.prompts.prompt_ids
    rollout = sampler.sample(variables, ids, settings, seed=config.train.seed, indices=batch.indices, shapes=shapes, turns=turns)
    rows = reward_rows(batch, rollout, turns, tokenizer.decode)
    display, texts = display or Display(silent=True), rows.texts
    with display.waiting(list[str] if runner is None else runner.pending):
        scored = score_across_processes(
            distributed if distributed.is_multiprocess() else None,
            functions,
            config.rewards.weights,
            prompts=rows.prompts,
            completions=rows.completions,
            completion_ids=rollout.completion_ids,
            columns=rows.columns,
            group=k,
            timeout_seconds=config.rewards.timeout_seconds,
            max_failed_share=config.rewards.max_failed_share,
            runner=runner,
        )
    for line in warning_lines(scored):
        display.warning(f"held-out completions: {line}")
    right = correct(scored, config.rewards.accuracy, config.rewards.accuracy_threshold).reshape(problems, k)
    mean = float(np.mean(scored.rewards[scored.valid])) if scored.valid.any() else float("nan")
    details = {"reward/std": sum_metrics(scored)["reward/std"], **reward_metrics(scored), **length_metrics(rollout)}
    details = {name: value for name, value in details.items() if name in OF_COMPLETIONS or name.endswith(("/mean", "/std"))}
    if samples is None:
        return Evaluation(float(np.mean(right)), problems, mean, details=details)
    estimates = {size: pass_at(right, size) for size in sample_counts(k)}
    return Evaluation(float(np.mean(right)), problems, mean, estimates[k], estimates, majority_at(texts, right), details)


def evaluate(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    eval_dataset: Any = None,
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    environment: EnvironmentFactory | EpisodeInputs | None = None,
    tools: Sequence[Callable[..., Any]] = (),
    run_dir: str | Path | None = None,
    best: bool = False,
    pass_k: int = 8,
) -> dict[str, Any]:
    """Evaluates a policy, the model of a config, or the newest checkpoint of a run on held-out problems, and shows the result.

    Args:
        config: the settings; not needed with `run_dir`.
        policy: evaluated instead of `model.path`.
        eval_dataset: held-out rows, instead of `data.eval_split` and `data.eval_path`; or a dict of several sets by name, of which
            the first is the main one.
        reward_funcs: one function or several, instead of `rewards.functions`.
        environment, tools: as `Trainer` takes them.
        run_dir: a run, evaluated with its own settings.
        best: of this run, the checkpoint of the best evaluation (`train.best_metric`) instead of the newest.
        pass_k: samples per problem for pass@k and majority@k.

    Returns:
        `accuracy`, `accuracy_low` and `accuracy_high` (its 95% interval), `pass_at_k`, `pass_k`, `pass_at` (estimates for smaller k
        too), `majority_at_k`, `sampled_accuracy`, `reward_mean`, `held_out_problems`, and `metrics`, under the names of
        evaluations.jsonl; `sets`, the same for each of `eval.sets` and of the further sets in `eval_dataset`.

    Raises:
        ConfigError: nothing is held out, or settings are missing.
    """
    if run_dir is not None:
        config, policy = load_run(run_dir, best=best)
    config = config or Config()
    use_compilation_cache(config.train.compilation_cache)
    if policy is None:
        if config.model.path is None:
            raise ConfigError("model.path: null; give a model folder or a hub id, or a run")
        policy = Policy.from_config(replace(config, mesh=replace(config.mesh, rollout=None)))  # nothing is updated
    elif run_dir is None:
        config, policy = config_with_policy(config, policy), with_template(policy, config)
    display = Display(config.train.quiet)
    given = [] if reward_funcs is None else [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    inputs = environment if isinstance(environment, EpisodeInputs) else EpisodeInputs(environment, tools)
    check_environment(config.environment, has_environment=inputs.environment is not None, has_tools=inputs.gives_tools)
    setup = EpisodeSetup.read(config, inputs, given or config.rewards.functions)
    config, entries, longest = setup.config, with_reward_models(setup.entries), config.rollout.max_completion_length
    functions = resolve_functions(entries, max_completion_length=longest)
    tokenizer = policy.need_tokenizer()
    rows, further = main_rows(eval_dataset)
    source = PromptSource.build(setup.source_config(tokenizer), tokenizer, None, rows, only_held_out=True)
    if len(source.held_out) == 0:
        raise ConfigError("data.eval_size: 0; nothing is held out: set it, or data.eval_split or data.eval_path")
    sets = {"": source, **evaluation_sets(setup.source_config(tokenizer), tokenizer, further)}
    for held_out in sets.values():
        columns = [*reward_columns(held_out, config), *setup.columns]
        check_functions(functions, columns, config.rewards.weights, config.rewards.accuracy)
    load_reward_models(functions, policy.layout, display.compiling)
    driver = setup.driver(tokenizer, several_processes=distributed.is_multiprocess())
    if driver is not None:
        policy.spec.check_episodes()
    sampler = policy.sampler.announcing(display.compiling)
    results: dict[str, dict[str, Any]] = {}
    with runner_of(config.rewards, entries, functions, longest, display.note) as runner:
        for name, held_out in sets.items():
            evaluated = functools.partial(
                evaluate_held_out,
                sampler,
                policy.variables,
                held_out,
                functions,
                tokenizer,
                config,
                runner=runner,
                display=display,
                driver=driver,
            )
            title = f"{name}: " if name else ""
            with display.busy(f"{title}greedy completions of {len(held_out.held_out)} problems"):
                greedy = evaluated()
            with display.busy(f"{title}{pass_k} samples of each"):
                sampled = evaluated(samples=pass_k)
            assert greedy is not None
            assert sampled is not None
            results[name] = result_of(greedy, sampled, pass_k)
            display.note(title + result_line(results[name]))
    main = results.pop("")
    return main | ({"sets": results} if results else {})


def result_of(greedy: Evaluation, sampled: Evaluation, pass_k: int) -> dict[str, Any]:
    """What `evaluate` returns for one set."""
    low, high = greedy.interval
    return {
        "accuracy": greedy.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at_k": sampled.pass_at_k,
        "pass_k": pass_k,
        "pass_at": sampled.pass_at,
        "majority_at_k": sampled.majority_at_k,
        "sampled_accuracy": sampled.accuracy,
        "reward_mean": greedy.reward_mean,
        "held_out_problems": greedy.problems,
        "metrics": evaluation_metrics(greedy, sampled),
    }


def result_line(result: dict[str, Any]) -> str:
    """One line that shows a result."""
    k, passes = result["pass_k"], result["pass_at"]
    more = "".join(f", pass@{size} {value:.1%}" for size, value in passes.items() if 1 < size < k)
    return (
        f"greedy accuracy {result['accuracy']:.1%} (95% interval {result['accuracy_low']:.1%} to {result['accuracy_high']:.1%})"
        f"{more}, pass@{k} {result['pass_at_k']:.1%}, majority@{k} {result['majority_at_k']:.1%}, "
        f"mean of samples {result['sampled_accuracy']:.1%}, greedy reward {result['reward_mean']:.3f}, "
        f"{result['held_out_problems']} held-out problems"
    )


def reward_columns(source: PromptSource, config: Config) -> list[str]:
    """Names of the columns that reach the rewards."""
    columns = source.train.table.columns if len(source.train) else source.held_out.table.columns
    if source.stream is not None:
        columns = source.stream.columns
    return [name for name in columns if name != config.data.prompt_column]
