"""The program that runs inside a sandbox.

It exchanges messages with the process outside, JSON that begins with its length, in one of four modes:

- `programs`: runs code as a program, once for each input, in a forked process that has no descriptor of the messages' pipes.
- `functions`: runs code once and then calls its functions as asked. Code and messages share a process here, so an answer is no more
  than a value that the code claims; the process outside, or the tests in another sandbox, compare it.
- `tests`: runs a dataset's test code. The solution's names are stand-ins in it, whose calls go to the process outside.
- `probe`: tries what must be impossible, and reports what was not.

Expected results are never sent to `programs` and `functions`.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import struct
import sys
import types

from .confine import DESCRIPTORS, confine, probe
from .plain import Remote, decode, encode

HEADER = struct.Struct("!Q")


class Channel:
    """Messages to and from the process outside, on descriptors that the code's own input and output do not use."""

    def __init__(self) -> None:
        self._incoming, self._outgoing = os.dup(0), os.dup(1)
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.close(nothing)
        self.nonce = ""

    def send(self, **content: object) -> None:
        """Sends one message with the nonce of this run."""
        payload = json.dumps({**content, "nonce": self.nonce}).encode()
        message = memoryview(HEADER.pack(len(payload)) + payload)
        while message:
            message = message[os.write(self._outgoing, message) :]

    def receive(self) -> dict:
        """Reads the next message; ends the process where there will be none."""
        (length,) = HEADER.unpack(self._read(HEADER.size))
        return json.loads(self._read(length))

    def _read(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = os.read(self._incoming, count - len(found))
            if not piece:
                os._exit(0)
            found += piece
        return bytes(found)


def serve_programs(channel: Channel, start: dict) -> None:
    """Runs the code once for each input: `{"input": text}` -> `{"output": text, "status": exit code or minus the signal}`."""
    channel.send(ready=True)
    while True:
        request = channel.receive()
        status, output = _run_program(start["code"], request["input"], start)
        channel.send(status=status, output=output.decode("utf-8", "replace"))


def _run_program(code: str, text: str, start: dict) -> tuple[int, bytes]:
    """Runs the code as a program in a process of its own."""
    given, printed = os.memfd_create("input"), os.memfd_create("output")
    with open(given, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        os.dup2(given, 0)
        os.dup2(printed, 1)
        os.closerange(3, max(given, printed, DESCRIPTORS) + 1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        confine(start["limits"])
        _execute(code, "__main__")
        sys.exit(0)  # through the interpreter's own end: threads are joined, buffers written
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, start["test_seconds"])
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    size = os.fstat(printed).st_size
    output = os.pread(printed, size, 0)
    os.close(given)
    os.close(printed)
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), output


def serve_functions(channel: Channel, start: dict) -> None:
    """Runs the code, then makes calls.

    `{"name": text, "args": [...], "kwargs": {...}, "object": number or null}` -> `{"value": encoded}`, or
    `{"raised": name of a built-in exception, "message": text}`.
    """
    confine(start["limits"])
    channel.send(ready=True)
    objects = []
    try:
        module = _execute(start["code"], "solution")
        channel.send(loaded=True)
    except BaseException as error:
        channel.send(loaded=False, **_description(error))
        return
    while True:
        request = channel.receive()
        try:
            owner = module if request["object"] is None else objects[request["object"]]
            args = [decode(item, objects.__getitem__) for item in request["args"]]
            kwargs = {key: decode(item, objects.__getitem__) for key, item in request["kwargs"].items()}
            answer = {"value": encode(getattr(owner, request["name"])(*args, **kwargs), objects)}
        except BaseException as error:
            answer = _description(error)
        channel.send(**answer)


def serve_tests(channel: Channel, start: dict) -> None:
    """Runs test code.

    `{"test": text, "names": [...], "modules": [...]}` -> any number of `{"call": {...}}`, each answered as by `serve_functions`,
    then `{"passed": true}` or `{"passed": false, "error": text}`; or `{"unusable": reason}`.
    """
    confine(start["limits"])
    channel.send(ready=True)

    def ask(name: str, args: tuple, kwargs: dict, number: int | None = None) -> object:
        try:
            named = {key: encode(item) for key, item in kwargs.items()}
            arguments = {"args": encode(list(args)), "kwargs": named}
        except TypeError as error:
            channel.send(unusable=f"they give {name} an argument that cannot be sent: {error}")
            os._exit(0)
        channel.send(call={"name": name, "object": number, **arguments})
        answer = channel.receive()
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), None)
            # A StopIteration would end an `all(map(...))` of the test as if everything in it were true.
            if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration):
                raise kind(answer.get("message", ""))
            raise RuntimeError(f"the solution raised {answer['raised']}")
        return decode(answer["value"], lambda number: Remote(ask, number))

    def stand_in(name):
        return lambda *args, **kwargs: ask(name, args, kwargs)

    while True:
        request = channel.receive()
        solution = types.ModuleType("solution")
        solution.__getattr__ = stand_in  # for `from solution import f`
        sys.modules["solution"] = solution
        names = {name: stand_in(name) for name in request["names"]}
        names.update((name, __import__(name)) for name in request["modules"])
        try:
            found = _execute(request["test"], "tests", names).__dict__
            for name, value in list(found.items()):
                if name.startswith("test_") and isinstance(value, types.FunctionType):
                    value()
            channel.send(passed=True)
        except BaseException as error:
            channel.send(passed=False, error=f"{type(error).__name__}: {error}"[:500])


def _execute(code: str, name: str, names: dict | None = None) -> types.ModuleType:
    """Runs code as a new module and returns the module."""
    module = types.ModuleType(name)
    module.__dict__.update(names or {})
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    return module


def _description(error: BaseException) -> dict[str, str]:
    """An exception as plain data: the nearest built-in class, and the message."""
    names = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    try:
        message = str(error)[:500]
    except BaseException:
        message = ""
    return {"raised": names[0] if names else "Exception", "message": message}


def main() -> None:
    """Reads what to do, and does it."""
    sys.path[:] = [path for path in sys.path if path]
    channel = Channel()
    start = channel.receive()
    channel.nonce = start["nonce"]
    {"programs": serve_programs, "functions": serve_functions, "tests": serve_tests, "probe": probe}[start["mode"]](channel, start)
