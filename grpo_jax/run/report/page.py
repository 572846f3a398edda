"""Builds a page: one HTML file with its styles, scripts and data, which needs no network.

The data are JSON, compressed and in base64, so no text of a model is part of the markup. The page's content security policy allows
the script and the style with their digests and nothing else: not even a mistake in the script could run code of a completion.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from grpo_jax.runtime.safe_text import safe_text

ASSETS = Path(__file__).parent / "assets"
SHARED_SCRIPTS = ("text.js", "chart.js", "panels.js")
RUN_SCRIPTS = (*SHARED_SCRIPTS, "completions.js", "run.js")
COMPARE_SCRIPTS = (*SHARED_SCRIPTS, "compare.js")


def page(title: str, scripts: Sequence[str], data: Any, *, live: bool = False) -> str:
    """Builds a page.

    Args:
        title: of the window; any text.
        scripts: names in `assets`, in their order.
        data: what JSON can hold.
        live: the page asks the server that it came from for data.
    """
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in scripts)
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    return Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        policy=html.escape(policy(script, style, live=live)),
        title=html.escape(safe_text(title, one_line=True)),
        style=style,
        script=script,
        data=packed(data),
    )


def policy(script: str, style: str, *, live: bool) -> str:
    """The content security policy of a page with one script and one style."""
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    """A digest as a content security policy has it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def packed(data: Any) -> str:
    """JSON, compressed and in base64. The same data give the same text."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: lone surrogates are escapes
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
