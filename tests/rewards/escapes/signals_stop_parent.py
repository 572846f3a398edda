"""Stops its parent, so that no time limit is kept."""

import os
import signal
import time

os.kill(os.getppid(), signal.SIGSTOP)
found = "stopped"
time.sleep(60)


def solve(n):
    return found


print(found)
