"""Finds what confines code on this machine, and checks before a run begins that it does. Nothing falls back to a plain process."""

from __future__ import annotations

import functools
import glob
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import ConfigError
from grpo_jax.rewards.sandbox import inside
from grpo_jax.rewards.sandbox.limits import Limits
from grpo_jax.rewards.sandbox.process import ENVIRONMENT, START_SECONDS, Sandbox, SandboxError, SolutionEndedError

ISOLATIONS = ("auto", "bubblewrap", "docker", "podman", "monty")
NOBODY = "65534"

INSTALL = (
    "install bubblewrap (apt-get install bubblewrap, dnf install bubblewrap), "
    "or give isolation: podman or docker with an image that has Python, "
    "or, for pure functions, pip install grpo_jax[code]; code of a model is never run without one of them"
)

ALLOW_NAMESPACES = (
    "If a namespace is not permitted, allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or an "
    "AppArmor profile for bwrap). "
)

PROGRAM = "import sys; sys.path.insert(0, '/sandbox'); from inside.main import main; main()"
INTERPRETER_OPTIONS = ("-s", "-S", "-B", "-X", "utf8", "-c", PROGRAM)
FILES = str(Path(inside.__file__).parent)


@dataclass(frozen=True)
class Bubblewrap:
    """Namespaces of the Linux kernel, set up by https://github.com/containers/bubblewrap.

    No network, no processes of others, no capabilities, no writable folder; of the file system only system libraries and this
    interpreter with its standard library, read-only, without /proc and installed packages.

    Attributes:
        program: path of bwrap.
    """

    program: str

    def open(self, start: Mapping[str, Any], limits: Limits) -> Sandbox:
        """Starts a sandbox."""
        return Sandbox(self.command(), start, limits, ENVIRONMENT)

    def command(self) -> list[str]:
        """The command line of a sandbox."""
        command = [self.program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        command += ["--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
        for path in _readable():
            # On most systems /lib is a link to usr/lib: one folder, to be hidden in once.
            link = os.path.islink(path)
            command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
        for path in _hidden():
            command += ["--tmpfs", path, "--remount-ro", path]
        command += ["--dev-bind", "/dev/null", "/dev/null", "--ro-bind", FILES, "/sandbox/inside", "--remount-ro", "/"]
        return [*command, "--chdir", "/", "--", os.path.realpath(sys.executable), *INTERPRETER_OPTIONS]


@dataclass(frozen=True)
class Container:
    """A container for each completion, of an image that the user names.

    Attributes:
        program: path of docker or podman.
        image: with `python3` 3.9 or newer in it; it must be there already.
    """

    program: str
    image: str

    def open(self, start: Mapping[str, Any], limits: Limits) -> Sandbox:
        """Starts a container."""
        name = f"grpo-jax-{secrets.token_hex(8)}"

        def remove() -> None:
            subprocess.run([self.program, "rm", "-f", name], capture_output=True, check=False, timeout=START_SECONDS)

        return Sandbox(self.command(name, limits), start, limits, None, on_close=remove)

    def command(self, name: str, limits: Limits) -> list[str]:
        """The command line of a container."""
        memory = f"{limits.memory_bytes + (64 << 20)}b"
        command = [self.program, "run", "--rm", "--interactive", "--name", name, "--pull=never", "--network=none", "--ipc=none"]
        command += ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", f"--user={NOBODY}:{NOBODY}"]
        command += ["--pids-limit=80", f"--memory={memory}", f"--memory-swap={memory}", "--hostname=sandbox", "--workdir=/"]
        if os.path.basename(self.program) == "podman":
            command.append("--read-only-tmpfs=false")  # its own --read-only leaves /tmp writable
        command += [f"--volume={FILES}:/sandbox/inside:ro", "--entrypoint=python3"]
        command += [f"--env={key}={value}" for key, value in ENVIRONMENT.items()]
        return [*command, self.image, *INTERPRETER_OPTIONS]


def find_isolation(isolation: str, image: str | None) -> Bubblewrap | Container | None:
    """Finds the isolation that the settings name and checks that it works, once a process.

    Args:
        isolation: one of ISOLATIONS; `auto` is bubblewrap where it is installed, else monty.
        image: of the container.

    Returns:
        The isolation; None for monty.

    Raises:
        ConfigError: it is not installed, or does not confine here.
    """
    if isolation in ("docker", "podman"):
        program = shutil.which(isolation)
        if program is None:
            raise ConfigError(f"code_execution.isolation is {isolation!r}, which is not installed: {INSTALL}")
        if not image:
            raise ConfigError(
                f"code_execution.image is {image!r}: name an image with python3 for {isolation}, such as python:3.12-slim"
            )
        return checked(Container(program, image))
    program = shutil.which("bwrap")
    if isolation == "monty" or (isolation == "auto" and program is None):
        if not monty_is_installed():
            raise ConfigError(
                f"code_execution found nothing on this machine that can confine code (isolation: {isolation}): {INSTALL}"
            )
        return None
    if program is None:
        raise ConfigError(f"code_execution.isolation is 'bubblewrap', and there is no bwrap on this machine: {INSTALL}")
    return checked(Bubblewrap(program))


def monty_is_installed() -> bool:
    """Whether the extra `code` is installed."""
    try:
        import pydantic_monty  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def checked(isolation: Bubblewrap | Container) -> Bubblewrap | Container:
    """Has a sandbox try what must be impossible.

    Raises:
        ConfigError: it does not start, or something was possible.
    """
    name = os.path.basename(isolation.program)
    limits = Limits(memory_bytes=256 << 20)
    with tempfile.NamedTemporaryFile(prefix="grpo-jax-", mode="w") as canary:
        canary.write("secret")
        canary.flush()
        os.chmod(canary.name, 0o644)
        try:
            with isolation.open({"mode": "probe", "canary": canary.name}, limits) as sandbox:
                report = sandbox.next(time.monotonic() + START_SECONDS)
        except (SandboxError, SolutionEndedError) as error:
            raise ConfigError(
                f"code_execution: {name} is installed and does not work here ({error}). "
                + (ALLOW_NAMESPACES if isinstance(isolation, Bubblewrap) else "")
                + f"Make it work, or {INSTALL}"
            ) from None
    found = [*report.get("possible", ["it did not report"])]
    if report.get("canary_present") is not False:
        found.append("it sees files of this machine")
    if isinstance(isolation, Bubblewrap) and set(report.get("environment", ["?"])) - {*ENVIRONMENT, "PWD", "LC_CTYPE"}:
        found.append("it has an environment")
    if found:
        raise ConfigError(f"code_execution: {name} does not confine code on this machine: {'; '.join(found)}. {INSTALL}")
    return isolation


@functools.cache
def _readable() -> tuple[str, ...]:
    """The files and folders that a sandbox of bubblewrap can read: system libraries, and this interpreter."""
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    # Not from sysconfig's paths, which name the virtual environment's folder. Next to the standard library are libraries in C.
    library = str(Path(os.path.realpath(os.__file__)).parent.parent)
    paths = dict.fromkeys([*system, os.path.realpath(sys.executable), library])
    return tuple(path for path in paths if os.path.exists(path))


@functools.cache
def _hidden() -> tuple[str, ...]:
    """Folders with installed packages among them, because these may contain a dataset with its answers."""
    folders = [path for path in _readable() if os.path.isdir(path) and not os.path.islink(path)]
    patterns = [f"{path}/{python}{kind}-packages" for path in folders for python in ("", "python3*/") for kind in ("site", "dist")]
    return tuple(sorted({path for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)}))
