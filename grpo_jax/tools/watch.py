"""Shows the report of a run in a browser while the run goes on: `grpo-jax watch`.

A server of the standard library on 127.0.0.1 answers three addresses: the page, the points of the curves that are new, and the
completions of a step. Each question reads only what the run has written since the last one. Nothing is written, no address names
a file, and a request whose Host header is not this server's is refused, so that a web page elsewhere cannot read the run through
the visitor's browser (DNS rebinding).
"""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from grpo_jax.config import ConfigError
from grpo_jax.run.report.content import counts, evaluations, group_size, head, settings_of, step_completions
from grpo_jax.run.report.page import RUN_SCRIPTS, page
from grpo_jax.run.report.reading import RunReader
from grpo_jax.run.report.sampling import choose_completions, curves
from grpo_jax.runtime.safe_text import safe_text

ADDRESS = "127.0.0.1"
IDLE_SECONDS = 30
"""A connection that says nothing for so long is closed."""

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def watch(run_dir: str, port: int = 0) -> None:
    """Serves a run until Ctrl-C.

    Args:
        run_dir: the run folder.
        port: on 127.0.0.1; 0 takes a free one.

    Raises:
        RunFolderError: the folder holds no run.
        ConfigError: the port is taken or not allowed.
    """
    with server(run_dir, port) as made:
        print(
            f"{safe_text(run_dir, one_line=True)} is shown at http://{ADDRESS}:{made.server_port}/ (Ctrl-C ends this)", flush=True
        )
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print()


def server(run_dir: str, port: int = 0) -> WatchServer:
    """Makes the server of a run, bound to its port; `serve_forever` starts it. Errors are those of `watch`."""
    watched = WatchedRun(RunReader.open(run_dir))
    try:
        return WatchServer((ADDRESS, port), watched)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(
            f"--port is {port}: {os.strerror(error.errno)}; use another one, or leave it out for a free one"
        ) from error


@dataclass
class WatchedRun:
    """What the pages of a run are told. Threads of the server take turns."""

    reader: RunReader
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: Any = None
    _version: int = 0

    def news(self, generation: int, version: int, every: int, start: int) -> dict[str, Any]:
        """What is new for a page.

        Args:
            generation: of the files that the page knows, as in `RunReader`; -1 for none.
            version: of what the page shows; -1 for none.
            every: steps of a point of the page's curves.
            start: number of points that the page need not get again; the last one may have changed.

        Returns:
            `changed` false where nothing is new; else as `content.page_data`, with the curves `from` a point on, and without
            completions but with `chosen`, the steps whose completions the page asks for.
        """
        with self._lock:
            self.reader.refresh()
            settings = settings_of(self.reader)
            shown = head(self.reader, settings)
            rows = sum(map(len, self.reader.completions.values()))
            state = (self.reader.generation, len(self.reader.metrics), len(self.reader.evaluations), rows, shown)
            if state != self._seen:
                self._seen, self._version = state, self._version + 1
            if version == self._version and generation == self.reader.generation:
                return {"changed": False}
            made = curves(self.reader.metrics)
            goes_on = generation == self.reader.generation and every == made["every"] and 0 <= start <= len(made["steps"])
            first = start if goes_on else 0
            completions = self.reader.finished_completions()
            choice = choose_completions(completions, group_size(settings))
            values = {name: column[first:] for name, column in made["values"].items()}
            return {
                "changed": True,
                "generation": self.reader.generation,
                "version": self._version,
                "from": first,
                "head": shown,
                "curves": {"every": made["every"], "steps": made["steps"][first:], "values": values},
                "evaluations": evaluations(self.reader),
                "chosen": list(choice.rows),
                "counts": counts(completions, choice),
            }

    def completions(self, step: int) -> dict[str, Any] | None:
        """The completions of a step that the page shows; None where there is none."""
        with self._lock:
            settings = settings_of(self.reader)
            choice = choose_completions(self.reader.finished_completions(), group_size(settings))
            return step_completions(self.reader, settings, step, choice) if step in choice.rows else None


class WatchServer(ThreadingHTTPServer):
    """The server of one run.

    Args:
        address: host and port.
        watched: what is served.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], watched: WatchedRun) -> None:
        super().__init__(address, Handler)
        self.watched = watched
        self.page = page(f"{watched.reader.path} · grpo-jax", RUN_SCRIPTS, {"live": True}, live=True).encode()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: WatchServer
    timeout = IDLE_SECONDS
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "grpo-jax", ""

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers its own pages only\n")
        address = urlsplit(self.path)
        words = {name: values[-1] for name, values in parse_qs(address.query).items()}
        if address.path == "/":
            return self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        try:
            if address.path == "/data":
                numbers = (whole(words, name) for name in ("generation", "version", "every", "from"))
                return self._json(self.server.watched.news(*numbers))
            if address.path == "/completions":
                found = self.server.watched.completions(whole(words, "step"))
                if found is not None:
                    return self._json(found)
        except ValueError:
            return self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"a number is missing, or is none\n")
        return self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, value: Any) -> None:
        self._answer(HTTPStatus.OK, "application/json", json.dumps(value, allow_nan=False).encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page asks every two seconds."""


def whole(words: dict[str, str], name: str) -> int:
    """A whole number of at most 15 digits among the words of a question; ValueError where there is none."""
    text = words.get(name, "")
    if len(text) > 15:
        raise ValueError(f"{name} is too long")
    return int(text)
