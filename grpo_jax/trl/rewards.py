r"""The reward functions of `trl.rewards`, by the same names and with the same values; written anew.

All take conversational completions, `[{"role": "assistant", "content": text}]`. Those that compare answers need the extra `math`
and a column `solution`: where the solution cannot be read, the reward is None. TRL's limits of time are those of math-verify: 10 s
for reading and 5 s for comparing, where the call is in the main thread; elsewhere there is none.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

READING_SECONDS, COMPARING_SECONDS = 10, 5
UNREADABLE, SKIPPED, UNFINISHED = "[unparseable]", "[skipped]", "[incomplete reasoning]"

Messages = list[dict[str, str]]


def think_format_reward(completions: list[Messages], **kwargs: Any) -> list[float]:
    """1.0 where a completion begins with one `<think>…</think>`, else 0.0.

    A second `<think>` anywhere gives 0.0; text after the block, and none at all, are allowed.
    """
    return [float(thinks_once(text)) for text in texts_of(completions)]


def thinks_once(text: str) -> bool:
    """Whether a text begins with `<think>`, closes it, and opens it nowhere else."""
    start, opening = text.startswith("<think>"), text.find("<think>", 1)
    return start and opening < 0 and "</think>" in text


def accuracy_reward(
    completions: list[Messages], solution: list[str], log_extra: Callable[[str, list[Any]], None] | None = None, **kwargs: Any
) -> list[float | None]:
    r"""1.0 where a completion's LaTeX answer equals the solution, else 0.0; None where the solution cannot be read.

    Args:
        completions: N conversations of one message.
        solution: N texts, such as `\frac{1}{3}`.
        log_extra: records the texts of solutions and answers as they were read.
    """
    checked = [checked_answer(text, goal) for text, goal in zip(texts_of(completions), solution, strict=True)]
    record(checked, solution, log_extra)
    return [item.reward for item in checked]


def reasoning_accuracy_reward(
    completions: list[Messages],
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """As `accuracy_reward`, for what follows the reasoning; 0.0 where the reasoning does not end.

    Args:
        reasoning_delimiters: texts that end the reasoning; the first of them that occurs counts, and its last occurrence. None is
            `["</think>"]`.
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters

    def check(text: str, goal: str) -> Checked:
        ending = next((delimiter for delimiter in delimiters if delimiter in text), None)
        return Checked(0.0, UNFINISHED, UNFINISHED) if ending is None else checked_answer(text.rpartition(ending)[2], goal)

    checked = [check(text, goal) for text, goal in zip(texts_of(completions), solution, strict=True)]
    record(checked, solution, log_extra)
    return [item.reward for item in checked]


@dataclass(frozen=True)
class Checked:
    """An answer that was compared with its solution.

    Attributes:
        reward: 1.0, 0.0, or None where the solution cannot be read.
        gold, answer: what was read, as text.
    """

    reward: float | None
    gold: str
    answer: str


def checked_answer(text: str, goal: str) -> Checked:
    """Compares the LaTeX answer of a text, boxed ones first, with a solution."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("this reward needs math-verify: pip install 'grpo-jax[math]'") from error
    in_main: bool = threading.current_thread() is threading.main_thread()  # elsewhere math-verify cannot set its alarm
    reading: Any = READING_SECONDS if in_main else None
    comparing: Any = COMPARING_SECONDS if in_main else None
    gold = parse(goal, parsing_timeout=reading)
    if not gold:
        return Checked(None, UNREADABLE, SKIPPED)
    answer = parse(text, extraction_config=[latex()], extraction_mode="first_match", parsing_timeout=reading)
    right = verify(gold, answer, timeout_seconds=comparing)
    return Checked(float(right), str(gold), str(answer) if answer else UNREADABLE)


@functools.cache
def latex() -> Any:
    """How answers are found: in LaTeX with its delimiters, boxed ones first, units removed."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    return LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )


def record(checked: Sequence[Checked], solution: list[str], log_extra: Callable[[str, list[Any]], None] | None) -> None:
    """Records what was read, in the columns that TRL uses."""
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [item.gold for item in checked])
        log_extra("answer_parsed", [item.answer for item in checked])


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """Makes DAPO's soft punishment of long completions (https://arxiv.org/abs/2503.14476, equation 13).

    0 up to max_completion_len − soft_punish_cache tokens, from there down to −1 at max_completion_len along a line, −1 above.
    """

    def punishment(length: int) -> float:
        free = max_completion_len - soft_punish_cache
        if length <= free:
            return 0.0
        return (free - length) / soft_punish_cache if length <= max_completion_len else -1.0

    return by_ids("soft_overlong_punishment_reward", lambda ids: punishment(len(ids)))


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Makes a penalty for repeated n-grams of tokens: max_penalty · (1 − different n-grams / all n-grams); 0 below n tokens.

    After appendix C.2 of https://arxiv.org/abs/2502.03373.

    Raises:
        ValueError: max_penalty is positive.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty is {max_penalty}: use a number that is not positive")

    def penalty(ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        repeated = len(ngrams) - len(set(ngrams))
        return max_penalty * repeated / len(ngrams) if repeated else 0.0

    return by_ids("repetition_penalty_reward", penalty)


def by_ids(name: str, value: Callable[[Sequence[int]], float]) -> Callable[..., list[float]]:
    """A reward function of each completion's token ids alone."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [value(ids) for ids in completion_ids]

    reward.__name__ = name
    return reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Makes an accuracy reward that goes by the completion's length, along half a cosine.

    After appendix C.1 of https://arxiv.org/abs/2502.03373: from max_value_correct (no token) down to min_value_correct (max_len
    tokens and more) where the answer is right, from min_value_wrong up to max_value_wrong where it is wrong.
    """

    def cosine_scaled_reward(
        completions: list[Messages], solution: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        def scaled(right: float | None, length: int) -> float | None:
            if right is None:
                return None
            short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
            return long + (short - long) * (1 + math.cos(math.pi * min(length / max_len, 1.0))) / 2

        right = accuracy_reward(completions, solution)
        return [scaled(value, len(ids)) for value, ids in zip(right, completion_ids, strict=True)]

    return cosine_scaled_reward


def texts_of(completions: list[Messages]) -> list[str]:
    """The text of each conversation's first message."""
    return [completion[0]["content"] for completion in completions]
