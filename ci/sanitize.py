"""Build the C++ with sanitizers and have it tested: a report of theirs is a failure.

    python3 ci/sanitize.py

AddressSanitizer and UndefinedBehaviorSanitizer: the extension, built apart and put in the place of
the installed one (ci/_extension.py), goes through `ktcore-probe --selftest`, tests of the kernels,
and ci/fuzz.py. ThreadSanitizer: csrc/stress, without Python. GCC or Clang, on Linux; the builds
are in build/sanitize. The Python is found as by ci/fuzz.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _check_python  # noqa: F401
import _environment
import fuzz

BUILDS = _environment.ROOT / "build" / "sanitize"
CSRC = _environment.ROOT / "csrc"
TESTS = ("test_moe", "test_linear", "test_route", "test_decoder_ops", "test_threads", "test_numa")
# The kernels' tests are thousands, and many times slower here: those of a few sizes and formats.
SOME = (
    "not reference and not 513 and "
    "(test_threads or test_decoder_ops or test_numa or route or "
    "bf16 or int8- or int4_g32 or q4_k or q6_k or q8_0 or nvfp4-)"
)
PARTS = ("selftest", "tests", "fuzz", "threads")
OPTIONS = {
    # Python and torch leave memory to the end of the process.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}

RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import _extension
_extension.use(sys.argv[2])
what, sys.argv = sys.argv[3], sys.argv[3:]
if what == "pytest":
    import pytest
    sys.exit(pytest.main(sys.argv[1:]))
from ktcore.cli import probe_main
probe_main()
"""


def run(command, variables=OPTIONS):
    """A program, its output here; its exit status."""
    command = list(map(str, command))
    return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode


def said(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tool(name, python):
    """A program beside Python, or anywhere. Raises SetupError."""
    found = shutil.which(name, path=os.path.dirname(python)) or shutil.which(name)
    if found is None:
        raise _environment.SetupError(f"there is no {name}: pip install {name}")
    return found


def compiler():
    """The C++ compiler's command, and whether it is Clang."""
    command = os.environ.get("CXX", "c++").split()
    return command, "clang" in said([*command, "--version"])


def build(folder, target, python, *options):
    """Compile with CMake. Raises SetupError."""
    cmake = tool("cmake", python)
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    common = ("-S", CSRC, "-B", folder, "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    commands = (
        (cmake, *generator, *common, *options),
        (cmake, "--build", folder, "--parallel", "2", "--target", target),
    )
    for command in commands:
        if run(command):
            raise _environment.SetupError(f"building {target} in {folder} failed: see above")


def extension(python):
    """The path of the extension, built with sanitizers, and the variables that it needs.

    Raises SetupError.
    """
    command, clang = compiler()
    # What Python must load first. libstdc++ is among it because the sanitizer looks for the real
    # `__cxa_throw` as it starts.
    wanted = ("libclang_rt.asan-x86_64.so",) if clang else ("libasan.so", "libubsan.so")
    paths = [said([*command, f"-print-file-name={name}"]) for name in (*wanted, "libstdc++.so.6")]
    for path in paths:
        if not os.path.isabs(path):
            raise _environment.SetupError(f"{command[0]} has no {path}: install its sanitizers")
    folder = BUILDS / "address"
    pybind11 = said([python, "-m", "pybind11", "--cmakedir"])
    linking = ("-DCMAKE_MODULE_LINKER_FLAGS=-shared-libsan",) if clang else ()
    build(
        folder, "_C", python, "-DSKBUILD=ON", "-DKTCORE_SANITIZE=address,undefined",
        f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11}", *linking,
    )  # fmt: skip
    (found,) = folder.glob("_C*.so")
    return found, {**OPTIONS, "LD_PRELOAD": " ".join(paths)}


def main(arguments):
    options = parser().parse_args(arguments)
    parts = options.only or PARTS
    python = fuzz.find_python()
    failed = []
    if set(parts) - {"threads"}:
        path, variables = extension(python)
        here = [python, "-c", RUN, Path(__file__).resolve().parent, path]
        tests = [_environment.ROOT / "tests" / f"{name}.py" for name in TESTS]
        quiet = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", options.tests]
        if "selftest" in parts:
            _environment.announce("ktcore-probe --selftest")
            if run([*here, "probe", "--selftest"], variables):
                failed.append("selftest")
        if "tests" in parts:
            _environment.announce("pytest")
            if run([*here, "pytest", *quiet, *tests], variables):
                failed.append("tests")
        if "fuzz" in parts:
            _environment.announce("ci/fuzz.py")
            cases = fuzz.parser().parse_args(
                ["--count", str(options.count), "--seed", str(options.seed), "--seconds", "120",
                 "--megabytes", "1024", "--jobs", str(options.jobs)]
            )  # fmt: skip
            if fuzz.report(fuzz.Fuzzer(cases, python, path, variables), False):
                failed.append("fuzz")
    if "threads" in parts:
        _environment.announce("ThreadSanitizer")
        folder = BUILDS / "thread"
        build(folder, "ktcore_stress", python, "-DKTCORE_SANITIZE=thread", "-DKTCORE_STRESS=ON")
        if run([folder / "ktcore_stress"]):
            failed.append("threads")
    _environment.announce("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


def parser():
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--only", nargs="+", choices=PARTS, help="these alone (all)")
    out.add_argument("--count", type=int, default=2000, help="cases for the fuzzer (2000)")
    out.add_argument("--seed", type=int, default=0, help="of the fuzzer (0)")
    out.add_argument("--jobs", type=int, default=1, help="the fuzzer's processes at a time (1)")
    out.add_argument("--tests", default=SOME, metavar="EXPRESSION", help="pytest's -k")
    return out


if __name__ == "__main__":
    sys.exit(_environment.run(main, parser().format_help()))
