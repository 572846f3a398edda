"""Looks for datasets in installed packages."""

import sys

sys.path += [path for path in ("/usr/lib/python3/dist-packages", f"{sys.prefix}/lib/python3.{sys.version_info[1]}/site-packages")]
import numpy  # noqa: E402

found = numpy.__file__


def solve(n):
    return found


print(found)
