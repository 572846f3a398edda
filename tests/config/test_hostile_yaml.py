"""YAML and values that PyYAML, `repr` or `float` fail on with errors of their own: each is a `ConfigError` in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.checks import show
from grpo_jax.config.yaml_files import parse_yaml

TENFOLD = "".join(f"- &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: !!int ''}", "cannot be read as YAML: IndexError"),
        ("train: {steps: !!bool maybe}", "cannot be read as YAML: KeyError"),
        ("train: {steps: !!timestamp x}", "cannot be read as YAML: AttributeError"),
        ("train: {steps: " + "9" * 5000 + "}", "cannot be read as YAML: ValueError"),
        ("objective: {loss: 0x" + "f" * 5000 + "}", r"objective\.loss is a whole number of 20000 bits: expected one of"),
        (
            "optim: {learning_rate: 1" + "0" * 400 + "}",
            r"optim\.learning_rate is a whole number of 1329 bits: expected a finite number",
        ),
        ("train: " + "[" * 5000, "cannot be read as YAML: RecursionError"),
        ("- &a [1]\n" + TENFOLD, "more than 100,000 values"),
        ("train: &a {steps: *a}", "more than 100,000 values, or a reference to itself"),
        ("# " + "x" * 10**6, "1,000,002 characters: settings take at most 1,000,000"),
        ("5: {}", "5 is no section"),
    ],
)
def test_what_pyyaml_fails_on_is_an_error_of_a_config(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Config.from_yaml(path)
    assert len(str(caught.value)) < 1000


def test_a_path_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a path"):
        Config.from_yaml("a\x00b")


def test_values_that_cannot_be_shown_are_described() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise OSError("no")

    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert show(10**5000) == "a whole number of 16610 bits"
    assert show([10**5000]) == "a list that cannot be shown (ValueError)"
    assert show(deep) == "a list that cannot be shown (RecursionError)"
    assert show(Silent()) == "a Silent that cannot be shown (OSError)"


def test_anchors_and_merge_keys_are_still_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
