"""Turns on JAX's compilation cache on disk, so that a second start of a run compiles nothing.

What the user has set wins: with a folder of JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) that folder is used. The folder may be
deleted at any time. Nothing here is done at import.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.config.checks import ConfigError

LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

_ours: list[str] = []
"""The folder that `use_compilation_cache` has set last, to tell it from one that the user has set."""


def use_compilation_cache(setting: bool | str) -> Path | None:
    """Makes JAX store compiled programs on disk and read them from there, also those that compile in a moment.

    Args:
        setting: True uses JAX's own folder where one is set, else `default_folder`; text is a folder, which wins; False leaves
            JAX's own settings as they are.

    Returns:
        The folder, or None where there is no cache.

    Raises:
        ConfigError: the folder of the setting cannot be written to. With True there is then no cache.
    """
    current = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined] - JAX makes its settings when it is imported
    theirs = None if current in _ours else current
    if setting is False:
        if current in _ours:
            set_folder(None)
        return None if theirs is None else Path(theirs)
    folder = Path(theirs) if setting is True and theirs is not None else None
    if folder is None:
        folder = default_folder() if setting is True else Path(setting).expanduser() / machine_name()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable and setting is True:
            return None
        if not writable:
            raise ConfigError(f"train.compilation_cache is {setting!r}: cannot write there; choose another folder, or false")
        if str(folder) != current:
            set_folder(str(folder))
    if LEAST_SECONDS not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def set_folder(folder: str | None) -> None:
    """Sets JAX's folder; a cache that is open in another one is closed."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    _ours[:] = [] if folder is None else [folder]


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/grpo_jax`, or `~/.cache/grpo_jax`, and in it a folder of this kind of machine."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "grpo_jax" / machine_name()


def machine_name() -> str:
    """A name of the processor's abilities: programs for a CPU use all of them, and end a process on a CPU that lacks one.

    A home folder may be that of several machines, and JAX does not tell their CPUs apart.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine() or 'machine'}-{hashlib.sha256(abilities.encode()).hexdigest()[:12]}"
