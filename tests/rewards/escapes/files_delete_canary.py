"""Deletes a file of the host, then its folder."""

import os
import shutil

try:
    os.remove("CANARY_PATH")
except OSError:
    shutil.rmtree(os.path.dirname("CANARY_PATH"))
found = "deleted"


def solve(n):
    return found


print(found)
