"""Sleeps for ever."""

import time

found = ""
time.sleep(10_000)


def solve(n):
    return found


print(found)
