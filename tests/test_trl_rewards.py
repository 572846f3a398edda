"""The ready rewards under TRL's names, on values worked out by hand: those of TRL's documentation and the edges between them."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.trl import rewards

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "trl_arguments.json").read_text())


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_every_reward_of_trl_is_there() -> None:
    assert {name for name in GOLDEN["rewards"] if callable(vars(rewards).get(name))} == set(GOLDEN["rewards"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nreasons\n</think>\nanswer", 1.0),
        ("<think>\nreasons\nanswer", 0.0),
        ("<think></think>", 1.0),
        (" <think>a</think>b", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b<think>", 0.0),
        ("<think>a</think>b</think>", 1.0),
        ("", 0.0),
    ],
)
def test_think_format(text: str, expected: float) -> None:
    assert rewards.think_format_reward(said(text), solution=["x"]) == [expected]


def test_accuracy_compares_latex_and_leaves_out_what_has_no_solution() -> None:
    pytest.importorskip("math_verify")
    logged: dict[str, list[Any]] = {}
    third = r"\frac{1}{3}"
    texts = said(
        rf"so \boxed{{{third}}}", r"so \boxed{\frac{1}{2}}", "no idea", rf"\boxed{{{third}}}", r"first $2$, boxed \boxed{0.5}"
    )
    goals = [third, third, third, "", r"$\frac{1}{2}$"]
    given = rewards.accuracy_reward(texts, goals, log_extra=logged.__setitem__, prompts=["p"] * 5)
    assert given == [1.0, 0.0, 0.0, None, 1.0]
    assert logged["solution"] == goals
    assert logged["gold_parsed"][3] == "[unparseable]"
    assert logged["answer_parsed"][2:4] == ["[unparseable]", "[skipped]"]
    assert rewards.accuracy_reward(texts[:1], goals[:1]) == [1.0]


def test_accuracy_after_reasoning_takes_the_last_part_and_punishes_what_does_not_end() -> None:
    pytest.importorskip("math_verify")
    right, wrong = r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"
    texts = said(
        f"<think> {wrong} </think> {right}",
        f"<think> {right} </think> {wrong}",
        f"<think> {right}",
        f"a </think> {wrong} </think> {right}",
    )
    goals = [r"\frac{1}{3}"] * 4
    assert rewards.reasoning_accuracy_reward(texts, goals) == [1.0, 0.0, 0.0, 1.0]
    assert rewards.reasoning_accuracy_reward(texts[:1], goals[:1], reasoning_delimiters=["||"]) == [0.0]
    assert rewards.reasoning_accuracy_reward(said(f"{wrong} || {right}"), goals[:1], reasoning_delimiters=["||"]) == [1.0]
    assert rewards.reasoning_accuracy_reward(said(f"</think> {right}"), [""]) == [None]


def test_soft_overlong_punishment_is_equation_13_of_dapo() -> None:
    reward = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 80, 81, 90, 100, 101]
    assert reward(completion_ids=[[1] * n for n in lengths]) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert rewards.get_soft_overlong_punishment(10, 0)(completion_ids=[[1] * 10, [1] * 11]) == [0, -1]
    assert reward.__name__ == "soft_overlong_punishment_reward"  # the name in the logs


def test_repetition_penalty_counts_ngrams_of_tokens() -> None:
    reward = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 5, [7], []]) == [0, -0.75, 0, 0]
    assert reward.__name__ == "repetition_penalty_reward"
    with pytest.raises(ValueError, match=r"max_penalty is 0\.5: use a number that is not positive"):
        rewards.get_repetition_penalty_reward(max_penalty=0.5)


def test_the_cosine_reward_favours_short_answers_that_are_right_and_long_ones_that_are_wrong() -> None:
    pytest.importorskip("math_verify")
    reward = rewards.get_cosine_scaled_reward(max_len=100)
    texts, goals = said(*[r"\boxed{1}", r"\boxed{2}"] * 3, r"\boxed{1}"), [*["1"] * 6, ""]
    lengths = [0, 0, 50, 50, 100, 250, 3]
    expected = [1.0, -1.0, 0.75, -0.75, 0.5, -0.5, None]
    given = reward(completions=texts, solution=goals, completion_ids=[[1] * n for n in lengths])
    assert [None if value is None else round(value, 12) for value in given] == expected
    quarter = reward(completions=texts[:1], solution=["1"], completion_ids=[[1] * 25])[0]
    assert quarter == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert reward.__name__ == "cosine_scaled_reward"


def test_a_reward_of_the_module_can_be_sent_to_a_process() -> None:
    assert pickle.loads(pickle.dumps(rewards.accuracy_reward)) is rewards.accuracy_reward
