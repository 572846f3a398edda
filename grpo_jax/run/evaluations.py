"""The result of an evaluation, and the names of its metrics in evaluations.jsonl and the trackers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from grpo_jax.config import Config, ConfigError
from grpo_jax.rewards import NamedFunction
from grpo_jax.rewards.accuracy import wilson_interval

BY_FUNCTION = ("rewards/{}/mean", "rewards/{}/std")
OF_COMPLETIONS = tuple(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio"))
SAMPLED = "sampled/"
"""What the names of a metric of samples begin with, where the greedy completions have the same metric."""


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out prompts.

    Attributes:
        accuracy: share of problems whose greedy completion is right, or of samples that are right.
        problems: number of problems.
        reward_mean: mean weighted reward of the completions that have one.
        pass_at_k: share of problems for which at least one of the k samples is right; None for greedy.
        pass_at: unbiased estimates of pass@1, 2, 4, ... and of all samples; empty for greedy.
        majority_at_k: share of problems whose most frequent answer is right; None for greedy.
        details: the spread of the rewards, each function's mean and spread, and the lengths, under the names that training has.
    """

    accuracy: float
    problems: int
    reward_mean: float
    pass_at_k: float | None = None
    pass_at: dict[int, float] = field(default_factory=dict, compare=False)
    majority_at_k: float | None = field(default=None, compare=False)
    details: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of a greedy accuracy (Wilson's), from the number of problems."""
        return wilson_interval(round(self.accuracy * self.problems), self.problems)


def evaluation_metrics(greedy: Evaluation, sampled: Evaluation | None = None, name: str = "") -> dict[str, float]:
    """The metrics of one set of held-out rows.

    Args:
        greedy: of one greedy completion of each row.
        sampled: of k samples of each row (`eval.samples`): `pass_at/1`, `pass_at/2`, ..., `majority_at/k`, and `sampled/...`.
        name: of the set, which the names then begin with; "" for the main rows.

    Example:
        {"accuracy": 0.5, "accuracy_low": 0.15, "accuracy_high": 0.85, "problems": 4, "reward/mean": 0.5, "reward/std": 0.58, ...}
    """
    low, high = greedy.interval
    values = {"accuracy": greedy.accuracy, "problems": greedy.problems, "reward/mean": greedy.reward_mean}
    values |= {"accuracy_low": low, "accuracy_high": high, **greedy.details}
    if sampled is not None:
        own = {"accuracy": sampled.accuracy, "reward/mean": sampled.reward_mean, **sampled.details}
        values |= {SAMPLED + key: value for key, value in own.items()}
        values |= {f"pass_at/{size}": value for size, value in sampled.pass_at.items()}
        if sampled.majority_at_k is not None:
            values[f"majority_at/{max(sampled.pass_at)}"] = sampled.majority_at_k
    return {f"{name}/{key}" if name else key: value for key, value in values.items()}


def sample_counts(k: int) -> list[int]:
    """The numbers for which pass@number is estimated from k samples: powers of two, and k."""
    return sorted({*(2**power for power in range(k.bit_length())), k})


def metric_names(config: Config, functions: Iterable[NamedFunction], sets: Iterable[str]) -> list[str]:
    """The names of all metrics that an evaluation of a run has; some are left out where there is nothing to count.

    Args:
        functions: of the rewards.
        sets: names of the further sets.
    """
    shared = ["accuracy", "reward/mean", "reward/std", *OF_COMPLETIONS]
    shared += [form.format(name) for name, _ in functions for form in BY_FUNCTION]
    own, k = [*shared, "problems", "accuracy_low", "accuracy_high"], config.eval.samples
    if k is not None:
        own += [*(SAMPLED + name for name in shared), *(f"pass_at/{size}" for size in sample_counts(k)), f"majority_at/{k}"]
    of_sets = [f"{name}/{metric}" for name in sets for metric in own]
    return [*own, *of_sets, *(["kl_divergence"] if config.train.eval_kl else [])]


def check_evaluation(config: Config, functions: Sequence[NamedFunction], sets: Iterable[str], problems: int) -> None:
    """Checks the settings of evaluations that go by what is evaluated.

    Args:
        problems: number of held-out rows of the main set.

    Raises:
        ConfigError: nothing is held out, so that a setting has no effect; or evaluations have no `train.best_metric`.
    """
    sets, metric = list(sets), config.train.best_metric
    fix = "it has an effect where main rows are held out: set data.eval_path, eval_split or eval_size too"
    if not problems:
        for given, what in ((sets, "eval.sets"), (config.eval.samples, "eval.samples")):
            if given:
                raise ConfigError(f"{what} is {given}: {fix}")
        if metric != "accuracy":
            raise ConfigError(f"train.best_metric is {metric!r}: {fix}")
    known = metric_names(config, functions, sets)
    if metric.removeprefix("-") not in known:
        raise ConfigError(f"train.best_metric is {metric!r}: use a metric of evaluations: {', '.join(known)}")
