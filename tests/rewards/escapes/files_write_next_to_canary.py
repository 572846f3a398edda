"""Leaves a file in a folder of the host."""

import os

for folder in (os.path.dirname("CANARY_PATH"), "/", "/usr/lib", "/dev", os.path.dirname(os.__file__)):
    try:
        with open(os.path.join(folder, "grpo-escape"), "w") as file:
            file.write("was here")
    except OSError:
        pass
found = "written"


def solve(n):
    return found


print(found)
