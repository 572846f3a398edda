"""The command `generate`: chat models are talked to through their template, and text is printed as it comes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from tiny_runs import build_model, config_of, run, tiny_model

import grpo_jax as gx
from grpo_jax.config import ConfigError, DataConfig, RolloutConfig
from grpo_jax.rollout.completions import Completion
from grpo_jax.runtime.safe_text import safe_text
from grpo_jax.tools.generate import GenerateOptions, Printer, as_prompt, generate

GREEDY = RolloutConfig(num_generations=1, max_completion_length=20, temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def options(**given: Any) -> GenerateOptions:
    return GenerateOptions(**{"prompts": ["1+1="], "rollout": GREEDY, "model": str(tiny_model())} | given)


def printed(chosen: GenerateOptions) -> str:
    out = io.StringIO()
    generate(chosen, out.write)
    return out.getvalue()


def test_a_chat_model_is_talked_to_through_its_template_unless_raw(tmp_path: Path) -> None:
    policy = gx.Policy.from_pretrained(tiny_model())
    user = {"role": "user", "content": "1+1="}
    for given, prompt in (
        ({}, [user]),
        ({"system": "Add."}, [{"role": "system", "content": "Add."}, user]),
        ({"raw": True}, "1+1="),
    ):
        assert as_prompt("1+1=", options(**given), DataConfig(), policy) == prompt
        expected = policy.generate([prompt], max_completion_length=20, temperature=0.0)[0][0]
        text = printed(options(**given))
        end = f"{len(expected.ids)} tokens ({expected.finish_reason})"
        assert text == f"prompt: 1+1=\n--- 1 of 1\n{safe_text(expected.text)}\n--- {end}\n"
    bare = gx.Policy.from_pretrained(build_model(tmp_path / "bare", None))
    assert as_prompt("1+1=", options(), DataConfig(), bare) == "1+1="
    cases = ((options(system="Add."), bare, "has no chat template"), (options(system="Add.", raw=True), policy, "--raw"))
    for chosen, policy_, why in cases:
        with pytest.raises(ConfigError, match=f"--system: 'Add.' needs a chat template, and .*{why}"):
            as_prompt("1+1=", chosen, DataConfig(), policy_)


@pytest.mark.slow
def test_a_run_is_talked_to_as_it_was_trained(tmp_path: Path) -> None:
    """The tiny run's prompts are plain texts. Where they are not recorded, a chat model is talked to through its template."""
    done = run(config_of(tmp_path / "run", train={"steps": 1}))
    user, policy = [{"role": "user", "content": "1+1="}], done.result.policy
    plain, chat = (policy.generate([prompt], max_completion_length=20, temperature=0.0)[0][0].text for prompt in ("1+1=", user))
    assert plain != chat
    saved = options(model=None, run=str(tmp_path / "run"))
    assert f"--- 1 of 1\n{safe_text(plain)}\n" in printed(saved)
    (tmp_path / "run" / "completions.jsonl").unlink()
    assert f"--- 1 of 1\n{safe_text(chat)}\n" in printed(saved)
    data = DataConfig(system_prompt="Add.", chat_template=None)
    assert as_prompt("2", options(), data, policy)[0] == {"role": "system", "content": "Add."}
    assert as_prompt("2", options(), replace(data, system_prompt=None, chat_template=False), policy) == "2"


def test_text_comes_in_pieces_and_in_order() -> None:
    out = io.StringIO()
    printer = Printer(["p", "q"], 2, out.write)
    printer.show(["he", "early", "", ""], [False, True, False, False])
    assert out.getvalue() == "prompt: p\n--- 1 of 2\nhe"
    printer.show(["hello\N{REPLACEMENT CHARACTER}", "early", "a", ""], [False, True, False, False])
    assert out.getvalue() == "prompt: p\n--- 1 of 2\nhello"  # half a character waits
    printer.show(["hello\N{SNOWMAN}", "early", "a", ""], [True, True, False, False])
    assert out.getvalue() == "prompt: p\n--- 1 of 2\nhello\N{SNOWMAN}\n--- 2 of 2\nearly\nprompt: q\n--- 1 of 2\na"
    no_logps = np.zeros(0, np.float32)
    rows = [Completion(text, [1, 2], no_logps, "stop") for text in ("hello\N{SNOWMAN}", "early", "ab", "c")]
    printer.finish([rows[:2], rows[2:]])
    assert out.getvalue().endswith("\nab\n--- 2 of 2\nc\n--- 2 tokens (stop), 2 tokens (stop), 2 tokens (stop), 2 tokens (stop)\n")


def test_a_completion_reaches_the_terminal_as_plain_text() -> None:
    out = io.StringIO()
    printer = Printer(["p\x1b[2J"], 1, out.write)
    printer.show(["[red]a[/red]\x1b]0;title\x07\r\u202eb"], [True])
    assert "[red]a[/red]\\x1b]0;title\\x07\\r\\u202eb\n" in out.getvalue()
    assert "prompt: p\\x1b[2J\n" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_text_streams_while_it_is_decoded() -> None:
    policy = gx.Policy.from_pretrained(tiny_model())
    seen: list[tuple[list[str], list[bool]]] = []
    whole = policy.generate(["a"], max_completion_length=20, temperature=0.0, segment=4, on_text=lambda *x: seen.append(x))[0][0]
    assert len(seen) > 1 or len(whole.ids) <= 5
    assert seen[-1] == ([whole.text], [True])
    assert all(not ended[0] for _, ended in seen[:-1])
