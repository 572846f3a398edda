"""Never ends."""

found = ""
while True:
    pass


def solve(n):
    return found


print(found)
