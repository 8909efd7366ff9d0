"""Set ktcore up and show its main job: one command on a fresh checkout.

    python3 ci/demo.py [options of `ktcore run`]

Makes a private environment in .ktcore-env, installs ktcore there, says what it found in this
machine, then lets the embedded model write and compares backends. Options go to `ktcore run`, such
as --prompt TEXT, --max-new-tokens N, --format int4, --backend reference.
"""

import sys

import _check_python  # noqa: F401
import _environment


def main(arguments):
    python = _environment.ready("cli")
    for command in (["probe"], ["run", "--explain", "--compare"] + arguments):
        _environment.announce("ktcore " + " ".join(command))
        status = _environment.call([python, "-m", "ktcore.cli"] + command)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(_environment.run(main, __doc__))
