"""Supervised warm-up: the cold start that GRPO recipes begin with.

Enters: rows with a prompt and a completion, and the same settings as GRPO's; `train.prompts_per_step` is the number of rows in
    a step. Leaves: a trained policy and a run folder; a GRPO run that starts from its adapter has it as the reference. The loss
    is the mean over completion tokens of −log π. Held-out accuracy is the share of rows whose greedy completion is the row's
    own, token for token.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.config import Config, check_supervised
from grpo_jax.config.checks import require
from grpo_jax.data import CompletionBatch, CompletionSource, completion_pairs
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.evaluation import policy_of_config
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.learner.micro_batches import Split
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.step import Learner, PackedMetrics, pack
from grpo_jax.policy import Policy, sampler_of, trained_model
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import pad_rows, round_up
from grpo_jax.run import Display, RunFolder, step_values
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.saved import (
    TrainResult,
    begin,
    evaluates_after,
    finish,
    host_values,
    saves_after,
    settings_of,
    trainable_of,
    updates_of,
    with_trained,
)
from grpo_jax.runtime.distributed import from_main, is_main
from grpo_jax.runtime.programs import Program, compile_seconds
from grpo_jax.runtime.sharding import BATCH, Layout, make_layout, spread_prompts
from grpo_jax.types import Frozen, Params, TrainBatch, TrainState
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.hf import find_model, read_folder_spec


def sft(
    config: Config,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
) -> TrainResult:
    """Trains on prompt and completion rows.

    Args: as `grpo.train`; rows need the columns `data.prompt_column` and `data.completion_column`.

    Raises:
        ConfigError, DataError, ModelError, RunFolderError: bad input, before anything is compiled.
    """
    check_supervised(config, has_policy=policy is not None, has_dataset=dataset is not None)
    if policy is not None:
        config = settings_of(config, policy)
    display, layout = begin(config, sources, resume=resume), make_layout(config.mesh)
    if policy is None:
        assert config.model.path is not None
        folder = find_model(config.model.path, config.model.revision)
        check_mesh(layout, read_folder_spec(folder))
        tokenizer = Tokenizer.from_folder(folder)
    else:
        tokenizer = policy.need_tokenizer()
    source = completion_pairs(config, tokenizer, dataset, eval_dataset)
    dropped = f", {source.dropped} dropped as too long" if source.dropped else ""
    display.note(f"rows: {len(source.train)} to train on, {len(source.held_out)} held out{dropped}")
    if policy is None:
        with display.busy(f"reading {config.model.path}"):
            policy = policy_of_config(config)
    run = Warmup.build(config, policy.placed(layout), source, display)
    with RunFolder.create(config.train.run_dir, config, sources, resume=resume, writes=is_main()) as folder:
        return loop(run, folder)


@dataclass(frozen=True)
class Warmup:
    """Everything that stays the same from step to step."""

    config: Config
    policy: Policy
    source: CompletionSource
    learner: Learner
    sampler: Sampler
    update: Program
    frozen: Frozen
    display: Display

    @staticmethod
    def build(config: Config, policy: Policy, source: CompletionSource, display: Display) -> Warmup:
        """Compiles nothing."""
        full, updates, limits = policy.adapters is None, updates_of(config, supervised=True), config.rollout
        micro = config.train.micro_batch_prompts
        require(micro != "auto", "train.micro_batch_prompts", micro, "use a number of rows, or null; auto is for GRPO")
        rows = spread_prompts(policy.layout, micro) if isinstance(micro, int) else config.train.prompts_per_step
        learner = Learner(
            model=trained_model(policy, config.model.remat, rows * (limits.max_prompt_length + limits.max_completion_length))[0],
            objective=config.objective,
            optimizer=make_optimizer(config.optim, updates),
            learning_rate=functools.partial(learning_rate_at, config.optim, updates),
            full=full,
            temperature=1.0,
            max_completion_length=config.rollout.max_completion_length,
            micro_batch=(rows, 1),
        )
        sampler = sampler_of(policy).announced(display.compiling)
        update = Program("update", functools.partial(supervised_step, learner), donate=(0,), announce=display.compiling)
        frozen = Frozen(base={} if full else policy.params, reference=None)
        return Warmup(config, policy, source, learner, sampler, update, frozen, display)


def supervised_step(learner: Learner, state: TrainState, batch: TrainBatch, frozen: Frozen) -> tuple[TrainState, PackedMetrics]:
    """One update on a batch of rows: the mean over all its completion tokens of −log π; micro-batches add up to the same."""
    split = Split.of(batch, learner.micro_batch, learner.model.layout)
    tokens = jnp.maximum(jnp.sum(batch.completion_mask), 1).astype(jnp.float32)

    def loss_of(trainable: Params, rows: Split) -> tuple[jax.Array, jax.Array]:
        logps, entropy = completion_logprobs(
            learner.model,
            learner.policy(trainable, frozen),
            rows.prompt_ids,
            rows.prompt_lengths,
            rows.completion_ids,
            head_trainable=learner.full,
        )
        zero = jnp.float32(0)
        return -jnp.sum(jnp.where(rows.completion_mask, logps, zero)) / tokens, jnp.sum(
            jnp.where(rows.completion_mask, entropy, zero)
        ) / tokens

    def accumulate(gradient: Params, rows: Split) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        (loss, entropy), new = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, rows)
        return learner.placed(jax.tree.map(jnp.add, gradient, new)), (loss, entropy)

    gradient, (losses, entropies) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.trainable), split)
    updates, opt_state = learner.optimizer.update(gradient, state.opt_state, state.trainable)
    metrics = {
        "loss": jnp.sum(losses),
        "entropy": jnp.sum(entropies),
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": learner.learning_rate(state.step),
    }
    trainable: Any = optax.apply_updates(state.trainable, updates)
    state = learner.placed(TrainState(state.step + 1, trainable, opt_state))
    return state, pack(metrics, jnp.zeros((1, 0), jnp.float32), learner.model.layout)


def supervised_batch(batch: CompletionBatch, config: Config, layout: Layout | None = None) -> TrainBatch:
    """Lists → padded arrays on the device."""
    lengths = np.array([len(ids) for ids in batch.completion_ids])
    width = min(round_up(int(lengths.max())), config.rollout.max_completion_length)
    rows = len(lengths)
    made = TrainBatch(
        prompt_ids=pad_rows(batch.prompt_ids, round_up(max(len(ids) for ids in batch.prompt_ids))),
        prompt_lengths=np.array([len(ids) for ids in batch.prompt_ids], np.int32),
        completion_ids=pad_rows(batch.completion_ids, width),
        completion_mask=np.arange(width)[None, :] < lengths[:, None],
        sampler_logprobs=np.zeros((rows, width), np.float32),
        rewards=np.zeros((rows, 1), np.float32),
        valid=np.ones((rows, 1), bool),
    )
    return jax.device_put(made) if layout is None else layout.put_tree(made, BATCH)


def loop(run: Warmup, folder: RunFolder) -> TrainResult:
    """All steps, from the first or from the newest checkpoint."""
    config, display = run.config, run.display
    state = run.learner.init(trainable_of(run.policy))
    host = host_values(run.policy, supervised=True)
    with Checkpointer(folder.checkpoints, config.train.keep_checkpoints) as checkpoints:
        done = checkpoints.latest_step() or 0
        folder.cut_back(done)
        seconds = 0.0
        if done:
            state, stored = checkpoints.restore(state)
            seconds = float(stored["seconds"])
            display.note(f"resuming after step {done}")
        started = time.perf_counter() - seconds
        if evaluates_after(config.train, done):
            evaluate(run, state, folder, done)
        with display.progress(config.train.steps, done):
            for step in range(done, config.train.steps):
                begun, compiled = time.perf_counter(), run.update.compile_seconds
                state, packed = run.update(state, supervised_batch(run.source.batch(step), config, run.policy.layout), run.frozen)
                metrics = packed.to_dict()
                compiling = run.update.compile_seconds - compiled
                metrics |= {"step_seconds": time.perf_counter() - begun - compiling, "compile_seconds": compiling}
                folder.write_step(step + 1, metrics)
                display.step(step + 1, step_values(metrics))
                if evaluates_after(config.train, step + 1):
                    evaluate(run, state, folder, step + 1)
                if saves_after(config.train, step + 1):
                    checkpoints.save(step + 1, state, host | {"seconds": time.perf_counter() - started})
    seconds, compiling = time.perf_counter() - started, compile_seconds(run.update, *run.sampler.programs)
    policy = with_trained(run.policy, state.trainable)
    return finish(policy, config, folder, display, held_out=len(run.source.held_out), seconds=seconds, compile_seconds=compiling)


def evaluate(run: Warmup, state: TrainState, folder: RunFolder, step: int) -> None:
    """Share of held-out rows that are completed as they stand."""
    problems = len(run.source.held_out)
    if problems == 0 or from_main(step in folder.evaluations()):
        return
    (batch,) = run.source.held_out_batches(problems)
    slots = run.sampler.spread(min(problems, run.config.train.prompts_per_step))
    settings = replace(run.config.rollout, num_generations=1, temperature=0.0, slots=slots)
    variables = run.learner.policy(state.trainable, run.frozen)
    rollout = run.sampler.sample(variables, batch.prompt_ids, settings, seed=0)
    accuracy = float(np.mean([got == own for got, own in zip(rollout.completion_ids, batch.completion_ids, strict=True)]))
    folder.write_evaluation(step, {"accuracy": accuracy, "problems": problems})
    run.display.evaluation(step, accuracy, problems)
