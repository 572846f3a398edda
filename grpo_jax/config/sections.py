"""Settings of a run that concern model, data, rollout and rewards: one frozen dataclass per section, validated when it is made.

A field always holds the value that will be used. Nothing here imports JAX, so that `grpo-jax --help` is quick. `load.py` reads
settings from files and remembers their sources; `presets.py` holds the named objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.config.checks import check_types, require, require_choice

RECURRENT_TARGETS = ("in_proj", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba")
LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *RECURRENT_TARGETS)
"""The linear layers that adapters may be added to; a model has those of its kinds of layers."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained, and its number formats.

    Args:
        path: Folder with a Hugging Face model, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`.
        revision: Branch, tag or commit on the hub; null is the default branch.
        dtype: Number format of the frozen weights and of the computation; `auto` takes the one in the model's config.json.
            Trained weights and the optimiser's state are always float32.
        quantization: Format of the layers' frozen matrices, quantised while they are read: `int8`, `int4`, `nf4`
            (https://arxiv.org/abs/2305.14314), `mxfp4` or `none`. Requires adapters (lora.rank above 0); embedding, head and norms
            keep dtype. `mxfp4` is for experts, all other matrices keep dtype: gpt-oss's are in it already and stay exactly as they
            are.
        remat: What the backward pass recomputes instead of storing: `none`, `selective` (inside each layer, but not attention and
            its output's product), `layer` (inside each layer), `offload` (as layer, with each layer's input stored in the host's
            memory), or `auto`: the first of these that fits with `train.micro_batch_tokens: auto`, else none on a CPU with enough
            memory, and layer.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "int8", "int4", "nf4", "mxfp4"] = "none"
    remat: Literal["auto", "none", "selective", "layer", "offload"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "model")


CURRICULUM_NAMES = ("uniform", "learnable", "hardest_unsolved")


@dataclass(frozen=True)
class DataConfig:
    """The dataset of prompts: where it is read from, and how its rows become prompts.

    Args:
        path: Dataset on the hub, or a local JSON, JSONL, CSV or Parquet file, or a folder of such files named by split.
        name: Configuration of a hub dataset (such as `main` for `openai/gsm8k`).
        split: Split to train on.
        eval_split: Split to evaluate on; null holds out eval_size rows of the training split.
        eval_path: File or dataset to evaluate on, where it differs from path.
        eval_size: Number of held-out rows to evaluate; null takes all of eval_split or eval_path, and none without them.
        prompt_column: Column with the prompt: a string, or a list of {role, content} messages. Where it is missing, a column
            `messages` is read instead: a conversation whose last message, if it is the assistant's, becomes the completion column.
        completion_column: Column with the answer to imitate; supervised warm-up only.
        system_prompt: System message added before every prompt; a plain prompt then becomes a conversation.
        chat_template: Render plain prompts as a conversation of one user message; null does so where system_prompt or
            chat_template_file is set.
        chat_template_file: File with a Jinja chat template, used instead of the model's; exports have it too.
        template_arguments: Arguments passed to the chat template, such as {enable_thinking: false}.
        overlong: What happens to a prompt longer than rollout.max_prompt_length: it is dropped (`drop`), raises an error (`error`),
            or loses the start of its last user message, template tokens unchanged (`shorten`).
        overlong_quantile: Drop the training rows whose prompt has more tokens than this quantile of all of them, such as 0.9; null
            drops none.
        streaming: Read rows while the run goes on, and hold shuffle_buffer of them: for datasets that do not fit into memory, from
            .jsonl or .parquet files or the hub. train.steps says when the run ends. Held-out rows are of eval_split or eval_path.
        shuffle_buffer: With streaming, the rows that are read and shuffled together; null is 1,000.
        shuffle: Visit the rows in an order drawn from train.seed, a new one each epoch.
        curriculum: Which rows a step draws: `uniform` visits them in order; `learnable` draws those most often that are solved half
            of the time, `hardest_unsolved` those that are solved least; `file.py:function` and `package.module:function` get the
            ledger of all rows and return a weight for each.
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
    chat_template_file: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    overlong: Literal["drop", "error", "shorten"] = "drop"
    overlong_quantile: float | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    shuffle: bool = True
    curriculum: str = "uniform"

    def __post_init__(self) -> None:
        check_types(self, "data")
        if ":" not in self.curriculum:
            require_choice("data.curriculum", self.curriculum, (*CURRICULUM_NAMES, "file.py:function"))
        fix = "a curriculum draws the rows at random: use true, or data.curriculum uniform"
        require(self.shuffle or self.curriculum == "uniform", "data.shuffle", self.shuffle, fix)
        require(
            self.eval_size is None or self.eval_size >= 0,
            "data.eval_size",
            self.eval_size,
            "use 0 (no evaluation) or a number of rows",
        )
        if self.overlong_quantile is not None:
            share = self.overlong_quantile
            require(0 < share <= 1, "data.overlong_quantile", share, "use a share above 0, at most 1, such as 0.9, or null")
        self._check_streaming()
        require(bool(self.prompt_column), "data.prompt_column", self.prompt_column, "name the column that holds the prompt")

    def _check_streaming(self) -> None:
        """Checks the settings that go with rows that stream, and those that need all rows."""
        buffer = self.shuffle_buffer
        if not self.streaming:
            require(
                buffer is None, "data.shuffle_buffer", buffer, "use null, or data.streaming true: all rows are shuffled otherwise"
            )
            return
        require(buffer is None or buffer >= 1, "data.shuffle_buffer", buffer, "use a number of rows, or null")
        fix = "use uniform with data.streaming: a curriculum chooses among all rows"
        require(self.curriculum == "uniform", "data.curriculum", self.curriculum, fix)
        fix = "use null with data.streaming, which does not know all lengths; rollout.max_prompt_length is the limit"
        require(self.overlong_quantile is None, "data.overlong_quantile", self.overlong_quantile, fix)

    @property
    def renders_texts(self) -> bool:
        """Whether a prompt that is a plain text is rendered as a conversation of one user message."""
        return self.chat_template_file is not None if self.chat_template is None else self.chat_template


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Args:
        num_generations: G, number of completions per prompt; they form one group.
        max_prompt_length: P, length of the longest prompt in tokens.
        max_completion_length: C, length of the longest completion in tokens.
        min_completion_length: No stop token is drawn before this many tokens.
        temperature: Divides the logits in sampling, and for the log-probabilities of policy, old policy and reference.
        top_p: Sample from the smallest set of tokens with at least this probability; 1 takes all tokens.
        top_k: Sample from the k most probable tokens; 0 takes all tokens.
        min_p: Sample from tokens with at least this fraction of the largest token probability; 0 takes all tokens.
        stop: Strings that end a completion; the token that completes one is the completion's last.
        slots: Completions decoded at once; when one ends, the next takes its slot. null takes all of a step, or as many as fit
            into memory.
        segment: Tokens decoded between two checks for completions that have ended; null chooses a number.
        refill: Give a free slot to the next completion at once; false waits until all slots are free, which is slower.
        dispatch_ahead: Call the program that decodes the next segment before the tokens of the last one are on the host, so that an
            accelerator does not wait. Which completions a stop token has ended is then known a segment later, and their slots are
            refilled later. `auto` does it on accelerators where that delays nothing: while no completion waits for a slot, and not
            with episodes. Tokens are the same.
        kv_dtype: Number format of the KV cache: `auto` takes the model's; next to bfloat16 `int8` halves its size and `int4` takes
            2/7 of it. Both change log-probabilities (see sampling/logp_difference, objective.importance_cap).
        merge_adapters: Sample with weights that the adapters were added to, once a step: fewer products per token, and memory for
            a copy of the adapted weights. In bfloat16 the sum is rounded (see sampling/logp_difference, objective.importance_cap).
        dense_base: Sample with a copy of an int4 or nf4 base in the model's dtype, made once a step and freed before the update. A
            GPU writes such a base out at every product, so that a token moves less with a copy; `grpo-jax plan` says if it fits.
        router_replay: What becomes of the experts that the sampler uses for each token, in a mixture of experts: `none` forgets
            them; `measure` records them and reports how often the update's routers choose others (router/mismatch); `replay` also
            computes the update with the recorded ones (https://arxiv.org/abs/2510.11370), reference included. Not with episodes.
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
    dispatch_ahead: bool | Literal["auto"] = "auto"
    kv_dtype: Literal["auto", "int8", "int4"] = "auto"
    merge_adapters: bool = False
    dense_base: bool = False
    router_replay: Literal["none", "measure", "replay"] = "none"

    @property
    def records_experts(self) -> bool:
        """Whether the experts that the sampler uses are recorded."""
        return self.router_replay != "none"

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
        require(0 <= self.min_p <= 1, "rollout.min_p", self.min_p, "use a fraction from 0 (off) to 1")
        for name, size in (("slots", self.slots), ("segment", self.segment)):
            require(size is None or size >= 1, f"rollout.{name}", size, "use at least 1, or null")
        require(all(self.stop), "rollout.stop", self.stop, "an empty string would end every completion; leave it out")


@dataclass(frozen=True)
class RewardsConfig:
    """How completions are scored: reward functions, their weights, and what happens where they fail.

    Args:
        functions: Built-in names, `package.module:function`, `file.py:function`, or {name: ..., argument: value, ...}.
        weights: One weight per function; null uses 1 for each.
        accuracy: Name of the function that decides in evaluation whether a completion is correct; null takes the first.
        accuracy_threshold: A completion is correct where that function returns at least this value.
        max_failed_share: The run stops when more than this fraction of a step's rows could not be scored.
        timeout_seconds: Limit of a call; one that takes longer is ended and has failed on its rows. null sets no limit.
        workers: Processes that call the functions; null takes one per core (not for Python objects), 0 the trainer's own process.
        row_by_row: Names of functions that are called with one row at a time, so that a failure or a hang costs one row.
        by_group: Names of functions that are called with the completions of one prompt at a time, num_generations rows. Several
            groups are then scored at the same time, and with train.overlap while others are decoded.
    """

    functions: list[str | dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = None
    accuracy: str | None = None
    accuracy_threshold: float = 1.0
    max_failed_share: float = 0.25
    timeout_seconds: float | None = 60.0
    workers: int | None = None
    row_by_row: list[str] = field(default_factory=list)
    by_group: list[str] = field(default_factory=list)

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
        require(self.workers is None or self.workers >= 0, "rewards.workers", self.workers, "use a number of processes, 0 or null")
        both = [name for name in self.by_group if name in self.row_by_row]
        require(not both, "rewards.by_group", both, "leave these out: rewards.row_by_row names them too")
        require(0 <= self.max_failed_share <= 1, "rewards.max_failed_share", self.max_failed_share, "use a fraction from 0 to 1")
