"""TRL's arithmetic of batches, steps and epochs, in steps of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_jax.trl.arguments import allow, refusal
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.peft import plain


@dataclass(frozen=True)
class Steps:
    """How many steps a run has, and how often it logs, evaluates and saves. A step has `updates` updates, which TRL calls steps.

    Attributes:
        prompts: prompts of a step.
        parts: parts that a step's prompts are divided into, each with updates of its own.
        updates: updates of a step: parts times num_iterations.
        total: steps of the run.
        epoch: steps of an epoch; None where the number of rows is not known.
        logging, evaluating, saving: steps between two; 0 is never.

    Example:
        Steps(prompts=2, parts=1, updates=1, total=36, epoch=12, logging=10, evaluating=0, saving=500)
    """

    prompts: int
    parts: int
    updates: int
    total: int
    epoch: int | None
    logging: int
    evaluating: int
    saving: int


def steps_of(args: GRPOConfig, rows: int | None) -> Steps:
    """Works out the steps of a run as TRL does.

    An epoch has `rows // prompts` steps. An interval below 1 is a share of all updates.

    Args:
        rows: rows to train on; None where that is not known.

    Raises:
        ConfigError: the batches of completions cannot be mapped to steps of ours; the message names the argument.
    """
    accumulation, per_generation, group = args.gradient_accumulation_steps, args.steps_per_generation, args.num_generations
    assert args.generation_batch_size is not None and per_generation is not None and group is not None
    prompts, parts = args.generation_batch_size // group, per_generation // accumulation
    fix = f"use a multiple of gradient_accumulation_steps ({accumulation}): each update learns from as many completions"
    allow(per_generation % accumulation == 0, "steps_per_generation", per_generation, fix)
    fix = f"use a divisor of the {prompts} prompts of a generation batch times gradient_accumulation_steps ({accumulation})"
    allow(prompts % parts == 0, "steps_per_generation", per_generation, fix)
    fix = (
        "use 1: with several parts of a generation batch, TRL goes through all of them before it repeats one; here each is repeated"
    )
    allow(parts == 1 or args.num_iterations == 1, "num_iterations", args.num_iterations, fix)
    updates = parts * args.num_iterations
    epoch = None if rows is None else max(rows // prompts, 1)
    if args.max_steps > 0:
        fix = f"use a multiple of {updates}, the updates on one generation batch"
        allow(args.max_steps % updates == 0, "max_steps", args.max_steps, fix)
        total = args.max_steps // updates
    else:
        if epoch is None:
            raise refusal("max_steps", args.max_steps, "give the number of steps: a dataset that streams has no length")
        allow(args.num_train_epochs > 0, "num_train_epochs", args.num_train_epochs, "use a positive number of epochs")
        total = math.ceil(math.ceil(args.num_train_epochs * epoch * updates) / updates)

    def every(strategy: str, field: str, given: int | float) -> int:
        kind = plain(strategy)
        if (field, kind) == ("save", "best"):
            return 0
        allow(kind in ("no", "steps", "epoch"), f"{field}_strategy", kind, "use 'no', 'steps' or 'epoch'")
        if kind == "epoch" and epoch is None:
            raise refusal(f"{field}_strategy", kind, "use 'steps': a dataset that streams has no epochs")
        if kind != "steps":
            return 0 if kind == "no" else epoch or 0
        allow(given > 0, f"{field}_steps", given, f"use a positive number of steps, or {field}_strategy='no'")
        interval = math.ceil(given * total * updates) if given < 1 else int(given)
        return math.ceil(interval / updates)

    return Steps(
        prompts=prompts,
        parts=parts,
        updates=updates,
        total=total,
        epoch=epoch,
        logging=every(args.logging_strategy, "logging", args.logging_steps),
        evaluating=every(args.eval_strategy, "eval", args.eval_steps or args.logging_steps),
        saving=every(args.save_strategy, "save", args.save_steps),
    )
