"""How an argument of TRL is treated: honoured, by a setting of ours, or refused, with what to do instead.

The table itself is the class `GRPOConfig` (`grpo_config.py`) and the parameters of `GRPOTrainer` (`TRAINER_ARGUMENTS` below): each
argument has exactly one of the two kinds of text. An argument that is refused has TRL's default here too, and only that value is
accepted: it says what happens anyway. So no value is ever ignored in silence.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show


class Honoured(str):
    """Says which setting an argument becomes, and what its values mean. `str`, so that argparse shows it as the help text."""

    __slots__ = ()


class Refused(str):
    """Says what to do instead of giving an argument."""

    __slots__ = ()


def honoured(default: Any, by: str) -> Any:
    """A field of `GRPOConfig` that does what it does in TRL.

    Args:
        default: TRL's default.
        by: the setting that it becomes, and what is different, if anything is.
    """
    return field(default=default, metadata={"help": Honoured(by)})


def refused(default: Any, instead: str) -> Any:
    """A field of `GRPOConfig` that must keep its default.

    Args:
        default: TRL's default; a list is copied.
        instead: what to do instead, as the end of a message.
    """
    metadata = {"help": Refused(instead)}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def refusal(name: str, value: Any, instead: str) -> ConfigError:
    """The error for an argument, or one of its values, that has no equivalent here."""
    return ConfigError(f"{name} is {show(value)}: {instead}")


def allow(ok: bool, name: str, value: Any, instead: str) -> None:
    """Raises a `ConfigError` that names an argument, its value and what to do instead, unless `ok`."""
    if not ok:
        raise refusal(name, value, instead)


TRAINER_ARGUMENTS: dict[str, Honoured | Refused] = {
    "model": Honoured("model.path, a folder or a hub id; a grpo_jax.Policy is trained as it is"),
    "reward_funcs": Honoured(
        "the rewards of the run: functions, called in this process as TRL does, and folders or hub ids of reward models (see "
        "gx.reward_model), which compute on the devices; a module of PyTorch is refused"
    ),
    "args": Honoured("every section; see GRPOConfig"),
    "train_dataset": Honoured(
        "the rows: a datasets.Dataset or a list of dicts, with `prompt` as a text or as messages; an IterableDataset streams "
        "(data.streaming) and needs max_steps and max_prompt_length"
    ),
    "eval_dataset": Honoured(
        "the held-out rows; of several sets in a dict the first is the main one, the others are as eval.sets; an IterableDataset "
        "is read whole"
    ),
    "processing_class": Honoured("the tokenizer, instead of the one in the model's folder"),
    "reward_processing_classes": Honoured("the tokenizers of reward models, instead of those in their folders"),
    "callbacks": Honoured("called at the same moments; see grpo_jax.trl.TrainerCallback for those that cannot be"),
    "optimizers": Honoured("(an Optax transformation, None) instead of `optim`; PyTorch's optimisers and schedulers are refused"),
    "quantization_config": Honoured("model.quantization: load_in_4bit is nf4, load_in_8bit is int8"),
    "peft_config": Honoured("lora, from a PEFT LoraConfig or a dict of its arguments; None trains every weight"),
    "tools": Honoured(
        "functions that the model may call; environment.tool_format says how it does, by default as its chat template shows"
    ),
    "rollout_func": Refused("completions are sampled by this package alone: leave it out"),
    "environment_factory": Honoured(
        "one object an episode: its public methods are tools, `reset` may add to the prompt, `get_reward` is one more reward of "
        "weight 1; several environments in a dict are refused"
    ),
}
"""What becomes of each argument of TRL 1.16's `GRPOTrainer`, in its order."""
