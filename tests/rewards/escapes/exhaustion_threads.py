"""Starts threads without end."""

import threading
import time

threading.stack_size(32768)
found = "threads"
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def solve(n):
    return found


print(found)
