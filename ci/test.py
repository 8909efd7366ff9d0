"""Set ktcore up and run its tests: one command on a fresh checkout.

    python3 ci/test.py [-- options of pytest]

Makes a private environment in .ktcore-env, installs ktcore there with what the tests need, then
runs the linters and the tests, all but the slow ones, several at a time. With options it runs
pytest alone: `python3 ci/test.py -- -k moe`, or `-- -m slow` for the slow tests.
"""

import os
import sys

import _check_python  # noqa: F401
import _environment

CPP = (".h", ".cpp", ".inl")
MOST_WORKERS = 8  # each has torch in memory, half a gigabyte


def workers():
    """How many processes share out the tests: one for each CPU that this one may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # which Windows does not have
    return min(len(affinity(0)) if affinity else os.cpu_count() or 1, MOST_WORKERS)


def checks(python, options):
    """What to run, by name."""
    module = [python, "-m"]
    tests = module + ["pytest", "-m", "not slow"] + options
    if options:
        return {"pytest": tests}
    clang_format = os.path.join(os.path.dirname(python), "clang-format")
    found = (path for name in ("csrc", "ci") for path in (_environment.ROOT / name).rglob("*"))
    sources = sorted(str(path) for path in found if path.suffix in CPP)
    return {
        "ruff check": module + ["ruff", "check", "."],
        "ruff format": module + ["ruff", "format", "--check", "."],
        "clang-format": [clang_format, "--dry-run", "-Werror"] + sources,
        "pytest": tests + ["-n", str(workers()), "--dist", "worksteal"],
    }


def main(arguments):
    options = arguments[1:] if arguments[:1] == ["--"] else arguments
    failed = []
    for name, command in checks(_environment.ready("test"), options).items():
        _environment.announce(name)
        if _environment.call(command):
            failed.append(name)
    _environment.announce("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_environment.run(main, __doc__))
