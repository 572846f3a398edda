"""Settings outside the usual ranges: notes, said before a run starts. And settings of the doctor that could have no effect."""

from __future__ import annotations

from grpo_jax.config import Config
from grpo_jax.config.checks import require

GROUP, BETA, LENGTH = (4, 16), (0.01, 0.1), (128, 512)
RATE_FULL, RATE_LORA = (1e-6, 5e-6), (5e-6, 5e-5)
OF_ADAMW = {"lion": (0.1, 1 / 3)}
"""What the ends of AdamW's range are multiplied by (https://arxiv.org/abs/2302.06675, section 5). Muon and Adafactor have its
range: their updates have the size of AdamW's. SGD's rates follow the size of the gradient, so there is no range."""


def setting_notes(config: Config, *, own_optimizer: bool = False) -> list[str]:
    """One line for each setting outside its usual range.

    Args:
        own_optimizer: the run has an optimiser of the user's, so that `optim.learning_rate` has no effect.
    """
    full = config.lora.rank == 0 and config.lora.adapter is None
    rate, (low, high), name = config.optim.learning_rate, RATE_FULL if full else RATE_LORA, config.optim.name
    least, most = OF_ADAMW.get(name, (1, 1))
    low, high = least * low, most * high
    kind = ("full training" if full else "LoRA") + (f" with {name}" if name in OF_ADAMW else "")
    checked = [
        ("rollout.num_generations", config.rollout.num_generations, *GROUP, "completions of a prompt"),
        ("objective.beta", config.objective.beta, *BETA, "weights of the KL term"),
        ("rollout.max_completion_length", config.rollout.max_completion_length, *LENGTH, "tokens"),
        *([] if own_optimizer or name == "sgd" else [("optim.learning_rate", rate, low, high, f"rates for {kind}")]),
    ]
    return [
        f"note: {name} is {value:g}; usual {what} are {least:g} to {most:g}"
        for name, value, least, most, what in checked
        if not least <= value <= most
    ]


def check_stop_on(config: Config, held_out: int) -> None:
    """Checks that the rules of `train.stop_on` can ever hold.

    Args:
        held_out: number of held-out problems.

    Raises:
        ConfigError: one needs evaluations, or a KL divergence, that the run does not have.
    """
    chosen = config.train.stop_on
    evaluates = held_out > 0 and config.train.eval_every > 0
    fix = "held_out_falls needs evaluations: set train.eval_every and data.eval_size (or eval_split, eval_path), or leave it out"
    require("held_out_falls" not in chosen or evaluates, "train.stop_on", chosen, fix)
    knows_kl = config.objective.needs_reference or (evaluates and config.train.eval_kl)
    fix = "with objective.beta 0 no KL divergence is known: set train.eval_kl with train.eval_every, or leave kl_explosion out"
    require("kl_explosion" not in chosen or knows_kl, "train.stop_on", chosen, fix)
