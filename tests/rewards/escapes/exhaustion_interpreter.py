"""Holds the interpreter in one long operation."""

found = str(len(str(9 ** 9**8)))


def solve(n):
    return found


print(found)
