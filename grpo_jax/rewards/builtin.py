"""The built-in reward functions: each a factory that takes settings and returns a `protocol.RewardFunction`.

Settings come from Python or from an entry of rewards.functions such as `{name: regex_format, pattern: "..."}`. All functions work
on plain and conversational completions.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.config.checks import ConfigError, require
from grpo_jax.rewards.answers import MARKER, final_number, reference_number
from grpo_jax.rewards.calls import FailedValue
from grpo_jax.rewards.code import code_execution
from grpo_jax.rewards.judge.reward import llm_judge
from grpo_jax.rewards.protocol import ColumnReward, RewardFunction, TextReward

MATH_VERIFY_SECONDS = 5
"""Time limit of math-verify for reading one answer, and for comparing it."""

OVERLONG_CACHE_SHARE = 5
"""L_max / L_cache in DAPO's settings: the cache is a fifth of the longest length (4,096 of 20,480 tokens)."""


def exact_match(column: str = "answer", ignore_case: bool = False) -> RewardFunction:
    """Returns 1 where the completion equals the reference, apart from white space around either; else 0.

    Args:
        column: Dataset column with the reference; None in it = does not apply. A value that is not text is compared as `str`
            formats it.
        ignore_case: Whether `Yes` equals `yes`.
    """

    def normalized(value: Any) -> str:
        text = str(value).strip()
        return text.casefold() if ignore_case else text

    return ColumnReward("exact_match", column, lambda text, reference: float(normalized(text) == normalized(reference)))


def number_match(column: str = "answer") -> RewardFunction:
    r"""Returns 1 where the completion's final number equals the reference's exactly; else 0.

    The final number is the first one after the last `####` (GSM8K's mark, on its line); without one, the first in the last
    `\boxed{...}`; without either, it falls back to the last number of the text. Currency signs, thousands commas, units, percent
    signs and a trailing period are ignored; `3/4` and `3 1/2` are fractions. A completion without a number gets 0.

    Args:
        column: Dataset column with the reference: a number, or a text read by the same rule, such as GSM8K's worked solutions.
            None in it = does not apply.

    The row fails (with a ValueError) where the reference has no number.
    """
    return ColumnReward("number_match", column, lambda text, reference: float(final_number(text) == reference_number(reference)))


def regex_format(pattern: str) -> RewardFunction:
    """Returns 1 where the pattern is found in the completion, else 0.

    Args:
        pattern: Regular expression of Python's `re`; `.` matches a line break too, `^` and `$` match the ends of the completion.
            Nested repetition such as `(a+)+` may never end: in a worker its row fails at rewards.timeout_seconds, in the trainer's
            process nothing can stop it.

    Raises:
        ConfigError: The pattern is not valid.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"regex_format.pattern is {pattern!r}: {error}; give a regular expression of Python's re") from None
    return TextReward("regex_format", lambda text: float(compiled.search(text) is not None))


def tag_format(tags: list[str] | None = None, first_is_open: bool = False) -> RewardFunction:
    """Returns 1 where the completion is exactly `<think>…</think><answer>…</answer>`, each tag once, none empty; else 0.

    White space before, between and after the tags is ignored.

    Args:
        tags: Names of the tags, in order; None is [think, answer].
        first_is_open: The chat template ends with the first opening tag, so that completions begin inside it.

    Raises:
        ConfigError: There are no tags, one is given twice, or a name contains white space, a slash or angle brackets.
    """
    names = list(tags) if tags is not None else ["think", "answer"]
    require(bool(names) and len(set(names)) == len(names), "tag_format.tags", names, "name each tag once, such as [think, answer]")
    for name in names:
        require(re.fullmatch(r"[^\s<>/]+", name) is not None, "tag_format.tags", name, "give the bare name, such as think")

    def fits(text: str) -> float:
        rest = f"<{names[0]}>{text}" if first_is_open else text
        if any(rest.count(f"<{name}>") != 1 or rest.count(f"</{name}>") != 1 for name in names):
            return 0.0
        for name in names:
            rest = rest.lstrip()
            inside, closing, after = rest.removeprefix(f"<{name}>").partition(f"</{name}>")
            if not rest.startswith(f"<{name}>") or not closing or not inside.strip():
                return 0.0
            rest = after
        return float(not rest.strip())

    return TextReward("tag_format", fits)


def overlong_penalty(max_completion_length: int, cache_length: int | None = None) -> RewardFunction:
    """Penalises completions near the maximal length (soft over-long punishment).

    DAPO (Yu et al. 2025, https://arxiv.org/abs/2503.14476), equation 13:

        R(y) = 0                                        |y| <= L_max - L_cache
               ((L_max - L_cache) - |y|) / L_cache      L_max - L_cache < |y| <= L_max
               -1                                       L_max < |y|

    |y| counts the completion's tokens, the stop token included.

    Args:
        max_completion_length: L_max in tokens; a config entry that leaves it out gets rollout.max_completion_length.
        cache_length: L_cache in tokens; None is a fifth of L_max, as in DAPO.

    Raises:
        ConfigError: A length is below 1, or the cache is above the maximum.
    """
    longest = max_completion_length
    require(longest >= 1, "overlong_penalty.max_completion_length", longest, "use rollout.max_completion_length")
    cache = cache_length if cache_length is not None else max(longest // OVERLONG_CACHE_SHARE, 1)
    require(
        1 <= cache <= longest, "overlong_penalty.cache_length", cache_length, f"use 1 to max_completion_length ({longest}) tokens"
    )

    def reward(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [max(-1.0, min(0.0, (longest - cache - len(ids)) / cache)) for ids in completion_ids]

    reward.__name__ = "overlong_penalty"
    return reward


def repetition_penalty(ngram_size: int = 3, max_penalty: float = 1.0) -> RewardFunction:
    """Penalises repetition: -max_penalty · (1 - different n-grams / all n-grams) of lower-case words; 0 below n words.

    After appendix C.2 of Yeo et al. 2025, https://arxiv.org/abs/2502.03373, which penalises each token of an n-gram that was
    seen before. Deviation: one number per completion.

    Args:
        ngram_size: n, in words split at white space.
        max_penalty: Size of the penalty in the limit of endless repetition.

    Raises:
        ConfigError: n is below 1 or the size is negative.
    """
    require(ngram_size >= 1, "repetition_penalty.ngram_size", ngram_size, "use 1 or more words, such as 3")
    require(
        max_penalty >= 0,
        "repetition_penalty.max_penalty",
        max_penalty,
        "give its size as a positive number; it is subtracted from the reward",
    )

    def penalty(text: str) -> float:
        words = text.lower().split()
        ngrams = [tuple(words[start : start + ngram_size]) for start in range(len(words) - ngram_size + 1)]
        return -max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return TextReward("repetition_penalty", penalty)


def math_verify(column: str = "answer") -> RewardFunction:
    """Returns 1 where the completion's answer equals the reference's by https://github.com/huggingface/Math-Verify, else 0.

    In a run it is always called in a worker process, because some answers never end, such as `$9^{9^{9^{9}}}$`: their rows fail at
    rewards.timeout_seconds. Where math-verify's own limit of 5 s works, an answer that takes longer is wrong.

    Args:
        column: Dataset column with the reference: LaTeX, a plain expression, or a text with `####`, `$...$` or a box. None in it =
            does not apply.

    The row fails (with a ValueError) where the reference cannot be read.

    Raises:
        ConfigError: The extra `math` is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(f"math_verify needs its extra ({error}): pip install grpo_jax[math]") from None

    def compare(text: str, reference: Any) -> float:
        # math-verify's limit is an alarm signal, which only the main thread may set.
        limit: Any = MATH_VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None
        gold = parse(_delimited(str(reference)), parsing_timeout=limit)
        if not gold:
            raise ValueError(f"math-verify cannot read the reference answer {str(reference)[-80:]!r}")
        return float(verify(gold, parse(text, parsing_timeout=limit), timeout_seconds=limit))

    return ColumnReward("math_verify", column, compare)


def _delimited(reference: str) -> str:
    r"""Adds a box to a reference without delimiters: math-verify would read a bare `2\sqrt{3}` as 2."""
    bare = reference.rsplit(MARKER, 1)[-1].strip()
    return bare if any(mark in bare for mark in ("$", "\\boxed", "\\(", "\\[")) else f"\\boxed{{{bare}}}"


def environment() -> RewardFunction:
    """Returns the environment's own reward: the sum over the turns of an episode; None where no turn gave one.

    With an environment or tools it is added to the functions by itself, with weight 1, unless `rewards.functions` names it. A row
    whose environment raised or took too long fails.
    """

    def reward(environment_reward: Sequence[float | None], environment_failure: Sequence[str | None]) -> list[Any]:
        pairs = zip(environment_reward, environment_failure, strict=True)
        return [value if failure is None else FailedValue(failure) for value, failure in pairs]

    reward.__name__ = "environment"
    return reward


BUILTINS: dict[str, Callable[..., RewardFunction]] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "regex_format": regex_format,
    "tag_format": tag_format,
    "overlong_penalty": overlong_penalty,
    "repetition_penalty": repetition_penalty,
    "math_verify": math_verify,
    "code_execution": code_execution,
    "environment": environment,
    "llm_judge": llm_judge,
}
"""The built-in reward functions by the name that rewards.functions gives."""
