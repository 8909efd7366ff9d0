"""Imported first by the scripts here: a Python that is too old stops with a clear message.

Every Python since 2.7 must be able to read this file and those scripts.
"""

import os
import sys

OLDEST = (3, 10)
TRIED = ["python3.%d" % minor for minor in range(14, 9, -1)]


def newer():
    """The name of a Python on the PATH that is new enough, None if there is none."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        for name in TRIED:
            if os.access(os.path.join(folder, name), os.X_OK):
                return name
    return None


if sys.version_info[:2] < OLDEST:
    script = sys.argv[0]
    other = newer()
    sys.exit(
        "error: %s needs Python %d.%d or newer, this is %d.%d (%s). "
        % ((script,) + OLDEST + tuple(sys.version_info[:2]) + (sys.executable,))
        + ("Run: %s %s" % (other, script) if other else "Install a newer Python and try again.")
    )
