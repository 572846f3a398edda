"""Calls in threads of their own, which do not keep the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")


def in_thread(call: Callable[[], Value], name: str) -> Future[Value]:
    """Makes a call in a new thread.

    Args:
        call: What is called; the future has its result or its error.
        name: Of the thread.
    """
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future
