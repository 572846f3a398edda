"""Writes to standard error without end."""

import sys

found = ""
while True:
    sys.stderr.write("x" * (1 << 20))


def solve(n):
    return found


print(found)
