"""One HTTP POST that can be cancelled at any moment, on asyncio's streams.

Each request has a connection of its own. Redirects are not followed, so that a key only reaches the address that the user gave.
Proxies and compressed answers are not supported.
"""

from __future__ import annotations

import asyncio
import http.client
import io
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

MOST_BYTES = 4 << 20
"""A longer answer is refused."""


class AnswerError(Exception):
    """What came back is no HTTP answer that this client can read."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer.

    Attributes:
        status: such as 200.
        headers: by lower-case name.
        body: its bytes.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


async def post(url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    """Sends one POST request and reads the whole answer; the caller sets the time limit.

    Raises:
        OSError: There is no connection, or it broke.
        AnswerError: The answer is not HTTP, ends too early, or is longer than MOST_BYTES.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc.rpartition("@")[2]
        fields = {
            "Host": host,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        writer.write(head.encode("latin-1") + body)
        # Not drained: a server that refuses a long body early answers before it has read all of it.
        return await _answer(reader)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, http.client.HTTPException, ValueError) as error:
        raise AnswerError(f"{type(error).__name__}: {error}") from error
    finally:
        writer.transport.abort()  # closing would wait for a peer that may never answer


async def _answer(reader: asyncio.StreamReader) -> Answer:
    """Reads status, header fields and body."""
    while True:
        line, _, fields = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        version, status, *_ = line.decode("latin-1").split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise AnswerError(f"the answer begins with {line[:40]!r}, which is not HTTP/1")
        if not 100 <= int(status) < 200:
            break
    parsed = http.client.parse_headers(io.BytesIO(fields))
    headers = {name.lower(): value for name, value in parsed.items()}
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = await _chunks(reader)
    elif "content-length" in headers:
        body = await reader.readexactly(_checked_length(int(headers["content-length"])))
    else:
        body = b""
        while piece := await reader.read(1 << 16):
            body += piece
            _checked_length(len(body))
    return Answer(int(status), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Reads a body in chunks (RFC 9112, section 7.1); what follows the last chunk is not read."""
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        _checked_length(len(body) + size)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return body


def _checked_length(length: int) -> int:
    """Returns a number of bytes.

    Raises:
        AnswerError: It is negative or too large.
    """
    if not 0 <= length <= MOST_BYTES:
        raise AnswerError(f"the answer has {length} bytes; at most {MOST_BYTES} are read")
    return length
