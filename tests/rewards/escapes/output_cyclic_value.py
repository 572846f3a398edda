"""Returns a list that contains itself."""

found = []
found.append(found)


def solve(n):
    return found


print(found)
