"""Makes a symbolic link to a file of the host and reads that."""

import os

for folder in ("/tmp", "/dev/shm", "/run", "/", "/sandbox"):
    try:
        link = os.path.join(folder, "link")
        os.symlink("CANARY_PATH", link)
        with open(link) as file:
            found = file.read()
        break
    except OSError:
        found = ""


def solve(n):
    return found


print(found)
