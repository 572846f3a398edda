"""Rollouts of tiny models: by the sampler under test, by a plain sampler without a cache, and their comparison.

The plain sampler runs a full forward pass per token, each row separately, and draws in float64. Float32 tokens may differ where two
tokens nearly tie: `assert_same` asks the plain model whether they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from plain_oracles import LORA, STOPS, int4_steps, int8_steps, log_softmax, plain_model, staying_tokens, tiny_policy

from grpo_jax.config import RolloutConfig
from grpo_jax.policy import Policy
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.sampling import NEAR_LOGITS
from grpo_jax.types import Rollout

PROMPTS = ((7, 30, 9), (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), (50, 6, 6, 31, 8, 77, 40))
MANY_STOPS = (*STOPS, *range(10, 97, 8))  # rows of a random model stop at various lengths
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=10, temperature=0.7)

MOST_TIES = 2
"""Rows that may differ from a near-tie on in one comparison; the chance of one is about 1e-4 a token."""

SAMPLERS: dict[object, Sampler] = {}
PLAIN: dict[str, Rollout] = {}


@dataclass(frozen=True)
class Task:
    """A rollout to run.

    Attributes:
        indices: prompt indices of the random numbers; None = 0, 1, ...
        limits: maximum length of each row.
        decode_text: token ids → text, for stop strings.
    """

    family: str = "qwen2"
    settings: RolloutConfig = SETTINGS
    prompts: tuple[tuple[int, ...], ...] = PROMPTS
    stops: tuple[int, ...] = MANY_STOPS
    seed: int = 0
    step: int = 0
    indices: tuple[int, ...] | None = None
    limits: tuple[int, ...] | None = None
    decode_text: Callable[[list[int]], str] | None = None

    def but(self, **settings: object) -> Task:
        """Returns the task with other settings of the rollout."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))  # type: ignore[arg-type] - fields by name

    @property
    def policy(self) -> Policy:
        """The tiny model with random adapters."""
        return tiny_policy(self.family, LORA)


def engine(task: Task, *, stacked: bool = False) -> Rollout:
    """Runs a task with the sampler under test. One sampler serves all tasks of a model.

    Args:
        stacked: loop over the layers, as on accelerators.
    """
    key = (task.family, task.stops, task.decode_text, stacked)
    if key not in SAMPLERS:
        model = task.policy.model.clone(unroll=not stacked)
        SAMPLERS[key] = Sampler.build(model, task.stops, decode_text=task.decode_text)
    return SAMPLERS[key].sample(
        task.policy.variables,
        task.prompts,
        task.settings,
        seed=task.seed,
        step=task.step,
        indices=task.indices,
        limits=task.limits,
    )


@jax.jit
def folded_numbers(seed: jax.Array, names: jax.Array) -> jax.Array:
    """Computes the random numbers of tokens: step, index, generation and position are folded into the key one after the other."""

    def one(row: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for name in row:
            key = jax.random.fold_in(key, name)
        return jax.random.uniform(key, ())

    return jax.vmap(one)(names)


def uniform_numbers(task: Task) -> np.ndarray:
    """Returns the random numbers [N, C] of a task, float64."""
    g, c = task.settings.num_generations, task.settings.max_completion_length
    indices = task.indices or range(len(task.prompts))
    names = [(task.step, index, generation, at) for index in indices for generation in range(g) for at in range(c)]
    numbers = folded_numbers(np.uint32(task.seed), np.array(names, np.int32))  # type: ignore[arg-type] - NumPy serves as well
    return np.asarray(numbers, np.float64).reshape(-1, c)


def next_logits(task: Task, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Computes float64 logits [N, V] after each row; the rows of a prompt are next to each other."""
    width = max(map(len, task.prompts)) + task.settings.max_completion_length
    table = np.zeros((len(task.prompts) * task.settings.num_generations, width), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    starts, steps = None, int4_steps if task.settings.kv_dtype == "int4" else int8_steps
    if task.settings.kv_dtype != "auto":
        starts = np.repeat([len(prompt) for prompt in task.prompts], task.settings.num_generations).astype(np.int32)
    logits = plain_model(task.family, LORA.scale, steps)(table, task.policy.adapters, starts)
    return np.asarray(logits)[np.arange(len(rows)), [len(row) - 1 for row in rows]].astype(np.float64)


def scaled(task: Task, logits: np.ndarray, at: int) -> np.ndarray:
    """Divides logits [V] by the temperature and removes what cannot be drawn at that position; greedy: the logits."""
    settings, own = task.settings, logits.copy()
    if at < settings.min_completion_length:
        own[list(task.stops)] = -np.inf
    if settings.temperature > 0:
        own = own / settings.temperature
        own[~staying_tokens(own, settings.top_k, settings.top_p, settings.min_p)] = -np.inf
    return own


def plain(task: Task) -> Rollout:
    """Runs a task with the plain sampler, once; near-ties are not counted."""
    same = task.but(slots=None, segment=None, refill=True, dispatch_ahead="auto")
    if repr(same) not in PLAIN:
        PLAIN[repr(same)] = plain_sample(same)
    return PLAIN[repr(same)]


def plain_sample(task: Task) -> Rollout:
    """Runs a task with the plain sampler."""
    settings = task.settings
    starts = [len(prompt) for prompt in task.prompts for _ in range(settings.num_generations)]
    rows = [list(prompt) for prompt in task.prompts for _ in range(settings.num_generations)]
    limits = task.limits or [settings.max_completion_length] * len(rows)
    logps: list[list[float]] = [[] for _ in rows]
    done, stopped = [False] * len(rows), [False] * len(rows)
    numbers = uniform_numbers(task)
    for t in range(settings.max_completion_length):
        if all(done):
            break
        logits = next_logits(task, rows)
        for number in np.flatnonzero(~np.array(done)):
            own = scaled(task, logits[number], t)
            distribution = log_softmax(own)
            passed = np.searchsorted(np.cumsum(np.exp(distribution)), numbers[number, t], side="right")
            token = int(own.argmax() if settings.temperature == 0 else passed)
            rows[number].append(token)
            logps[number].append(float(distribution[token]))
            text = "" if task.decode_text is None else task.decode_text(rows[number][starts[number] :])
            stopped[number] = token in task.stops or any(string in text for string in settings.stop)
            done[number] = stopped[number] or t + 1 >= limits[number]
    ids = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return Rollout(ids, [np.array(values, np.float32) for values in logps], ["stop" if s else "length" for s in stopped])


def nearness(own: np.ndarray, number: float, temperature: float, near: float) -> tuple[bool, bool]:
    """Tells whether slightly different logits would give another token: surely, and possibly.

    Surely: the nearest border between tokens is within the deviation that independent changes of deviation `near` give it.
    Possibly: any border is within the most that changes of at most `near` can move it, 2 · F · (1 - F) · near at cumulative
    probability F.
    """
    if temperature == 0:
        first, second = np.sort(own)[::-1][:2]
        return bool(first - second < near), bool(first - second < near)
    p = np.exp(log_softmax(own))
    borders = np.cumsum(p)
    token = int(np.searchsorted(borders, number, side="right"))
    surely = False
    for end in (token - 1, token):
        if 0 <= end < len(p):
            change = p * ((np.arange(len(p)) <= end) - borders[end])
            surely |= bool(abs(number - borders[end]) < near * np.sqrt(np.sum(change**2)))
    return surely, bool(np.any(np.abs(number - borders) < 2 * near * borders * (1 - borders)))


def drawing_margins(task: Task, rollout: Rollout, near: float) -> list[tuple[bool, bool]]:
    """Computes `nearness` of every token of a rollout, in the plain model and in float64."""
    starts = [list(prompt) for prompt in task.prompts for _ in range(task.settings.num_generations)]
    numbers, found = uniform_numbers(task), []
    for t in range(max(map(len, rollout.completion_ids))):
        logits = next_logits(task, [start + ids[:t] for start, ids in zip(starts, rollout.completion_ids, strict=True)])
        for row, ids in enumerate(rollout.completion_ids):
            if t < len(ids):
                found.append(nearness(scaled(task, logits[row], t), numbers[row, t], task.settings.temperature, near))
    return found


def is_near_tie(task: Task, row: int, ids: Sequence[int], near: float = NEAR_LOGITS) -> bool:
    """Tells whether logits that differ by `near` may give another token after `ids`, in the plain model and in float64."""
    starts = [list(prompt) for prompt in task.prompts for _ in range(task.settings.num_generations)]
    own = scaled(task, next_logits(task, [*starts[:row], [*starts[row], *ids]])[row], len(ids))
    return nearness(own, uniform_numbers(task)[row, len(ids)], task.settings.temperature, near)[1]


def assert_same(task: Task, got: Rollout, expected: Rollout, tolerance_nats: float = 1e-4, near: float = NEAR_LOGITS) -> None:
    """Asserts equal tokens, log-probabilities and reasons, row by row up to a near-tie. Near-ties are printed, and few."""
    assert len(got.completion_ids) == len(expected.completion_ids)
    ties = 0
    for row, (ours, theirs) in enumerate(zip(got.completion_ids, expected.completion_ids, strict=True)):
        same = next((t for t, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        if same < max(len(ours), len(theirs)):
            assert same < min(len(ours), len(theirs)), f"row {row}: {len(ours)} tokens for {len(theirs)}"
            assert is_near_tie(task, row, theirs[:same], near), f"row {row}, token {same}: {ours[same]} for {theirs[same]}"
            print(f"near-tie: row {row}, token {same}")
            ties += 1
        else:
            assert got.finish_reasons[row] == expected.finish_reasons[row]
        assert got.logprobs[row].dtype == np.float32
        assert len(got.logprobs[row]) == len(ours)
        np.testing.assert_allclose(got.logprobs[row][:same], expected.logprobs[row][:same], rtol=0, atol=tolerance_nats)
    assert ties <= MOST_TIES


def rows_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Returns some rows of a rollout."""
    return Rollout(
        completion_ids=[rollout.completion_ids[row] for row in rows],
        logprobs=[rollout.logprobs[row] for row in rows],
        finish_reasons=[rollout.finish_reasons[row] for row in rows],
    )
