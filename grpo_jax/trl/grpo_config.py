"""`GRPOConfig` with the names and defaults of TRL 1.16 and, where TRL inherits them, of transformers 5.23.

Each field's text is its row in the table: `honoured` names the setting of ours that it becomes, `refused` says what to do instead.
`steps.py` and `settings.py` make the settings. What a setting means is said in `grpo_jax.config`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from grpo_jax.trl.arguments import Refused, allow, honoured, refusal, refused

MESH = "leave it out; devices are used as settings={'mesh': {...}} says"
NO_TORCH = "leave it out; it concerns PyTorch, which this package does not use"
NO_LOADER = "leave it out; there is no data loader, the trainer reads the rows itself"
NO_VLLM = "leave it out; this package samples completions itself, and a free slot goes to the next completion at once"
NO_TRACKIO = "leave it out; trackio's environment variables choose its bucket"
NO_FLOAT16 = "use bf16=True, or False for float32"

DICTS = (
    *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config", "settings"),
    *("accelerator_config", "fsdp_config", "deepspeed", "lr_scheduler_kwargs", "liger_kernel_config"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
"""Fields that the command line gives as JSON text."""


@dataclass
class GRPOConfig:
    """The arguments of a run, by TRL's names and with TRL's defaults.

    "Processes" in TRL's formulas are devices here (`jax.device_count()`), as TRL starts one process per device. A generation batch
    of `per_device_train_batch_size` × devices × `steps_per_generation` completions is one step of ours, with `num_iterations` ×
    `steps_per_generation` / `gradient_accumulation_steps` updates; `global_step` counts updates.

    Raises:
        ConfigError: an argument, or its value, has no equivalent here. The message names it and says what to do instead.

    Example:
        GRPOConfig(output_dir="out", per_device_train_batch_size=8, num_generations=8, max_steps=100, learning_rate=1e-5)
    """

    # What transformers' TrainingArguments has.
    output_dir: str | None = honoured(None, "train.run_dir; None is trainer_output")
    per_device_train_batch_size: int = honoured(8, "train.prompts_per_step, with num_generations and the two fields below")
    num_train_epochs: float = honoured(3.0, "train.steps, with TRL's arithmetic: rows left over in an epoch make no step")
    max_steps: int = honoured(-1, "train.steps times num_iterations, which must divide it; above 0 it wins over num_train_epochs")
    learning_rate: float = honoured(1e-6, "optim.learning_rate")
    lr_scheduler_type: str = honoured(
        "linear", "optim.schedule: linear, cosine, cosine_with_min_lr, constant or constant_with_warmup"
    )
    lr_scheduler_kwargs: dict | str | None = honoured(
        None, "optim.final_ratio, with cosine_with_min_lr: min_lr, or min_lr_rate as a share of learning_rate"
    )
    warmup_steps: float = honoured(0, "optim.warmup_steps; below 1 it is a share of all updates, optim.warmup_ratio")
    optim: str = honoured(
        "adamw_torch_fused",
        "optim.name: adamw_torch, adamw_torch_fused, adamw_torch_xla, adafactor, lion_32bit, sgd; adamw_8bit, lion_8bit",
    )
    optim_args: str | None = refused(
        None, "leave it out; the settings have arguments of their own, others are settings={'optim': ...}"
    )
    weight_decay: float = honoured(0.0, "optim.weight_decay")
    adam_beta1: float = honoured(0.9, "optim.b1, with adamw and lion")
    adam_beta2: float = honoured(0.999, "optim.b2, with adamw and lion")
    adam_epsilon: float = honoured(1e-8, "optim.eps, with adamw")
    optim_target_modules: str | None = refused(None, "leave it out; it belongs to optimisers that are not offered")
    gradient_accumulation_steps: int = honoured(1, "train.prompts_per_step; what is computed at once is found by itself")
    average_tokens_across_devices: bool = refused(True, "leave it out; the losses always count the tokens of the whole batch")
    max_grad_norm: float = honoured(1.0, "optim.max_grad_norm; 0 clips nothing")
    label_smoothing_factor: float = refused(0.0, "leave it out; GRPO's loss has no labels")
    bf16: bool | None = honoured(
        None, "model.dtype: True is bfloat16, False what model_init_kwargs says, else float32; None is True"
    )
    fp16: bool = refused(False, NO_FLOAT16)
    bf16_full_eval: bool = refused(False, "leave it out; evaluation computes as training does")
    fp16_full_eval: bool = refused(False, NO_FLOAT16)
    tf32: bool | None = refused(None, "leave it out; matrix products follow JAX's own setting, jax_default_matmul_precision")
    activation_checkpointing: bool | None = honoured(None, "the newer name of gradient_checkpointing")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = refused(None, "leave it out; settings={'model': {'remat': ...}}")
    gradient_checkpointing: bool = honoured(
        True, "model.remat: True is auto, which recomputes where memory asks for it; False is none"
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = refused(None, "leave it out; settings={'model': {'remat': ...}}")
    torch_compile: bool = refused(False, "leave it out; every step is compiled by XLA")
    torch_compile_backend: str | None = refused(None, "leave it out; every step is compiled by XLA")
    torch_compile_mode: str | None = refused(None, "leave it out; every step is compiled by XLA")
    use_liger_kernel: bool = refused(False, "leave it out; the kernels of this package are used wherever they run")
    liger_kernel_config: dict[str, bool] | None = refused(
        None, "leave it out; the kernels of this package are used wherever they run"
    )
    use_cache: bool = refused(False, "leave it out; sampling always has a KV cache, and the update never")
    neftune_noise_alpha: float | None = refused(None, "leave it out; noise in the embedding is not offered")
    torch_empty_cache_steps: int | None = refused(None, NO_TORCH)
    auto_find_batch_size: bool = refused(
        False, "leave it out; the micro-batch that fits into memory is found before the first step"
    )
    logging_strategy: str = honoured("steps", "entries of state.log_history: no, steps or epoch; the run folder has all steps")
    logging_steps: float = honoured(10, "entries of state.log_history; below 1 a share of all steps. Rounded up to whole batches")
    logging_first_step: bool = honoured(False, "an entry of state.log_history after the first step")
    log_on_each_node: bool = refused(True, "leave it out; process 0 alone writes and shows")
    logging_nan_inf_filter: bool = refused(True, "leave it out; a step that is not finite is skipped, said and counted")
    include_num_input_tokens_seen: str | bool = refused("no", "leave it out; num_tokens is always logged")
    log_level: str = refused("passive", "leave it out; use disable_tqdm=True for plain lines")
    log_level_replica: str = refused("warning", "leave it out; process 0 alone shows anything")
    disable_tqdm: bool | None = honoured(None, "train.quiet: True prints plain lines instead of a live bar")
    report_to: list[str] | str | None = honoured(
        "none", "train.track: wandb, trackio, mlflow or several; tensorboard is always written; none and [] are neither"
    )
    run_name: str | None = honoured(None, "train.run_name: what trackers call the run; None is the name of output_dir")
    project: str = honoured("huggingface", "train.project: of W&B, trackio and MLflow; the default is the trackers' own variables")
    trackio_space_id: str | None = honoured(
        None, "the environment variable TRACKIO_SPACE_ID, set where report_to has trackio and it is not set"
    )
    trackio_bucket_id: str | None = refused(None, NO_TRACKIO)
    trackio_static_space_id: str | None = refused(None, NO_TRACKIO)
    eval_strategy: str = honoured(
        "no", "train.eval_every: no, steps or epoch; one greedy completion of each held-out row is scored"
    )
    eval_steps: float | None = honoured(
        None, "train.eval_every; None is logging_steps, below 1 a share. Rounded up to whole batches"
    )
    eval_delay: float = refused(0, "leave it out; evaluations begin at the first multiple of eval_steps")
    per_device_eval_batch_size: int = honoured(8, "train.eval_slots: completions decoded at once in evaluation, times devices")
    prediction_loss_only: bool = refused(False, "leave it out; evaluation has rewards and no loss")
    eval_on_start: bool = honoured(
        False, "callbacks and log_history get the evaluation before the first step, which is made anyway"
    )
    eval_do_concat_batches: bool = refused(True, "leave it out; evaluation returns rewards alone")
    eval_use_gather_object: bool = refused(False, "leave it out; evaluation returns rewards alone")
    eval_accumulation_steps: int | None = refused(None, "leave it out; per_device_eval_batch_size bounds the memory of evaluation")
    include_for_metrics: list[str] = refused([], "leave it out; evaluation returns rewards alone")
    batch_eval_metrics: bool = refused(False, "leave it out; evaluation returns rewards alone")
    save_only_model: bool = refused(False, "leave it out; checkpoints always hold what resuming needs; save_model writes the model")
    save_strategy: str = honoured(
        "steps",
        "train.save_every: steps or epoch; no saves the last state alone; best is train.keep_best by metric_for_best_model",
    )
    save_steps: float = honoured(500, "train.save_every; below 1 a share of all steps. Rounded up to whole batches")
    save_on_each_node: bool = refused(False, "leave it out; all processes write their parts of one checkpoint")
    save_total_limit: int | None = honoured(None, "train.keep_checkpoints; None keeps all")
    enable_jit_checkpoint: bool = refused(False, "leave it out; SIGTERM and Ctrl-C save a checkpoint anyway")
    push_to_hub: bool = honoured(False, "uploads adapter or model with a card: as hub_strategy says, and in save_model")
    hub_token: str | None = honoured(None, "the token of uploads; None takes that of `hf auth login` or HF_TOKEN")
    hub_private_repo: bool | None = honoured(None, "whether a new repository is private; None is the account's default")
    hub_model_id: str | None = honoured(None, "the repository of uploads; None is the last part of output_dir")
    hub_strategy: str = honoured(
        "every_save",
        "when push_to_hub uploads: end, or every_save (in the background); checkpoint and all_checkpoints also upload what "
        "resuming needs, without completions, as the folder last-checkpoint or checkpoint-STEP",
    )
    hub_always_push: bool = honoured(False, "True uploads at a save although the upload before goes on, after it")
    hub_revision: str | None = honoured(None, "the branch of uploads, made where it does not exist")
    load_best_model_at_end: bool = honoured(
        False,
        "train.keep_best, train.best_metric: the best evaluation's checkpoint is saved, and `train` ends with its weights; needs "
        "metric_for_best_model",
    )
    metric_for_best_model: str | None = honoured(
        None,
        "state.best_metric, which EarlyStoppingCallback reads, and train.best_metric: eval_reward, eval_accuracy, "
        "eval_rewards/FUNCTION/mean; eval_SET_reward with several sets",
    )
    greater_is_better: bool | None = honoured(
        None, "state.best_metric and train.best_metric; None is True unless the metric's name ends in loss"
    )
    ignore_data_skip: bool = refused(
        False, "leave it out; a resumed run goes on with the next rows, and skips nothing to get there"
    )
    restore_callback_states_from_checkpoint: bool = refused(False, "leave it out; callbacks are made anew by your script")
    full_determinism: bool = honoured(False, "nothing: the same seed on the same devices gives the same run with either value")
    seed: int = honoured(42, "train.seed")
    data_seed: int | None = refused(None, "use seed, which fixes the order of the rows too")
    use_cpu: bool = honoured(False, "True needs a process that was started with JAX_PLATFORMS=cpu")
    accelerator_config: dict | str | None = refused(None, MESH)
    parallelism_config: Any = refused(None, MESH)
    dataloader_drop_last: bool = refused(False, "leave it out; rows left over in an epoch make no step")
    dataloader_num_workers: int = refused(0, NO_LOADER)
    dataloader_pin_memory: bool = refused(True, NO_LOADER)
    dataloader_persistent_workers: bool = refused(False, NO_LOADER)
    dataloader_prefetch_factor: int | None = refused(None, NO_LOADER)
    dataloader_multiprocessing_context: str | None = refused(None, NO_LOADER)
    dataloader_in_order: bool = refused(True, NO_LOADER)
    label_names: list[str] | None = refused(None, "leave it out; GRPO's loss has no labels")
    train_sampling_strategy: str = refused("random", "use shuffle_dataset=False for the order of the dataset")
    length_column_name: str = refused("length", "leave it out; lengths are counted here")
    ddp_find_unused_parameters: bool | None = refused(None, NO_TORCH)
    ddp_bucket_cap_mb: int | None = refused(None, NO_TORCH)
    ddp_broadcast_buffers: bool | None = refused(None, NO_TORCH)
    ddp_static_graph: bool | None = refused(None, NO_TORCH)
    ddp_backend: str | None = refused(None, NO_TORCH)
    ddp_timeout: int = refused(1800, NO_TORCH)
    fsdp: str | None = refused(None, MESH)
    fsdp_config: dict[str, Any] | str | None = refused(None, MESH)
    deepspeed: dict | str | None = refused(None, MESH)
    debug: str | list[str] = refused("", "leave it out; settings={'train': {'debug': True}} checks all arrays after every step")
    skip_memory_metrics: bool = refused(True, "leave it out; `grpo-jax plan` says what a run takes")
    do_train: bool = honoured(False, "nothing: the trainer does not read it, as in TRL; it is there for your script")
    do_eval: bool = honoured(False, "nothing: eval_strategy decides, as in TRL; it is there for your script")
    do_predict: bool = honoured(False, "nothing: the trainer does not read it, as in TRL; it is there for your script")
    resume_from_checkpoint: str | None = honoured(None, "train(resume_from_checkpoint=...), where that is not given")
    local_rank: int = refused(-1, "leave it out; JAX finds its processes itself")

    # What TRL's GRPOConfig adds.
    model_init_kwargs: dict[str, Any] | str | None = honoured(
        None, "model: revision, dtype, quantization_config; others are refused"
    )
    trust_remote_code: bool = refused(False, "leave it out; code from a model's folder never runs")
    router_aux_loss_coef: float | None = honoured(None, "objective.router_aux_coef, of a mixture of experts")
    disable_dropout: bool = honoured(False, "nothing: models are trained without dropout with either value")
    cast_lm_head_to_fp32: bool = refused(False, "leave it out; log-probabilities are float32 anyway")
    remove_unused_columns: bool | None = honoured(False, "True drops every column but the prompt, before rewards see them")
    num_generations: int | None = honoured(8, "rollout.num_generations")
    num_generations_eval: int | None = honoured(
        None,
        "eval.samples: above 1 eval_reward is the mean of as many samples of each row, and there are eval_pass_at/K and "
        "eval_majority_at/K; None and 1 are one greedy completion, and so is eval_accuracy always",
    )
    max_completion_length: int | None = honoured(512, "rollout.max_completion_length")
    ds3_gather_for_generation: bool = refused(True, MESH)
    shuffle_dataset: bool | None = honoured(True, "data.shuffle")
    pad_to_multiple_of: int | str | None = refused("auto", "leave it out; the widths that are compiled are chosen once a run")
    generation_batch_size: int | None = honoured(None, "train.prompts_per_step times num_generations; see steps_per_generation")
    steps_per_generation: int | None = honoured(
        None,
        "train.updates_per_rollout times gradient_accumulation_steps; each update learns from whole prompts and divides by its own "
        "tokens, where TRL mixes the completions of all prompts",
    )
    temperature: float = honoured(1.0, "rollout.temperature")
    top_p: float = honoured(1.0, "rollout.top_p; log-probabilities are then those of the truncated distribution, as in TRL")
    top_k: int = honoured(0, "rollout.top_k")
    min_p: float | None = honoured(None, "rollout.min_p; None is 0")
    generation_kwargs: dict | str | None = honoured(
        None, "rollout: stop, stop_strings, min_new_tokens, and the sampling fields above"
    )
    chat_template_kwargs: dict | str | None = honoured(None, "data.template_arguments")
    repetition_penalty: float = refused(1.0, "leave it out, and let a reward such as gx.repetition_penalty discourage repetition")
    cache_implementation: str | None = refused(None, "leave it out; settings={'rollout': {'kv_dtype': ...}} chooses the KV cache")
    use_vllm: bool = refused(False, NO_VLLM)
    vllm_mode: str = refused("colocate", NO_VLLM)
    vllm_model_impl: str = refused("vllm", NO_VLLM)
    vllm_enable_sleep_mode: bool = refused(False, NO_VLLM)
    vllm_structured_outputs_regex: str | None = refused(None, NO_VLLM)
    vllm_server_base_url: str | None = refused(None, NO_VLLM)
    vllm_server_host: str = refused("0.0.0.0", NO_VLLM)
    vllm_server_port: int = refused(8000, NO_VLLM)
    vllm_server_timeout: float = refused(240.0, NO_VLLM)
    vllm_group_port: int = refused(51216, NO_VLLM)
    vllm_gpu_memory_utilization: float = refused(0.3, NO_VLLM)
    vllm_max_model_length: int | None = refused(None, NO_VLLM)
    vllm_tensor_parallel_size: int = refused(1, NO_VLLM)
    beta: float = honoured(0.0, "objective.beta")
    num_iterations: int = honoured(1, "objective.num_iterations")
    epsilon: float = honoured(0.2, "objective.epsilon")
    delta: float | None = honoured(None, "objective.delta")
    epsilon_high: float | None = honoured(None, "objective.epsilon_high; with cispo objective.epsilon_max. None is epsilon")
    sapo_temperature_neg: float = refused(1.05, "leave it out; sapo has its paper's temperatures")
    sapo_temperature_pos: float = refused(1.0, "leave it out; sapo has its paper's temperatures")
    vespo_k_pos: float = refused(2.0, "leave it out; vespo has TRL's default exponents")
    vespo_lambda_pos: float = refused(3.0, "leave it out; vespo has TRL's default exponents")
    vespo_k_neg: float = refused(3.0, "leave it out; vespo has TRL's default exponents")
    vespo_lambda_neg: float = refused(2.0, "leave it out; vespo has TRL's default exponents")
    importance_sampling_level: str = honoured(
        "token", "objective.loss: sequence is for loss_type grpo, which is then gspo, and luspo"
    )
    reward_weights: list[float] | None = honoured(None, "rewards.weights")
    multi_objective_aggregation: str = honoured("sum_then_normalize", "objective.normalize_each_reward: normalize_then_sum is true")
    scale_rewards: str = honoured("group", "objective.scale_rewards: group or True, batch, none or False")
    loss_type: str = honoured("dapo", "objective.loss: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo")
    mask_truncated_completions: bool = honoured(False, "objective.mask_truncated")
    sync_ref_model: bool = honoured(False, "train.reference_every; with adapters too, whose matrices are averaged")
    ref_model_mixup_alpha: float = honoured(0.6, "train.reference_mix, with sync_ref_model")
    ref_model_sync_steps: int = honoured(512, "train.reference_every in steps of ours, with sync_ref_model")
    top_entropy_quantile: float = honoured(1.0, "objective.top_entropy; below 1 only without gradient accumulation")
    entropy_coef: float = honoured(0.0, "objective.entropy_coef, over the tokens of the whole batch")
    use_adaptive_entropy: bool = honoured(
        False, "objective.entropy_target; the bonus is switched by the entropy of the batch's samples, not of the step before"
    )
    entropy_coef_min: float = honoured(0.0, "objective.entropy_coef_min, with use_adaptive_entropy")
    entropy_coef_max: float = honoured(1.0, "objective.entropy_coef_max, with use_adaptive_entropy")
    entropy_coef_delta: float = honoured(0.005, "objective.entropy_coef_delta, with use_adaptive_entropy")
    entropy_target: float = honoured(0.2, "objective.entropy_target, with use_adaptive_entropy")
    max_tool_calling_iterations: int | None = honoured(None, "environment.max_turns, which also counts the last turn; None is 1024")
    vllm_importance_sampling_correction: bool = refused(True, NO_VLLM)
    vllm_importance_sampling_mode: str = refused("sequence_mask", NO_VLLM)
    vllm_importance_sampling_clip_max: float | None = refused(3.0, NO_VLLM)
    vllm_importance_sampling_clip_min: float | None = refused(None, NO_VLLM)
    off_policy_mask_threshold: float | None = honoured(None, "objective.off_policy_threshold")
    use_bias_correction_kl: bool = honoured(True, "objective.kl: k3_corrected, or k3")
    log_completions: bool = honoured(False, "train.show_every: a table every logging_steps; completions.jsonl always has them all")
    log_multimodal: bool = refused(True, "leave it out; models here read text alone")
    num_completions_to_print: int | None = honoured(
        None, "train.show_completions: rows of the table of log_completions; None is 4. completions.jsonl has them all"
    )
    log_unique_prompts: bool = refused(False, "leave it out; completions.jsonl has all of them")
    log_completions_hub_repo: str | None = refused(None, "leave it out, and upload completions.jsonl of output_dir")
    use_transformers_continuous_batching: bool = honoured(
        False, "rollout.refill, which is always on: a free slot is filled at once"
    )
    transformers_continuous_batching_config: dict | str | None = honoured(
        None, "only {'use_cuda_graph': False}, which is so anyway"
    )
    use_transformers_paged: bool = honoured(False, "the older name of use_transformers_continuous_batching")
    vllm_importance_sampling_cap: float | None = refused(None, NO_VLLM)

    # What older versions and Unsloth have, and what TRL has not.
    max_prompt_length: int | None = honoured(None, "rollout.max_prompt_length; longer prompts lose their start. None: no limit")
    warmup_ratio: float | None = honoured(None, "optim.warmup_ratio")
    settings: dict[str, Any] | str | None = honoured(
        None, "settings of grpo_jax by section, such as {'mesh': {'fsdp': -1}}; they win"
    )

    def __post_init__(self) -> None:
        for name in DICTS:
            text = getattr(self, name)
            if isinstance(text, str) and text.startswith("{"):
                setattr(self, name, json.loads(text))
        self.output_dir = os.path.expanduser(self.output_dir or "trainer_output")
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        self.debug = self.debug or ""  # the parser of a command line makes None of it
        if isinstance(self.include_num_input_tokens_seen, bool):
            self.include_num_input_tokens_seen = "all" if self.include_num_input_tokens_seen else "no"
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        self.use_transformers_continuous_batching |= self.use_transformers_paged
        self.do_eval = self.do_eval or str(self.eval_strategy) != "no"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self.check()
        self.hub_strategy = getattr(self.hub_strategy, "value", self.hub_strategy)  # transformers' HubStrategy or a text
        strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
        allow(self.hub_strategy in strategies, "hub_strategy", self.hub_strategy, f"use one of {', '.join(strategies)}")
        self._set_generation_batch()

    def check(self) -> None:
        """Checks that every refused argument has its default; the trainer checks again, as a script may set fields later.

        Raises:
            ConfigError: one has not.
        """
        for item in dataclasses.fields(self):
            instead = item.metadata["help"]
            if not isinstance(instead, Refused):
                continue
            default = [] if item.default is dataclasses.MISSING else item.default
            value = getattr(self, item.name)
            if item.name == "gradient_checkpointing_kwargs" and value == {"use_reentrant": False}:
                continue  # what TRL's own examples write; nothing is reentrant here
            if value != default:
                raise refusal(item.name, value, instead)

    def _set_generation_batch(self) -> None:
        """Works out the generation batch as TRL does, and checks that it is made of whole groups."""
        per_step = self.per_device_train_batch_size * self.world_size
        size, steps, group = self.generation_batch_size, self.steps_per_generation, self.num_generations or 0
        allow(size is None or steps is None, "generation_batch_size", size, f"leave out this or steps_per_generation ({steps})")
        if size is None:
            self.steps_per_generation = self.gradient_accumulation_steps if steps is None else steps
            self.generation_batch_size = size = per_step * self.steps_per_generation
        else:
            fix = f"use a multiple of per_device_train_batch_size times devices ({per_step})"
            allow(size % per_step == 0, "generation_batch_size", size, fix)
            self.steps_per_generation = size // per_step
        allow(group >= 2, "num_generations", self.num_generations, "use at least 2: completions of a prompt are compared")
        batch = f"the generation batch of {size} completions (per_device_train_batch_size times devices times steps_per_generation)"
        allow(size % group == 0, "num_generations", group, f"use a divisor of {batch}")

    @property
    def world_size(self) -> int:
        """Number of devices of all processes: what TRL calls processes."""
        import jax

        return jax.device_count()

    @property
    def process_index(self) -> int:
        """Number of this process."""
        import jax

        return jax.process_index()

    def to_dict(self) -> dict[str, Any]:
        """Every argument by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
