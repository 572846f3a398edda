"""TRL's arguments: the table against TRL's own names and defaults, every honoured argument's setting, every refusal's message."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

from grpo_jax.config import Config, ConfigError, LoraConfig, config_to_dict
from grpo_jax.trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrainerCallback,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from grpo_jax.trl.arguments import TRAINER_ARGUMENTS, Honoured, Refused
from grpo_jax.trl.peft import lora_settings, quantization_of_config
from grpo_jax.trl.settings import config_of
from grpo_jax.trl.steps import steps_of

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "trl_arguments.json").read_text())
TABLE = {item.name: item for item in dataclasses.fields(GRPOConfig)}
OURS = {"max_prompt_length", "warmup_ratio", "settings"}
REFUSED = [name for name, item in TABLE.items() if isinstance(item.metadata["help"], Refused)]
ROWS = [{"prompt": f"{i}", "answer": str(i)} for i in range(24)]
BATCH: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 4}


def default_of(item: dataclasses.Field[Any]) -> Any:
    return [] if item.default is dataclasses.MISSING else item.default


def another(default: Any) -> Any:
    """A value other than a default, of its kind."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return ["x"] if isinstance(default, list) else "x"


def settings_of(rows: int = 24, peft_config: Any = None, quantization_config: Any = None, **given: Any) -> dict[str, Any]:
    """The settings that arguments become, by `section.field`."""
    args = GRPOConfig(**{"output_dir": "out", **given})
    config = config_of(
        args, steps_of(args, rows), model="m", evaluates=True, peft_config=peft_config, quantization_config=quantization_config
    )
    return {f"{section}.{name}": value for section, held in config_to_dict(config).items() for name, value in held.items()}


# the table


def test_every_argument_of_trl_is_in_the_table_with_its_default() -> None:
    assert GOLDEN["versions"] == ["transformers-5.23.0", "trl-1.16.0"]
    assert TABLE.keys() == GOLDEN["GRPOConfig"].keys() | OURS
    assert {name: default_of(TABLE[name]) for name in GOLDEN["GRPOConfig"]} == GOLDEN["GRPOConfig"]
    assert all(isinstance(item.metadata["help"], Honoured | Refused) and item.metadata["help"] for item in TABLE.values())


def test_every_argument_of_trls_trainer_is_in_the_table_with_its_default() -> None:
    named = inspect.signature(GRPOTrainer.__init__).parameters
    own = {name: "required" if item.default is item.empty else item.default for name, item in named.items() if name != "self"}
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in GOLDEN["GRPOTrainer"].items()}
    assert list(own.items()) == list(stored.items())
    assert list(TRAINER_ARGUMENTS) == list(stored)
    assert all(isinstance(text, Honoured | Refused) for text in TRAINER_ARGUMENTS.values())


def test_the_hooks_of_a_callback_are_those_of_transformers() -> None:
    assert [name for name in vars(TrainerCallback) if name.startswith("on_")] == GOLDEN["hooks"]


@pytest.mark.parametrize(("kind", "name"), [(ModelConfig, "ModelConfig"), (ScriptArguments, "ScriptArguments")])
def test_the_arguments_of_scripts_are_trls(kind: type, name: str) -> None:
    own = {item.name: item.default for item in dataclasses.fields(kind)}
    changed = {"lora_dropout": 0.0} if name == "ModelConfig" else {}
    assert own == GOLDEN[name] | changed


# refused arguments


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_named_with_what_to_do_instead(name: str) -> None:
    item = TABLE[name]
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(**{name: another(default_of(item))})
    assert str(caught.value).startswith(f"{name} is ")
    assert str(caught.value).endswith(item.metadata["help"])
    assert ("leave it out" in str(caught.value)) or ("use " in str(caught.value))


def test_an_argument_that_a_script_sets_later_is_refused_by_the_trainer() -> None:
    args = GRPOConfig()
    args.use_vllm = True
    with pytest.raises(ConfigError, match=r"use_vllm is true: leave it out; this package samples"):
        GRPOTrainer(model="m", reward_funcs=len, args=args, train_dataset=ROWS)


@pytest.mark.parametrize("name", [name for name, text in TRAINER_ARGUMENTS.items() if isinstance(text, Refused)])
def test_a_refused_argument_of_the_trainer_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is '.*': .*leave it out"):
        GRPOTrainer(**{"model": "m", "train_dataset": ROWS, name: [len]})


class Network:
    """Looks like a module of PyTorch."""

    def __call__(self) -> None: ...


Network.__module__ = "torch.nn.modules.module"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": Network()}, r"model is 'a Network': give its folder or hub id"),
        ({"reward_funcs": None}, r"reward_funcs is null: give a function"),
        ({"reward_funcs": []}, r"reward_funcs is \[\]: give a function"),
        ({"reward_funcs": Network()}, r"reward_funcs\[0\] is 'a Network': give the model's folder or hub id"),
        ({"reward_processing_classes": [len]}, r"reward_processing_classes\[0\] is 'a builtin_function_or_method': use None"),
        ({"train_dataset": None}, r"train_dataset is null: give rows"),
        ({"train_dataset": {"train": ROWS}}, r"train_dataset is 'a dict of train': give one set of rows"),
        ({"train_dataset": [{"prompt": "a", "image": 1}]}, r"train_dataset\['image'\] is 'a column of images': remove it"),
        ({"eval_dataset": {"a/b": ROWS}}, r"eval_dataset is 'a/b': name a set with letters"),
        ({"eval_dataset": {}}, r"eval_dataset is \{\}: give rows, or a dict of several sets by name"),
        ({"environment_factory": {"a": len, "b": len}}, r"environment_factory is 'a dict of a, b': give one class: with several"),
        ({"args": GRPOConfig(eval_strategy="steps")}, r"eval_dataset is null: give rows, or use eval_strategy='no'"),
        ({"optimizers": (object(), None)}, r"optimizers\[0\] is 'a object': give an Optax transformation"),
        ({"optimizers": (optax.sgd(1.0), len)}, r"optimizers\[1\] is .*: use None; an Optax transformation holds its schedule"),
        (
            {"callbacks": [type("Own", (), {"on_substep_end": lambda self: None})]},
            r"callbacks is 'Own': its on_substep_end cannot be",
        ),
    ],
)
def test_what_the_trainer_cannot_use_is_named_before_the_model_is_looked_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(**{"model": "no/such-model", "reward_funcs": len, "train_dataset": ROWS, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type is 'ppo': use one of grpo, bnpo"),
        ({"loss_type": "bnpo", "gradient_accumulation_steps": 2}, r"loss_type is 'bnpo': use 'dapo', which divides by the tokens"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level is 'sequence': use loss_type 'grpo' or 'luspo'"),
        ({"loss_type": "luspo"}, r"importance_sampling_level is 'token': use 'sequence' with loss_type='luspo'"),
        ({"importance_sampling_level": "word"}, r"importance_sampling_level is 'word': use 'token'"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.1},
            r"use_bias_correction_kl is true: use False with importance_sampling_level='sequence'",
        ),
        ({"scale_rewards": "mean"}, r"scale_rewards is 'mean': use one of group, batch, none"),
        ({"optim": "rmsprop_bnb_8bit"}, r"optim is 'rmsprop_bnb_8bit': use one of 'adamw_torch', .*'sgd', 'adamw_8bit', "),
        ({"lr_scheduler_type": "polynomial"}, r"lr_scheduler_type is 'polynomial': use one of linear"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, r"lr_scheduler_type is 'constant': use 'constant_with_warmup'"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, r"warmup_ratio is 0.1: leave out this or warmup_steps \(2\)"),
        ({"warmup_steps": 3, "num_iterations": 2}, r"warmup_steps is 3: use a multiple of 2, the updates on one"),
        ({"max_steps": 3, "num_iterations": 2}, r"max_steps is 3: use a multiple of 2, the updates on one"),
        ({"num_train_epochs": 0}, r"num_train_epochs is 0: use a positive number of epochs"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            r"steps_per_generation is 3: use a multiple of gradient_acc",
        ),
        (
            {"steps_per_generation": 2, "per_device_train_batch_size": 12, "num_generations": 8},
            r"steps_per_generation is 2: use a divisor of the 3 prompts",
        ),
        (
            {**BATCH, "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2},
            r"num_iterations is 2: use 1: with several parts",
        ),
        ({"sync_ref_model": True}, r"sync_ref_model is true: leave it out, or use beta above 0"),
        (
            {"sync_ref_model": True, "beta": 0.1, "num_iterations": 2, "ref_model_sync_steps": 3},
            r"ref_model_sync_steps is 3: use a multiple of 2, the updates",
        ),
        ({"top_entropy_quantile": 0.2, "entropy_coef": 0.1}, r"entropy_coef is 0\.1: use 0 with top_entropy_quantile"),
        ({"top_entropy_quantile": 0.2, "gradient_accumulation_steps": 2}, r"top_entropy_quantile is 0\.2: use 1\.0 with gradient"),
        ({"multi_objective_aggregation": "max"}, r"multi_objective_aggregation is 'max': use one of sum_then_normalize"),
        ({"generation_batch_size": 12}, r"generation_batch_size is 12: use a multiple of .* \(8\)"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, r"generation_batch_size is 16: leave out this or steps_per_gen"),
        ({"num_generations": 3}, r"num_generations is 3: use a divisor of the generation batch of 8 completions"),
        ({"num_generations": 1}, r"num_generations is 1: use at least 2"),
        ({"num_generations_eval": 0}, r"num_generations_eval is 0: use 1 \(greedy\), or more completions of each row"),
        ({"eval_strategy": "sometimes"}, r"eval_strategy is 'sometimes': use 'no', 'steps' or 'epoch'"),
        ({"save_strategy": "never"}, r"save_strategy is 'never': use 'no', 'steps' or 'epoch'"),
        ({"save_strategy": "best"}, r"metric_for_best_model is null: use 'eval_reward' or 'eval_accuracy' with save_strategy"),
        ({"load_best_model_at_end": True}, r"metric_for_best_model is null: use 'eval_reward' or 'eval_accuracy' with load_best"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "loss"},
            r"metric_for_best_model is 'loss': use 'eval_reward' or 'eval_accuracy': evaluations have no loss",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
            r"lr_scheduler_kwargs is \{'num_cycles': 2\}: leave it out; cosine takes no arguments here",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"lr_scheduler_kwargs is \{.*\}: give min_lr, or min_lr_rate as a share"),
        ({"logging_steps": 0}, r"logging_steps is 0: use a positive number of steps"),
        ({"report_to": ["wandb", "comet_ml"]}, r"report_to is 'comet_ml': use 'none', 'tensorboard', 'wandb', 'trackio', 'mlflow'"),
        ({"generation_kwargs": {"num_beams": 4}}, r"generation_kwargs\['num_beams'\] is 4: leave it out"),
        (
            {"model_init_kwargs": {"attn_implementation": "sdpa"}},
            r"model_init_kwargs\['attn_implementation'\] is 'sdpa': leave it out",
        ),
        ({"model_init_kwargs": {"dtype": "float16"}}, r"model_init_kwargs\['dtype'\] is 'float16': use 'float32'"),
        ({"transformers_continuous_batching_config": {"max_memory_percent": 0.4}}, r"transformers_continuous_batching_config is "),
        ({"max_completion_length": None}, r"max_completion_length is null: give the length"),
        ({"chat_template_kwargs": 3}, r"is 3: give a dict"),
        ({"settings": {"rollout": {"slot": 2}}}, r"rollout\.slot is not a setting; did you mean rollout\.slots"),
    ],
)
def test_a_value_without_an_equivalent_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(**given)


# honoured arguments

EVALUATES: dict[str, Any] = {"eval_strategy": "steps"}
HONOURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "output_dir": ({"output_dir": "runs/x"}, {"train.run_dir": "runs/x"}),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 24}, {"train.prompts_per_step": 3, "train.steps": 24}),
    "num_train_epochs": ({"num_train_epochs": 0.3}, {"train.steps": 8}),
    "max_steps": ({"max_steps": 12, "num_iterations": 2}, {"train.steps": 6}),
    "learning_rate": ({"learning_rate": 1e-4}, {"optim.learning_rate": 1e-4}),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 2e-7}', "learning_rate": 1e-6},
        {"optim.schedule": "cosine", "optim.final_ratio": 0.2},
    ),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {"optim.schedule": "constant"}),
    "warmup_steps": ({"warmup_steps": 6, "num_iterations": 2}, {"optim.warmup_steps": 3, "optim.warmup_ratio": None}),
    "optim": ({"optim": "adamw_torch"}, {}),
    "weight_decay": ({"weight_decay": 0.1}, {"optim.weight_decay": 0.1}),
    "adam_beta1": ({"adam_beta1": 0.8}, {"optim.b1": 0.8}),
    "adam_beta2": ({"adam_beta2": 0.99}, {"optim.b2": 0.99}),
    "adam_epsilon": ({"adam_epsilon": 1e-6}, {"optim.eps": 1e-6}),
    "gradient_accumulation_steps": ({**BATCH, "gradient_accumulation_steps": 3}, {"train.prompts_per_step": 6}),
    "max_grad_norm": ({"max_grad_norm": 0.0}, {"optim.max_grad_norm": None}),
    "bf16": ({"bf16": False}, {"model.dtype": "float32"}),
    "activation_checkpointing": ({"activation_checkpointing": False}, {"model.remat": "none"}),
    "gradient_checkpointing": ({"gradient_checkpointing": False}, {"model.remat": "none"}),
    "logging_strategy": ({"logging_strategy": "no", "log_completions": True}, {"train.show_every": 0}),
    "logging_steps": ({"logging_steps": 5, "num_iterations": 2, "log_completions": True}, {"train.show_every": 3}),
    "logging_first_step": ({"logging_first_step": True}, {}),
    "disable_tqdm": ({"disable_tqdm": True}, {"train.quiet": True}),
    "report_to": ({"report_to": ["wandb", "tensorboard", "mlflow"]}, {"train.track": ["wandb", "mlflow"]}),
    "run_name": ({"report_to": "wandb", "run_name": "first"}, {"train.run_name": "first"}),
    "project": ({"report_to": "mlflow", "project": "sums"}, {"train.project": "sums"}),
    "trackio_space_id": ({"trackio_space_id": "me/space"}, {}),
    "eval_strategy": ({"eval_strategy": "epoch", **BATCH}, {"train.eval_every": 12}),
    "eval_steps": ({**EVALUATES, "eval_steps": 0.25}, {"train.eval_every": 18}),
    "per_device_eval_batch_size": ({"per_device_eval_batch_size": 3}, {"train.eval_slots": 3}),
    "eval_on_start": ({"eval_on_start": True}, {}),
    "save_strategy": ({"save_strategy": "no"}, {"train.save_every": 0}),
    "save_steps": ({"save_steps": 7, "num_iterations": 2}, {"train.save_every": 4}),
    "save_total_limit": ({"save_total_limit": 3}, {"train.keep_checkpoints": 3}),
    "push_to_hub": ({"push_to_hub": True}, {}),
    "hub_token": ({"hub_token": "hf_x"}, {}),
    "hub_private_repo": ({"hub_private_repo": True}, {}),
    "hub_model_id": ({"hub_model_id": "me/mine"}, {}),
    "hub_strategy": ({"hub_strategy": "all_checkpoints"}, {}),
    "hub_always_push": ({"hub_always_push": True}, {}),
    "hub_revision": ({"hub_revision": "main"}, {}),
    "load_best_model_at_end": (
        {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
        {"train.keep_best": "held_out", "train.best_metric": "accuracy"},
    ),
    "metric_for_best_model": (
        {"save_strategy": "best", "metric_for_best_model": "eval_reward"},
        {"train.best_metric": "reward/mean", "train.save_every": 0},
    ),
    "greater_is_better": (
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl", "greater_is_better": False},
        {"train.best_metric": "-kl_divergence"},
    ),
    "full_determinism": ({"full_determinism": True}, {}),
    "seed": ({"seed": 7}, {"train.seed": 7}),
    "use_cpu": ({"use_cpu": True}, {}),
    "do_train": ({"do_train": True}, {}),
    "do_eval": ({"do_eval": True}, {}),
    "do_predict": ({"do_predict": True}, {}),
    "resume_from_checkpoint": ({"resume_from_checkpoint": "out"}, {}),
    "model_init_kwargs": (
        {"bf16": False, "model_init_kwargs": {"revision": "v2", "dtype": "bfloat16", "attn_implementation": None}},
        {"model.revision": "v2", "model.dtype": "bfloat16"},
    ),
    "disable_dropout": ({"disable_dropout": True}, {}),
    "remove_unused_columns": ({"remove_unused_columns": True}, {}),
    "num_generations": ({"num_generations": 4}, {"rollout.num_generations": 4, "train.prompts_per_step": 2}),
    "num_generations_eval": ({"num_generations_eval": 4}, {"eval.samples": 4}),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.01}, {"objective.router_aux_coef": 0.01}),
    "max_completion_length": ({"max_completion_length": 99}, {"rollout.max_completion_length": 99}),
    "shuffle_dataset": ({"shuffle_dataset": False}, {"data.shuffle": False}),
    "generation_batch_size": (
        {**BATCH, "gradient_accumulation_steps": 2, "generation_batch_size": 16},
        {"train.prompts_per_step": 4},
    ),
    "steps_per_generation": ({**BATCH, "gradient_accumulation_steps": 2, "steps_per_generation": 2}, {"train.prompts_per_step": 4}),
    "temperature": ({"temperature": 0.7}, {"rollout.temperature": 0.7}),
    "top_p": ({"top_p": 0.9}, {"rollout.top_p": 0.9}),
    "top_k": ({"top_k": 20}, {"rollout.top_k": 20}),
    "min_p": ({"min_p": 0.1}, {"rollout.min_p": 0.1}),
    "generation_kwargs": (
        {"generation_kwargs": '{"stop": "END", "min_new_tokens": 2, "max_new_tokens": 9, "top_k": 3}', "top_k": 5},
        {
            "rollout.stop": ["END"],
            "rollout.min_completion_length": 2,
            "rollout.max_completion_length": 9,
            "rollout.top_k": 3,
        },
    ),
    "chat_template_kwargs": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"data.template_arguments": {"enable_thinking": False}},
    ),
    "beta": ({"beta": 0.1, "use_bias_correction_kl": False}, {"objective.beta": 0.1}),
    "num_iterations": ({"num_iterations": 2}, {"objective.num_iterations": 2, "train.steps": 72}),
    "epsilon": ({"epsilon": 0.1}, {"objective.epsilon": 0.1, "objective.epsilon_high": 0.1}),
    "delta": ({"delta": 3.0}, {"objective.delta": 3.0}),
    "epsilon_high": ({"epsilon_high": 4.0, "loss_type": "cispo"}, {"objective.epsilon_max": 4.0, "objective.epsilon_high": 0.2}),
    "importance_sampling_level": ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, {"objective.loss": "gspo"}),
    "reward_weights": ({"reward_weights": [1.0, 0.5]}, {"rewards.weights": [1.0, 0.5]}),
    "scale_rewards": ({"scale_rewards": False}, {"objective.scale_rewards": "none"}),
    "loss_type": ({"loss_type": "dr_grpo"}, {"objective.loss": "dr_grpo"}),
    "mask_truncated_completions": ({"mask_truncated_completions": True}, {"objective.mask_truncated": True}),
    "use_bias_correction_kl": ({"beta": 0.1, "use_bias_correction_kl": False}, {"objective.kl": "k3"}),
    "max_tool_calling_iterations": ({"max_tool_calling_iterations": None}, {}),  # test_episode_runs.py
    "log_completions": ({"log_completions": True}, {"train.show_every": 10}),
    "num_completions_to_print": ({"log_completions": True, "num_completions_to_print": 2}, {"train.show_completions": 2}),
    "use_transformers_continuous_batching": ({"use_transformers_continuous_batching": True}, {"rollout.refill": True}),
    "transformers_continuous_batching_config": ({"transformers_continuous_batching_config": {"use_cuda_graph": False}}, {}),
    "use_transformers_paged": ({"use_transformers_paged": True}, {"rollout.refill": True}),
    "max_prompt_length": ({"max_prompt_length": 77}, {"rollout.max_prompt_length": 77, "data.overlong": "shorten"}),
    "warmup_ratio": ({"warmup_ratio": 0.1}, {"optim.warmup_ratio": 0.1}),
    "settings": ({"settings": {"mesh": {"fsdp": 1}, "train": {"seed": 3}}, "seed": 7}, {"mesh.fsdp": 1, "train.seed": 3}),
}
"""Each honoured argument: what is given, and the settings that it becomes; none where it is no setting (test_trl_trainer.py)."""


SAME = {"logging_strategy", "use_bias_correction_kl", "use_transformers_continuous_batching", "use_transformers_paged"}
"""Those whose setting has the expected value without them too: it is so anyway, or depends on another argument."""


def test_the_table_of_honoured_arguments_is_whole() -> None:
    assert HONOURED.keys() | LATER.keys() == TABLE.keys() - set(REFUSED)


SYNC = {"sync_ref_model": True, "beta": 0.1}

LATER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps_per_generation": (
        {
            **BATCH,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        },
        {"train.prompts_per_step": 4, "train.updates_per_rollout": 2, "train.steps": 18},
    ),
    "top_entropy_quantile": ({"top_entropy_quantile": 0.2}, {"objective.top_entropy": 0.2}),
    "off_policy_mask_threshold": ({"off_policy_mask_threshold": 0.5}, {"objective.off_policy_threshold": 0.5}),
    "multi_objective_aggregation": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"objective.normalize_each_reward": True, "objective.scale_rewards": "batch"},
    ),
    "sync_ref_model": ({**SYNC, "sync_ref_model": True}, {"train.reference_every": 512, "train.reference_mix": 0.6}),
    "ref_model_sync_steps": ({**SYNC, "num_iterations": 2, "ref_model_sync_steps": 6}, {"train.reference_every": 3}),
    "ref_model_mixup_alpha": ({**SYNC, "ref_model_mixup_alpha": 1.0}, {"train.reference_mix": 1.0}),
    "entropy_coef": ({"entropy_coef": 0.01}, {"objective.entropy_coef": 0.01, "objective.entropy_target": None}),
    "use_adaptive_entropy": ({"use_adaptive_entropy": True}, {"objective.entropy_target": 0.2}),
    "entropy_target": ({"use_adaptive_entropy": True, "entropy_target": 1.5}, {"objective.entropy_target": 1.5}),
    "entropy_coef_min": (
        {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_coef_min": 0.2},
        {"objective.entropy_coef_min": 0.2, "objective.entropy_coef": 0.5},
    ),
    "entropy_coef_max": ({"use_adaptive_entropy": True, "entropy_coef_max": 0.3}, {"objective.entropy_coef_max": 0.3}),
    "entropy_coef_delta": ({"use_adaptive_entropy": True, "entropy_coef_delta": 0.1}, {"objective.entropy_coef_delta": 0.1}),
    "loss_type": ({"loss_type": "vespo"}, {"objective.loss": "vespo"}),
    "importance_sampling_level": ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, {"objective.loss": "luspo"}),
    "use_bias_correction_kl": ({"beta": 0.1}, {"objective.kl": "k3_corrected"}),
}
"""More arguments and values, of the losses and advantages."""


@pytest.mark.parametrize("name", LATER)
def test_arguments_of_the_losses_become_their_settings(name: str) -> None:
    given, expected = LATER[name]
    found = settings_of(**given)
    assert {setting: found[setting] for setting in expected} == expected


@pytest.mark.parametrize("name", HONOURED)
def test_an_honoured_argument_becomes_its_setting(name: str) -> None:
    assert jax.device_count() == 1
    given, expected = HONOURED[name]
    found = settings_of(**given)
    assert {setting: found[setting] for setting in expected} == expected
    usual = settings_of()
    changed = [setting for setting, value in expected.items() if value != usual[setting]]
    assert changed or not expected or name in SAME


def test_the_defaults_are_trls_run() -> None:
    expected = {
        "model.path": "m",
        "model.dtype": "bfloat16",
        "lora.rank": 0,
        "objective.loss": "dapo",
        "objective.beta": 0.0,
        "objective.scale_rewards": "group",
        "optim.learning_rate": 1e-6,
        "optim.schedule": "linear",
        "optim.warmup_steps": 0,
        "optim.max_grad_norm": 1.0,
        "rollout.num_generations": 8,
        "rollout.max_completion_length": 512,
        "train.prompts_per_step": 1,
        "train.steps": 72,  # three epochs of 24 rows, one prompt a step
        "train.seed": 42,
        "train.save_every": 500,
        "train.eval_every": 0,
        "train.run_dir": "out",
        "train.show_every": 0,
        "train.track": "none",
        "rewards.timeout_seconds": None,
    }
    found = settings_of()
    assert {name: found[name] for name in expected} == expected


def steps_by_hand(rows: int, args: GRPOConfig) -> int:
    """TRL's number of optimiser steps, counted on its order of micro-batches: each entry is a micro-batch's generation batch."""
    size: Any = args.generation_batch_size
    parts: Any = args.steps_per_generation
    whole = range(rows // (size // args.num_generations))  # what is left over is dropped
    micro = [batch for batch in whole for _ in range(args.num_iterations) for _ in range(parts)]
    an_epoch = math.ceil(len(micro) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * an_epoch)


@pytest.mark.parametrize("rows", [24, 25, 100])
@pytest.mark.parametrize("epochs", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(
    ("size", "accumulation", "updates", "parts"),
    [(8, 1, 1, 1), (8, 2, 1, 1), (4, 4, 1, 1), (8, 1, 3, 1), (16, 2, 2, 1), (8, 1, 1, 2), (4, 2, 1, 3)],
)
def test_epochs_make_as_many_steps_as_in_trl(
    rows: int, epochs: float, size: int, accumulation: int, updates: int, parts: int
) -> None:
    args = GRPOConfig(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * parts,
        num_iterations=updates,
        num_generations=4,
        num_train_epochs=epochs,
    )
    steps = steps_of(args, rows)
    assert steps.prompts * 4 == size * accumulation * parts
    assert (steps.parts, steps.updates) == (parts, parts * updates)
    assert steps.total == math.ceil(steps_by_hand(rows, args) / (parts * updates))
    assert steps.epoch == rows // steps.prompts


def test_devices_count_as_trls_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOConfig, "world_size", 4)
    args = GRPOConfig(per_device_train_batch_size=8, num_generations=8, per_device_eval_batch_size=2)
    assert args.generation_batch_size == 32
    assert steps_of(args, 24).prompts == 4
    found = config_of(args, steps_of(args, 24), model="m", evaluates=True)
    assert (found.train.prompts_per_step, found.train.eval_slots) == (4, 8)


# PEFT and bitsandbytes


@dataclass
class PeftLora:
    """A LoraConfig of PEFT 0.21 as its `to_dict` gives it, with the defaults that are not None, False or empty."""

    r: int = 8
    lora_alpha: int = 8
    target_modules: Any = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: Any = True
    modules_to_save: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: Any = None
    layers_pattern: Any = None
    loftq_config: Any = field(default_factory=dict)
    megatron_core: str = "megatron.core"
    qalora_group_size: int = 16
    use_dora: bool = False
    task_type: str | None = "CAUSAL_LM"
    peft_type: str = "LORA"
    peft_version: str = "0.21.2"
    base_model_name_or_path: str | None = "m"
    runtime_config: Any = field(default_factory=lambda: {"ephemeral_gpu_offload": False})

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("kind", [PeftLora, dict])
def test_a_lora_config_is_read_from_an_object_or_a_dict(kind: Any) -> None:
    assert settings_of(peft_config=kind())["lora.targets"] == ["q_proj", "v_proj"]  # PEFT's for our families
    assert LoraConfig(**lora_settings(kind())) == LoraConfig(rank=8, alpha=8.0, targets=["q_proj", "v_proj"])
    given = kind(r=4, lora_alpha=16, target_modules={"v_proj", "k_proj"}, use_rslora=True)
    assert LoraConfig(**lora_settings(given)) == LoraConfig(rank=4, alpha=16.0, targets=["k_proj", "v_proj"], rslora=True)
    assert lora_settings(kind(target_modules="all-linear"))["targets"] == "all-linear"
    given = kind(lora_dropout=0.05, use_dora=True, layers_to_transform=1, layers_pattern="layers", rank_pattern={"v_proj": 2})
    expected = {"dropout": 0.05, "use_dora": True, "layers_to_transform": [1], "rank_pattern": {"v_proj": 2}}
    assert LoraConfig(**lora_settings(given)) == LoraConfig(rank=8, alpha=8.0, targets=["q_proj", "v_proj"], **expected)
    given = kind(init_lora_weights="pissa_niter_16", alpha_pattern={"v_proj": 4})
    assert LoraConfig(**lora_settings(given)).init == "pissa_niter_16"
    assert LoraConfig(**lora_settings(given)).alpha_pattern == {"v_proj": 4.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch", ("adamw", "float32", 0.9, 0.999, 1e-8)),
        ("paged_adamw_32bit", ("adamw", "float32", 0.9, 0.999, 1e-8)),
        ("adamw_bnb_8bit", ("adamw", "int8", 0.9, 0.999, 1e-8)),
        ("lion_32bit", ("lion", "float32", 0.9, 0.999, None)),  # transformers passes its betas to Lion
        ("paged_lion_8bit", ("lion", "int8", 0.9, 0.999, None)),
        ("adafactor", ("adafactor", "float32", 0.0, None, 1e-30)),
        ("sgd", ("sgd", "float32", 0.0, None, None)),
    ],
)
def test_optimisers_by_transformers_names(name: str, expected: tuple[Any, ...]) -> None:
    found = settings_of(optim=name)
    assert tuple(found[f"optim.{field}"] for field in ("name", "moments", "b1", "b2", "eps")) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers_pattern": "h"}, r"peft_config\.layers_pattern is 'h': leave it out, or use 'layers'"),
        ({"loftq_config": {"loftq_bits": 4}}, r"peft_config\.loftq_config is .*: leave it out"),
        ({"bias": "all"}, r"peft_config\.bias is 'all': use 'none'"),
        ({"init_lora_weights": "olora"}, r"peft_config\.init_lora_weights is 'olora': use True .*, 'pissa' or 'pissa_niter_16'"),
        ({"modules_to_save": ["lm_head"]}, r"peft_config\.modules_to_save is \['lm_head'\]: leave it out; only adapters are"),
        ({"target_modules": r".*q_proj"}, r"peft_config\.target_modules is '\.\*q_proj': use 'all-linear'"),
        ({"target_modules": ["lm_head"]}, r"peft_config\.target_modules is 'lm_head': use 'all-linear' or a list"),
        ({"r": 0}, r"peft_config\.r is 0: use 8"),
        ({"task_type": "SEQ_CLS"}, r"peft_config\.task_type is 'SEQ_CLS': use 'CAUSAL_LM'"),
    ],
)
def test_what_a_lora_config_asks_for_in_vain_is_named(given: dict[str, Any], message: str) -> None:
    for config in (given, PeftLora(**given)):
        with pytest.raises(ConfigError, match=message):
            lora_settings(config)


def test_a_quantised_base_is_read_from_a_bits_and_bytes_config() -> None:
    assert quantization_of_config(None) == "none"
    assert quantization_of_config({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}) == "nf4"
    assert quantization_of_config({"load_in_8bit": True, "llm_int8_threshold": 6.0}) == "int8"
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found = settings_of(peft_config={}, model_init_kwargs={"quantization_config": given})
    assert found["model.quantization"] == "nf4"
    for wrong, message in (
        ({"load_in_4bit": True}, r"bnb_4bit_quant_type is 'fp4': use 'nf4'"),
        ({"bits": 4}, r"quantization_config\.bits is 4: use load_in_4bit"),
        ({"load_in_8bit": True, "llm_int8_threshold": 5.0}, r"llm_int8_threshold is 5\.0: leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantization_of_config(wrong)


def test_the_number_format_of_a_4_bit_config_is_the_models_or_named() -> None:
    given: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "torch.bfloat16"}
    assert settings_of(bf16=False, peft_config={}, quantization_config=given)["model.dtype"] == "bfloat16"
    with pytest.warns(UserWarning, match="bnb_4bit_compute_dtype bfloat16 changes nothing: the model computes in float32"):
        found = settings_of(bf16=False, peft_config={}, quantization_config=given, model_init_kwargs={"dtype": "float32"})
    assert found["model.dtype"] == "float32"
    with pytest.warns(UserWarning, match="bnb_4bit_use_double_quant changes nothing"):
        assert quantization_of_config({**given, "bnb_4bit_use_double_quant": True}) == "nf4"
    for name, value in (("bnb_4bit_compute_dtype", "float16"), ("bnb_4bit_quant_storage", "bfloat16")):
        with pytest.raises(ConfigError, match=f"quantization_config.{name} is '{value}'"):
            settings_of(peft_config={}, quantization_config={**given, name: value})


# command lines of scripts


def test_a_scripts_command_line_is_read_as_trls_parser_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAID_BY_THE_FILE", "before")
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-4\nmax_steps: 7\nuse_peft: true\nenv:\n  SAID_BY_THE_FILE: after\n")
    words = "--config FILE --model_name_or_path m --max-steps 9 --lora_target_modules q_proj v_proj --scale_rewards none"
    words += ' --no_gradient_checkpointing --chat_template_kwargs {"a":1} --output_dir out'
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config(words.replace("FILE", str(tmp_path / "run.yaml")).split())
    assert (training.learning_rate, training.max_steps, training.scale_rewards) == (1e-4, 9, "none")
    assert (training.gradient_checkpointing, training.chat_template_kwargs) == (False, {"a": 1})
    assert (script.dataset_train_split, model.model_name_or_path) == ("train", "m")
    assert LoraConfig(**lora_settings(get_peft_config(model))) == LoraConfig(rank=16, alpha=32.0, targets=["q_proj", "v_proj"])
    assert get_quantization_config(model) is None
    import os

    assert os.environ["SAID_BY_THE_FILE"] == "after"
    untouched = parser.parse_args_and_config([])[1]
    assert untouched.to_dict()["learning_rate"] == 1e-4  # the file's values are the parser's defaults now


def test_an_unknown_entry_of_a_scripts_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-4\n")
    with pytest.raises(ConfigError, match=r"the file of --config has --learning_rat, which is no argument"):
        TrlParser((GRPOConfig,)).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])


def test_a_whole_config_survives_its_dict() -> None:
    args = GRPOConfig(max_steps=4, **BATCH)
    found = config_of(args, steps_of(args, 24), model="m", evaluates=False)
    assert Config.from_dict(config_to_dict(found)) == found
    assert found.data.eval_size == 0
