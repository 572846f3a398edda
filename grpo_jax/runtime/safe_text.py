"""Makes text that a model wrote safe to print on a terminal.

Every control character is spelled out, so that a completion can neither move the cursor, set colours or the window's title, nor
change the reading direction of the text around it. Markup of the printing library is not handled: pass the result as plain text
(`rich.text.Text`), never as markup.
"""

from __future__ import annotations

import re

# DEL, controls of Latin-1, line and paragraph separators, direction marks and overrides, and lone surrogates, which no output
# encodes. The patterns below add the controls of ASCII.
NON_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL = re.compile(f"[\x00-\x08\x0b-\x1f{NON_ASCII}]")
CONTROL_OR_BREAK = re.compile(f"[\x00-\x1f{NON_ASCII}]")


def safe_text(text: str, one_line: bool = False) -> str:
    r"""Spells out control characters as Python would: ESC becomes `\x1b`.

    Args:
        text: Any text.
        one_line: Spell out line breaks and tabs too, for a cell of a table.

    Returns:
        The text with printable characters only, apart from line breaks and tabs unless `one_line`.
    """
    pattern = CONTROL_OR_BREAK if one_line else CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
