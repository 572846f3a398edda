"""The process that renders chat templates: `python template_worker.py`, started by `templates.py`; it imports jinja2 only.

A chat template is a program from a model's folder. jinja2's sandbox keeps it from Python's internals, but not from looping or
allocating without end. Here the kernel does: the process has a limit of memory, and one of processor time for each rendering, which
ends it also inside a single long operation such as 9 ** 9 ** 9.

Requests and replies have a length of 8 bytes in front. A request is marshalled: (template, variables, seconds). A reply is one
byte, `t` for text or `e` for an error's message, and UTF-8. The environment is that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

HEADER = struct.Struct("<Q")
CACHED_TEMPLATES = 16


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:  # so that `namespace(self=1)` works
        values = dict(*args[1:], **named)
        for name in values:
            check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class Dict:
    """`dict()` and `dict.fromkeys()`, without the other attributes of Python's class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As Python's."""
        return dict.fromkeys(*args)


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's text, renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Makes a block of the statements inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


def check_name(name: Any) -> None:
    """Raises SecurityError for a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute {name!r}")


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """The local time."""
    return datetime.now().strftime(form)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment of chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace)
    return made


def read(stream: BinaryIO) -> Any:
    """Reads a request; ends the process where the trainer has closed the pipe."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        sys.exit(0)
    return marshal.loads(stream.read(HEADER.unpack(header)[0]))


def main(memory_bytes: int, most_characters: int) -> None:
    """Answers requests until the trainer closes the pipe.

    Args:
        memory_bytes: limit of the process.
        most_characters: length of the longest text.
    """
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(limit, (value, value))
    # A trainer that ignores or blocks SIGPROF, as it does after a profile, hands that down.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    environ, compiled = environment(), dict[str, Any]()
    while True:
        template, variables, seconds = read(requests)
        # After that much processor time SIGPROF, which nobody handles, ends the process.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if template not in compiled:
                if len(compiled) >= CACHED_TEMPLATES:
                    compiled.clear()
                compiled[template] = environ.from_string(template)
            text = compiled[template].render(**variables)
            if len(text) > most_characters:
                raise jinja2.TemplateError(f"it makes {len(text):,} characters, and {most_characters:,} are the most")
            reply = b"t" + text.encode("utf-8", "surrogatepass")
        except MemoryError:
            reply = b"e" + b"it needs more than %d MB of memory" % (memory_bytes // 10**6)
        except Exception as error:
            said = f"{error}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            reply = b"e" + said[:1000].encode("utf-8", "backslashreplace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(HEADER.pack(len(reply)) + reply)
        replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
