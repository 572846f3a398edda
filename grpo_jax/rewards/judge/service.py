"""Asks a service that speaks OpenAI's chat completions: retries with back-off, a limit on requests in flight, a cache on disk.

Nothing waits longer than its limit: a request has one, and so have all requests of a call together.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import random
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grpo_jax.rewards.judge.http import Answer, AnswerError, post
from grpo_jax.rewards.judge.question import UnreadableError

Value = TypeVar("Value")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
"""The wait before the first retry, which doubles with each further one, and its limit."""

BUSY = {408, 409, 425, 429}
"""Statuses that are worth another try, as those from 500 are."""

_IN_FLIGHT: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Service, asyncio.Semaphore]] = weakref.WeakKeyDictionary()
"""The limit on requests in flight of each service, which calls row by row share. A semaphore belongs to its event loop."""


class FailedRequestError(Exception):
    """The judge gave no answer that can be read; the message says why, after "the judge"."""


@dataclass(frozen=True)
class Service:
    """Where and how to ask.

    Attributes:
        url: of chat completions.
        api_key_env: environment variable with the key; None sends none. It is read at each request and never stored.
        retries: further tries of a request that failed for a reason that may pass.
        request_seconds: limit of one try.
        requests_in_flight: limit of requests at the same time, those that wait for their next try included.
        cache: folder of answers; None caches nothing.
        seed: of the jitter of waits.
    """

    url: str
    api_key_env: str | None
    retries: int
    request_seconds: float
    requests_in_flight: int
    cache: str | None
    seed: int

    async def ask(self, body: Mapping[str, Any], read: Callable[[str], Value], deadline: float) -> Value:
        """Returns what the judge answers, from the cache where the same request was answered before.

        Args:
            body: the request.
            read: reads the answer's text; raises `UnreadableError`. Only an answer that it can read is cached.
            deadline: end of the call, by the event loop's clock.

        Raises:
            FailedRequestError: There is no answer, or it cannot be read.
        """
        content = json.dumps(body, sort_keys=True).encode()
        digest = hashlib.sha256(self.url.encode() + b"\0" + content).hexdigest()
        cached = self._cached(digest)
        if cached is not None:
            with contextlib.suppress(UnreadableError):  # the file was changed
                return read(cached)
        try:
            async with asyncio.timeout_at(deadline), self._limit():
                text = await self._answer_text(content, digest, deadline)
        except TimeoutError:
            raise FailedRequestError("had not answered within call_seconds") from None
        try:
            value = read(text)
        except UnreadableError as error:
            raise FailedRequestError(f"cannot be read: {error}") from None
        self._store(digest, text)
        return value

    def _limit(self) -> asyncio.Semaphore:
        """The limit on requests in flight, shared by all calls in this event loop."""
        services = _IN_FLIGHT.setdefault(asyncio.get_running_loop(), {})
        return services.setdefault(self, asyncio.Semaphore(self.requests_in_flight))

    async def _answer_text(self, content: bytes, digest: str, deadline: float) -> str:
        """Sends a request until it is answered.

        Raises:
            FailedRequestError: It was refused, or failed at every try.
        """
        jitter = random.Random(f"{self.seed} {digest}")
        tries = self.retries + 1
        for number in range(tries):
            asked_to_wait = 0.0
            limit = asyncio.timeout(self.request_seconds)
            try:
                async with limit:
                    answer = await post(self.url, content, self._headers())
            except (OSError, AnswerError) as error:  # a TimeoutError is an OSError, and may be the connection's own
                reason = f"gave no answer ({type(error).__name__}: {_cut(str(error))})"
                if limit.expired():
                    reason = f"had not answered within request_seconds = {self.request_seconds:g}"
            else:
                if answer.status == 200:
                    return _text_of(answer)
                reason = f"answered with status {answer.status}: {_cut(answer.body.decode(errors='replace'))}"
                if answer.status not in BUSY and answer.status < 500:
                    raise FailedRequestError(reason)
                asked_to_wait = _retry_after(answer.headers.get("retry-after"))
            if number + 1 == tries:
                break
            wait = min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS) * jitter.uniform(0.5, 1.5)
            wait = max(wait, asked_to_wait)
            if asyncio.get_running_loop().time() + wait >= deadline:
                raise FailedRequestError(f"{reason}; the next try would be after call_seconds")
            await asyncio.sleep(wait)
        raise FailedRequestError(f"{reason}; tried {tries} times" if tries > 1 else reason)

    def _headers(self) -> dict[str, str]:
        """The header field with the key, where there is one."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env is not None else ""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _cached(self, digest: str) -> str | None:
        """The cached text of an answer; None where there is none, or it cannot be read."""
        if self.cache is None:
            return None
        try:
            found = json.loads(self._path(digest).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        text = found.get("answer") if isinstance(found, dict) else None
        return text if isinstance(text, str) else None

    def _store(self, digest: str, text: str) -> None:
        """Writes an answer into the cache, whole or not at all; a full disk costs the cache and no answer."""
        if self.cache is None:
            return
        path, temporary = self._path(digest), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"answer": text}, file)
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        """The file of an answer."""
        return Path(self.cache or "").expanduser() / digest[:2] / f"{digest}.json"


def _text_of(answer: Answer) -> str:
    """The text of a chat completion.

    Raises:
        FailedRequestError: The body is no chat completion, or was cut off at its limit of tokens.
    """
    try:
        choice = json.loads(answer.body)["choices"][0]
        text = choice["message"]["content"]
        ended = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        shown = _cut(answer.body.decode(errors="replace"))
        raise FailedRequestError(f"answered with something that is no chat completion: {shown}") from None
    if not isinstance(text, str):
        raise FailedRequestError("answered without a text")
    if ended not in (None, "stop"):
        raise FailedRequestError(f"did not finish its answer (finish_reason {ascii(ended)[:40]})")
    return text


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After field asks to wait, given as a number or a date; 0 where it has neither."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _cut(text: str) -> str:
    """A text in ASCII on one line, at most 160 characters."""
    line = ascii(" ".join(text.split()))[1:-1]
    return line if len(line) <= 160 else line[:157] + "..."
