"""Evaluates a run's policy on its held-out prompts: accuracy of greedy completions, and the KL divergence from the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grpo_jax.data.source import PromptSource
from grpo_jax.evaluation import evaluate_held_out
from grpo_jax.fit.micro_batch import text_lengths
from grpo_jax.learner.batches import text_batch
from grpo_jax.learner.packing import row_sizes
from grpo_jax.learner.reference import with_reference
from grpo_jax.rollout.environment_turns import reward_rows
from grpo_jax.rollout.shapes import RolloutShapes
from grpo_jax.run.evaluations import Evaluation, evaluation_metrics
from grpo_jax.runtime.memory import in_device_memory
from grpo_jax.types import TrainState

if TYPE_CHECKING:
    from grpo_jax.steps.grpo import GrpoStep


def evaluate_step(step: GrpoStep, state: TrainState) -> dict[str, Any] | None:
    """Evaluates the held-out prompts, greedily and by `eval.samples`; None where nothing is held out."""
    if not isinstance(step.source, PromptSource):
        return None
    tokenizer, shapes = step.policy.need_tokenizer(), step.evaluation_shapes(state) if step.problems else None

    def evaluated(source: PromptSource, shapes: RolloutShapes | None, samples: int | None = None) -> Evaluation | None:
        return evaluate_held_out(
            step.sampler,
            step.variables(state),
            source,
            step.functions,
            tokenizer,
            step.config,
            samples=samples,
            shapes=shapes,
            runner=step.runner,
            display=step.display,
            driver=step.driver,
        )

    metrics, k = dict[str, Any](), step.config.eval.samples
    for name, held_out in {"": step.source, **step.sets}.items():
        greedy = evaluated(held_out, None if name else shapes)
        if greedy is None:
            return None
        metrics |= evaluation_metrics(greedy, None if k is None else evaluated(held_out, None, k), name)
    return metrics | ({"kl_divergence": held_out_kl(step, state, step.source)} if step.config.train.eval_kl else {})


def held_out_kl(step: GrpoStep, state: TrainState, source: PromptSource) -> float:
    """Mean k3 from the reference, nats a token, on one completion sampled of each held-out prompt."""
    config, problems = step.config, step.problems
    (batch,) = source.held_out_batches(problems)
    settings, shapes = replace(config.rollout, num_generations=1), step.evaluation_shapes(state)
    turns = None if step.driver is None else step.driver.begin(batch, 1)
    batch = batch if turns is None else turns.prompts
    rollout = step.sampler.sample(
        step.variables(state),
        batch.prompt_ids,
        settings,
        seed=config.train.seed,
        indices=batch.indices,
        shapes=shapes,
        turns=turns,
    )
    reward_rows(batch, rollout, turns, step.policy.text_of)  # closes the environments
    lengths, layout = text_lengths(config, source.prompt_lengths[1]), step.policy.layout
    sizes = row_sizes(lengths, problems, 1, step.sizes[0].tokens, 1 if layout is None else layout.rows)
    held_out = text_batch(
        batch.prompt_ids, rollout.completion_ids, sizes, config.rollout.max_completion_length, layout, rollout.sampled
    )
    state = in_device_memory(replace(state, opt_state=()))
    sums = step.policy.on_host(step.kl(state.trainable, held_out, with_reference(step.frozen, state)))
    return float(sums[0] / sums[1])
