"""Strategies of hypothesis: hostile values, JSON with one value replaced, bytes with some flipped or cut."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st


def deep() -> Any:
    """A list 300 levels deep."""
    made: Any = []
    for _ in range(300):
        made = [made]
    return made


NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    -5,
    2**31,
    2**32 + 5,
    2**63,
    10**9,
    10**12,
    10**30,
    0.5,
    -0.0,
    1e38,
    1e308,
    1e-320,
    float("inf"),
    float("nan"),
]
TEXTS = ["", "\x00", "\ud800", "\u202e", "\x1b[2J", "../x", "/etc/passwd", "a" * 300, "{{", "<s>", "null", "1e999", "é", "0"]

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(TEXTS), st.text(max_size=8)
)
values = st.one_of(
    scalars,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
    ),
    st.builds(deep),
)
"""What JSON and YAML can hold where something else is expected."""


@st.composite
def changed_json(draw: st.DrawFn, document: Any) -> Any:
    """A copy of a document of lists and dicts in which up to three values are replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            if action == "remove":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(st.text(max_size=6))] = draw(values)
            else:
                place[key] = draw(values)
            break
    return document


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are replaced, or which are cut or repeated."""
    raw = bytearray(content)
    for position, byte in draw(st.lists(st.tuples(st.integers(0, max(len(raw) - 1, 0)), st.integers(0, 255)), max_size=4)):
        if raw:
            raw[position] = byte
    cut = draw(st.one_of(st.none(), st.integers(0, len(raw))))
    if cut is not None:
        del raw[cut:]
    return bytes(raw) + draw(st.sampled_from([b"", b"", b"\x00", b"\xff\xfe", b"[" * 2000]))


def as_json(value: Any) -> bytes:
    """JSON with NaN, infinity as 1e999, and lone surrogates as escapes."""
    return json.dumps(value).replace("Infinity", "1e999").encode()


@st.composite
def json_files(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON file made of a good one: values replaced, or bytes."""
    if draw(st.integers(0, 4)):
        return as_json(draw(changed_json(document)))
    return draw(changed_bytes(as_json(document)))
