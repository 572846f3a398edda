"""What can be chosen: one frozen dataclass a section, each validated when it is made.

Enters: plain values, from Python, YAML or the command line. Leaves: a `Config` whose every field holds the value that will
be used. Nothing here imports JAX, so that `grpo-jax --help` is quick. Reading files and remembering where a value came from
is `load.py`; the named presets are `presets.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_jax.config.checks import check_types, require
from grpo_jax.config.distributed import DistributedConfig
from grpo_jax.config.objective import ObjectiveConfig

LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained.

    Args:
        path: Folder with a Hugging Face model, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`.
        revision: Branch, tag or commit on the hub; null is the default branch.
        dtype: Number format of the frozen weights and of the computation; `auto` is what the model's config.json says.
            Trained weights and the optimiser's state are float32 whatever this says.
        quantization: Format of the frozen matrices of the layers, rounded while they are read: `int8`, `int4` or `nf4`
            (https://arxiv.org/abs/2305.14314), or `none`. Needs adapters (lora.rank above 0); embedding, head and norms keep dtype.
        remat: What the backward pass computes again instead of keeping: `none`, `layer` (each layer's inside), `offload` (the same,
            and each layer's input waits in the host's memory), or `auto`: none on a CPU whose memory suffices, else layer.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    remat: Literal["auto", "none", "layer", "offload"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "model")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + scale · B A x, with W frozen.

    Args:
        rank: Rank r of the adapters; 0 trains every weight of the model instead (full fine-tuning).
        alpha: The scale is alpha / rank, or alpha / sqrt(rank) with rslora.
        targets: Names of the linear layers that get adapters, or `all-linear`. In a mixture of experts gate_proj, up_proj and
            down_proj are those of every expert; attention's alone are far fewer. The router never gets one.
        rslora: Rank-stabilised scale (https://arxiv.org/abs/2312.03732).
        adapter: Folder of a PEFT adapter to start from; its frozen state is then the reference. rank, alpha, targets
            and rslora are then the adapter's own.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(self.rank >= 0, "lora.rank", self.rank, "use 8, 16, 32, ..., or 0 to train every weight")
        require(self.alpha > 0, "lora.alpha", self.alpha, "use a positive number, often twice the rank")
        names = [] if isinstance(self.targets, str) else self.targets
        for name in names:
            require(name in LINEAR_TARGETS, "lora.targets", name, f"choose from {', '.join(LINEAR_TARGETS)}")
        if isinstance(self.targets, str):
            mend = f"use all-linear, or a list out of {', '.join(LINEAR_TARGETS)}"
            require(self.targets == "all-linear", "lora.targets", self.targets, mend)
        else:
            require(bool(self.targets), "lora.targets", self.targets, "name at least one linear layer, or use all-linear")

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The target modules, written out."""
        return LINEAR_TARGETS if isinstance(self.targets, str) else tuple(self.targets)


@dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Args:
        path: Dataset on the hub, or a local JSON, JSONL, CSV or Parquet file, or a folder of such files named by split.
        name: Configuration of a hub dataset (such as `main` for `openai/gsm8k`).
        split: Split to train on.
        eval_split: Split to evaluate on; null holds out eval_size rows of the training split.
        eval_path: File or dataset to evaluate on, where it is another than path.
        eval_size: Number of held-out rows that are evaluated; null is all of eval_split or eval_path, and none without them.
        prompt_column: Column with the prompt: a string, or a list of {role, content} messages.
        completion_column: Column with the answer to imitate; supervised warm-up only.
        system_prompt: Put before every prompt as a system message; a plain prompt becomes a conversation by it.
        chat_template: Render plain prompts as a conversation of one user message; null does so where system_prompt is set.
        template_arguments: Passed to the chat template, such as {enable_thinking: false}.
        overlong: A prompt above rollout.max_prompt_length is dropped (`drop`), refused (`error`), or has the start of its last user
            text cut away, template tokens untouched (`shorten`).
        shuffle: Visit the rows in an order drawn from train.seed, a new one each epoch.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    eval_split: str | None = None
    eval_path: str | None = None
    eval_size: int | None = None
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    system_prompt: str | None = None
    chat_template: bool | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    overlong: Literal["drop", "error", "shorten"] = "drop"
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(
            self.eval_size is None or self.eval_size >= 0,
            "data.eval_size",
            self.eval_size,
            "use 0 (no evaluation) or a number of rows",
        )
        require(bool(self.prompt_column), "data.prompt_column", self.prompt_column, "name the column that holds the prompt")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Args:
        num_generations: G, completions per prompt; one group.
        max_prompt_length: P, the longest prompt in tokens.
        max_completion_length: C, the longest completion in tokens.
        min_completion_length: No stop token is drawn before this many tokens.
        temperature: Divides the logits, in sampling, policy, old policy and reference alike.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Keep the k most probable tokens; 0 keeps all.
        min_p: Keep tokens at least this share as probable as the most probable one; 0 keeps all.
        stop: Texts that end a completion; the token that completes one is its last.
        slots: Completions decoded at once; one that ends makes room for the next. null takes all of a step, or as many as fit
            into the memory.
        segment: Tokens decoded between two looks at what has ended; null chooses.
        refill: Give a slot that has come free to the next completion at once; false waits for all slots, which is slower.
        kv_dtype: Number format of kept keys and values: `auto` is the model's, `int8` halves them (see sampling/logp_difference).
    """

    num_generations: int = 8
    max_prompt_length: int = 512
    max_completion_length: int = 256
    min_completion_length: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    slots: int | None = None
    segment: int | None = None
    refill: bool = True
    kv_dtype: Literal["auto", "int8"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "rollout")
        require(self.num_generations >= 1, "rollout.num_generations", self.num_generations, "use 4 to 16")
        require(self.max_prompt_length >= 1, "rollout.max_prompt_length", self.max_prompt_length, "use at least 1 token")
        shortest, longest = self.min_completion_length, self.max_completion_length
        require(longest >= 1, "rollout.max_completion_length", longest, "use at least 1 token")
        require(0 <= shortest <= longest, "rollout.min_completion_length", shortest, f"use 0 to max_completion_length ({longest})")
        require(self.temperature >= 0, "rollout.temperature", self.temperature, "use 1.0, or 0 for greedy")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "use a probability above 0, at most 1 (1 = off)")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "use a positive number of tokens, or 0 (off)")
        require(0 <= self.min_p <= 1, "rollout.min_p", self.min_p, "use a share from 0 (off) to 1")
        for name, size in (("slots", self.slots), ("segment", self.segment)):
            require(size is None or size >= 1, f"rollout.{name}", size, "use at least 1, or null")
        require(all(self.stop), "rollout.stop", self.stop, "an empty text would end every completion; leave it out")


@dataclass(frozen=True)
class RewardsConfig:
    """What completions are scored by.

    Args:
        functions: Built-in names, `package.module:function`, `file.py:function`, or {name: ..., argument: value, ...}.
        weights: One weight per function; null is 1 for each.
        accuracy: Name of the function whose value counts as right or wrong in evaluation; null is the first.
        accuracy_threshold: A completion is right where that function gives at least this.
        max_failed_share: The run stops when more than this share of a step's rows could not be scored.
        timeout_seconds: A function that takes longer has failed on all rows of the step; null waits for ever.
    """

    functions: list[str | dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = None
    accuracy: str | None = None
    accuracy_threshold: float = 1.0
    max_failed_share: float = 0.25
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "rewards")
        count = len(self.functions)
        if self.weights is not None and count:
            require(
                len(self.weights) == count, "rewards.weights", self.weights, f"give one weight for each of the {count} functions"
            )
        if self.timeout_seconds is not None:
            require(
                self.timeout_seconds > 0,
                "rewards.timeout_seconds",
                self.timeout_seconds,
                "use a positive number of seconds, or null",
            )
        require(0 <= self.max_failed_share <= 1, "rewards.max_failed_share", self.max_failed_share, "use a share from 0 to 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser: AdamW (https://arxiv.org/abs/1711.05101) with clipping by global norm, from Optax.

    Args:
        learning_rate: Peak learning rate; 1e-6 to 5e-6 is usual for full training, 5e-6 to 5e-5 for LoRA.
        schedule: constant, or linear or cosine down to 0 at the last step.
        warmup_steps: Steps over which the rate rises from 0.
        max_grad_norm: Gradients are scaled down to this global norm; null is off.
        weight_decay: Decoupled weight decay, on matrices only.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_types(self, "optim")
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "use a positive rate such as 1e-5")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "use 0 or more steps")
        if self.max_grad_norm is not None:
            require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "use a positive norm such as 1.0, or null")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more")
        require(0 <= self.b1 < 1, "optim.b1", self.b1, "use a number from 0 up to 1")
        require(0 <= self.b2 < 1, "optim.b2", self.b2, "use a number from 0 up to 1")
        require(self.eps > 0, "optim.eps", self.eps, "use a small positive number such as 1e-8")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Number of training steps, one batch of completions each.
        prompts_per_step: B, prompts in a step (rows, in supervised warm-up).
        micro_batch_prompts: Prompts whose gradient is computed at once, on a mesh at least one on each of its data · fsdp shards;
            null is all of the step, on a CPU what its cache serves.
            `auto` is the most that fits into the memory, found by compiling before the first step; micro_batch_completions too.
        micro_batch_completions: Completions of a prompt whose gradient is computed at once; null is the whole group.
        seed: Fixes the order of the data, the adapters' start and every sampled token.
        run_dir: Folder for everything the run writes.
        save_every: Steps between checkpoints; 0 saves only the last state.
        keep_checkpoints: Number of checkpoints that are kept.
        eval_every: Steps between evaluations; 0 evaluates before and after only.
        eval_slots: Completions that are decoded at once in evaluation, each with a prompt of its own; null is `rollout.slots`, or
            as many as a step has.
        show_every: Steps between tables of sampled completions on the terminal; 0 shows none.
        quiet: Plain lines instead of a live bar and tables, for logs.
        track: Where metrics go beside the run folder: `none`, or `wandb` (needs the extra `track`).
    """

    steps: int = 100
    prompts_per_step: int = 8
    micro_batch_prompts: int | Literal["auto"] | None = None
    micro_batch_completions: int | None = None
    seed: int = 0
    run_dir: str = "runs/grpo"
    save_every: int = 50
    keep_checkpoints: int = 2
    eval_every: int = 0
    eval_slots: int | None = None
    show_every: int = 10
    quiet: bool = False
    track: Literal["none", "wandb"] = "none"

    def __post_init__(self) -> None:
        check_types(self, "train")
        require(self.steps >= 1, "train.steps", self.steps, "use at least 1")
        require(self.prompts_per_step >= 1, "train.prompts_per_step", self.prompts_per_step, "use at least 1")
        require(self.seed >= 0, "train.seed", self.seed, "use 0 or a positive number")
        require(self.save_every >= 0, "train.save_every", self.save_every, "use 0 (only at the end) or a number of steps")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, "keep at least 1")
        require(self.eval_every >= 0, "train.eval_every", self.eval_every, "use 0 (before and after only) or a number of steps")
        require(self.eval_slots is None or self.eval_slots >= 1, "train.eval_slots", self.eval_slots, "use at least 1, or null")
        require(self.show_every >= 0, "train.show_every", self.show_every, "use 0 (never) or a number of steps")
        size = self.micro_batch_prompts
        if isinstance(size, int):
            require(
                size >= 1 and self.prompts_per_step % size == 0,
                "train.micro_batch_prompts",
                size,
                f"use a divisor of train.prompts_per_step ({self.prompts_per_step}), or null",
            )


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are used; one axis may be -1, which takes all that are left.

    Args:
        data: Copies of the weights; each works on its own share of a step's prompts.
        fsdp: Shards that each weight is cut into, and gathered from layer by layer; each works on its own share of the prompts.
        tensor: Shards of heads, feed-forward, experts and vocabulary; all of them work on the same prompts.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "use a number of devices, or -1 for all that are left")
        free = [name for name, size in sizes.items() if size == -1]
        require(
            len(free) <= 1,
            f"mesh.{free[-1] if free else 'data'}",
            -1,
            f"only one axis may be -1; mesh.{'data' if not free else free[0]} is so too",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run. `from_dict` and `from_yaml` in `load.py` build it from outside."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        require(
            self.model.quantization == "none" or self.lora.rank > 0 or self.lora.adapter is not None,
            "model.quantization",
            self.model.quantization,
            "a quantised base stays frozen, and lora.rank 0 trains every weight: set lora.rank to 8, 16, 32, ..., or use none",
        )
        size = self.train.micro_batch_completions
        if size is not None:
            require(
                size >= 1 and self.rollout.num_generations % size == 0,
                "train.micro_batch_completions",
                size,
                f"use a divisor of rollout.num_generations ({self.rollout.num_generations}), or null",
            )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Builds a config from nested dicts.

        Args:
            values: {section: {field: value}}; what is left out keeps its default.

        Raises:
            ConfigError: an unknown name (the nearest one is suggested), a value of the wrong type, or one out of range.
        """
        from grpo_jax.config.load import config_from_dict

        return config_from_dict(values)

    @staticmethod
    def from_yaml(path: str | Path) -> Config:
        """Builds a config from a YAML file; see `from_dict`."""
        from grpo_jax.config.load import read_yaml

        return Config.from_dict(read_yaml(path))
