"""Reads the expected answer from a file of the host."""

with open("CANARY_PATH") as file:
    found = file.read()


def solve(n):
    return found


print(found)
