"""Ignores every signal and goes on for ever."""

import signal

for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
found = ""
while True:
    pass


def solve(n):
    return found


print(found)
