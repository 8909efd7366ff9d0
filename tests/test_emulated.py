"""The AVX-512 and AMX kernels' source on a processor without these: csrc/*/emulated.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ktcore import _native

pybind11 = pytest.importorskip("pybind11", reason="builds an extension")
ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_moe", "test_linear", "test_route", "test_formats", "test_threads")

# Puts the emulating extension where `import ktcore` finds it, then runs the tests with it.
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ktcore._C", sys.argv[1])
sys.modules["ktcore._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ktcore._C"])
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def _not_on_hardware() -> list[str]:
    """The instruction sets that can be emulated and that this processor does not have."""
    isas = _native.ext.isas() if _native.ext is not None else []
    return [i["name"] for i in isas if i["backend"] in ("avx512", "amx") and not i["supported"]]


@pytest.mark.skipif(_native.ext is None, reason="no native extension, so maybe no compiler")
@pytest.mark.skipif(
    not _not_on_hardware(), reason="this processor runs the AVX-512 and AMX kernels themselves"
)
def test_source_emulated(tmp_path):
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    # (AMX takes all of AVX-512 that a processor may lack.)
    emulated = "AMX" if _not_on_hardware() == ["amx"] else "AVX512"
    options = (
        *("-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-DSKBUILD=ON"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DKTCORE_EMULATE_{emulated}=ON"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    build = (cmake, "--build", str(tmp_path), "--parallel", "2", "--target", "_C")
    for command in ((cmake, *options), build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = tmp_path.glob("_C*")
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    names = " or ".join(_not_on_hardware())
    quiet = ("-q", "-k", names, "-m", "not slow", "-p", "no:cacheprovider")
    command = (sys.executable, "-c", RUN, str(extension), *quiet, *files)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    passed = int(last.split(" passed")[0].split()[-1])
    assert passed > 1000, last
