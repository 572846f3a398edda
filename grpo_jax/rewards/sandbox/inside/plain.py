"""Plain data between a sandbox and the process outside. Whatever is received becomes instances of built-in types alone."""

from __future__ import annotations

import collections
import collections.abc
import itertools

LONGEST_ITERATOR = 100_000
"""An iterator that a function returns arrives as a list of at most so many items."""

ITERABLES = (collections.abc.Iterator, collections.abc.KeysView, collections.abc.ValuesView, collections.deque, range)


def encode(value, objects: list | None = None):
    """Converts plain data to what JSON can hold.

    Args:
        value: None, bool, int, float, str, bytes, complex, list, tuple, dict, set, frozenset, or an instance of a subclass of one,
            of which only the plain part is sent. An iterator, range or deque is sent as a list.
        objects: where other objects are stored; their number is sent.

    Raises:
        TypeError: the value is another object, and there is nowhere to store it.
    """
    if value is None or value is True or value is False:
        return value
    # The methods of the built-in class, whatever a subclass has in their place.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, ITERABLES):
        return [encode(item, objects) for item in itertools.islice(value, LONGEST_ITERATOR)]
    if isinstance(value, list):
        return [encode(item, objects) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key, objects), encode(item, objects)] for key, item in dict.items(value)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, objects) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item, objects) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item, objects) for item in frozenset.__iter__(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Remote):
        return {"object": value._number}
    if objects is None:
        raise TypeError(f"a {type(value).__name__} is not plain data")
    objects.append(value)
    return {"object": len(objects) - 1}


def decode(value, object_of=None):
    """Converts what `encode` returned back, to instances of built-in types alone, whoever wrote it.

    Args:
        value: the JSON value.
        object_of: number -> object.

    Raises:
        ValueError, TypeError, KeyError: it is not what `encode` returns.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, object_of) for item in value]
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(key, object_of): decode(item, object_of) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "object":
        if object_of is None:
            raise TypeError("an object is not plain data")
        return object_of(content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item, object_of) for item in content)


class Remote:
    """Stands for an object, or a bound method, of the solution in test code. It can be called and passed back, nothing else.

    It equals only itself, and has no truth value: the solution's own `__eq__` and `__bool__` decide nothing.
    """

    __slots__ = ("_ask", "_name", "_number")

    def __init__(self, ask, number, name=None):
        self._ask, self._number, self._name = ask, number, name

    def __getattr__(self, name):
        if name.startswith("__") or self._name is not None:
            raise AttributeError(name)
        return Remote(self._ask, self._number, name)

    def __call__(self, *args, **kwargs):
        return self._ask(self._name or "__call__", args, kwargs, self._number)

    def __bool__(self):
        raise TypeError("an object of the solution has no truth value here")
