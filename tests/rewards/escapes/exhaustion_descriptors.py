"""Opens descriptors without end."""

import os

found = "pipes"
while True:
    os.pipe()


def solve(n):
    return found


print(found)
