"""What TRL's example scripts use besides the trainer: their arguments, and the parser that reads them from a command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from grpo_jax.config import ConfigError, read_yaml
from grpo_jax.trl.arguments import allow


def said(default: Any, text: str) -> Any:
    """A field with its help text; a list is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """The arguments of a script that concern its data; the script itself reads them."""

    dataset_name: str | None = said(None, "folder or hub id of the dataset")
    dataset_config: str | None = said(None, "configuration of a hub dataset")
    dataset_train_split: str = said("train", "split to train on")
    dataset_test_split: str = said("test", "split to evaluate on")
    dataset_streaming: bool = said(False, "stream the dataset; the trainer then needs max_steps and max_prompt_length")
    ignore_bias_buffers: bool = said(False, "must stay False: it concerns PyTorch")

    def __post_init__(self) -> None:
        allow(not self.ignore_bias_buffers, "ignore_bias_buffers", True, "leave it out; it concerns PyTorch")


@dataclass
class ModelConfig:
    """The arguments of a script that concern its model. `lora_dropout` is 0 by default, not TRL's 0.05."""

    model_name_or_path: str | None = said(None, "folder or hub id of the model")
    model_revision: str = said("main", "branch, tag or commit on the hub")
    dtype: str | None = said("float32", "number format where bf16 is False: auto, float32 or bfloat16")
    attn_implementation: str | None = said(None, "must stay None: attention is chosen by the device")
    use_peft: bool = said(False, "train LoRA adapters instead of every weight")
    lora_r: int = said(16, "rank of the adapters")
    lora_alpha: int = said(32, "the scale is lora_alpha / lora_r")
    lora_dropout: float = said(0.0, "share of their input that adapters do not see, in updates alone")
    lora_target_modules: list[str] | None = said(None, "layers that get adapters, or all-linear")
    lora_target_parameters: list[str] | None = said(None, "must stay None")
    lora_modules_to_save: list[str] | None = said(None, "must stay None: only adapters are trained")
    lora_task_type: str = said("CAUSAL_LM", "must stay CAUSAL_LM")
    use_rslora: bool = said(False, "the scale is lora_alpha / sqrt(lora_r)")
    use_dora: bool = said(False, "train magnitudes too (DoRA)")
    load_in_8bit: bool = said(False, "freeze the base in int8")
    load_in_4bit: bool = said(False, "freeze the base in nf4")
    bnb_4bit_quant_type: str = said("nf4", "must stay nf4")
    use_bnb_nested_quant: bool = said(False, "must stay False: scales are bfloat16")
    bnb_4bit_quant_storage: str | None = said(None, "must stay None")

    def __post_init__(self) -> None:
        allow(not (self.load_in_8bit and self.load_in_4bit), "load_in_8bit", True, "leave out this or load_in_4bit")
        allow(not self.use_bnb_nested_quant, "use_bnb_nested_quant", True, "leave it out; scales are bfloat16")
        targets = self.lora_target_modules
        if targets is not None and len(targets) == 1:
            self.lora_target_modules = targets[0]  # type: ignore[assignment] - as TRL does, so that all-linear can be given


def get_peft_config(model_args: ModelConfig) -> dict[str, Any] | None:
    """The arguments of a LoraConfig for `GRPOTrainer(peft_config=...)`; None without `use_peft`. PEFT is not needed."""
    if not model_args.use_peft:
        return None
    return {
        "task_type": model_args.lora_task_type,
        "r": model_args.lora_r,
        "target_modules": model_args.lora_target_modules,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "bias": "none",
        "use_rslora": model_args.use_rslora,
        "use_dora": model_args.use_dora,
        "modules_to_save": model_args.lora_modules_to_save,
        "target_parameters": model_args.lora_target_parameters,
    }


def get_quantization_config(model_args: ModelConfig) -> dict[str, Any] | None:
    """The arguments of a BitsAndBytesConfig for `GRPOTrainer(quantization_config=...)`; None where nothing is quantised."""
    if model_args.load_in_4bit:
        return {"load_in_4bit": True, "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type}
    return {"load_in_8bit": True} if model_args.load_in_8bit else None


def get_kbit_device_map() -> None:
    """None: where a quantised base lies is decided by the mesh."""
    return


class TrlParser(HfArgumentParser):
    """Reads dataclasses from a command line, and from a YAML file that `--config` names; the command line wins.

    Example:
        script_args, training_args = TrlParser((ScriptArguments, GRPOConfig)).parse_args_and_config()
    """

    def __init__(self, dataclass_types: Any = (), **options: Any) -> None:
        super().__init__(dataclass_types, **options)

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Reads the command line.

        Args:
            args: its words; None takes the process's.
            return_remaining_strings: put the words that are no argument at the end of the result, the file's first; else
                they are an error.
            fail_with_unknown_args: whether an entry of the file that is no argument is an error.
            separate_remaining_strings: put those of the file and of the command line apart.

        Raises:
            ConfigError: the file cannot be read, or has an entry that is no argument.
        """
        words = list(sys.argv[1:] if args is None else args)
        unknown: list[str] = []
        if "--config" in words:
            at = words.index("--config")
            allow(at + 1 < len(words), "--config", None, "give the path of a YAML file")
            values = read_yaml(words[at + 1])
            del words[at : at + 2]
            os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
            unknown = self.set_defaults_with_config(**values)
        parsed = self.parse_args_into_dataclasses(args=words, return_remaining_strings=return_remaining_strings)
        if not return_remaining_strings:
            if unknown and fail_with_unknown_args:
                raise ConfigError(f"the file of --config has {', '.join(unknown[::2])}, which is no argument: remove it")
            return parsed
        return (*parsed[:-1], unknown, parsed[-1]) if separate_remaining_strings else (*parsed[:-1], unknown + parsed[-1])

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Makes values the defaults of the arguments of these names; returns the others, as words of a command line."""
        known = {action.dest: action for action in self._actions}
        for name in known.keys() & values.keys():
            known[name].default, known[name].required = values[name], False
        return [word for name, value in values.items() if name not in known for word in (f"--{name}", str(value))]
