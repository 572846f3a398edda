"""The formats in which the families of models write tool calls.

Each takes the text of a turn, special tokens included, and returns its calls in order. As in `calls.py`, nothing raises, and
nothing takes more than linear time.
"""

from __future__ import annotations

import json
import re

from grpo_jax.environments.calls import (
    BadCall,
    Calls,
    ToolCall,
    ToolFormat,
    block_calls,
    call_of,
    json_calls,
    python_calls,
    read_json,
)

PYTHON_TAG = "<|python_tag|>"

NAME = re.compile(r"[A-Za-z_][\w.-]{0,255}")
"""A tool's name, at the beginning of a text."""

RECIPIENT = re.compile(r"to=([^\s<]{1,256})")
"""Whom a message of the harmony format is for, in its header."""

HARMONY_END = re.compile(r"<\|(?:end|call|return)\|>")

BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w.-]{0,255})\s*:")
"""A key without quotes behind a brace or a comma."""


def hermes(text: str) -> Calls:
    """Calls of Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4: JSON, or a list of it, between <tool_call> and </tool_call>."""
    return block_calls(text, "<tool_call>", "</tool_call>", lambda block: json_calls(block, "arguments"))


def llama(text: str) -> Calls:
    """Calls of Llama 3: the whole turn is JSON with name and parameters, several separated by ";", or `name.call(key=value)`."""
    body = text.strip()
    tagged = body.startswith(PYTHON_TAG)
    body = body.removeprefix(PYTHON_TAG).strip()
    if tagged and not body.startswith("{"):
        return python_calls(body)
    if not body.startswith("{") or not (tagged or '"name"' in body):
        return []
    calls: Calls = []
    decoder = json.JSONDecoder()
    while body:
        try:
            _, end = decoder.raw_decode(body)
        except (ValueError, RecursionError):
            return [*calls, *json_calls(body, "parameters")]
        calls += json_calls(body[:end], "parameters")
        body = body[end:].lstrip().removeprefix(";").lstrip()
        if body and not body.startswith("{"):
            return [*calls, BadCall("there is text after the call")]
    return calls


def gemma(text: str) -> Calls:
    """Calls of Gemma 3: Python calls in a block that begins with ```tool_code."""
    return block_calls(text, "```tool_code", "```", python_calls)


def gemma4(text: str) -> Calls:
    """Calls of Gemma 4: <|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|>, with keys without quotes."""

    def read(block: str) -> Calls:
        name, brace, _ = block.strip().removeprefix("call:").partition("{")
        if not brace or not NAME.fullmatch(name.strip()):
            return [BadCall("a call is call:NAME{key:value}")]
        # Every second piece is a text, and needs no reading.
        pieces = block[block.index("{") :].split('<|"|>')
        pieces[::2] = [BARE_KEY.sub(r'\1"\2":', piece) for piece in pieces[::2]]
        pieces[1::2] = [json.dumps(piece) for piece in pieces[1::2]]
        arguments = read_json("".join(pieces))
        return [arguments if isinstance(arguments, BadCall) else call_of(name, arguments)]

    return block_calls(text, "<|tool_call>", "<tool_call|>", read)


def harmony(text: str) -> Calls:
    """Calls of gpt-oss: messages to a function, <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>.

    A turn may have several messages, and the recipient may stand before the channel. Other messages are thoughts and answers.
    """
    calls: Calls = []
    for message in text.split("<|start|>"):
        header, found, body = message.partition("<|message|>")
        recipient = RECIPIENT.search(header)
        if recipient is None or recipient[1] in ("user", "assistant", "all"):
            continue
        if not found:
            calls.append(BadCall("the call has no <|message|>"))
            continue
        arguments = read_json(HARMONY_END.split(body, maxsplit=1)[0].strip() or "{}")
        name = recipient[1].removeprefix("functions.")
        calls.append(arguments if isinstance(arguments, BadCall) else call_of(name, arguments))
    return calls


def mistral(text: str) -> Calls:
    """Calls of Mistral behind [TOOL_CALLS]: a JSON list, or, each behind its own, NAME[ARGS]{...}, as in Ministral 3."""
    calls: Calls = []
    for piece in text.split("[TOOL_CALLS]")[1:]:
        body = piece.strip()
        name = NAME.match(body)
        if name is None:
            calls += json_calls(body, "arguments")
            continue
        rest = body[name.end() :]
        if rest.startswith("[CALL_ID]"):
            rest = rest.partition("[ARGS]")[2]
        arguments = read_json(rest.removeprefix("[ARGS]").strip() or "{}")
        calls.append(arguments if isinstance(arguments, BadCall) else call_of(name[0], arguments))
    return calls


def qwen_xml(text: str) -> Calls:
    """Calls of Qwen3-Coder, Qwen3.5 and 3.6: <function=NAME><parameter=KEY>value</parameter></function>; values are texts."""
    calls: Calls = []
    for piece in text.split("<function=")[1:]:
        name, named, body = piece.partition(">")
        body, closed, _ = body.partition("</function>")
        if not named or not closed or not NAME.fullmatch(name.strip()):
            calls.append(BadCall("a call is <function=NAME><parameter=KEY>value</parameter></function>"))
            continue
        calls.append(text_call(name, body, ("<parameter=", ">", "</parameter>")))
    if not calls and "<tool_call>" in text:
        return [BadCall("write <function=NAME> ... </function> between <tool_call> and </tool_call>")]
    return calls


def glm(text: str) -> Calls:
    """Calls of GLM: <tool_call>NAME<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>; values are texts.

    GLM-4-0414 writes the name in one line and a JSON object behind it.
    """
    if "<tool_call>" in text:
        return block_calls(text, "<tool_call>", "</tool_call>", _glm_call)
    calls: Calls = []
    for turn in text.split("<|assistant|>"):
        name, _, body = turn.strip().partition("\n")
        if NAME.fullmatch(name.strip()) and body.lstrip().startswith("{"):
            arguments = read_json(body)
            calls.append(arguments if isinstance(arguments, BadCall) else call_of(name, arguments))
    return calls


def _glm_call(block: str) -> Calls:
    """The call of one block."""
    name, key, rest = block.partition("<arg_key>")
    if not NAME.fullmatch(name.strip()):
        return [BadCall("a call is <tool_call>NAME<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>")]
    return [text_call(name, key + rest, ("<arg_key>", "</arg_key>", "</arg_value>"), "<arg_value>")]


def text_call(name: str, body: str, marks: tuple[str, str, str], before_value: str = "") -> ToolCall | BadCall:
    """A call whose arguments are marked texts.

    Args:
        marks: what stands before a key, behind it, and behind its value.
        before_value: what stands before a value.
    """
    arguments: dict[str, str] = {}
    for piece in body.split(marks[0])[1:]:
        key, has_key, rest = piece.partition(marks[1])
        if before_value:
            _, has_value, rest = rest.partition(before_value)
            has_key = has_key and has_value
        value, has_end, _ = rest.partition(marks[2])
        if not has_key or not has_end:
            return BadCall(f"an argument of {name.strip()} has no {marks[2]} at its end")
        arguments[key.strip()] = value.removeprefix("\n").removesuffix("\n")
    return ToolCall(name.strip(), dict(arguments), texts=True)


def lfm2(text: str) -> Calls:
    """Calls of LFM2: a list of Python calls, or JSON, between <|tool_call_start|> and <|tool_call_end|>."""

    def read(block: str) -> Calls:
        body = block.strip()
        return json_calls(body, "arguments") if body.startswith(("{", "[{")) else python_calls(body)

    return block_calls(text, "<|tool_call_start|>", "<|tool_call_end|>", read)


def code(text: str) -> Calls:
    """Calls of SmolLM3 with `python_tools`: Python calls between <code> and </code>."""
    return block_calls(text, "<code>", "</code>", python_calls)


def granite(text: str) -> Calls:
    """Calls of Granite 3: a JSON list behind <|tool_call|> or <tool_call>, to the end or to the mark that closes it."""
    calls: Calls = []
    for piece in re.split(r"<\|tool_call\|>|<tool_call>", text)[1:]:
        calls += json_calls(re.split(r"<\|/tool_call\|>|</tool_call>", piece, maxsplit=1)[0].strip(), "arguments")
    return calls


def phi(text: str) -> Calls:
    """Calls of Phi-4-mini: a JSON list behind functools, or between <|tool_call|> and <|/tool_call|>."""
    _, found, body = text.partition("functools[")
    return json_calls(f"[{body.strip()}", "arguments") if found else granite(text)


FORMATS: dict[str, ToolFormat] = {
    "hermes": hermes,
    "llama": llama,
    "gemma": gemma,
    "gemma4": gemma4,
    "harmony": harmony,
    "mistral": mistral,
    "qwen_xml": qwen_xml,
    "glm": glm,
    "lfm2": lfm2,
    "code": code,
    "granite": granite,
    "phi": phi,
}
"""The formats by the name that environment.tool_format gives."""
