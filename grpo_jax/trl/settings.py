"""Turns a `GRPOConfig` into settings of ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import Config
from grpo_jax.trl.arguments import allow
from grpo_jax.trl.best import best_settings, samples_of
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.peft import computing_dtype, lora_settings, plain, plain_dtype, quantization_of_config
from grpo_jax.trl.steps import Steps

UNLIMITED_PROMPT_TOKENS = 1_000_000
"""`rollout.max_prompt_length` where TRL has no limit: what is compiled follows the lengths that there are."""

UNLIMITED_ITERATIONS = 1023
"""Turns with calls where TRL has no limit: the episode's tokens are the limit."""

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "lion"),
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""`optim.name` for the names of transformers. Paged ones differ in where their state is, which `optim.offload` says here."""

EIGHT_BITS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion"),
}
"""`optim.name` for the names of transformers whose `optim.moments` are int8."""

ALL_OPTIMIZERS = OPTIMIZERS | EIGHT_BITS
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
BY_SEQUENCE = {"grpo": "gspo", "luspo": "luspo"}
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
SCHEDULES = {
    **{"linear": "linear", "cosine": "cosine", "cosine_with_min_lr": "cosine"},
    **{"constant": "constant", "constant_with_warmup": "constant"},
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def config_of(
    args: GRPOConfig,
    steps: Steps,
    *,
    model: str | None,
    evaluates: bool,
    peft_config: Any = None,
    quantization_config: Any = None,
    episodes: bool = False,
    streaming: bool = False,
    sets: Sequence[str] = (),
    own_rewards: int = 0,
) -> Config:
    """Makes the settings of a run.

    Args:
        args: TRL's arguments.
        steps: of `steps_of`.
        model: folder or hub id; None where a policy is passed, which has its own adapters and number formats.
        evaluates: whether there are held-out rows.
        peft_config, quantization_config: the trainer's arguments of these names.
        episodes: whether there are tools or environments.
        streaming: whether the rows to train on stream.
        sets: names of several sets of held-out rows.
        own_rewards: rewards of the environment's, each of weight 1, after those of reward_weights.

    Raises:
        ConfigError: an argument, or its value, has no equivalent here; the message names it.
    """
    args.check()
    iterations = args.max_tool_calling_iterations
    allow(
        episodes or iterations is None,
        "max_tool_calling_iterations",
        iterations,
        "give tools or environment_factory, or leave it out",
    )
    fix = "give the length of the longest prompt in tokens: a dataset that streams does not show it"
    allow(not streaming or args.max_prompt_length is not None, "max_prompt_length", args.max_prompt_length, fix)
    weights = None if args.reward_weights is None else [*args.reward_weights, *[1.0] * own_rewards]
    samples = args.num_generations_eval
    allow(samples is None or samples >= 1, "num_generations_eval", samples, "use 1 (greedy), or more completions of each row")
    values = {
        "model": model_settings(args, model, quantization_config),
        "lora": lora_settings(peft_config) if model is not None else {},
        "data": {
            "shuffle": bool(args.shuffle_dataset),
            "template_arguments": given_dict(args.chat_template_kwargs),
            "overlong": "shorten",
            "streaming": streaming,
            **({} if evaluates else {"eval_size": 0}),
        },
        "rollout": rollout_settings(args),
        "environment": environment_settings(args) if episodes else {},
        "rewards": {"weights": weights, "timeout_seconds": None},
        "objective": objective_settings(args),
        "optim": optim_settings(args, steps),
        "train": {**train_settings(args, steps), **best_settings(args, sets, evaluates=evaluates)},
        "eval": {"samples": args.num_generations_eval} if evaluates and samples_of(args) > 1 else {},
    }
    given = given_dict(args.settings)
    merged = {section: {**values.get(section, {}), **(given.get(section) or {})} for section in {**values, **given}}
    return Config.from_dict(merged)


def model_settings(args: GRPOConfig, path: str | None, quantization_config: Any) -> dict[str, Any]:
    """The section `model`."""
    init = given_dict(args.model_init_kwargs)
    dtype = plain_dtype(init.pop("dtype", init.pop("torch_dtype", None)))
    revision, quantized = init.pop("revision", None), init.pop("quantization_config", None)
    both = quantized is not None and quantization_config is not None
    allow(not both, "quantization_config", "given twice", "leave it out of model_init_kwargs")
    for name, value in init.items():
        allow(
            value is None or value is False, f"model_init_kwargs[{name!r}]", value, "leave it out; only revision and dtype are read"
        )
    choices = (None, "auto", "float32", "bfloat16")
    allow(dtype in choices, "model_init_kwargs['dtype']", dtype, "use 'float32', 'bfloat16' or 'auto'")
    if path is None:
        allow(not (args.model_init_kwargs or quantization_config), "model_init_kwargs", args.model_init_kwargs, POLICY)
        return {"remat": "auto" if args.gradient_checkpointing else "none"}
    quantized = quantization_config if quantized is None else quantized
    computing = computing_dtype(quantized)
    chosen = "bfloat16" if args.bf16 else dtype or computing or "float32"
    if computing is not None and computing != chosen:
        warnings.warn(f"bnb_4bit_compute_dtype {computing} changes nothing: the model computes in {chosen}", stacklevel=2)
    return {
        "path": path,
        "revision": revision,
        "dtype": chosen,
        "quantization": quantization_of_config(quantized),
        "remat": "auto" if args.gradient_checkpointing else "none",
    }


POLICY = "leave it out (and quantization_config): the policy that is passed as model has its formats already"


def given_dict(value: Any) -> dict[str, Any]:
    """A dict that an argument gives; {} for None. Text was read when the `GRPOConfig` was made."""
    allow(value is None or isinstance(value, Mapping), "a dict of arguments", value, "give a dict, or JSON text of one")
    return dict(value or {})


def rollout_settings(args: GRPOConfig) -> dict[str, Any]:
    """The section `rollout`."""
    engine = args.transformers_continuous_batching_config or {}
    allow(engine in ({}, {"use_cuda_graph": False}), "transformers_continuous_batching_config", engine, "leave it out")
    values: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING}
    given = given_dict(args.generation_kwargs)
    values |= {name: given.pop(name) for name in SAMPLING if name in given}
    stop = given.pop("stop_strings", given.pop("stop", []))
    shortest = given.pop("min_new_tokens", given.pop("min_tokens", 0))
    longest = given.pop("max_new_tokens", given.pop("max_tokens", args.max_completion_length))
    for name, value in given.items():
        known = ", ".join((*SAMPLING, "stop_strings", "min_new_tokens", "max_new_tokens"))
        allow(False, f"generation_kwargs[{name!r}]", value, f"leave it out; {known} can be given")
    allow(longest is not None, "max_completion_length", longest, "give the length of the longest completion, in tokens")
    return {
        **values,
        "min_p": values["min_p"] or 0.0,
        "top_k": values["top_k"] or 0,
        "stop": [stop] if isinstance(stop, str) else list(stop),
        "num_generations": args.num_generations,
        "min_completion_length": shortest,
        "max_completion_length": longest,
        "max_prompt_length": args.max_prompt_length or UNLIMITED_PROMPT_TOKENS,
    }


def environment_settings(args: GRPOConfig) -> dict[str, Any]:
    """The section `environment`: TRL has no limit of time, and counts the calls, not the turns."""
    iterations = args.max_tool_calling_iterations
    allow(iterations is None or iterations >= 0, "max_tool_calling_iterations", iterations, "use 0 or more, or None")
    return {"max_turns": (UNLIMITED_ITERATIONS if iterations is None else iterations) + 1, "timeout_seconds": None}


def objective_settings(args: GRPOConfig) -> dict[str, Any]:
    """The section `objective`."""
    loss, level = args.loss_type, args.importance_sampling_level
    allow(loss in LOSSES, "loss_type", loss, f"use one of {', '.join(LOSSES)}")
    allow(level in ("token", "sequence"), "importance_sampling_level", level, "use 'token' or 'sequence'")
    fix = "use loss_type 'grpo' or 'luspo' with it"
    allow(level == "token" or loss in BY_SEQUENCE, "importance_sampling_level", level, fix)
    allow(level == "sequence" or loss != "luspo", "importance_sampling_level", level, "use 'sequence' with loss_type='luspo'")
    scales = ("group", "batch", "none")
    allow(args.scale_rewards in scales, "scale_rewards", args.scale_rewards, f"use one of {', '.join(scales)}")
    whole = args.gradient_accumulation_steps * args.world_size == 1
    split = "use 'dapo', which divides by the tokens of the whole batch, or gradient_accumulation_steps=1 on one device"
    allow(loss != "bnpo" or whole, "loss_type", loss, split)
    corrected = args.use_bias_correction_kl and args.beta > 0
    allow(level == "token" or not corrected, "use_bias_correction_kl", True, "use False with importance_sampling_level='sequence'")
    share, aggregation = args.top_entropy_quantile, args.multi_objective_aggregation
    fix = "use 1.0 with gradient accumulation: there TRL takes the quantile of each micro-batch, which has no equivalent"
    allow(share == 1 or args.gradient_accumulation_steps == 1, "top_entropy_quantile", share, fix)
    allow(aggregation in AGGREGATIONS, "multi_objective_aggregation", aggregation, f"use one of {', '.join(AGGREGATIONS)}")
    others = {
        **entropy_settings(args),
        **({"top_entropy": share} if share != 1 else {}),
        **({} if args.router_aux_loss_coef is None else {"router_aux_coef": args.router_aux_loss_coef}),
        **({"off_policy_threshold": args.off_policy_mask_threshold} if args.off_policy_mask_threshold is not None else {}),
        **({"normalize_each_reward": True, "scale_rewards": "batch"} if aggregation == "normalize_then_sum" else {}),
    }
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return {
        "loss": BY_SEQUENCE[loss] if level == "sequence" else loss,
        "beta": args.beta,
        "kl": "k3_corrected" if corrected else "k3",
        "kl_in_reward": False,
        "epsilon": args.epsilon,
        **({"epsilon_max": high} if loss == "cispo" else {"epsilon_high": high}),
        "delta": args.delta,
        "advantage_eps": 1e-4,
        "scale_rewards": args.scale_rewards,
        "num_iterations": args.num_iterations,
        "mask_truncated": args.mask_truncated_completions,
        **others,
    }


def entropy_settings(args: GRPOConfig) -> dict[str, Any]:
    """The settings of the entropy bonus."""
    weight, adapts = args.entropy_coef, args.use_adaptive_entropy
    fix = "use 0 with top_entropy_quantile: there TRL gives the bonus to the tokens of high entropy alone, which has no equivalent"
    allow(args.top_entropy_quantile == 1 or not (weight or adapts), "entropy_coef", weight, fix)
    adaptive = ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max")
    values = {name: getattr(args, name) for name in adaptive} if adapts else {}
    return values | ({"entropy_coef": weight} if weight else {})


def reference_settings(args: GRPOConfig, steps: Steps) -> dict[str, Any]:
    """The settings of a reference that changes."""
    if not args.sync_ref_model:
        return {}
    every, mix = args.ref_model_sync_steps, args.ref_model_mixup_alpha
    allow(args.beta > 0, "sync_ref_model", True, "leave it out, or use beta above 0: without a KL term there is no reference")
    fix = f"use a multiple of {steps.updates}, the updates on one generation batch"
    allow(every > 0 and every % steps.updates == 0, "ref_model_sync_steps", every, fix)
    return {"reference_every": every // steps.updates, "reference_mix": mix}


def optim_settings(args: GRPOConfig, steps: Steps) -> dict[str, Any]:
    """The section `optim`."""
    name, schedule, warmup, ratio = plain(args.optim), plain(args.lr_scheduler_type), args.warmup_steps, args.warmup_ratio
    allow(name in ALL_OPTIMIZERS, "optim", name, f"use one of {', '.join(map(repr, ALL_OPTIMIZERS))}")
    allow(schedule in SCHEDULES, "lr_scheduler_type", schedule, f"use one of {', '.join(SCHEDULES)}")
    allow(not (warmup and ratio), "warmup_ratio", ratio, f"leave out this or warmup_steps ({warmup})")
    if 0 < warmup < 1:
        warmup, ratio = 0, warmup
    fix = "use 'constant_with_warmup': with 'constant' there is no warm-up"
    allow(schedule != "constant" or not (warmup or ratio), "lr_scheduler_type", schedule, fix)
    fix = f"use a multiple of {steps.updates}, the updates on one generation batch"
    allow(warmup % steps.updates == 0, "warmup_steps", warmup, fix)
    moments = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
    own = {"adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2")}.get(ALL_OPTIMIZERS[name], ())  # as transformers passes them on
    return {
        "name": ALL_OPTIMIZERS[name],
        **({"moments": "int8"} if name in EIGHT_BITS else {}),
        "learning_rate": args.learning_rate,
        "schedule": SCHEDULES[schedule],
        "warmup_steps": int(warmup) // steps.updates,
        "warmup_ratio": ratio or None,
        "final_ratio": final_ratio(args),
        "max_grad_norm": args.max_grad_norm or None,
        "weight_decay": args.weight_decay,
        **{field: moments[field] for field in own},
    }


def final_ratio(args: GRPOConfig) -> float:
    """`optim.final_ratio` for lr_scheduler_kwargs."""
    given, kind = given_dict(args.lr_scheduler_kwargs), plain(args.lr_scheduler_type)
    if kind != "cosine_with_min_lr":
        allow(not given, "lr_scheduler_kwargs", given, f"leave it out; {kind} takes no arguments here")
        return 0.0
    rate, share = given.pop("min_lr", None), given.pop("min_lr_rate", None)
    allow(not given, "lr_scheduler_kwargs", given, "leave it out; min_lr or min_lr_rate can be given")
    fix = "give min_lr, or min_lr_rate as a share of learning_rate, and only one of them"
    allow((rate is None) != (share is None), "lr_scheduler_kwargs", {"min_lr": rate, "min_lr_rate": share}, fix)
    return float(share) if rate is None else float(rate) / args.learning_rate


def train_settings(args: GRPOConfig, steps: Steps) -> dict[str, Any]:
    """The section `train`."""
    project = None if args.project == "huggingface" else args.project  # TRL's default; ours leaves it to the trackers' variables
    shown, tracked = args.num_completions_to_print if args.log_completions else None, tracker(args.report_to)
    return {
        "steps": steps.total,
        "prompts_per_step": steps.prompts,
        **({"updates_per_rollout": steps.parts} if steps.parts > 1 else {}),
        **reference_settings(args, steps),
        "seed": args.seed,
        "run_dir": args.output_dir,
        "save_every": steps.saving,
        "keep_checkpoints": KEEP_ALL if args.save_total_limit is None else args.save_total_limit,
        "eval_every": steps.evaluating,
        "eval_slots": args.per_device_eval_batch_size * args.world_size,
        "show_every": steps.logging if args.log_completions else 0,
        **({} if shown is None else {"show_completions": shown}),
        "quiet": bool(args.disable_tqdm),
        "track": tracked,
        **({} if tracked == "none" else {"run_name": args.run_name, "project": project}),
    }


TRACKERS = ("wandb", "trackio", "mlflow")
"""The names of report_to that `train.track` has, TensorBoard apart."""

KEEP_ALL = 1_000_000
"""`train.keep_checkpoints` that no run reaches."""


def tracker(report_to: Any) -> str | list[str]:
    """`train.track` for TRL's report_to. TensorBoard's events are always written."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    known = ("none", "tensorboard", *TRACKERS)
    for name in names:
        allow(name in known, "report_to", name, "use " + ", ".join(repr(name) for name in known))
    found = [name for name in dict.fromkeys(names) if name in TRACKERS]
    return found if len(found) > 1 else found[0] if found else "none"
