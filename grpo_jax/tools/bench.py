"""Benchmarks a training step: the real loop on random prompts, compared with ceilings of the device measured in the same run.

The result is the medians over the steps after two warm-up steps. Stop tokens are ignored, so that every completion has the same
length; with `ragged` each length is drawn from a heavy tail. beta is 0.04, so that the reference is scored. The rewards are
made up; weights are the folder's, or random where it has only a config.json.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config, ConfigError, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from grpo_jax.models.spec import ModelSpec, init_params
from grpo_jax.policy import Policy
from grpo_jax.rewards import NamedFunction, resolve_functions
from grpo_jax.run.display import Display
from grpo_jax.runtime.memory import peak_bytes
from grpo_jax.runtime.programs import compile_seconds
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.tools.step_cost import StepCost, StepShapes
from grpo_jax.types import PromptBatch
from grpo_jax.weights.hf import find_model, read_folder_spec
from grpo_jax.weights.lora import init_lora
from grpo_jax.weights.quantize import quantize_params
from grpo_kernels.numerics import precision_of

WARMUP_STEPS = 2
MEDIANS = ("step_seconds", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "update_tokens_per_second")
MEAN_SHARE = 0.25
"""Mean of the ragged lengths, as a share of the longest."""


@dataclass(frozen=True)
class BenchOptions:
    """The options of a benchmark.

    Args:
        model: Folder of a Hugging Face model; weights are random where it holds only a config.json.
        prompts: Prompts of a step.
        num_generations: Completions of each.
        prompt_length: Tokens of every prompt.
        completion_length: Tokens of every completion, or of the longest where ragged.
        steps: Measured steps, after two warm-up steps.
        lora_rank: Rank of the adapters on all linear layers; 0 trains every weight.
        slots: Completions decoded at once; null takes all, or as many as fit into the memory.
        segment: Tokens decoded between two checks for completions that have ended; null chooses.
        refill: False lets a free slot wait for all others.
        capacity: Completion length that the KV cache has room for, where it is more than completion_length.
        kv_dtype: Number format of the KV cache, `auto`, `int8` or `int4`.
        dtype: Number format of the model, `auto`, `float32` or `bfloat16`.
        remat: As `model.remat`.
        micro_batch_prompts: As `train.micro_batch_prompts`.
        micro_batch_tokens: As `train.micro_batch_tokens`.
        ragged: Draws lengths from a seeded heavy tail, with a mean of a quarter of the longest.
    """

    model: str
    prompts: int = 4
    num_generations: int = 8
    prompt_length: int = 64
    completion_length: int = 128
    steps: int = 6
    lora_rank: int = 16
    slots: int | None = None
    segment: int | None = None
    refill: bool = True
    capacity: int | None = None
    kv_dtype: Literal["auto", "int8", "int4"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["auto", "none", "selective", "layer", "offload"] = "auto"
    micro_batch_prompts: int | None = None
    micro_batch_tokens: int | None = None
    ragged: bool = False

    def config(self) -> Config:
        """Returns the settings of the training loop."""
        longest = self.capacity or self.completion_length
        if longest < self.completion_length:
            raise ConfigError(f"capacity: {longest}; use at least completion_length ({self.completion_length})")
        return Config(
            model=ModelConfig(path=self.model, dtype=self.dtype, remat=self.remat),
            lora=LoraConfig(rank=self.lora_rank),
            rollout=RolloutConfig(
                num_generations=self.num_generations,
                max_prompt_length=self.prompt_length,
                max_completion_length=longest,
                slots=self.slots,
                segment=self.segment,
                refill=self.refill,
                kv_dtype=self.kv_dtype,
            ),
            objective=ObjectiveConfig(beta=0.04),
            train=TrainConfig(
                steps=WARMUP_STEPS + self.steps,
                prompts_per_step=self.prompts,
                micro_batch_prompts=self.micro_batch_prompts,
                micro_batch_tokens=self.micro_batch_tokens,
                save_every=0,
                show_every=0,
                quiet=True,
            ),
        )

    def limits(self) -> np.ndarray | None:
        """Returns the length at which each completion ends; None where that is `max_completion_length` for all."""
        return self.lengths() if self.ragged or self.capacity is not None else None

    def lengths(self) -> np.ndarray:
        """Returns the tokens of each completion of a step, [N]."""
        rows = self.prompts * self.num_generations
        return heavy_tail(rows, self.completion_length) if self.ragged else np.full(rows, self.completion_length)

    def cost(self, policy: Policy) -> StepCost:
        """Counts the operations and bytes of a step."""
        shapes = StepShapes(self.prompts, self.num_generations, self.prompt_length, self.slots, self.lora_rank, self.kv_dtype)
        return StepCost.of(policy.spec, shapes, self.lengths(), jnp.dtype(policy.dtype).itemsize)


def heavy_tail(rows: int, longest: int) -> np.ndarray:
    """Draws completion lengths: exponential, clipped at the longest, scaled so that their mean is a quarter of it."""
    draws = np.random.default_rng(0).exponential(1.0, rows)
    low, high = 0.0, float(longest)
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.clip(middle * draws, 1, longest).mean()
        low, high = (middle, high) if mean < MEAN_SHARE * longest else (low, middle)
    lengths = np.clip(np.round(high * draws), 1, longest).astype(np.int64)
    lengths[np.argmax(lengths)] = longest
    return lengths


@dataclass(frozen=True)
class RandomPrompts:
    """A source of random prompts that all have the same length."""

    spec: ModelSpec
    prompts: int
    length: int

    def batch(self, step: int) -> PromptBatch:
        """Returns the prompts of a step."""
        ids = np.random.default_rng([0, step]).integers(0, self.spec.vocab, (self.prompts, self.length))
        indices = np.arange(step * self.prompts, (step + 1) * self.prompts)
        return PromptBatch(step, indices, [f"prompt {index}" for index in indices], ids.tolist(), {})

    @property
    def prompt_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the prompts to train on, and of held-out ones, of which there are none."""
        return np.full(self.prompts, self.length), np.zeros(0, np.int64)


def made_up_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns rewards that differ within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def bench(options: BenchOptions, display: Display) -> dict[str, Any]:
    """Runs and measures training steps.

    Returns:
        Medians under the names of the loop's metrics, the ceilings, the reached shares of them, and the counts behind them.

    Raises:
        ConfigError, ModelError: the input cannot be used; raised before anything is compiled.
    """
    config = options.config()
    with display.busy(f"reading {options.model}"):
        policy, random_weights = bench_policy(config)
    if random_weights:
        display.note("weights: random (the folder has only a config.json)")
    functions: list[NamedFunction] = resolve_functions([made_up_reward], max_completion_length=options.completion_length)
    source = RandomPrompts(policy.spec, options.prompts, options.prompt_length)
    limits = options.limits()
    step = GrpoStep.build(config, policy, source, functions, display)
    step = replace(step, limits=None if limits is None else limits.tolist())
    state, steps = step.learner.init(policy.trainable()), []
    with display.progress(config.train.steps, 0):
        for number in range(config.train.steps):
            state, metrics, _ = step.run(state, number)
            display.step(number + 1, {"step": metrics["step_seconds"]})
            steps.append(metrics)
    with display.busy("measuring the ceilings"):
        flops, transfer = matmul_ceiling(policy), memory_ceiling()
    measured = steps[WARMUP_STEPS:]
    result: dict[str, Any] = {name: statistics.median(step[name] for step in measured) for name in MEDIANS}
    cost = options.cost(policy)
    result |= {
        "compile_seconds": compile_seconds(*step.programs),
        "peak_memory_bytes": peak_bytes(),
        "matmul_flops_per_second": flops,
        "memory_bytes_per_second": transfer,
        "mfu": cost.update_flops / result["update_seconds"] / flops,
        "mbu": cost.rollout_bytes / result["rollout_seconds"] / transfer,
        "computed_from": asdict(cost) | {"rollout_bytes": cost.rollout_bytes},
        "steps": [{name: step[name] for name in MEDIANS} for step in measured],
        "padding": statistics.fmean(step["update/padding"] for step in measured),
        "programs": sum(program.compilations for program in step.programs),
        "near_ties": statistics.fmean(step["sampling/near_ties"] for step in measured),
        "logp_difference_max": max(step["sampling/logp_difference/max"] for step in measured),
        "options": asdict(options),
        "random_weights": random_weights,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }
    return result


def bench_policy(config: Config) -> tuple[Policy, bool]:
    """Builds the policy without stop tokens; also returns whether its weights are random."""
    assert config.model.path is not None
    folder = find_model(config.model.path, config.model.revision, weights=False)
    if any(folder.glob("*.safetensors")):
        policy = Policy.from_pretrained(folder, lora=config.lora, dtype=config.model.dtype, quantization=config.model.quantization)
        return replace(policy, stop_ids=()), False
    spec = read_folder_spec(folder)
    dtype = jnp.dtype(spec.dtype if config.model.dtype == "auto" else config.model.dtype)
    lora = config.lora if config.lora.rank else None
    adapters = None if lora is None else init_lora(spec, lora, jax.random.key(1))
    params = jax.jit(functools.partial(init_params, spec, dtype=dtype))(jax.random.key(0))
    if config.model.quantization != "none":
        params = jax.jit(functools.partial(quantize_params, spec, quantization=config.model.quantization), donate_argnums=0)(params)
    return Policy(spec, dtype, params, adapters, lora, None, (), folder, str(folder)), True


def best_seconds(program: Any, *arguments: Any) -> float:
    """Returns the shortest time of eight calls, after one to warm up."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_ceiling(policy: Policy) -> float:
    """Measures the operations per second of a large square matrix product in the model's dtype."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), policy.dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision_of(policy.dtype)))
    return 2 * size**3 / best_seconds(product, x, x)


def memory_ceiling() -> float:
    """Measures the bytes per second, read and written, of an addition to an array larger than any cache."""
    count = 2**26 if jax.default_backend() == "cpu" else 2**29
    x = jnp.ones((count,), jnp.float32)
    return 8 * count / best_seconds(jax.jit(lambda a: a + jnp.float32(1)), x)


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Formats the result as (label, value) rows of a table."""
    peak = result["peak_memory_bytes"]
    return [
        ("step", f"{result['step_seconds']:.3f} s"),
        ("rollout", f"{result['rollout_seconds']:.3f} s, {result['rollout_tokens_per_second']:,.0f} completion tokens a second"),
        ("update", f"{result['update_seconds']:.3f} s, {result['update_tokens_per_second']:,.0f} tokens a second"),
        ("compiling", f"{result['compile_seconds']:.1f} s"),
        ("peak memory", "not known" if peak is None else f"{peak / 1e9:.2f} GB"),
        ("update against matmuls", f"{result['mfu']:.0%} of {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"),
        ("rollout against memory", f"{result['mbu']:.0%} of {result['memory_bytes_per_second'] / 1e9:,.0f} GB/s"),
        (
            "sampler against trainer",
            f"at most {result['logp_difference_max']:.1e} nats; near-ties {result['near_ties']:.1e} of the tokens",
        ),
        ("device", result["device"]),
    ]
