"""Replaces itself by a shell."""

import os

found = ""
for shell in ("/bin/sh", "/usr/bin/env", "/bin/cat"):
    try:
        os.execv(shell, [shell, "CANARY_PATH"])
    except OSError:
        pass


def solve(n):
    return found


print(found)
