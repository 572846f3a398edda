"""Stop strings: a completion has the fewest tokens whose text contains one, whatever the segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from plain_oracles import quick_compiling
from rollouts import Task, assert_same, engine, plain
from scripted_segments import STOP_ID, scripted
from tiny_tokenizers import byte_tokenizer

from grpo_jax.config import RolloutConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.types import Rollout

DecodeText = Callable[[list[int]], str]
TOKENIZER = Tokenizer.wrap(byte_tokenizer(merges=(("l", "o"), ("w", "o"), ("wo", "r"))))
decode, encode = TOKENIZER.decode, TOKENIZER.encode_text


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def expected_row(ids: Sequence[int], strings: Sequence[str], decode_text: DecodeText) -> tuple[list[int], str]:
    """Returns the expected tokens of a row and its finish reason, by trying every length."""
    for count in range(1, len(ids) + 1):
        if ids[count - 1] == STOP_ID or any(string in decode_text(list(ids[:count])) for string in strings):
            return list(ids[:count]), "stop"
    return list(ids), "length"


def check(script: Sequence[Sequence[int]], strings: Sequence[str], decode_text: DecodeText, generations: int = 1) -> Rollout:
    """Compares several segment lengths and slots with `expected_row`; returns the last rollout."""
    longest = max(map(len, script))
    script = [[*row, *[STOP_ID] * (longest - len(row))] for row in script]
    prompts = [[7]] * (len(script) // generations)
    for number, (segment, slots) in enumerate(((None, None), (1, None), (2, 2), (3, 1), (8, 3), (8, None), (40, 2))):
        settings = RolloutConfig(
            num_generations=generations,
            max_completion_length=longest,
            stop=list(strings),
            segment=segment,
            slots=slots,
            dispatch_ahead=number % 2 == 1,
        )
        got = scripted(script, generations, decode_text).sample({}, prompts, settings, seed=0)
        for row, script_ids in enumerate(script):
            ids, reason = expected_row(script_ids, strings, decode_text)
            assert (got.completion_ids[row], got.finish_reasons[row]) == (ids, reason), f"segment {segment}, slots {slots}"
            # Token and position determine the log-probability, so that a shift would be seen.
            np.testing.assert_array_equal(got.logprobs[row], -np.array(ids) - np.arange(len(ids)) / 64)
    return got


TEXT = "Hello world ### more"


@pytest.mark.parametrize(
    ("strings", "expected"),
    [
        (["###"], "Hello world ###"),  # three tokens
        (["d #"], "Hello world #"),
        (["o wor"], "Hello wor"),  # ends inside no token, begins inside one
        (["w"], "Hello wor"),  # the token that contains it is not cut
        (["H"], "H"),  # the very first token
        (["# m", "ld", "zzz"], "Hello world"),  # the first of several
        (["world", "worl"], "Hello worl"),
        (["e", "Hello world ### more"], "He"),
        ([TEXT], TEXT),
        (["?", "hello"], TEXT),  # none
    ],
)
def test_a_completion_has_the_fewest_tokens_whose_text_contains_the_string(strings: list[str], expected: str) -> None:
    got = check([encode(TEXT)], strings, decode)
    assert decode(got.completion_ids[0]) == expected
    assert len(got.completion_ids[0]) == len(got.logprobs[0]) == len(encode(expected))


def test_characters_of_several_tokens() -> None:
    text = "naïve 😀😁 – ok"
    assert len(encode("😀")) == 4
    for string in ("ï", "😀", "😁", "😀😁", "😁 –", "ok", "n", "?"):
        check([encode(text)], [string], decode)


def test_tokens_without_text_lie_between() -> None:
    """Special tokens, and ids of a padded embedding, have no text, however many there are."""
    pad = [0, 300]
    a, b = encode("a"), encode("b")
    assert decode([*a, *pad, *b]) == "ab"
    check([[*a, *pad * 20, *b, *a], [*pad * 20, *a, *b, *a], [*a, *pad, *b, *b]], ["ab"], decode)


def by_runs(ids: list[int]) -> str:
    """Decodes ids as tokenizers with byte fallback do: ids 0 to 255 are bytes; an invalid run of bytes is all �."""
    out, run = "", b""
    for token in [*ids, -1]:
        if 0 <= token < 256:
            run += bytes([token])
            continue
        try:
            out += run.decode()
        except UnicodeDecodeError:
            out += "�" * len(run)
        out, run = out + (chr(token) if token > 0 else ""), b""
    return out


def test_a_string_that_later_bytes_hide_for_a_while() -> None:
    """Llama 2 has a line break as a byte; a character of four bytes after it is invalid until it is complete."""
    letters = [ord(c) + 256 for c in "ab"]
    face = list("😀".encode())
    assert by_runs([*letters, 10, *face]).endswith("\n😀")
    assert by_runs([10, *face[:2]]) == "���"
    check([[*letters, 10, *face, *letters], [10, *face, 10, *face], [*face, *letters, 10]], ["\n"], by_runs)
    check([[*letters, *face, *face, 10, *letters], [*face * 5, 10, *face], [*face * 3, 10, *face[:2], *letters]], ["\n"], by_runs)
    check([[*letters, 10, *face, *face, *letters]], ["😀😀"], by_runs)
    check([[*letters, *face[1:], *face[:1], 10, *face * 2, 300, 10]], ["😀,", "\n"], by_runs)


@pytest.mark.parametrize("seed", range(4))
def test_random_texts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [encode(c)[0] for c in "aab "] + encode("é") + encode("lo") + [0, 1]
    script = [[*rng.choice(pieces, 24).tolist()] for _ in range(6)]
    strings = ["".join(rng.choice(list("ab élo"), rng.integers(1, 5))) for _ in range(3)]
    check(script, strings, decode, generations=2)
    pieces = [10, 10, *"é".encode(), *"😀".encode(), ord("a") + 256, ord("b") + 256]
    script = [[*rng.choice(pieces, 24).tolist()] for _ in range(6)]
    strings = ["".join(rng.choice(list("\nabé"), rng.integers(1, 4))) for _ in range(2)]
    check(script, strings, by_runs, generations=2)


def test_a_stop_token_and_a_string_in_one_segment() -> None:
    check([[*encode("ab"), STOP_ID, *encode("cd")], [*encode("abcd"), STOP_ID]], ["cd"], decode)


def letters(ids: list[int]) -> str:
    """Decodes ids to eight letters, and every ninth id to nothing."""
    return "".join("abcdefgh "[i % 9].strip() for i in ids)


def test_the_engine_cuts_tokens_and_log_probabilities() -> None:
    settings = RolloutConfig(num_generations=3, max_completion_length=20, temperature=0.7, stop=["ab", "fh", "hd", "ea"])
    task = Task("llama2", settings, stops=(2, 5, 60), decode_text=letters)
    expected = plain(task)
    assert set(expected.finish_reasons) == {"stop", "length"}
    ends = [letters(ids)[-2:] in settings.stop for ids in expected.completion_ids]
    assert 3 <= sum(ends) < 9
    for segment, slots in ((3, 4), (None, None)):
        other = task.but(segment=segment, slots=slots)
        assert_same(other, engine(other, stacked=True), expected)
        assert_same(other, engine(other.but(refill=False), stacked=True), expected)


def test_without_strings_nothing_is_decoded() -> None:
    def refuse(_: list[int]) -> str:
        raise AssertionError

    script = [encode(TEXT)]
    got = scripted(script, 1, refuse).sample(
        {}, [[7]], RolloutConfig(num_generations=1, max_completion_length=len(script[0])), seed=0
    )
    assert got.completion_ids == script
    assert got.finish_reasons == ["length"]
    assert dataclasses.asdict(got)["near_ties"] == 0
