"""The built-in rewards, against values worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rewards import exact_match, math_verify, number_match, overlong_penalty, regex_format, repetition_penalty, tag_format


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_exact_match_compares_the_stripped_text() -> None:
    values = exact_match()(completions=[" 42\n", "42.", "yes", said("42")], answer=["42", "42", "Yes", 42])
    assert values == [1.0, 0.0, 0.0, 1.0]


def test_exact_match_can_ignore_case_and_read_another_column() -> None:
    assert exact_match(column="goal", ignore_case=True)(completions=["YES", "no"], goal=["yes", None], answer=["x", "y"]) == [
        1.0,
        None,
    ]


def test_number_match_gives_none_without_a_reference_and_0_without_a_number() -> None:
    values = number_match()(completions=["18", "nothing", "18", said("#### 1,800")], answer=["#### 18", "18", None, 1800])
    assert values == [1.0, 0.0, None, 1.0]


def test_number_match_refuses_a_reference_without_a_number() -> None:
    with pytest.raises(ValueError, match="no number in the reference answer 'seven'"):
        number_match()(completions=["7"], answer=["seven"])


def test_number_match_says_in_its_docstring_that_it_falls_back_to_the_last_number() -> None:
    assert "falls back to the last number" in str(number_match.__doc__)


def test_regex_format_searches_and_its_dot_crosses_lines() -> None:
    reward = regex_format("^<a>.*</a>$")
    assert reward(completions=["<a>1\n2</a>", "x<a>1</a>", said("<a></a>"), "<a>1</a>\nx"]) == [1.0, 0.0, 1.0, 0.0]


def test_regex_format_refuses_a_broken_pattern() -> None:
    with pytest.raises(ConfigError, match=r"regex_format\.pattern is '\(': .*give a regular expression"):
        regex_format("(")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a < b</think><answer>b</answer>", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("x <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> x", 0.0),
        ("<think>a</think>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a<answer></think>b</answer>", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format_wants_each_tag_once_in_order_and_nothing_else(text: str, value: float) -> None:
    assert tag_format()(completions=[text, said(text)]) == [value, value]


def test_tag_format_with_other_tags_and_one_opened_by_the_template() -> None:
    reward = tag_format(tags=["plan", "do"], first_is_open=True)
    assert reward(completions=["a</plan><do>b</do>", "<plan>a</plan><do>b</do>"]) == [1.0, 0.0]


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["<a>"], ["a b"]])
def test_tag_format_refuses_tags_that_are_none(tags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"tag_format\.tags"):
        tag_format(tags)


def test_overlong_penalty_is_equation_13_of_dapo() -> None:
    # L_max = 10, L_cache = 4: free up to 6, then (6 - |y|) / 4, then -1.
    reward = overlong_penalty(max_completion_length=10, cache_length=4)
    lengths = [0, 5, 6, 7, 8, 9, 10, 11, 50]
    assert reward(completion_ids=[[1] * n for n in lengths]) == [0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]


def test_overlong_penalty_s_cache_is_a_fifth_as_in_dapo() -> None:
    # 20,480 tokens with a cache of 4,096: half way into the cache is 16,384 + 2,048.
    reward = overlong_penalty(max_completion_length=20480)
    assert reward(completion_ids=[[1] * 16384, [1] * 18432, [1] * 20480]) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("lengths", [(0, None), (10, 0), (10, 11)])
def test_overlong_penalty_refuses_lengths_that_do_not_fit(lengths: tuple[int, int | None]) -> None:
    with pytest.raises(ConfigError, match="overlong_penalty"):
        overlong_penalty(*lengths)


def test_repetition_penalty_counts_ngrams_seen_before() -> None:
    # "a b a b a": bigrams ab ba ab ba, 2 of 4 different; "A a a": aa aa, 1 of 2; a text of one word has no bigram.
    reward = repetition_penalty(ngram_size=2, max_penalty=0.5)
    assert reward(completions=["a b a b a", "A a a", "a b c", "a", "", said("a b a b a")]) == [-0.25, -0.25, 0.0, 0.0, 0.0, -0.25]


@pytest.mark.parametrize("arguments", [{"ngram_size": 0}, {"max_penalty": -1.0}])
def test_repetition_penalty_refuses_bad_settings(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="repetition_penalty"):
        repetition_penalty(**arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its parser's runtime
class TestMathVerify:
    @pytest.fixture(autouse=True)
    def _needs_the_extra(self) -> None:
        pytest.importorskip("math_verify", reason="needs the extra `math`")

    def test_it_knows_equal_expressions(self) -> None:
        texts = [r"so \boxed{0.5}", r"\boxed{\frac{2}{4}}", "the answer is $2\\sqrt{3}$", r"\boxed{2}", "#### 1,080", "nothing"]
        references = [r"\frac{1}{2}", "$0.5$", r"2\sqrt{3}", r"2\sqrt{3}", "9 * 120 = 1,080\n#### 1,080", "4"]
        assert math_verify()(completions=texts, answer=references) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]

    def test_it_reads_conversations_other_columns_and_none(self) -> None:
        reward = math_verify(column="solution")
        assert reward(completions=[said(r"\boxed{7}"), "7"], solution=["7", None]) == [1.0, None]

    def test_it_works_in_a_thread(self) -> None:
        from grpo_jax.rewards import score

        batch = score(
            [("math_verify", math_verify())],
            prompts=["1+1"],
            completions=[r"\boxed{2}"],
            completion_ids=[[1]],
            columns={"answer": ["2"]},
            timeout_seconds=60.0,
        )
        assert batch.rewards.tolist() == [1.0]
        assert batch.failures == []


def test_math_verify_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install grpo_jax\[math\]"):
        math_verify()
