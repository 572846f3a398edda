"""Asks the same server by HTTP."""

import urllib.request

found = urllib.request.urlopen("http://127.0.0.1:LISTENER_PORT/", timeout=1).read().decode()


def solve(n):
    return found


print(found)
