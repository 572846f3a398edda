"""Chooses the format in which a model writes tool calls: by name, by the chat template, or by a pattern of the user's."""

from __future__ import annotations

from grpo_jax.config.checks import ConfigError, show
from grpo_jax.environments.calls import BadCall, Calls, ToolFormat, call_of, read_json
from grpo_jax.environments.formats import FORMATS

PATTERN_SECONDS = 1.0
"""Limit of a user's pattern on one text."""

MARKS = {
    "<function=": "qwen_xml",
    "<arg_key>": "glm",
    "<|tool_list_start|>": "lfm2",
    "<|tool_call_start|>": "lfm2",
    "[TOOL_CALLS]": "mistral",
    "to=functions.": "harmony",
    "<|channel|>commentary": "harmony",
    "<|tool_call>": "gemma4",
    "<|tool|>": "phi",
    "<|tool_call|>": "granite",
    "<|observation|>": "glm",
    "<tool_call>": "hermes",
    "tool_code": "gemma",
    "<|python_tag|>": "llama",
    '"parameters":': "llama",
}
"""What a chat template has that shows a format; the first that is there counts, since later ones occur in other formats too."""


def matching(pattern: str) -> ToolFormat:
    """The format of a user's regular expression, which has groups named `name` and `arguments`.

    Raises:
        ConfigError: it is no regular expression, or lacks a group.
    """
    import regex  # transformers needs it too; unlike re, it has a time limit

    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"environment.tool_pattern is {show(pattern)}: it is no regular expression: {error}") from None
    missing = {"name", "arguments"} - set(compiled.groupindex)
    if missing:
        fix = f"write the groups (?P<name>...) and (?P<arguments>...); {', '.join(sorted(missing))} is missing"
        raise ConfigError(f"environment.tool_pattern is {show(pattern)}: {fix}")

    def calls(text: str) -> Calls:
        found: Calls = []
        try:
            for match in compiled.finditer(text, timeout=PATTERN_SECONDS, concurrent=True):
                arguments = read_json(match["arguments"] or "{}")
                found.append(arguments if isinstance(arguments, BadCall) else call_of(match["name"], arguments))
        except TimeoutError:
            return [BadCall("the text of the call takes too long to read")]
        return found

    return calls


def find_format(name: str, pattern: str | None, template: str | None) -> ToolFormat:
    """Finds the format in which a model writes calls.

    Args:
        name: environment.tool_format.
        pattern: environment.tool_pattern.
        template: the chat template's source, which `auto` looks at; None where there is none.

    Raises:
        ConfigError: the template shows no known format, or the pattern cannot be used.
    """
    if pattern is not None:
        return matching(pattern)
    if name != "auto":
        return FORMATS[name]
    for mark, found in MARKS.items():
        if mark in (template or ""):
            return FORMATS[found]
    shown = "the chat template shows no known format of calls" if template else "the model has no chat template"
    raise ConfigError(
        f"environment.tool_format is auto: {shown}; set it to {', '.join(FORMATS)}, or to pattern with a tool_pattern"
    )
