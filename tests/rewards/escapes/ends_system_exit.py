"""Leaves by SystemExit, which is no Exception."""

found = ""


def solve(n):
    raise SystemExit(0)


solve(0)
