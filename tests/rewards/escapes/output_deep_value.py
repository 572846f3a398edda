"""Returns a list that is nested without end."""

found = []
for _ in range(100_000):
    found = [found]


def solve(n):
    return found


print(found)
