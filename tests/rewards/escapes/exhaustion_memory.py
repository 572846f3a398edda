"""Allocates 10 GB."""

blocks = []
for _ in range(10_000):
    blocks.append(bytearray(b"x" * (1 << 20)))
found = str(len(blocks))


def solve(n):
    return found


print(found)
