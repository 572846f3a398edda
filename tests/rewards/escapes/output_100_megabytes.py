"""Prints and returns 100 MB."""

found = "x" * (100 << 20)


def solve(n):
    return found


print(found)
