"""Evaluations under TRL's names, which of our metrics `metric_for_best_model` is, and going back to the best checkpoint.

TRL's `eval_NAME_...` are of the set NAME of an `eval_dataset` that is a dict. Our metrics have the name of a further set in front,
and the first set's have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grpo_jax.run.best import best_checkpoint
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.evaluations import SAMPLED
from grpo_jax.trl.arguments import allow
from grpo_jax.trl.grpo_config import GRPOConfig

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer

NAMES = {"reward/mean": "reward", "reward/std": "reward_std", "kl_divergence": "kl", "sampled/accuracy": "sampled_accuracy"}
"""Our metrics that have another name in TRL; the others have the same one, with eval_ in front."""

OWN = {theirs: ours for ours, theirs in NAMES.items()}
LEFT_OUT = ("problems", "accuracy_low", "accuracy_high")
OF_SAMPLES = (SAMPLED, "pass_at/", "majority_at/")
GREEDY = ("accuracy", "kl_divergence")
"""What stays that of greedy completions, or has one value anyway, where there are samples."""


def log_entries(metrics: Mapping[str, Any], sets: Sequence[str] = (), *, sampled: bool = False) -> list[dict[str, Any]]:
    """An entry of the log for each set.

    Args:
        metrics: of an evaluation, as `Callback.on_evaluate` gets them.
        sets: names of the sets of a dict of several, the main one first; () where there is one set without a name.
        sampled: rewards and lengths are those of the samples (num_generations_eval above 1), as in TRL; else there are none.

    Example:
        log_entries({"accuracy": 0.5, "reward/mean": 0.4, "b/accuracy": 0.1, "b/reward/mean": 0.2}, ["a", "b"]) ==
        [{"eval_a_accuracy": 0.5, "eval_a_reward": 0.4}, {"eval_b_accuracy": 0.1, "eval_b_reward": 0.2}]
    """
    further = tuple(f"{name}/" for name in sets[1:])
    found = []
    for number, name in enumerate(sets or [""]):
        start = "" if number == 0 else f"{name}/"
        others = tuple(prefix for prefix in further if prefix != start)
        own = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
        own = {key: value for key, value in own.items() if key not in LEFT_OUT and not key.startswith(others)}
        samples = {key: value for key, value in own.items() if key.startswith(OF_SAMPLES)}
        greedy = {key: value for key, value in own.items() if key not in samples}
        if sampled and samples:
            plain = {key if key in NAMES else key.removeprefix(SAMPLED): value for key, value in samples.items()}
            greedy = {key: value for key, value in greedy.items() if key in GREEDY} | plain
        prefix = f"eval_{name}_" if name else "eval_"
        found.append({prefix + NAMES.get(key, key): value for key, value in greedy.items()})
    return found


def own_metric(name: str, sets: Sequence[str], *, sampled: bool) -> str:
    """Our metric for a `metric_for_best_model`; see `log_entries` for the arguments.

    Raises:
        ConfigError: it is the loss, or names no set.
    """
    fix = "use 'eval_reward' or 'eval_accuracy': evaluations have no loss"
    key, start = name.removeprefix("eval_"), ""
    allow(key != "loss" and not key.endswith("_loss"), "metric_for_best_model", name, fix)
    if sets:
        chosen = max((own for own in sets if key.startswith(f"{own}_")), key=len, default=None)
        listed = ", ".join(f"eval_{own}_reward" for own in sets)
        allow(chosen is not None, "metric_for_best_model", name, f"name one of the sets of eval_dataset, as in {listed}")
        key, start = key.removeprefix(f"{chosen}_"), "" if chosen == sets[0] else f"{chosen}/"
    key = OWN.get(key, key)
    greedy = not sampled or key in GREEDY or key.startswith(OF_SAMPLES)
    return start + (key if greedy else SAMPLED + key)


def best_settings(args: GRPOConfig, sets: Sequence[str], *, evaluates: bool) -> dict[str, Any]:
    """The settings of the section `train` that keep the best checkpoint; without one TRL saves at the steps of save_steps alone."""
    asked = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy"
    if not keeps_best(args):
        return {"keep_best": "none"}
    value: Any = True if args.load_best_model_at_end else "best"
    allow(evaluates, asked, value, "give eval_dataset, and use eval_strategy='steps' or 'epoch': evaluations say what is best")
    metric = args.metric_for_best_model
    if metric is None:
        fix = f"use 'eval_reward' or 'eval_accuracy' with {asked}: TRL's default is the loss, which evaluations do not have"
        allow(False, "metric_for_best_model", metric, fix)
    assert metric is not None
    lowest = "" if args.greater_is_better else "-"
    return {"keep_best": "held_out", "best_metric": lowest + own_metric(metric, sets, sampled=samples_of(args) > 1)}


def keeps_best(args: GRPOConfig) -> bool:
    """Whether the best checkpoint stays on disk."""
    return args.load_best_model_at_end or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"


def samples_of(args: GRPOConfig) -> int:
    """Completions of each row in an evaluation; 1 is the greedy one."""
    return args.num_generations_eval or 1


def restore_best(trainer: Trainer) -> int:
    """Takes the weights back to those of the best checkpoint; returns its step.

    Args:
        trainer: of a run that is over.

    Raises:
        CheckpointError: no checkpoint belongs to an evaluation, or the best one is damaged.
    """
    step = best_checkpoint(trainer.run_dir, trainer.best.metric)
    if step != trainer.steps_done:
        with Checkpointer(trainer.run_dir / "checkpoints", keep=None) as checkpoints:
            state, _ = checkpoints.restore(trainer.state, step)
        trainer.state = replace(trainer.state, trainable=state.trainable)
    return step
