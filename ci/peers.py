"""Install what `ktcore bench --peers` measures ktcore beside.

    python3 ci/peers.py

Brings .ktcore-env up to date, as ci/test.py does, and adds ONNX Runtime, torchao and kt-kernel;
builds llama.cpp (ci/llama_cpp.py, ten to thirty minutes the first time) and a program that computes
one layer with it; and prints the command that measures. Linux, with a C++ compiler.
"""

import sys

import _check_python  # noqa: F401
import _environment
import llama_cpp
from _environment import SetupError

PACKAGES = ("onnxruntime==1.32.0", "onnx==1.23.2", "torchao==0.18.0")
ALONE = "kt-kernel==0.7.2"  # without what it wants for itself: it is given its weights here
SOURCE = _environment.ROOT / "ci" / "peers" / "ggml_layer.cpp"
PROGRAM = llama_cpp.PEERS / "ggml-layer"


def install(python):
    pip = [python, "-m", "pip", "install", "--constraint", str(_environment.CONSTRAINTS)]
    llama_cpp.run([*pip, *PACKAGES])
    try:
        llama_cpp.run([*pip, "--no-deps", ALONE])
    except SetupError as error:  # it has packages for few systems
        print(f"    kt-kernel is left out: {error}", file=sys.stderr)


def build_program():
    if PROGRAM.is_file() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    built = llama_cpp.BUILD / "ggml" / "src"
    include = llama_cpp.SOURCE / "vendor" / "llama.cpp" / "ggml" / "include"
    libraries = [str(built / f"lib{name}.a") for name in ("ggml", "ggml-cpu", "ggml-base")]
    llama_cpp.run(
        [_environment.find_compiler(), "-std=c++17", "-O2", f"-I{include}", str(SOURCE),
         "-o", str(PROGRAM), *libraries, "-fopenmp", "-ldl", "-lpthread"]
    )  # fmt: skip
    (llama_cpp.PEERS / "llama.cpp-version").write_text(llama_cpp.VERSION, "utf-8")


def main(arguments):
    if arguments:
        raise SetupError(f"expected no arguments, got {' '.join(arguments)}")
    if sys.platform != "linux":
        raise SetupError("the peers that are built from source are measured on Linux alone")
    python = _environment.ready("test")
    llama_cpp.PEERS.mkdir(exist_ok=True)
    with _environment.step("Installing ONNX Runtime, torchao and kt-kernel"):
        install(python)
    # With the environment's Python, beside which CMake is.
    if _environment.call([python, str(_environment.ROOT / "ci" / "llama_cpp.py")]):
        raise SetupError("llama.cpp could not be built")
    with _environment.step("Building the program for llama.cpp's layer"):
        build_program()
    print(f"\n{python} -m ktcore.cli bench --peers --format bf16 --format int4 --format q4_k")
    return 0


if __name__ == "__main__":
    sys.exit(_environment.run(main, __doc__))
