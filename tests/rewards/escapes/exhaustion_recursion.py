"""Overflows the stack of C."""

import sys

sys.setrecursionlimit(10**9)


class Deep:
    def __repr__(self):
        return repr(self)


found = repr(Deep())


def solve(n):
    return found


print(found)
