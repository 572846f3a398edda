"""The settings sections `optim`, `train` and `mesh`: optimiser, training loop and devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from grpo_jax.config.checks import check_types, require

TrackerName: TypeAlias = Literal["none", "wandb", "trackio", "mlflow", "tensorboard"]


OF_OPTIMIZER: Any = None
"""Default of settings that `OptimConfig` fills in by the optimiser's name."""

OPTIMIZERS: dict[str, dict[str, float | None]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "muon": {"b1": 0.95, "b2": 0.999, "eps": 1e-8},
    "adafactor": {"b1": 0.0, "b2": None, "eps": 1e-30},
    "lion": {"b1": 0.9, "b2": 0.99, "eps": None},
    "sgd": {"b1": 0.0, "b2": None, "eps": None},
}
"""The optimisers, each with the usual values of its own settings; None where it has no such setting."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, of Optax, after clipping by global norm.

    Args:
        name: `adamw` (https://arxiv.org/abs/1711.05101); `muon` (https://arxiv.org/abs/2502.16982) for matrices, whose updates have
            the size of AdamW's, with Adam for embedding, head and vectors; `adafactor` (https://arxiv.org/abs/1804.04235) with
            absolute steps, for each layer's matrix by itself; `lion` (https://arxiv.org/abs/2302.06675); or `sgd`.
        moments: What is kept of earlier gradients: `float32`; `bfloat16` for the first moment (momentum), at half its memory; with
            adamw `factored`: the second moment as means of rows and columns, as in Adafactor, where both are at least 128; or with
            adamw, lion and sgd `int8`: both moments of matrices in 8 bits with a scale for each 256, at a quarter of their memory
            (https://arxiv.org/abs/2110.02861).
        learning_rate: Peak learning rate; 1e-6 to 5e-6 is usual for full fine-tuning, 5e-6 to 5e-5 for LoRA; with lion a tenth to
            a third of that.
        schedule: Learning rate after the warm-up: constant, or linear or cosine decay to final_ratio at the last step.
        final_ratio: Where linear and cosine decay end, as a share of learning_rate; 0 is the usual end.
        warmup_steps: Steps in which the learning rate rises from 0 to its peak.
        warmup_ratio: The same as a share of all updates of the run, rounded up; null leaves it to warmup_steps.
        max_grad_norm: Gradients with a larger global norm are scaled down to this one; null clips nothing.
        weight_decay: Decoupled weight decay, applied to matrices only.
        b1: Decay of the first moment, or of the momentum; 0 is none. Default 0.9; muon 0.95, adafactor and sgd 0.
        b2: Decay of the second moment; with lion of the momentum, of which b1 is then the share in an update. Default 0.999, lion
            0.99; null where there is none (adafactor, sgd).
        eps: Added to the square root of the second moment, in adafactor to the square. Default 1e-8, adafactor 1e-30; null where
            there is none (lion, sgd).
        max_skipped_steps: The run saves its state and stops after this many steps in a row whose loss or gradient was not finite.
            The update of such a step is left out.
        offload: Keep what training changes (float32 adapters or weights, and the optimiser's state) in the host's memory while
            completions are sampled; each update copies it to the device and back.
    """

    name: Literal["adamw", "muon", "adafactor", "lion", "sgd"] = "adamw"
    moments: Literal["float32", "bfloat16", "factored", "int8"] = "float32"
    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = OF_OPTIMIZER
    b2: float | None = OF_OPTIMIZER
    eps: float | None = OF_OPTIMIZER
    max_skipped_steps: int = 5
    offload: bool = False

    def __post_init__(self) -> None:
        usual = OPTIMIZERS.get(self.name, {}) if isinstance(self.name, str) else {}
        for field_name, default in usual.items():
            if getattr(self, field_name) is None:
                object.__setattr__(self, field_name, default)
        check_types(self, "optim")
        for field_name, default in usual.items():
            value = getattr(self, field_name)
            fix = f"{self.name} has none: leave it out"
            require(default is not None or value is None, f"optim.{field_name}", value, fix)
        fix = "only adamw's second moment is kept whole else: use float32, or optim.name adamw"
        require(self.moments != "factored" or self.name == "adamw", "optim.moments", self.moments, fix)
        fix = "8 bits are offered for adamw, lion and sgd: use one of these, or float32"
        require(self.moments != "int8" or self.name in ("adamw", "lion", "sgd"), "optim.moments", self.moments, fix)
        has_moments = self.b1 > 0 or (self.name == "adamw" and self.moments in ("factored", "int8"))
        fix = f"{self.name} has no momentum with optim.b1 0: use float32, or an optim.b1 such as 0.9"
        require(self.moments == "float32" or has_moments, "optim.moments", self.moments, fix)
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "use a positive rate such as 1e-5")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "use 0 or more steps")
        require(0 <= self.final_ratio <= 1, "optim.final_ratio", self.final_ratio, "use a share of learning_rate from 0 to 1")
        fix = "it has an effect with optim.schedule linear or cosine: set that, or leave this out"
        require(self.final_ratio == 0 or self.schedule != "constant", "optim.final_ratio", self.final_ratio, fix)
        if self.warmup_ratio is not None:
            ratio = self.warmup_ratio
            require(0 <= ratio < 1, "optim.warmup_ratio", ratio, "use a share of all updates from 0 up to 1, such as 0.1, or null")
            require(self.warmup_steps == 0, "optim.warmup_ratio", ratio, f"leave out this or warmup_steps ({self.warmup_steps})")
        if self.max_grad_norm is not None:
            require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "use a positive norm such as 1.0, or null")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more")
        require(0 <= self.b1 < 1, "optim.b1", self.b1, "use a number from 0 up to 1")
        require(self.b2 is None or 0 <= self.b2 < 1, "optim.b2", self.b2, "use a number from 0 up to 1")
        require(self.eps is None or self.eps > 0, "optim.eps", self.eps, "use a small positive number such as 1e-8")
        require(self.max_skipped_steps >= 1, "optim.max_skipped_steps", self.max_skipped_steps, "use at least 1")


DoctorRule = Literal[
    "reward_hacking",
    "kl_explosion",
    "no_improvement",
    "mode_collapse",
    "nothing_stops",
    "no_reward",
    "all_solved",
    "sampler_drift",
    "gradient_clipped",
    "reward_fails",
    "length_runaway",
    "held_out_falls",
]
"""What `grpo-jax doctor` looks for; `grpo_jax/run/doctor/rules.py` has the rules of these names."""

DEFAULT_STEPS = 100
DEFAULT_EXTRA_STEPS = 3
"""`train.max_extra_groups` by default, in steps."""

FROM_EPOCHS: Any = None
"""Default of `train.steps`, which `TrainConfig` fills in: 100, or 0 where `train.epochs` says how many."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: its length, batches, seed, checkpoints and output.

    Args:
        steps: Number of training steps, one batch of completions each. Default 100, or what epochs says.
        epochs: Passes over the training rows, instead of steps: epochs · rows / prompts_per_step steps, rounded up. steps is then 0
            until the rows have been read.
        prompts_per_step: B, number of prompts in a step (of rows, in supervised warm-up).
        updates_per_rollout: Optimiser updates in a step, each on its own part of the step's prompts (mini-batches). Later updates
            find a policy that has moved away from the one that sampled, so that the objective's clipping acts. Above 1 it costs
            one more forward pass.
        dynamic_sampling: Where all completions of a prompt have the same reward, sample other prompts in the same step, until there
            are prompts_per_step prompts to learn from (DAPO) or max_extra_groups is spent: while others are decoded where overlap
            can score groups as they end, else in a rollout that follows.
        max_extra_groups: The most prompts that a step samples beyond prompts_per_step; null is three times as many. A step that is
            not full by then also trains groups without a spread of rewards.
        overlap: Score a group as soon as its completions have ended, while others are decoded: by functions that see one row or one
            group at a time (built-ins, rewards.row_by_row, rewards.by_group). Changes no result; with dynamic_sampling it may
            change what is sampled in addition.
        max_staleness: 1 samples the completions of the next step before the update of this one, so that this step's rewards are
            computed meanwhile. They are then one update old; the loss compares with the policy that sampled them. With
            dynamic_sampling, groups that were sampled too much are kept for the next step. 0 samples with the newest weights.
        update_generations: m, the completions of each prompt that the update learns from: of the num_generations that are sampled
            those whose rewards vary most (PODS). Advantages are computed among them alone. null takes all.
        reference_every: Steps between two changes of the reference, which the KL term compares with: it becomes reference_mix times
            the policy plus the rest of itself. It is then part of the checkpoints. null leaves it what training started from.
        reference_mix: Share of the policy in such a change; 1 (the default) resets the reference to the policy, less is a moving
            average of weights (of the adapters' matrices where adapters are trained).
        micro_batch_tokens: Tokens of prompts and completions whose gradient is computed at once, on each of the mesh's data · fsdp
            shards; prompts and completions are packed by their real lengths. `auto` finds the most that fit into memory by
            compiling before the first step. null is `auto` on accelerators, and on a CPU one group or as much as its cache holds.
        micro_batch_prompts: The same in prompts with completions of the longest length, on a mesh of all its shards; or `auto`.
        micro_batch_completions: Completions of each of these prompts; null takes the whole group.
        seed: Seed of the order of the data, of the adapters' initial values and of every sampled token.
        run_dir: Folder for all files that the run writes.
        save_every: Steps between checkpoints; 0 saves only the last state.
        keep_checkpoints: Number of the newest checkpoints that stay on disk.
        keep_best: Which other checkpoint stays on disk: `held_out` saves and keeps the one after the evaluation with the highest
            best_metric, where there are evaluations after steps; `none` keeps no other.
        best_metric: The metric of evaluations that says which step is the best, for keep_best and `--best`: accuracy, reward/mean,
            pass_at/8, NAME/accuracy of a further set, ... A minus in front takes the lowest, as in -kl_divergence.
        stop_on: Names of the doctor's findings that end the run when they begin, such as [kl_explosion]; see `grpo-jax doctor`.
        eval_every: Steps between evaluations; 0 evaluates only before and after training.
        eval_kl: Compute the KL divergence from the reference at evaluations too, on one completion sampled of each held-out
            prompt; with objective.beta 0 it is computed nowhere else.
        eval_slots: Completions that are decoded at once in evaluation, each of another prompt; null takes `rollout.slots`, or
            as many as a step has.
        show_every: Steps between tables of sampled completions on the terminal; 0 shows none.
        show_completions: Completions in such a table at most.
        record_tokens: Prompts of each step whose completions are recorded with the text and the log-probability of every token, for
            the report; each of these completions then takes about five times its space in completions.jsonl. 0 records none.
            Entropy and KL of each token are recorded too where a step makes one update on all of its completions. What the update
            did not compute (no reference, a group without spread) is left out.
        quiet: Print plain lines instead of a live progress bar and tables, for logs.
        track: Where metrics are sent in addition to the run folder, one or a list: `wandb` (extra `track`), `trackio`, `mlflow`
            (extras of their names); `none` is nothing, and `tensorboard` is always written.
        run_name: What the trackers call the run; null is the name of run_dir.
        project: The trackers' project (of MLflow the experiment); null leaves it to their environment variables WANDB_PROJECT,
            TRACKIO_PROJECT and MLFLOW_EXPERIMENT_NAME, and else is grpo_jax.
        grace_seconds: Longest time that a step may go on after SIGTERM, SIGHUP or the first Ctrl-C. The run then saves its state,
            writes its summary and ends; a step that lasts longer is abandoned.
        accept_changed_inputs: Resume although the files of the model, the data or the source of a reward function have changed
            since; the differences are shown as warnings.
        debug: Check after every step that all trained arrays are finite; costs a copy of them to the host.
        compilation_cache: Store compiled programs on disk, so that a second start compiles nothing: true uses
            JAX_COMPILATION_CACHE_DIR, or $XDG_CACHE_HOME/grpo_jax, or ~/.cache/grpo_jax; a path is another folder; false stores
            nothing. Whoever can write to the folder can make this process run code.
    """

    steps: int = FROM_EPOCHS
    epochs: float | None = None
    prompts_per_step: int = 8
    updates_per_rollout: int = 1
    dynamic_sampling: bool = False
    max_extra_groups: int | None = None
    overlap: bool = True
    max_staleness: int = 0
    update_generations: int | None = None
    reference_every: int | None = None
    reference_mix: float = 1.0
    micro_batch_tokens: int | Literal["auto"] | None = None
    micro_batch_prompts: int | Literal["auto"] | None = None
    micro_batch_completions: int | None = None
    seed: int = 0
    run_dir: str = "runs/grpo"
    save_every: int = 50
    keep_checkpoints: int = 2
    keep_best: Literal["held_out", "none"] = "held_out"
    best_metric: str = "accuracy"
    stop_on: list[DoctorRule] = field(default_factory=list)
    eval_every: int = 0
    eval_kl: bool = False
    eval_slots: int | None = None
    show_every: int = 10
    show_completions: int = 4
    record_tokens: int = 1
    quiet: bool = False
    track: TrackerName | list[TrackerName] = "none"
    run_name: str | None = None
    project: str | None = None
    grace_seconds: float = 20.0
    accept_changed_inputs: bool = False
    debug: bool = False
    compilation_cache: bool | str = True

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS if self.epochs is None else 0)
        check_types(self, "train")
        if self.epochs is not None:
            require(self.epochs > 0, "train.epochs", self.epochs, "use a positive number of passes over the rows, or null")
        require(self.steps >= (1 if self.epochs is None else 0), "train.steps", self.steps, "use at least 1")
        require(self.prompts_per_step >= 1, "train.prompts_per_step", self.prompts_per_step, "use at least 1")
        parts = self.updates_per_rollout
        fix = f"use a divisor of train.prompts_per_step ({self.prompts_per_step}): every update has as many prompts"
        require(parts >= 1 and self.prompts_per_step % parts == 0, "train.updates_per_rollout", parts, fix)
        extra = self.max_extra_groups
        require(extra is None or extra >= 1, "train.max_extra_groups", extra, "use at least 1, or null")
        fix = "it has an effect only with train.dynamic_sampling true: set that, or leave this out"
        require(extra is None or self.dynamic_sampling, "train.max_extra_groups", extra, fix)
        stale = self.max_staleness
        require(stale in (0, 1), "train.max_staleness", stale, "use 0 (completions of the newest policy) or 1")
        every, mix = self.reference_every, self.reference_mix
        require(every is None or every >= 1, "train.reference_every", every, "use a number of steps, or null (a fixed reference)")
        require(0 < mix <= 1, "train.reference_mix", mix, "use a share above 0, at most 1 (the reference becomes the policy)")
        fix = "leave it out, or also set train.reference_every: without it the reference never changes"
        require(every is not None or mix == 1, "train.reference_mix", mix, fix)
        require(self.seed >= 0, "train.seed", self.seed, "use 0 or a positive number")
        require(self.save_every >= 0, "train.save_every", self.save_every, "use 0 (only at the end) or a number of steps")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, "keep at least 1")
        require(self.eval_every >= 0, "train.eval_every", self.eval_every, "use 0 (before and after only) or a number of steps")
        require(self.eval_slots is None or self.eval_slots >= 1, "train.eval_slots", self.eval_slots, "use at least 1, or null")
        require(self.grace_seconds >= 0, "train.grace_seconds", self.grace_seconds, "use 0 (abandon the step at once) or more")
        names = self.trackers
        alone = len(set(names)) == len(names) and ("none" not in names or len(names) == 1)
        require(alone, "train.track", self.track, "name each tracker once, and none alone")
        require(self.show_every >= 0, "train.show_every", self.show_every, "use 0 (never) or a number of steps")
        shown = self.show_completions
        require(shown >= 1, "train.show_completions", shown, "use at least 1; train.show_every 0 shows no table")
        fix = "it has an effect only with train.show_every above 0: set that, or leave this out"
        require(self.show_every > 0 or shown == TrainConfig.show_completions, "train.show_completions", shown, fix)
        for name in ("run_name", "project"):
            value, fix = getattr(self, name), "it has an effect only with a tracker: set train.track, or leave this out"
            tracked = bool(set(self.trackers) - {"none", "tensorboard"})
            require(value is None or tracked, f"train.{name}", value, fix)
            require(value is None or bool(value.strip()), f"train.{name}", value, "give a name, or null")
        require(self.record_tokens >= 0, "train.record_tokens", self.record_tokens, "use 0 (none) or a number of prompts")
        require(
            self.micro_batch_tokens is None or (self.micro_batch_prompts is None and self.micro_batch_completions is None),
            "train.micro_batch_tokens",
            self.micro_batch_tokens,
            "leave out train.micro_batch_prompts and train.micro_batch_completions, which say the same in other words",
        )
        size = self.micro_batch_prompts
        prompts = "train.prompts_per_step" if parts == 1 else "train.prompts_per_step / train.updates_per_rollout"
        if isinstance(size, int):
            require(
                size >= 1 and self.prompts_per_update % size == 0,
                "train.micro_batch_prompts",
                size,
                f"use a divisor of {prompts} ({self.prompts_per_update}), or null",
            )

    @property
    def prompts_per_update(self) -> int:
        """Prompts that one optimiser update learns from."""
        return self.prompts_per_step // self.updates_per_rollout

    @property
    def trackers(self) -> list[str]:
        """The names in `track`."""
        return [self.track] if isinstance(self.track, str) else list(self.track)

    @property
    def extra_groups(self) -> int:
        """The most prompts that a step samples beyond `prompts_per_step`; 0 without dynamic sampling."""
        if not self.dynamic_sampling:
            return 0
        return DEFAULT_EXTRA_STEPS * self.prompts_per_step if self.max_extra_groups is None else self.max_extra_groups


ROLLOUT_AXES = ("data", "tensor")
"""Axes of `mesh.rollout`."""


@dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices; one axis may be -1, which takes all devices that are left.

    With `data` and `fsdp` both `auto` the devices that are left go to `data` where adapters are trained and the frozen weights take
    at most half of a device's memory, else to `fsdp`.

    Args:
        data: Number of copies of the weights; each copy computes a part of a step's prompts. `auto` is 1 where fsdp is a number.
        fsdp: Number of shards of each weight, gathered layer by layer; each shard's devices compute a part of the prompts. `auto`
            takes all devices that are left where data is a number.
        tensor: Number of shards of heads, feed-forward, experts and vocabulary; all of them compute the same prompts.
        rollout: Devices for rollouts alone, such as {data: 2, tensor: 1}: they sample the next step's completions while the other
            devices update, so that neither waits for the other (needs train.max_staleness 1). data copies of the weights, each in
            tensor shards; what is left out is 1. null samples on the devices that update.
    """

    data: int | Literal["auto"] = "auto"
    fsdp: int | Literal["auto"] = "auto"
    tensor: int = 1
    rollout: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        self._check_rollout()
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            ok = isinstance(size, str) or size == -1 or size >= 1
            require(ok, f"mesh.{name}", size, "use a number of devices, or -1 for all that are left")
        free = [name for name, size in sizes.items() if size == -1]
        require(
            len(free) <= 1,
            f"mesh.{free[-1] if free else 'data'}",
            -1,
            f"only one axis may be -1; mesh.{'data' if not free else free[0]} is -1 too",
        )

    def _check_rollout(self) -> None:
        """Checks the axes of `rollout` and their sizes."""
        if self.rollout is None:
            return
        require(bool(self.rollout), "mesh.rollout", self.rollout, "use a mapping such as {data: 2}, or null")
        for axis, size in self.rollout.items():
            fix = "use data and tensor: a rollout has whole weights, so there is nothing to gather over fsdp"
            require(axis in ROLLOUT_AXES, "mesh.rollout", self.rollout, fix)
            require(size >= 1, f"mesh.rollout.{axis}", size, "use a number of devices; those that are left update")

    @property
    def rollout_sizes(self) -> tuple[int, int]:
        """Sizes of data and tensor of the rollout's own mesh; (0, 0) where it has none."""
        return (0, 0) if self.rollout is None else (self.rollout.get("data", 1), self.rollout.get("tensor", 1))

    @property
    def rollout_devices(self) -> int:
        """Number of devices that only sample."""
        data, tensor = self.rollout_sizes
        return data * tensor

    @property
    def is_auto(self) -> bool:
        """Whether copies or shards of the weights are left open."""
        return self.data == self.fsdp == "auto" and self.tensor != -1
