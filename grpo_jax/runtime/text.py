"""Text that a model wrote, made safe to print.

Enters: any text. Leaves: the same text with every character that steers a terminal spelled out, so that a completion can neither
move the cursor, set colours or the window's title, nor turn its neighbours' reading direction. Markup of the printing library is
another matter: hand it the result as plain text (`rich.text.Text`), never as markup.
"""

from __future__ import annotations

import re

# DEL, controls of Latin-1, line and paragraph separators, direction marks and overrides, and lone surrogates, which no output
# encodes; the controls of ASCII come before them below.
OTHERS = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
STEERING = re.compile(f"[\x00-\x08\x0b-\x1f{OTHERS}]")
STEERING_OR_BREAK = re.compile(f"[\x00-\x1f{OTHERS}]")


def safe_text(text: str, one_line: bool = False) -> str:
    r"""Spells out control characters as Python would: ESC becomes `\x1b`.

    Args:
        text: Anything.
        one_line: Spell out line breaks and tabs too, for a cell of a table.

    Returns:
        Text of printable characters, and of line breaks and tabs unless `one_line`.
    """
    pattern = STEERING_OR_BREAK if one_line else STEERING
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
