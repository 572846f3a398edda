"""Reads, checks and builds what a GRPO step needs. Compiles nothing, except with `train.micro_batch_tokens: auto`."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import optax

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.checks import require
from grpo_jax.data.evaluation_sets import evaluation_sets, main_rows
from grpo_jax.data.source import PromptSource
from grpo_jax.evaluation import reward_columns
from grpo_jax.fit.auto import fit_run
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.micro_batch import is_auto, row_tokens, sizes_of_rows, text_lengths
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.learner.reward_models import load_reward_models, with_reward_models
from grpo_jax.learner.step import train_step
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rewards import NamedFunction, check_functions, resolve_functions, runner_of
from grpo_jax.rewards.protocol import DeviceReward
from grpo_jax.rollout.dispatch_ahead import dispatches_ahead
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.run.display import Display
from grpo_jax.run.doctor.ranges import check_stop_on, setting_notes
from grpo_jax.run.evaluations import check_evaluation
from grpo_jax.runtime import distributed
from grpo_jax.runtime.memory import in_device_memory
from grpo_jax.runtime.mesh import make_rollout_layout
from grpo_jax.runtime.programs import Program
from grpo_jax.steps.grpo import GrpoStep, Prompts
from grpo_jax.steps.prompt_choice import PromptChoice
from grpo_jax.steps.refilling import replaces_at_once
from grpo_jax.steps.rollout_mesh import RolloutMesh
from grpo_jax.steps.setup import mesh_line, placed_policy, read_tokenizer, with_steps
from grpo_jax.steps.stream_choice import StreamChoice
from grpo_jax.types import Frozen, Params
from grpo_jax.weights.lora_start import starts_as_base

TRUNCATED_LINE = (
    "log-probabilities use the truncated distribution that tokens are sampled from (top_p, top_k, min_p); the backward pass of the "
    "update then computes logits again and is slower. objective.match_sampling: false uses the full distribution"
)


def read_grpo_step(
    config: Config,
    policy: Policy | None,
    dataset: Any,
    eval_dataset: Any,
    rewards: list[Any],
    display: Display,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFunction | None = None,
    given: EpisodeInputs | None = None,
) -> GrpoStep:
    """Reads and checks everything that can be wrong, cheapest first, and the weights last; see `Trainer` for the arguments."""
    longest = config.rollout.max_completion_length
    setup = EpisodeSetup.read(config, given or EpisodeInputs(), rewards or config.rewards.functions)
    config, entries = setup.config, with_reward_models(setup.entries)
    functions = resolve_functions(entries, max_completion_length=longest)
    tokenizer = policy.need_tokenizer() if policy is not None else read_tokenizer(config, display)
    eval_dataset, further = main_rows(eval_dataset)
    source = PromptSource.build(setup.source_config(tokenizer), tokenizer, dataset, eval_dataset)
    assert tokenizer is not None  # else there is no source
    driver = setup.driver(tokenizer, several_processes=distributed.is_multiprocess())
    if driver is not None and config.train.max_staleness:
        raise ConfigError("train.max_staleness is 1: use 0 with environments and tools: a checkpoint cannot hold an environment")
    if (line := setup.hidden_tools(tokenizer)) is not None:
        display.warning(line)
    if driver is not None and setup.adds_to_prompts:
        longest_prompt = setup.longest_prompt(*source.prompt_lengths)
        source, driver = replace(source, longest_prompt=longest_prompt), replace(driver, longest_prompt=longest_prompt)
    display.note(prompts_line(source, config.rollout.max_prompt_length))
    check_stop_on(config, len(source.held_out))
    for line in setting_notes(config, own_optimizer=optimizer is not None):
        display.note(line)
    config = with_steps(config, len(source.train), display)
    fix = "use 0 with data.streaming: a resumed run reads the prompts of the next step again, which a stream cannot"
    require(source.stream is None or not config.train.max_staleness, "train.max_staleness", config.train.max_staleness, fix)
    choice = PromptChoice(source, config) if source.stream is None else StreamChoice(source, config)
    sets = evaluation_sets(setup.source_config(tokenizer), tokenizer, further)
    check_evaluation(config, functions, sets, len(source.held_out))
    for held_out in (source, *sets.values()):
        columns = [*reward_columns(held_out, config), *setup.columns]
        check_functions(functions, columns, config.rewards.weights, config.rewards.accuracy)
    if config.mesh.rollout is not None and config.train.overlap:
        names = [name for name, function in functions if isinstance(function, DeviceReward) and name in config.rewards.by_group]
        fix = "leave these out with mesh.rollout, or use train.overlap false: they would score on the devices that are updating"
        require(not names, "rewards.by_group", names, fix)
    runner = runner_of(config.rewards, entries, functions, longest, display.note)
    runner.start()  # its processes start while the weights are read
    policy = placed_policy(config, policy, display)
    if driver is not None:
        policy.spec.check_episodes()
    load_reward_models(functions, policy.layout, display.compiling)
    at_once = replaces_at_once(config, runner, functions, episodes=driver is not None)
    options: dict[str, Any] = {"optimizer": optimizer, "loss_fn": loss_fn, "episodes": driver is not None, "refills": at_once}
    step = build_grpo_step(config, policy, source, functions, display, **options)
    return replace(step, runner=runner, choice=choice, driver=driver, sets=sets, at_once=at_once)


def build_grpo_step(
    config: Config,
    policy: Policy,
    source: Prompts,
    functions: list[NamedFunction],
    display: Display,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFunction | None = None,
    episodes: bool = False,
    refills: bool = False,
) -> GrpoStep:
    """Builds the step from what has been read and checked. Compiles nothing, except with `train.micro_batch_tokens: auto`."""
    if config.rollout.dispatch_ahead == "auto":
        display.note(f"rollout.dispatch_ahead: auto resolved to {dispatches_ahead(config.rollout, episodes=episodes)}")
    base = {} if policy.adapters is None else policy.params
    frozen = Frozen(base, reference_of(policy, config))
    rollout_mesh = rollout_mesh_of(policy, config, display)
    make_learner = functools.partial(grpo_learner, optimizer=optimizer, loss_fn=loss_fn)
    lengths = text_lengths(config, source.prompt_lengths[0])
    if is_auto(config):
        problems = len(source.held_out) if isinstance(source, PromptSource) else 0
        widest = with_widest_prompts(config, source)
        options: dict[str, Any] = {} if rollout_mesh is None else {"rollout_layout": rollout_mesh.layout}
        options |= {"episodes": episodes, "refills": refills}
        fit = fit_run(widest, policy, frozen, display, problems, make_learner, lengths, **options)
        kl = Program("KL to the reference", fit.learner.kl_sums, announce=display.compiling)
        config = replace(config, train=fit.config.train, rollout=replace(config.rollout, slots=fit.config.rollout.slots))
        parts = (config, policy, source, functions, fit.sampler, fit.learner, fit.sizes, fit.update, kl, frozen, display)
        return GrpoStep(*parts, rollout_mesh=rollout_mesh).with_programs()
    sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
    learner, remat = make_learner(config, policy, sizes[0].tokens)
    if remat != config.model.remat:
        display.note(f"model.remat: {config.model.remat} resolved to {remat}")
    tokens = " and ".join(str(size.tokens) for size in sizes)
    display.note(f"train.micro_batch_tokens: texts are packed into rows of {tokens} tokens")
    if learner.truncation is not None and learner.truncation.truncates:
        display.note(TRUNCATED_LINE)
    sampling = policy if rollout_mesh is None else rollout_mesh.placed(policy)
    sampler = sampler_of(sampling, records_experts=config.rollout.records_experts).announcing(display.compiling)
    update = Program("update", functools.partial(train_step, learner), donate=(0,), announce=display.compiling)
    kl = Program("KL to the reference", learner.kl_sums, announce=display.compiling)
    parts = (config, policy, source, functions, sampler, learner, sizes, update, kl, frozen, display)
    return GrpoStep(*parts, rollout_mesh=rollout_mesh).with_programs()


def rollout_mesh_of(policy: Policy, config: Config, display: Display) -> RolloutMesh | None:
    """Copies the frozen weights to the devices of `mesh.rollout`, and says which they are; None where it is not set."""
    layout = make_rollout_layout(config.mesh)
    if layout is None:
        return None
    display.note(mesh_line(layout, "", "mesh of the rollout"))
    with display.busy("copying the weights to the devices of the rollout"):
        return RolloutMesh.of(policy, layout)


def with_widest_prompts(config: Config, source: Prompts) -> Config:
    """The settings with the length of the longest prompt as the limit, so that what is compiled to measure it is what runs."""
    if not isinstance(source, PromptSource):
        return config
    longest = max(int(lengths.max(initial=1)) for lengths in source.prompt_lengths)
    return replace(config, rollout=replace(config.rollout, max_prompt_length=min(longest, config.rollout.max_prompt_length)))


def reference_of(policy: Policy, config: Config) -> Params | None:
    """Returns the reference's own parameters.

    {} is the base alone (a new adapter, which changes nothing), None no reference: no KL is computed, or the reference is in the
    train state because it changes. Otherwise they are the adapter that training starts from or, in full training, the weights
    before it. They are the policy's arrays and not copied: only the train state is donated, and it begins as a copy.
    """
    if policy.adapters is None:
        used = config.objective.needs_reference or config.train.eval_kl
        return policy.params if used and config.train.reference_every is None else None
    return {} if starts_as_base(policy.adapters, policy.on_host) else in_device_memory(policy.adapters)


def prompts_line(source: PromptSource, limit_tokens: int) -> str:
    """Number of prompts, and what became of those that were too long."""
    counts = {"dropped": source.dropped, "held-out ones dropped": source.held_out_dropped, "shortened": source.shortened}
    overlong = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    said = f"; longer than {limit_tokens} tokens: {overlong}" if overlong else ""
    count = len(source.train) if source.stream is None else f"a stream of {source.stream.origin}"
    return f"prompts: {count} to train on, {len(source.held_out)} held out{said}"
