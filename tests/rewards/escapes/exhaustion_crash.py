"""Crashes the interpreter."""

import ctypes

found = ctypes.string_at(0)


def solve(n):
    return found


print(found)
