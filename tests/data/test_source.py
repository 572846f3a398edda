"""Batches of prompts: order, held-out rows, length limit, what rewards get, and bad rows, against sequences worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import CHATML, NO_SYSTEM, byte_tokenizer, word_tokenizer

from grpo_jax.config import Config, ConfigError
from grpo_jax.data import DataError, PromptSource
from grpo_jax.data.examples import with_bar
from grpo_jax.data.order import held_out_positions, rows_from, rows_of_step, windowed_order
from grpo_jax.data.tokenizer import Tokenizer

WORDS = Tokenizer.wrap(word_tokenizer(" ".join(f"w{i}" for i in range(100))))  # <s> in front, word i has id 5 + i
CHAT = Tokenizer.wrap(byte_tokenizer(CHATML))
BASE = Tokenizer.wrap(byte_tokenizer())


def settings(prompts_per_step: int = 2, seed: int = 0, limit: int = 64, **data: Any) -> Config:
    return Config.from_dict(
        {
            "data": data,
            "rollout": {"max_prompt_length": limit},
            "train": {"prompts_per_step": prompts_per_step, "seed": seed, "quiet": True},
        }
    )


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i}", "answer": str(i)} for i in range(count)]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def indices(source: PromptSource, steps: int) -> list[list[int]]:
    return [source.batch(step).indices.tolist() for step in range(steps)]


# order


@pytest.mark.parametrize(("count", "size"), [(7, 3), (10, 4), (4, 4), (5, 4), (9, 5), (6, 3), (1, 1), (100, 7), (13, 12)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_row_once_and_no_step_repeats_one(count: int, size: int, shuffle: bool) -> None:
    steps = 3 * count  # so that they end with an epoch
    visited = [rows_of_step(step, size, count, 11, shuffle) for step in range(steps)]
    assert all(len(set(step.tolist())) == size for step in visited)
    for epoch in np.concatenate(visited).reshape(-1, count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_an_order_does_not_depend_on_the_steps_asked_for_before() -> None:
    forwards = [rows_of_step(step, 4, 9, 3, True).tolist() for step in range(40)]
    backwards = [rows_of_step(step, 4, 9, 3, True).tolist() for step in reversed(range(40))]
    assert forwards == backwards[::-1]


def test_where_steps_divide_the_rows_an_epoch_is_the_permutation_of_seed_and_epoch() -> None:
    for epoch in (0, 1, 5):
        visited = np.concatenate([rows_of_step(3 * epoch + part, 4, 12, 21, True) for part in range(3)])
        np.testing.assert_array_equal(visited, np.random.default_rng([21, epoch]).permutation(12))


def test_the_seed_changes_the_order_and_every_row_is_as_likely_first() -> None:
    first = Counter(int(rows_of_step(0, 1, 4, seed, True)[0]) for seed in range(400))
    assert set(first) == {0, 1, 2, 3}
    assert min(first.values()) > 60  # 100 expected, deviation under 9


def test_unshuffled_rows_come_in_the_order_of_the_file() -> None:
    source = PromptSource.build(settings(2, shuffle=False), WORDS, rows(5))
    # the third step takes row 4 and, a new epoch, row 0
    assert indices(source, 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_bad_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="without repeating"):
        rows_of_step(0, 3, 2, 0, True)
    with pytest.raises(ValueError, match="negative"):
        rows_of_step(-1, 1, 2, 0, True)
    with pytest.raises(ValueError, match="3 rows in a row cannot differ where there are 2"):
        rows_from(0, 1, 3, 2, 0, True)
    with pytest.raises(ValueError, match="from position -1"):
        rows_from(-1, 1, 2, 2, 0, True)


@pytest.mark.parametrize(("count", "window"), [(7, 3), (10, 9), (4, 4), (5, 1), (1, 1), (40, 7), (13, 12), (2, 2), (20, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_of_any_size_visit_every_row_once_an_epoch_and_repeat_none(count: int, window: int, shuffle: bool) -> None:
    order = rows_from(0, 9 * count, window, count, 5, shuffle).tolist()
    for epoch in range(9):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    for start in range(len(order) - window + 1):
        assert len(set(order[start : start + window])) == window, start
    if not shuffle:
        assert order == 9 * list(range(count))
    windowed_order.cache_clear()
    for start in (8 * count - 1, 3, 5 * count + count // 2):  # in another sequence, nothing remembered
        assert rows_from(start, count, window, count, 5, shuffle).tolist() == order[start : start + count]


def test_an_epoch_is_the_permutation_of_seed_and_epoch_but_for_rows_that_would_repeat() -> None:
    """By the definition: at every position the first row in the permutation's order that the last window - 1 rows do not have."""
    count, window, before = 11, 5, []
    for epoch in range(4):
        left = np.random.default_rng([3, epoch]).permutation(count).tolist()
        for _ in range(count):
            recent = before[-(window - 1) :]
            chosen = next(row for row in left if row not in recent)
            left.remove(chosen)
            before.append(chosen)
    assert rows_from(0, 4 * count, window, count, 3, True).tolist() == before


def test_more_prompts_a_step_than_rows_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.prompts_per_step is 4: there are only 3 rows"):
        PromptSource.build(settings(4), WORDS, rows(3))
    with pytest.raises(ConfigError, match=r"only 1 rows to train on \(2 were too long and dropped\)"):
        PromptSource.build(settings(2, limit=2), WORDS, [{"prompt": "w1 w2"}, {"prompt": "w1"}, {"prompt": "w1 w2 w3"}])


# what a batch holds


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    source, again = (PromptSource.build(settings(3, seed=5), WORDS, rows(10)) for _ in range(2))
    other = PromptSource.build(settings(3, seed=6), WORDS, rows(10))
    assert indices(source, 9) == [again.batch(step).indices.tolist() for step in reversed(range(9))][::-1]
    assert indices(source, 9) != indices(other, 9)
    batch = source.batch(4)
    assert batch.step == 4
    assert batch.indices.dtype == np.int64
    assert batch.prompts == [f"w{i}" for i in batch.indices]
    assert batch.prompt_ids == [[1, 5 + i] for i in batch.indices]
    assert batch.columns == {"answer": [str(i) for i in batch.indices]}


def test_every_column_but_the_prompt_reaches_rewards_by_name() -> None:
    data = [{"question": "w1", "prompt": 3, "answer": [1], "level": None}, {"question": "w2", "prompt": 4, "answer": []}]
    batch = PromptSource.build(settings(prompt_column="question", shuffle=False), WORDS, data).batch(0)
    assert batch.columns == {"prompt": [3, 4], "answer": [[1], []], "level": [None, None]}
    assert batch.prompts == ["w1", "w2"]


def test_a_column_that_hides_an_argument_of_rewards_is_refused() -> None:
    with pytest.raises(DataError, match="column completions, but rewards get another argument by that name"):
        PromptSource.build(settings(), WORDS, [{"prompt": "w1", "completions": 1}] * 2)


def test_a_system_prompt_makes_a_conversation() -> None:
    data = [{"prompt": "hi"}, {"prompt": user("ho")}]
    batch = PromptSource.build(settings(system_prompt="Be brief", shuffle=False), CHAT, data).batch(0)
    system = {"role": "system", "content": "Be brief"}
    assert batch.prompts == [[system, *user("hi")], [system, *user("ho")]]
    assert batch.prompt_ids == [CHAT.encode_prompt(prompt, chat=True) for prompt in batch.prompts]
    assert data == [{"prompt": "hi"}, {"prompt": user("ho")}]


def test_chat_template_alone_renders_a_text_that_stays_a_text_for_rewards() -> None:
    batch = PromptSource.build(
        settings(1, chat_template=True, template_arguments={"enable_thinking": False}), CHAT, [{"prompt": "hi"}]
    ).batch(0)
    assert batch.prompts == ["hi"]
    assert CHAT.hf.decode(batch.prompt_ids[0]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>"
    plain = PromptSource.build(settings(1), CHAT, [{"prompt": "hi"}]).batch(0)
    assert CHAT.hf.decode(plain.prompt_ids[0]) == "hi"


def test_a_reward_that_changes_a_message_does_not_change_the_next_epoch() -> None:
    source = PromptSource.build(settings(1), CHAT, [{"prompt": user("hi")}])
    prompt = source.batch(0).prompts[0]
    assert isinstance(prompt, list)
    prompt[0]["content"] = "changed"
    assert source.batch(1).prompts == [user("hi")]


# held-out rows


def test_held_out_rows_are_drawn_by_the_seed_and_never_trained_on() -> None:
    source = PromptSource.build(settings(2, seed=3, eval_size=4), WORDS, rows(10))
    held_out = [batch.indices.tolist() for batch in source.held_out_batches(3)]
    assert [len(batch) for batch in held_out] == [3, 1]
    kept = [*held_out[0], *held_out[1]]
    assert kept == sorted(set(kept)) == held_out_positions(10, 4, 3).tolist()
    trained = {i for batch in indices(source, 12) for i in batch}
    assert trained == set(range(10)) - set(kept)
    draws = {tuple(held_out_positions(10, 4, seed)) for seed in range(20)}
    assert len(draws) > 15


def test_a_row_with_a_held_out_prompt_is_not_trained_on() -> None:
    data = [{"prompt": f"w{i % 5}"} for i in range(20)]
    source = PromptSource.build(settings(2, eval_size=2), WORDS, data)
    held_out = {str(prompt) for batch in source.held_out_batches(8) for prompt in batch.prompts}
    trained = {str(prompt) for step in range(20) for prompt in source.batch(step).prompts}
    assert not trained & held_out
    assert trained | held_out == {f"w{i}" for i in range(5)}
    with pytest.raises(ConfigError, match=r"data\.eval_size is 1: no row with another prompt is left of 3"):
        PromptSource.build(settings(1, eval_size=1), WORDS, [{"prompt": "w1"}] * 3)
    with pytest.raises(ConfigError, match=r"data\.eval_size is 3"):
        PromptSource.build(settings(1, eval_size=3), WORDS, rows(3))


def write_rows(path: Path, first: int, last: int) -> Path:
    path.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(first, last)))
    return path


def held_out_prompts(source: PromptSource) -> list[Any]:
    return [prompt for batch in source.held_out_batches(2) for prompt in batch.prompts]


def test_a_named_split_a_file_or_python_rows_are_held_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 0, 4)
    write_rows(tmp_path / "test.jsonl", 10, 15)
    first = ["w10", "w11", "w12"]
    source = PromptSource.build(settings(path=str(tmp_path), eval_split="test", eval_size=3), WORDS)
    assert held_out_prompts(source) == first
    assert len(source.train) == 4
    one_file = settings(path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "test.jsonl"), eval_size=3)
    assert held_out_prompts(PromptSource.build(one_file, WORDS)) == first
    python = PromptSource.build(settings(eval_size=9), WORDS, rows(4), [{"prompt": "w20"}])
    assert held_out_prompts(python) == ["w20"]
    with pytest.raises(ConfigError, match=r"data\.eval_split is 'tset'.*did you mean test"):
        PromptSource.build(settings(path=str(tmp_path), eval_split="tset", eval_size=3), WORDS)
    with pytest.raises(ConfigError, match=r"data\.eval_split is 'train': it is trained on"):
        PromptSource.build(settings(path=str(tmp_path), eval_split="train", eval_size=3), WORDS)
    with pytest.raises(ConfigError, match=r"data\.eval_split is 'test': rows from Python have no splits"):
        PromptSource.build(settings(eval_split="test", eval_size=3), WORDS, rows(4))


def test_evaluation_alone_does_not_need_the_training_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", 0, 3)
    source = PromptSource.build(settings(8, path=str(tmp_path), eval_split="test", eval_size=3), WORDS, only_held_out=True)
    assert (len(source.train), len(source.held_out)) == (0, 3)
    few = PromptSource.build(settings(8, eval_size=2), WORDS, rows(3), only_held_out=True)
    assert len(few.held_out) == 2


# too long


LONG = [{"prompt": "w0 w1"}, {"prompt": "w2 w3 w4 w5"}, {"prompt": "w6"}, {"prompt": "w7 w8 w9"}]


def test_long_prompts_are_dropped_and_counted_and_the_others_keep_their_numbers() -> None:
    source = PromptSource.build(settings(2, limit=3, shuffle=False), WORDS, LONG)
    assert (source.dropped, source.shortened, len(source.train)) == (2, 0, 2)
    assert indices(source, 2) == [[0, 2], [0, 2]]
    with pytest.raises(DataError, match=r"all 2 rows are longer than rollout\.max_prompt_length \(3 tokens\)"):
        PromptSource.build(settings(1, limit=3), WORDS, [LONG[1], LONG[3]])


@pytest.mark.parametrize(("share", "kept"), [(1.0, [0, 1, 2, 3]), (0.7, [0, 2, 3]), (0.5, [0, 2]), (0.1, [2])])
def test_training_rows_above_a_quantile_of_the_prompts_lengths_are_dropped(share: float, kept: list[int]) -> None:
    # Tokens with <s>: 3, 5, 2, 4. Quantiles of 2, 3, 4, 5, interpolated: 0.7 is 4.1, 0.5 is 3.5, 0.1 is 2.3.
    source = PromptSource.build(settings(1, shuffle=False, overlong_quantile=share), WORDS, LONG, rows(2))
    assert source.train.row_numbers.tolist() == kept
    assert (source.dropped, len(source.held_out)) == (4 - len(kept), 2)


def test_a_long_prompt_is_refused_with_row_and_length() -> None:
    with pytest.raises(DataError, match=r"dataset, row 1 .*the prompt has 5 tokens, more than rollout\.max_prompt_length \(3\)"):
        PromptSource.build(settings(1, limit=3, overlong="error"), WORDS, LONG)


def test_a_long_text_loses_its_start_and_keeps_its_special_tokens() -> None:
    source = PromptSource.build(settings(4, limit=3, overlong="shorten", shuffle=False), WORDS, LONG)
    batch = source.batch(0)
    assert batch.prompt_ids == [[1, 5, 6], [1, 9, 10], [1, 11], [1, 13, 14]]
    assert batch.prompts == [row["prompt"] for row in LONG]
    assert (source.dropped, source.shortened) == (0, 2)
    only_special = PromptSource.build(settings(1, limit=1, overlong="shorten"), WORDS, LONG[:1])
    assert only_special.batch(0).prompt_ids == [[1]]
    two = Tokenizer.wrap(word_tokenizer("w0 w1", "<s> <pad> $A"))
    with pytest.raises(DataError, match=r"row 0 .*special tokens alone are more"):
        PromptSource.build(settings(1, limit=1, overlong="shorten"), two, LONG[:1])


@pytest.mark.parametrize("merges", [(), (("a", "b"), ("ab", "a"), ("b", "a"), ("ba", "ba"))])
def test_a_long_conversation_loses_the_start_of_its_last_user_text_only(merges: tuple[tuple[str, str], ...]) -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(CHATML, merges))
    text = "abaabababaab baba abab " * 4
    earlier = [{"role": "system", "content": "s" * 9}, *user("first"), {"role": "assistant", "content": "yes"}]
    rest = len(tokenizer.encode_prompt([*earlier, *user("")], chat=True))
    ends = [text[start:] for start in (*tokenizer.token_starts(text), len(text))]
    for room in (0, 1, 2, 3, 10, 17, 31):
        source = PromptSource.build(
            settings(1, limit=rest + room, overlong="shorten"), tokenizer, [{"prompt": [*earlier, *user(text)]}]
        )
        batch = source.batch(0)
        # oracle: try every end of the text, the longest first
        fitting = (tokenizer.encode_prompt([*earlier, *user(end)], chat=True) for end in ends)
        assert batch.prompt_ids[0] == next(ids for ids in fitting if len(ids) <= rest + room)
        assert batch.prompts == [[*earlier, *user(text)]]
        assert source.shortened == 1
    with pytest.raises(DataError, match=rf"row 0 .*the rest of the conversation alone has {rest} tokens"):
        PromptSource.build(settings(1, limit=rest - 1, overlong="shorten"), tokenizer, [{"prompt": [*earlier, *user(text)]}])


def test_the_user_text_is_shortened_even_where_a_tool_spoke_last() -> None:
    messages = [*user("abcdef"), {"role": "tool", "content": "42"}]
    limit = len(CHAT.encode_prompt([*user("ef"), messages[1]], chat=True))
    batch = PromptSource.build(settings(1, limit=limit, overlong="shorten"), CHAT, [{"prompt": messages}]).batch(0)
    assert batch.prompt_ids == [CHAT.encode_prompt([*user("ef"), messages[1]], chat=True)]
    with pytest.raises(DataError, match="no user message to shorten"):
        PromptSource.build(settings(1, limit=5, overlong="shorten"), CHAT, [{"prompt": messages[1:]}])


def test_a_templated_text_is_shortened_inside_its_turn() -> None:
    limit = len(CHAT.encode_prompt("def", chat=True))
    batch = PromptSource.build(
        settings(1, limit=limit, chat_template=True, overlong="shorten"), CHAT, [{"prompt": "abcdef"}]
    ).batch(0)
    assert CHAT.hf.decode(batch.prompt_ids[0]) == "<|im_start|>user\ndef<|im_end|>\n<|im_start|>assistant\n"
    assert batch.prompts == ["abcdef"]


# bad rows and settings


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "there is no prompt; column prompt is null or left out"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty: it has no message"),
        (user(" "), "the prompt is empty: its last message has no text"),
        (5, "a prompt is a text or a list of messages, not 5"),
        (["hi"], r"message 0: expected \{\"role\": ..., \"content\": ...\}, not 'hi'"),
        ([{"role": "user"}], "message 0: there is no content; it has role"),
        ([*user("a"), {"from": "human", "value": "b"}], "message 1: there is no role; it has from, value"),
        ([{"role": "user", "content": ["x"]}], "message 0: content must be a text"),
        ([*user("a"), {"role": "assistant", "content": "b"}], "ends with the assistant's message"),
    ],
)
def test_a_bad_prompt_is_named_with_its_row(prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"dataset, row 1 \(counting from 0\).*" + message):
        PromptSource.build(settings(1), CHAT, [{"prompt": "fine"}, {"prompt": prompt}])


def test_a_row_without_the_prompt_column_is_named() -> None:
    with pytest.raises(DataError, match=r"row 2 .*column prompt is null or left out"):
        PromptSource.build(settings(1), WORDS, [{"prompt": "w1"}, {"prompt": "w2"}, {"promt": "w3"}])


def test_a_missing_column_is_named_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.prompt_column is 'prompt': dataset has no such column; did you mean prompts\? columns: prompts, answer",
    ):
        PromptSource.build(settings(1), WORDS, [{"prompts": "w1", "answer": 1}])
    with pytest.raises(ConfigError, match=r"no such column; columns: question, answer"):
        PromptSource.build(settings(1), WORDS, [{"question": "w1", "answer": 1}])


def test_a_conversation_without_a_chat_template_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1 .*the model's tokenizer has no chat template; use an instruct model"):
        PromptSource.build(settings(1), BASE, [{"prompt": "a"}, {"prompt": user("b")}])


def test_a_template_that_refuses_is_quoted_with_the_row() -> None:
    with pytest.raises(DataError, match=r"row 0 .*refuses the conversation: System role not supported"):
        PromptSource.build(settings(1, system_prompt="s"), Tokenizer.wrap(byte_tokenizer(NO_SYSTEM)), [{"prompt": "a"}])


def test_two_system_messages_and_a_template_turned_off_are_refused() -> None:
    system = [{"role": "system", "content": "own"}, *user("a")]
    with pytest.raises(DataError, match=r"row 0 .*system message of its own"):
        PromptSource.build(settings(1, system_prompt="s"), CHAT, [{"prompt": system}])
    with pytest.raises(DataError, match=r"row 0 .*data\.chat_template is false"):
        PromptSource.build(settings(1, chat_template=False), CHAT, [{"prompt": user("a")}])


@pytest.mark.parametrize(
    ("tokenizer", "data", "message"),
    [
        (None, {}, r"model\.path is null: the model has no tokenizer"),
        (BASE, {"system_prompt": "s"}, r"data\.system_prompt is 's': the model's tokenizer has no chat template"),
        (BASE, {"chat_template": True}, r"data\.chat_template is true: the model's tokenizer has no chat template"),
        (BASE, {"template_arguments": {"x": 1}}, r"data\.template_arguments is .*no chat template"),
        (CHAT, {"system_prompt": "s", "chat_template": False}, r"data\.chat_template is false: data\.system_prompt needs"),
        (CHAT, {"template_arguments": {"tokenize": True}}, r"data\.template_arguments is .*tokenize cannot be set"),
    ],
)
def test_settings_that_the_tokenizer_cannot_serve_are_refused(
    tokenizer: Tokenizer | None, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSource.build(settings(1, **data), tokenizer, [{"prompt": "a"}])


def test_the_bar_appears_only_where_tokenising_takes_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("grpo_jax.data.examples.PATIENCE_SECONDS", -1.0)
    assert list(with_bar(300, "Tokenising rows", quiet=True)) == list(range(300))
    assert capfd.readouterr().err == ""
    assert list(with_bar(300, "Tokenising rows", quiet=False)) == list(range(300))
    assert "Tokenising rows" in capfd.readouterr().err
    monkeypatch.setattr("grpo_jax.data.examples.PATIENCE_SECONDS", 60.0)
    assert list(with_bar(300, "Tokenising rows", quiet=False)) == list(range(300))
    assert capfd.readouterr().err == ""


def test_gsm8k_gives_prompts_and_answers(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared_data / "stories260k")
    config = settings(4, limit=160, path=str(shared_data / "gsm8k"), prompt_column="question", eval_split="test", eval_size=16)
    source = PromptSource.build(config, tokenizer)
    assert len(source.train) + source.dropped == 7473
    assert 0 < source.dropped < 7473
    assert len(source.held_out) == 16
    batch = source.batch(0)
    assert all(0 < len(ids) <= 160 and ids[0] == 1 for ids in batch.prompt_ids)
    assert all("####" in answer for answer in batch.columns["answer"])
