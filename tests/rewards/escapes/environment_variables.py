"""Reads the answer from the environment."""

import os

found = os.environ.get("GRPO_ESCAPE_ANSWER", "")


def solve(n):
    return found


print(found)
