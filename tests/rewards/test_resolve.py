"""From entries of rewards.functions to named functions, and what is refused before a run."""

from __future__ import annotations

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rewards import check_functions, number_match, resolve_functions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's own rewards in it; imports are undone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent("""
            from my_helper import FACTOR

            LIMIT = 3

            class Judge:
                def __call__(self, completions):
                    return [0.0] * len(completions)

            def longer(completions):
                return [FACTOR * len(text) for text in completions]

            def scaled(completions, scale, offset=0.0, **columns):
                return [scale * len(text) + offset for text in completions]

            def strict(completions, scale):
                return [scale for text in completions]
        """)
    )
    (tmp_path / "my_helper.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('no key')\n")
    return tmp_path


def test_built_ins_by_name_and_with_arguments() -> None:
    (name, exact), (other, pattern) = resolve_functions(["exact_match", {"name": "regex_format", "pattern": "^A"}])
    assert (name, other) == ("exact_match", "regex_format")
    assert exact(completions=["1"], answer=["1"]) == [1.0]
    assert pattern(completions=["A", "B"]) == [1.0, 0.0]


def test_a_single_entry_needs_no_list() -> None:
    assert [name for name, _ in resolve_functions("exact_match")] == ["exact_match"]
    assert [name for name, _ in resolve_functions({"name": "exact_match", "ignore_case": True})] == ["exact_match"]


def test_names_are_unique_even_where_the_function_is_the_same() -> None:
    def exact_match_2(completions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    entries = ["exact_match", exact_match_2, "exact_match", "exact_match"]
    assert [name for name, _ in resolve_functions(entries)] == ["exact_match", "exact_match_2", "exact_match_3", "exact_match_4"]


def test_functions_partials_instances_and_lambdas_get_names() -> None:
    class Judge:
        def __call__(self, completions: list[str], bias: float = 0.0) -> list[float]:
            return [bias for _ in completions]

        def method(self, completions: list[str]) -> list[float]:
            return [0.0 for _ in completions]

    def plain(completions: list[str], bias: float) -> list[float]:
        return [bias for _ in completions]

    entries: list[Any] = [
        plain,
        functools.partial(plain, bias=1.0),
        Judge(),
        Judge().method,
        lambda completions: [0.0],
        number_match(),
    ]
    names = [name for name, _ in resolve_functions(entries)]
    assert names == ["plain", "plain_2", "Judge", "method", "lambda", "number_match"]


def test_a_factory_that_was_not_called_is_called() -> None:
    ((name, function),) = resolve_functions([number_match])
    assert (name, function(completions=["4"], answer=[4])) == ("number_match", [1.0])


def test_a_function_of_a_file_or_a_module(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    (first, of_file), (second, of_module), _ = resolve_functions(
        ["my_rewards.py:longer", "my_rewards:longer", f"{folder / 'my_rewards.py'}:longer"]
    )
    assert (first, second) == ("longer", "longer_2")
    assert of_file(completions=["abc"]) == of_module(completions=["abc"]) == [6.0]


def test_arguments_of_a_user_s_function_are_passed_and_win_over_columns(folder: Path) -> None:
    resolved = resolve_functions([{"name": "my_rewards.py:scaled", "scale": 2.0}])
    check_functions(resolved, [])
    assert resolved[0][1](completions=["abc"]) == [6.0]


def test_overlong_penalty_takes_the_rollout_s_length_where_it_has_none() -> None:
    ((_, own),) = resolve_functions(
        [{"name": "overlong_penalty", "max_completion_length": 10, "cache_length": 10}], max_completion_length=99
    )
    ((_, filled),) = resolve_functions([{"name": "overlong_penalty", "cache_length": 20}], max_completion_length=20)
    assert own(completion_ids=[[0] * 5]) == [-0.5]
    assert filled(completion_ids=[[0] * 5]) == [-0.25]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("exact_mach", r"rewards\.functions\[0\] is 'exact_mach': no such built-in; did you mean exact_match\?"),
        ("pkg.mod.reward", r"write pkg\.mod:reward"),
        ("my_rewards.py", r"say which function in it, such as my_rewards\.py:reward"),
        (3, r"rewards\.functions\[0\] is 3: give a built-in name"),
        ({"pattern": "a"}, "has no name"),
        ({"name": 3}, "is 3"),
        ({"name": "regex_format"}, r"regex_format needs pattern: write \{name: regex_format, pattern: \.\.\.\}"),
        ("overlong_penalty", "needs max_completion_length"),
        ({"name": "regex_format", "patern": "a"}, r"has no argument patern; did you mean pattern\?"),
        ({"name": "regex_format", "pattern": 5}, r"rewards\.functions\[0\]\.pattern is 5: expected text"),
        ({"name": "repetition_penalty", "ngram_size": "3"}, "ngram_size is '3': expected a whole number"),
        ({"name": "tag_format", "tags": "think"}, r"tags is 'think': expected a list"),
        ("my_rewards.py:longr", r"my_rewards\.py has no function longr; did you mean longer\?"),
        ("my_rewards.py:LIMIT", "LIMIT in my_rewards.py is no function"),
        ("my_rewards.py:Judge", "Judge in my_rewards.py is a class"),
        ("my_reward.py:longer", r"there is no file my_reward\.py .*did you mean my_rewards\.py\?"),
        ("broken.py:reward", "importing .*broken.py raised RuntimeError: no key"),
        ("my_rewards:longer", r"importing my_rewards raised ModuleNotFoundError.*write my_rewards\.py:longer"),
        ({"name": "my_rewards.py:strict", "scal": 1.0}, r"strict has no argument scal; did you mean scale\?"),
        ({"name": "my_rewards.py:strict", "completions": []}, "strict has no argument completions"),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_way_out(folder: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_functions([entry])


def test_no_functions_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.functions is empty"):
        resolve_functions([])


def test_a_missing_column_names_function_parameter_and_columns() -> None:
    def judge(completions: list[str], solution: list[str], level: int = 0) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(
        ConfigError, match=r"judge needs solution, which .*columns are: question, solutions\. Did you mean solutions\?"
    ):
        check_functions([("judge", judge)], ["question", "solutions"])
    check_functions([("judge", judge)], ["question", "solution"])


def test_a_misspelled_input_suggests_the_sampled_one() -> None:
    def judge(completion: list[str]) -> list[float]:
        return [0.0 for _ in completion]

    with pytest.raises(ConfigError, match=r"its columns are: none\. Did you mean completions\?"):
        check_functions([("judge", judge)], [])


def test_a_built_in_s_missing_column_is_found_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"number_match needs goal.*columns are: answer"):
        check_functions([("number_match", number_match("goal"))], ["answer"])


def test_a_function_that_takes_anything_needs_nothing() -> None:
    check_functions([("any", lambda **columns: [])], [])


def test_inputs_by_position_only_are_refused() -> None:
    def judge(completions: list[str], /) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(ConfigError, match="completions can only be given by position"):
        resolve_functions([judge])


def test_a_function_without_a_signature_is_refused() -> None:
    with pytest.raises(ConfigError, match="its inputs cannot be read"):
        resolve_functions([max])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    functions = resolve_functions(["exact_match", "exact_match"])
    with pytest.raises(ConfigError, match=r"rewards\.weights"):
        check_functions(functions, ["answer"], weights)


def test_an_accuracy_that_is_no_function_suggests_the_nearest() -> None:
    functions = resolve_functions(["exact_match"])
    with pytest.raises(ConfigError, match=r"rewards\.accuracy is 'exact_mtch': did you mean exact_match\?"):
        check_functions(functions, ["answer"], accuracy="exact_mtch")
