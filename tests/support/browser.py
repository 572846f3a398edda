"""Drives a headless Chromium through its DevTools protocol, over a pair of pipes: no driver and no websocket is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The browser; None where there is none."""

START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""A program that becomes the browser, with the pipes where it looks for them."""

LIMIT_SECONDS = 120.0
"""Longest wait for an answer or a condition: only a browser that hangs reaches it."""


class Browser:
    """A browser with one tab.

    Args:
        profile: an empty folder for the browser's files.

    Attributes:
        problems: what the console said that was no plain log, uncaught errors and violations of the content security policy.
        requests: addresses that the tab asked for.
    """

    def __init__(self, profile: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._sent = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._unread = b""
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        options = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--disable-extensions",
        )
        browser = [str(CHROMIUM), *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # The browser reads commands from file 3 and writes answers to file 4.
        words = [sys.executable, "-c", START, str(commands), str(events), *browser]
        self._process = subprocess.Popen(
            words, pass_fds=(commands, events), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(events)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        number = self._sent
        self._read_until(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while not done():
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._events], [], [], left)[0]:
                raise TimeoutError(f"no answer of the browser in {LIMIT_SECONDS:.0f} s")
            read = os.read(self._events, 1 << 20)
            if not read:
                raise ConnectionError(f"the browser has ended, status {self._process.wait()}")
            *messages, self._unread = (self._unread + read).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, said = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(said["exceptionDetails"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] != "info":
            self.problems.append(f"{said['entry']['source']}: {said['entry']['text']}")
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(said["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    def open(self, address: str, width: int = 1280, *, dark: bool = False) -> None:
        """Opens a page in a window of a width in pixels; a narrow one is a phone."""
        self.problems.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.call("Page.navigate", url="about:blank")  # else another fragment of the same address would not load the page anew
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """The value of an expression in the page, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true in the page."""
        self.until(lambda: self.value(f"Boolean({expression})"), expression)

    def until(self, done: Callable[[], bool], what: str = "it") -> None:
        """Waits until something is true, and takes up what the page says meanwhile."""
        end = time.monotonic() + LIMIT_SECONDS
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"{what} is still false; the console said {self.problems}")
            time.sleep(0.05)
            self.value("0")

    def type(self, selector: str, text: str) -> None:
        """Types into a field, in place of what it has."""
        self.value(f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.focus(); field.select(); }})()")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Writes a screenshot as PNG, of the whole page or of the window."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)
