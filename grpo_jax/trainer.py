"""The loop. Read this page and you know what a run does.

    for every step:
        prompts   = source.batch(step)                        the same for the same seed and step, whatever happened before
        rollout   = sampler.sample(policy, prompts)           G completions of each prompt, prompt computed once
        scored    = score(functions, completions)             on the host; a failure costs a row, not the run
        state     = train_step(state, batch)                  one pure, jitted update; the old state's memory is reused
        metrics, completions, checkpoint → the run folder

With several processes every one runs this page, on the same prompts and completions; each scores its own part of them, process 0
alone writes and shows, and all write checkpoints (`distributed.py`).

Enters: a `Config`, or a policy, rows and functions from Python. Leaves: a `TrainResult`, and the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from grpo_jax.config import Config, check_training
from grpo_jax.data import PromptSource
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.evaluation import Evaluation, evaluate_held_out, policy_of_config, reward_columns
from grpo_jax.fit.auto import fit_run
from grpo_jax.fit.micro_batch import micro_batch_of, tokens_of
from grpo_jax.learner.step import Learner
from grpo_jax.policy import Policy, sampler_of, trained_model
from grpo_jax.rewards import NamedFunction, ScoredBatch, check_functions, failure_lines, resolve_functions, reward_metrics
from grpo_jax.rewards.across_processes import score_together
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
from grpo_jax.runtime.sharding import BATCH, Layout, make_layout
from grpo_jax.types import Frozen, Params, PromptBatch, Rollout, TrainBatch, TrainState
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.hf import find_model, read_folder_spec

TRUNCATED_LINE = (
    "log-probabilities: truncated as sampling is (top_p, top_k, min_p), so the update computes logits again in its backward pass "
    "instead of keeping one vector a token; objective.match_sampling false takes the whole distribution's, without that cost"
)


def train(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    eval_dataset: Any = None,
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
) -> TrainResult:
    """Trains a policy with GRPO (DeepSeekMath, https://arxiv.org/abs/2402.03300).

    Args:
        config: the settings; what is handed over below replaces the part of it that it stands for.
        policy: trained instead of `model` and `lora`. It is not changed; the result holds a new one.
        dataset: rows to train on, a list of dicts or a datasets.Dataset, instead of `data.path`.
        reward_funcs: one function or several, instead of `rewards.functions`.
        eval_dataset: held-out rows, instead of `data.eval_split` and `data.eval_path`.
        resume: continue the run in `train.run_dir` at its newest checkpoint.
        sources: where settings came from, for the table that is shown first.

    Raises:
        ConfigError, DataError, ModelError, RunFolderError: bad input, before anything is compiled.
        RewardError: too many completions could not be scored.
    """
    config = config or Config()
    given = [] if reward_funcs is None else ([reward_funcs] if callable(reward_funcs) else list(reward_funcs))
    check_training(config, has_policy=policy is not None, has_dataset=dataset is not None, has_rewards=bool(given))
    if policy is not None:
        config = settings_of(config, policy)
    display = begin(config, sources, resume=resume)
    run = prepare(config, policy, dataset, given, eval_dataset, display)
    with RunFolder.create(config.train.run_dir, config, sources, resume=resume, writes=is_main()) as folder:
        return loop(run, folder)


class Source(Protocol):
    """Where prompts come from: a `PromptSource`, or what stands in for one."""

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a step."""
        ...


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from step to step.

    Attributes:
        limits: longest length of each of a step's completions in tokens; None is `rollout.max_completion_length` for all.
    """

    config: Config
    policy: Policy
    source: Source
    functions: list[NamedFunction]
    sampler: Sampler
    learner: Learner
    update: Program
    frozen: Frozen
    display: Display
    limits: Sequence[int] | None = None

    def variables(self, state: TrainState) -> Params:
        """What the sampler runs."""
        return self.learner.policy(state.trainable, self.frozen)

    def evaluate(self, state: TrainState) -> Evaluation | None:
        """Greedy accuracy on the held-out part, where there is one."""
        if not isinstance(self.source, PromptSource):
            return None
        variables, tokenizer = self.variables(state), self.policy.need_tokenizer()
        return evaluate_held_out(self.sampler, variables, self.source, self.functions, tokenizer, self.config)


def prepare(
    config: Config, policy: Policy | None, dataset: Any, reward_funcs: list[Any], eval_dataset: Any, display: Display
) -> Run:
    """Reads everything that can be wrong, cheapest first, and the weights last. Compiles nothing."""
    functions = resolve_functions(
        reward_funcs or config.rewards.functions, max_completion_length=config.rollout.max_completion_length
    )
    if policy is None:
        assert config.model.path is not None
        with display.busy(f"looking for {config.model.path}"):
            folder = find_model(config.model.path, config.model.revision, weights=False)
            check_mesh(make_layout(config.mesh), read_folder_spec(folder))
            tokenizer = Tokenizer.from_folder(folder)
    else:
        tokenizer = policy.need_tokenizer()
    source = PromptSource.build(config, tokenizer, dataset, eval_dataset)
    display.note(prompts_line(source, config.rollout.max_prompt_length))
    check_functions(functions, reward_columns(source, config), config.rewards.weights, config.rewards.accuracy)
    if policy is None:
        with display.busy(f"reading {config.model.path}"):
            policy = policy_of_config(config)
    policy.need_tokenizer()
    policy = policy.placed(make_layout(config.mesh))
    return assemble(config, policy, source, functions, display)


def assemble(config: Config, policy: Policy, source: Source, functions: list[NamedFunction], display: Display) -> Run:
    """Everything that a step needs, from what has been read and checked. Compiles nothing, but for `micro_batch_prompts: auto`."""
    full = policy.adapters is None
    frozen = Frozen(base={} if full else policy.params, reference=reference_of(policy, config))
    if config.train.micro_batch_prompts == "auto":
        fit = fit_run(config, policy, frozen, display, problems_of(source))
        return Run(fit.config, policy, source, functions, fit.sampler, fit.learner, fit.update, frozen, display)
    micro_batch = micro_batch_of(config, policy)
    model, remat = trained_model(policy, config.model.remat, tokens_of(config, micro_batch))
    if remat != config.model.remat:
        display.note(f"model.remat: {config.model.remat} is {remat} here")
    if config.train.micro_batch_prompts is None and micro_batch[0] < config.train.prompts_per_step:
        display.note(f"train.micro_batch_prompts: {micro_batch[0]} at once, as many as a processor's cache serves well")
    learner = Learner.of(
        config,
        model,
        full=full,
        micro_batch=micro_batch,
        updates=updates_of(config, supervised=False),
        stop_ids=policy.stop_ids,
    )
    if learner.truncation is not None and learner.truncation.truncates:
        display.note(TRUNCATED_LINE)
    sampler = sampler_of(policy).announced(display.compiling)
    update = Program("update", learner.train_step, donate=(0,), announce=display.compiling)
    return Run(config, policy, source, functions, sampler, learner, update, frozen, display)


def problems_of(source: Source) -> int:
    """How many problems are held out."""
    return len(source.held_out) if isinstance(source, PromptSource) else 0


def prompts_line(source: PromptSource, limit_tokens: int) -> str:
    """How many prompts there are, and what became of those that were too long."""
    counts = {"dropped": source.dropped, "held-out ones dropped": source.held_out_dropped, "shortened": source.shortened}
    overlong = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    said = f"; longer than {limit_tokens} tokens: {overlong}" if overlong else ""
    return f"prompts: {len(source.train)} to train on, {len(source.held_out)} held out{said}"


def reference_of(policy: Policy, config: Config) -> Params | None:
    """What turns the base into the reference: nothing, the adapter that training starts from, or in full training the old weights.

    They are the policy's own arrays, no copies: only the state is donated, and it begins as a copy.
    """
    if policy.adapters is None:
        return policy.params if config.objective.needs_reference else None
    started = any(bool(np.any(policy.on_host(pair["b"]))) for pair in policy.adapters["layers"].values())
    return policy.adapters if started else {}


def loop(run: Run, folder: RunFolder) -> TrainResult:
    """All steps, from the first or from the newest checkpoint."""
    config, display = run.config, run.display
    state = run.learner.init(trainable_of(run.policy))
    host = host_values(run.policy, supervised=False)
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
                state, metrics = one_step(run, state, folder, step)
                folder.write_step(step + 1, metrics)
                display.step(step + 1, step_values(metrics))
                if evaluates_after(config.train, step + 1):
                    evaluate(run, state, folder, step + 1)
                if saves_after(config.train, step + 1):
                    checkpoints.save(step + 1, state, host | {"seconds": time.perf_counter() - started})
    seconds, compiling = time.perf_counter() - started, compile_seconds(run.update, *run.sampler.programs)
    policy = with_trained(run.policy, state.trainable)
    return finish(policy, config, folder, display, held_out=problems_of(run.source), seconds=seconds, compile_seconds=compiling)


def one_step(run: Run, state: TrainState, folder: RunFolder, step: int) -> tuple[TrainState, dict[str, float]]:
    """One step of the loop: prompts, completions, rewards, update."""
    config = run.config
    prompts = run.source.batch(step)
    clock = Clock((run.update, *run.sampler.programs))
    rollout = run.sampler.sample(
        run.variables(state),
        prompts.prompt_ids,
        config.rollout,
        seed=config.train.seed,
        step=step,
        indices=prompts.indices,
        limits=run.limits,
    )
    clock.lap("rollout_seconds")
    texts = [run.policy.text_of(ids) for ids in rollout.completion_ids]
    if step == 0 and rollout.slots < len(texts):
        run.display.note(f"slots: {rollout.slots} of {len(texts)} completions are decoded at once")
    scored = score_together(
        run.functions,
        config.rewards.weights,
        prompts=prompts.prompts,
        completions=texts,
        completion_ids=rollout.completion_ids,
        columns=prompts.columns,
        timeout_seconds=config.rewards.timeout_seconds,
        max_failed_share=config.rewards.max_failed_share,
    )
    for line in failure_lines(scored):
        run.display.warning(line)
    clock.lap("reward_seconds")
    state, packed = run.update(state, train_batch(prompts, rollout, scored, config, run.policy.layout), run.frozen)
    metrics, advantages = packed.to_host()
    clock.lap("update_seconds")
    metrics |= reward_metrics(scored) | length_metrics(rollout) | clock.metrics(prompts, rollout)
    show_completions(run, folder, step + 1, prompts, texts, scored, rollout, advantages)
    return state, metrics


def train_batch(
    prompts: PromptBatch, rollout: Rollout, scored: ScoredBatch, config: Config, layout: Layout | None = None
) -> TrainBatch:
    """Lists → padded arrays on the device. Lengths are rounded up to a few sizes, so that a run compiles a handful of times."""
    b = len(prompts.prompt_ids)
    lengths = np.array([len(ids) for ids in rollout.completion_ids])
    width = min(round_up(int(lengths.max())), config.rollout.max_completion_length)
    mask = np.arange(width)[None, :] < lengths[:, None]
    logps = np.zeros(mask.shape, np.float32)
    logps[mask] = np.concatenate(rollout.logprobs)
    if config.objective.mask_truncated:
        mask &= np.array([reason == "stop" for reason in rollout.finish_reasons])[:, None]
    batch = TrainBatch(
        prompt_ids=pad_rows(prompts.prompt_ids, round_up(max(len(ids) for ids in prompts.prompt_ids))),
        prompt_lengths=np.array([len(ids) for ids in prompts.prompt_ids], np.int32),
        completion_ids=pad_rows(rollout.completion_ids, width),
        completion_mask=mask,
        sampler_logprobs=logps,
        rewards=scored.rewards.reshape(b, -1),
        valid=scored.valid.reshape(b, -1),
    )
    return jax.device_put(batch) if layout is None else layout.put_tree(batch, BATCH)


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of the completions in tokens; `clipped_ratio` is the share that no stop token ended."""
    lengths = np.array([len(ids) for ids in rollout.completion_ids])
    stopped = np.array([reason == "stop" for reason in rollout.finish_reasons])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
        "sampling/near_ties": rollout.near_ties / max(1.0, float(lengths.sum())),
    }
    if stopped.any():
        metrics["completions/mean_terminated_length"] = float(lengths[stopped].mean())
    return metrics


class Clock:
    """Seconds of the parts of a step, compiling left out."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs, self.seconds = programs, dict[str, float]()
        self.start = self.mark = time.perf_counter()
        self.compiled = self.compiled_at_start = self.compile_seconds()

    def compile_seconds(self) -> float:
        """Spent on compiling since the run began."""
        return compile_seconds(*self.programs)

    def lap(self, name: str) -> None:
        """Names what has passed since the last lap."""
        now, compiled = time.perf_counter(), self.compile_seconds()
        self.seconds[name] = now - self.mark - (compiled - self.compiled)
        self.mark, self.compiled = now, compiled

    def metrics(self, prompts: PromptBatch, rollout: Rollout) -> dict[str, float]:
        """Seconds and speeds. Rollout speed counts completion tokens; update speed those and each prompt once."""
        tokens = sum(len(ids) for ids in rollout.completion_ids)
        shared = tokens + sum(len(ids) for ids in prompts.prompt_ids)
        return self.seconds | {
            "step_seconds": sum(self.seconds.values()),
            "compile_seconds": self.compile_seconds() - self.compiled_at_start,
            "rollout_tokens_per_second": tokens / self.seconds["rollout_seconds"],
            "update_tokens_per_second": shared / self.seconds["update_seconds"],
        }


def show_completions(
    run: Run,
    folder: RunFolder,
    step: int,
    prompts: PromptBatch,
    texts: list[str],
    scored: ScoredBatch,
    rollout: Rollout,
    advantages: Any,
) -> None:
    """Completions to the file, and now and then to the terminal."""
    every = run.config.train.show_every
    arguments = (step, prompts.prompts, texts, scored.per_function, advantages, rollout.finish_reasons)
    folder.write_completions(*arguments)
    if every and (step == 1 or step % every == 0 or step == run.config.train.steps):
        run.display.completions(*arguments)


def evaluate(run: Run, state: TrainState, folder: RunFolder, step: int) -> None:
    """Greedy accuracy on the held-out part; one that a resumed run already has is not made again."""
    if from_main(step in folder.evaluations()):
        return
    result = run.evaluate(state)
    if result is not None:
        folder.write_evaluation(step, {"accuracy": result.accuracy, "problems": result.problems, "reward/mean": result.reward_mean})
        run.display.evaluation(step, result.accuracy, result.problems)
