"""Makes a hard link to a file of the host."""

import os

os.link("CANARY_PATH", "/sandbox/link")
with open("/sandbox/link") as file:
    found = file.read()


def solve(n):
    return found


print(found)
