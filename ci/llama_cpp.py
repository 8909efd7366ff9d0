"""Build llama.cpp's tools from the source package of llama-cpp-python, to compare with.

    python3 ci/llama_cpp.py

Fetches the package with pip, builds llama-bench, llama-perplexity, llama-quantize, llama-imatrix
and llama-tokenize for this processor in .ktcore-peers/, and prints where they are. The first time
takes ten to thirty minutes on two cores, the next seconds. Needs pip, CMake and a C++ compiler.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import _check_python  # noqa: F401
import _environment
from _diagnosis import diagnose
from _environment import SetupError

VERSION = "0.3.36"  # of llama-cpp-python, which holds llama.cpp's source
TOOLS = (
    *("llama-bench", "llama-perplexity", "llama-quantize"),
    *("llama-imatrix", "llama-tokenize"),
)
PEERS = _environment.ROOT / ".ktcore-peers"
SOURCE = PEERS / f"llama_cpp_python-{VERSION}"
BUILD = PEERS / f"llama.cpp-{VERSION}"
LOG = PEERS / "llama.cpp.log"
# The processor's own instructions, one static program each, nothing that needs a network.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def tools():
    """The programs by name, fetched and built where that is not done. Raises SetupError."""
    programs = {name: BUILD / "bin" / name for name in TOOLS}
    if _environment.WINDOWS:
        programs = {name: path.with_suffix(".exe") for name, path in programs.items()}
    if all(path.is_file() for path in programs.values()):
        return programs
    PEERS.mkdir(exist_ok=True)
    if not SOURCE.is_dir():
        with _environment.step(f"Fetching the source of llama-cpp-python {VERSION}"):
            fetch()
    with _environment.step("Building llama.cpp; the first time takes many minutes"):
        build()
    return programs


def fetch():
    """The unpacked source, complete or not there."""
    with tempfile.TemporaryDirectory(dir=PEERS) as folder:
        package = f"llama-cpp-python=={VERSION}"
        download = ("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder)
        run([sys.executable, "-m", "pip", *download, package])
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, **safe)
        os.replace(Path(folder) / SOURCE.name, SOURCE)


def build():
    beside = os.path.dirname(sys.executable)
    cmake = shutil.which("cmake", path=beside) or shutil.which("cmake")
    if cmake is None:
        raise SetupError("CMake is missing: `pip install cmake`, or your system's package.")
    source = str(SOURCE / "vendor" / "llama.cpp")
    run([cmake, "-S", source, "-B", str(BUILD), *OPTIONS, *for_compiler()])
    parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    run([cmake, "--build", str(BUILD), "--config", "Release", "--parallel", parallel,
         "--target", *TOOLS])  # fmt: skip


def for_compiler():
    """GCC 12 takes the set-up of AMX tiles for stores that nobody reads, and leaves them out: the
    program then dies of an illegal instruction."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return ()
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    gcc = b"Free Software Foundation" in said
    return ("-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse",) if gcc else ()


def run(command):
    LOG.write_bytes(b"")
    if _environment.logged(command, LOG):
        output = LOG.read_text(encoding="utf-8", errors="replace")
        hint = diagnose(output, only=("disk", "certificate", "network", "version", "memory"))
        end = "\n".join(output.splitlines()[-25:])
        raise SetupError(f"{Path(command[0]).name} failed:\n{end}\n{hint or ''}\nAll of it: {LOG}")


def main(arguments):
    if arguments:
        raise SetupError(f"expected no arguments, got {' '.join(arguments)}")
    for path in tools().values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(_environment.run(main, __doc__))
