"""Runs the host's commands."""

import subprocess

found = subprocess.run(["cat", "CANARY_PATH"], capture_output=True, text=True).stdout


def solve(n):
    return found


print(found)
