"""Resolves the entries of rewards.functions to named functions, by importing the user's modules.

Entries are names of built-ins, `package.module:function`, `file.py:function`, mappings with arguments, or functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.config.checks import ConfigError, MismatchError, convert, nearest, wrong_type
from grpo_jax.rewards.builtin import BUILTINS
from grpo_jax.rewards.protocol import (
    SAMPLED_INPUTS,
    ColumnReward,
    DeviceReward,
    NamedFunction,
    RewardFunction,
    TextReward,
    accepted,
)

ALLOWED_ENTRIES = "give a built-in name, package.module:function, file.py:function, or {name: ..., argument: value}"


def resolve_functions(
    entries: Sequence[Any] | Mapping[str, Any] | RewardFunction,
    *,
    max_completion_length: int | None = None,
) -> list[NamedFunction]:
    """Finds or imports the reward functions, and gives each a unique name.

    - `number_match`: a built-in, with its default settings.
    - `{name: regex_format, pattern: "^A"}`: a built-in with settings.
    - `package.module:function`, `file.py:function` (relative to the current folder): a user's function. In
      `{name: file.py:function, argument: value}` the arguments are passed at every call. The file's folder is appended to the
      search path, so that it may import its neighbours.
    - a function, or a built-in factory that needs no settings.

    Args:
        entries: Texts, mappings and functions as above; a single one need not be in a list.
        max_completion_length: rollout.max_completion_length, for built-ins that need it where the entry does not set it.

    Returns:
        (name, function) pairs in order. The name is the function's; a repeated name gets `_2`, `_3`, ...

    Raises:
        ConfigError: There is no entry, or a function cannot be found (the nearest name is suggested), imported or called.
    """
    listed: Sequence[Any] = [entries] if isinstance(entries, str | Mapping) or callable(entries) else list(entries)
    if not listed:
        raise ConfigError(f"rewards.functions is empty: {ALLOWED_ENTRIES}")
    modules: dict[str, ModuleType] = {}
    functions: list[NamedFunction] = []
    taken: set[str] = set()
    for index, entry in enumerate(listed):
        field = f"rewards.functions[{index}]"
        name, function = _resolved(field, entry, max_completion_length, modules)
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        accepted(function, unique)
        functions.append((unique, function))
    return functions


def resolve_callable(field: str, entry: str) -> Callable[..., Any]:
    """Imports a function that is no reward, `package.module:function` or `file.py:function`.

    Args:
        field: Name of the setting in errors.
        entry: Its value.

    Raises:
        ConfigError: It cannot be imported, or is no function.
    """
    source, _, attribute = entry.rpartition(":")
    return _imported(field, source, attribute, {})


def _resolved(field: str, entry: Any, max_completion_length: int | None, modules: dict[str, ModuleType]) -> NamedFunction:
    """Resolves one entry to its function and the function's name."""
    if callable(entry):
        for name, factory in BUILTINS.items():
            if entry is factory:
                return name, _built_in(field, name, {}, max_completion_length)
        return _own_name(entry), entry
    name, arguments = entry, {}
    if isinstance(entry, Mapping):
        if "name" not in entry:
            raise ConfigError(f"{field} is {dict(entry)!r}: it has no name; {ALLOWED_ENTRIES}")
        name, arguments = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    if not isinstance(name, str):
        raise ConfigError(f"{field} is {name!r}: {ALLOWED_ENTRIES}")
    if name in BUILTINS:
        return name, _built_in(field, name, arguments, max_completion_length)
    if ":" not in name:
        raise ConfigError(f"{field} is {name!r}: {_not_built_in(name)}")
    source, _, attribute = name.rpartition(":")
    function = _imported(field, source, attribute, modules)
    return attribute, _with_arguments(field, name, function, arguments) if arguments else function


def _built_in(field: str, name: str, arguments: Mapping[str, Any], max_completion_length: int | None) -> RewardFunction:
    """Makes a built-in with the arguments of its entry."""
    factory, given = BUILTINS[name], dict(arguments)
    if "max_completion_length" in inspect.signature(factory).parameters and max_completion_length is not None:
        given.setdefault("max_completion_length", max_completion_length)
    return made_by(factory, field, name, given)


def made_by(factory: Callable[..., Any], field: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """Makes a reward, or what describes one, with the arguments of its entry, each checked against its annotation.

    Args:
        field: Name of the entry in errors.
        name: Name of the reward.

    Raises:
        ConfigError: An argument is unknown, missing, or of another type.
    """
    parameters = inspect.signature(factory).parameters
    kinds = typing.get_type_hints(factory)
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in parameters:
            raise ConfigError(f"{field}: {name} has no argument {key}; {_choices(key, list(parameters))}")
        try:
            values[key] = convert(value, kinds[key])
        except MismatchError:
            raise wrong_type(f"{field}.{key}", value, kinds[key]) from None
    missing = [key for key, item in parameters.items() if item.default is item.empty and key not in values]
    if missing:
        example = "{" + f"name: {name}, {missing[0]}: ..." + "}"
        raise ConfigError(f"{field}: {name} needs {', '.join(missing)}: write {example}")
    return factory(**values)


def _with_arguments(field: str, name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> RewardFunction:
    """Binds the arguments of an entry to a user's function."""
    takes = accepted(function, name)
    named = [item for item in (*takes.required, *takes.optional) if item not in SAMPLED_INPUTS]
    for key in arguments:
        if key in SAMPLED_INPUTS or not takes.takes(key):
            raise ConfigError(f"{field}: {name} has no argument {key}; {_choices(key, named)}")
    return functools.partial(function, **arguments)


def _imported(field: str, source: str, attribute: str, modules: dict[str, ModuleType]) -> RewardFunction:
    """Imports a file or module, once, and returns its function."""
    if source not in modules:
        modules[source] = import_file(field, Path(source)) if source.endswith(".py") else import_module(field, source, attribute)
    found = vars(modules[source])
    if attribute not in found:
        functions = [name for name, value in found.items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{field}: {source} has no function {attribute}; {_choices(attribute, functions)}")
    function = found[attribute]
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else "no function"
        raise ConfigError(f"{field}: {attribute} in {source} is {kind}; name a function")
    return function


def import_file(field: str, path: Path) -> ModuleType:
    """Imports a Python file, whose folder is appended to the search path."""
    if not path.is_file():
        near = [found.name for found in path.parent.glob("*.py")] if path.parent.is_dir() else []
        guess = nearest(path.name, near)
        hint = f"; did you mean {path.parent / guess}?" if guess else ""
        raise ConfigError(f"{field}: there is no file {path} (looked from {Path.cwd()}){hint}")
    # The path is resolved so that two spellings of it give one module name; the bare stem may be a package's name.
    path = path.resolve()
    name = f"reward_file_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{field}: {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{field}: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def import_module(field: str, source: str, attribute: str) -> ModuleType:
    """Imports a module by its dotted name."""
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        here = Path(*source.split(".")).with_suffix(".py")
        hint = f"; for the file in this folder write {here}:{attribute}" if here.is_file() else ""
        raise ConfigError(f"{field}: importing {source} raised {type(error).__name__}: {error}{hint}") from error


def _own_name(function: Callable[..., Any]) -> str:
    """Returns a function's name; that of the inner function for a partial."""
    if isinstance(function, functools.partial):
        return _own_name(function.func)
    if isinstance(function, TextReward | ColumnReward | DeviceReward):
        return function.name
    return function.__name__.strip("<>") if inspect.isroutine(function) else type(function).__name__


def _not_built_in(name: str) -> str:
    """The fix for a name that is not a built-in's."""
    if name.endswith(".py"):
        return f"say which function in it, such as {name}:reward"
    module, _, last = name.rpartition(".")
    dotted = f"for a function of your own write {module}:{last}; " if module else ""
    known = _choices(name, [*BUILTINS, "reward_model"])  # the latter is made before, in `learner/reward_models.py`
    return f"no such built-in; {dotted}{known}; for your own, package.module:function or file.py:function"


def _choices(name: str, choices: Sequence[str]) -> str:
    """Suggests the nearest choice and lists all."""
    guess = nearest(name, choices)
    listed = f"choose from {', '.join(choices)}" if choices else "there is none"
    return f"did you mean {guess}? ({listed})" if guess else listed
