"""The private environment of ci/demo.py and ci/test.py: `.ktcore-env/` in the checkout.

`ready` makes it, or brings it up to date, and leaves it alone while nothing that went into it has
changed. It can be stopped at any moment and run again. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from _diagnosis import WITHOUT, diagnose

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".ktcore-env"
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
BUILD_TOOLS = ("scikit-build-core", "pybind11", "cmake", "ninja")
# What changes the build, beside the files.
BUILD_VARIABLES = ("KTCORE_BUILD_NATIVE", "CC", "CXX", "CFLAGS", "CXXFLAGS", "CMAKE_ARGS")
OLDEST_PIP = (22, 0)  # for editable installs of pyproject.toml projects
WINDOWS = os.name == "nt"


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


# ---------------------------------------------------------------------------------------- talking


def announce(text: str) -> None:
    print(f"\n==> {text}", flush=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    announce(title)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.1f} s", flush=True)


def run(main: Callable[[list[str]], int], usage: str) -> int:
    """Run a script's `main` on the command line; its exit status."""
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(usage.strip())
        return 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a compiler's quotes must not be fatal anywhere
    try:
        return main(arguments)
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------- running programs


def python_of(environment: Path) -> str:
    return str(environment / ("Scripts/python.exe" if WINDOWS else "bin/python"))


def variables() -> dict[str, str]:
    """This process's variables, less those that would lead Python or pip out of the environment."""
    astray = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON")
    out = {name: value for name, value in os.environ.items() if name not in astray}
    programs = str(Path(python_of(ENVIRONMENT)).parent)
    out.update(
        PATH=programs + os.pathsep + out.get("PATH", os.defpath),
        VIRTUAL_ENV=str(ENVIRONMENT),
        PIP_USER="0",
        PIP_NO_INPUT="1",
        PIP_PROGRESS_BAR="off",  # it is for terminals, and this goes to a file
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    return out


def call(command: list[str]) -> int:
    """Run a program of the environment on this terminal; its exit status."""
    process = subprocess.Popen(command, cwd=ROOT, env=variables())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it, too: let it clean up
        raise


def captured(command: list[str]) -> tuple[int, str]:
    """Exit status and output of a short program."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=variables(),
            check=False,
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def logged(command: list[str], log: Path) -> int:
    """Run a long program, its output to a file, with a sign of life here; its exit status."""
    latest: deque[str] = deque(maxlen=1)
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def read() -> None:
        assert process.stdout is not None
        with log.open("ab") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if text := readable(line.decode(errors="replace").strip()):
                    latest.append(text)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait(process, latest)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        reader.join()
    return process.returncode


def readable(line: str) -> str | None:
    """A line of pip's as a sign of life; None for one that does not say what goes on."""
    silent = ("Attempting", "Found existing", "Uninstalling", "Successfully uninst", "WARNING")
    if line.startswith(silent):
        return None
    return "Compiling ktcore" if line.startswith("Building editable for ktcore") else line


def wait(process: subprocess.Popen, latest: deque[str]) -> None:
    """Until a program ends, show its latest line: in place on a terminal, else now and then."""
    live = sys.stdout.isatty()
    start = shown = time.monotonic()
    while True:
        try:
            process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if live or now - shown >= 20:
            shown = now
            line = f"    {now - start:4.0f} s  {latest[0] if latest else ''}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:{width}}" if live else line[:110], end="" if live else "\n")
            sys.stdout.flush()
    if live:
        print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


# ------------------------------------------------------------------------------- what is installed


def fingerprint() -> str:
    """Names everything that an installation depends on, Python code aside: that is not copied."""
    digest = hashlib.sha256()
    named = ("pyproject.toml", "ci/constraints.txt", "ci/_environment.py")
    files = [ROOT / name for name in named]
    files += (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    for name in BUILD_VARIABLES:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    return digest.hexdigest()


def identity() -> list[str]:
    """Names the Python that an environment is made of, and the place it cannot be moved from."""
    return [sys.version, platform.machine(), os.path.realpath(sys.base_prefix), str(ENVIRONMENT)]


def _state_file() -> Path:
    return ENVIRONMENT / "ktcore-state.json"


def read_state() -> dict:
    """What `write_state` wrote; empty where there is no environment, or half of one."""
    try:
        state = json.loads(_state_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(**state: object) -> None:
    temporary = _state_file().with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
    os.replace(temporary, _state_file())


def why_make(state: dict) -> str | None:
    """Why the environment must be made (again); None if it can be used."""
    if not ENVIRONMENT.exists():
        return "new"
    if state.get("status") not in ("made", "installed"):
        return "the last set-up was interrupted"
    if state.get("identity") != identity():
        return "it belongs to another Python or place"
    if captured([python_of(ENVIRONMENT), "-c", ""])[0]:
        return "its Python does not start"
    return None


def installed(state: dict, extra: str, wanted: str) -> bool:
    """Whether the environment has this version of ktcore with an extra's packages."""
    return (
        state.get("status") == "installed"
        and state.get("fingerprint") == wanted
        and extra in state.get("extras", ())
    )


# ---------------------------------------------------------------------------------- making it ready


def ready(extra: str) -> str:
    """The path of a Python that has ktcore (editable, this checkout) with an extra's packages.

    Raises SetupError.
    """
    try:
        with only_one():
            return _ready(extra)
    except OSError as error:
        raise SetupError(f"{error}. The set-up writes to {ROOT} only.") from error


def _ready(extra: str) -> str:
    state, wanted = read_state(), fingerprint()
    why = why_make(state)
    python = python_of(ENVIRONMENT)
    if why is None and installed(state, extra, wanted):
        print(f"==> {ENVIRONMENT.name} is up to date", flush=True)
        return python
    check_compiler()
    if why is not None:
        with step(f"Making a Python environment in {ENVIRONMENT.name} ({why})"):
            make_environment()
            state = {"status": "made", "identity": identity()}
            write_state(**state)
    # The test extra includes cli; whatever was there stays up to date.
    extras = sorted({extra, *state.get("extras", ()), *(("cli",) if extra == "test" else ())})
    with step(f"Installing ktcore[{','.join(extras)}]; the first time takes some minutes"):
        write_state(status="installing", identity=identity())
        install(python, extras, state)
        write_state(status="installed", identity=identity(), fingerprint=wanted, extras=extras)
    return python


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Two set-ups at a time would undo each other's work: the second waits."""
    with open(ROOT / f"{ENVIRONMENT.name}.lock", "w") as file:
        waiting = False
        while not _lock(file.fileno()):
            if not waiting:
                announce("Waiting for another set-up of this checkout to end")
            waiting = True
            time.sleep(0.5)
        yield  # closing the file, or the end of this process, unlocks it


def _lock(handle: int) -> bool:
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_environment() -> None:
    """An empty environment with pip, by whichever way this Python offers. Raises SetupError."""
    with contextlib.suppress(OSError):
        _state_file().unlink()
    target = str(ENVIRONMENT)
    output = ""
    for commands in (
        [["-m", "venv", "--clear", target]],
        # Debian and Ubuntu split venv off: virtualenv, or a pip from elsewhere, does as well.
        [["-m", "virtualenv", "--clear", target]],
        [
            ["-m", "venv", "--clear", "--without-pip", target],
            ["-m", "pip", "--python", python_of(ENVIRONMENT), "install", "pip"],
        ],
    ):
        for command in commands:
            status, said = captured([sys.executable, *command])
            output += said
            if status:
                break
        else:
            return
    if hint := diagnose(output, only=("disk", "permission")):
        raise SetupError(hint)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise SetupError(
        f"this Python ({sys.executable}) cannot make environments: it has neither a whole venv "
        f"module nor virtualenv nor pip. On Debian and Ubuntu: sudo apt install "
        f"python{version}-venv (or python3-venv), then run this again. They said:\n"
        f"{tail(output, 8)}"
    )


def install(python: str, extras: list[str], before: dict) -> None:
    """pip install, editable, with the kernels compiled. Raises SetupError."""
    log = ENVIRONMENT / "setup.log"
    log.unlink(missing_ok=True)
    pip = [python, "-m", "pip", "install", "--constraint", str(CONSTRAINTS)]
    commands = []
    if pip_version(python) < OLDEST_PIP:
        commands.append([*pip, "--upgrade", "pip"])
    # Building without isolation has the pinned tools, and compiles only what has changed.
    commands.append([*pip, *BUILD_TOOLS])
    project = f"{ROOT}[{','.join(extras)}]"
    commands.append([*pip, "--no-build-isolation", "--editable", project])
    for command in commands:
        begin = log.stat().st_size if log.exists() else 0
        if logged(command, log) == 0:
            continue
        said = log.read_bytes()[begin:].decode(errors="replace")
        if "Installing collected packages" not in said:
            # Nothing has been touched yet, so the next run need not start afresh.
            write_state(**{**before, "status": "made"})
        hint = diagnose(said) or "The reason should be above."
        raise SetupError(f"pip failed.\n\n{tail(said, 25)}\n\n{hint}\nAll of its output: {log}")


def pip_version(python: str) -> tuple[int, ...]:
    found = re.search(r"pip (\d+)\.(\d+)", captured([python, "-m", "pip", "--version"])[1])
    return tuple(map(int, found.groups())) if found else (0, 0)


def tail(text: str, lines: int) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


# ------------------------------------------------------------------------------------ the compiler


def native() -> bool:
    """Whether the kernels are to be compiled, read as pyproject.toml reads it."""
    return os.environ.get("KTCORE_BUILD_NATIVE", "").lower() not in (
        "0", "n", "no", "off", "f", "false",
    )  # fmt: skip


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take; on Windows the folder of Visual Studio."""
    if named := os.environ.get("CXX"):
        return shutil.which(named.split()[0])
    if WINDOWS:
        programs = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
        finder = Path(programs) / "Microsoft Visual Studio/Installer/vswhere.exe"
        component = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
        wanted = ["-latest", "-products", "*", "-requires", component]
        status, said = captured([str(finder), *wanted, "-property", "installationPath"])
        return said.strip() or None if status == 0 else shutil.which("cl")
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def check_compiler() -> None:
    """Raises SetupError, before any download, if the kernels cannot be compiled."""
    if not native():
        return
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named} is not there" if named else "there is no C++ compiler"
        how = (
            'Install "Desktop development with C++" of the Visual Studio Build Tools.'
            if WINDOWS
            else "On Debian and Ubuntu: sudo apt install g++."
        )
        raise SetupError(f"{missing}. {how} {WITHOUT}")
    if WINDOWS:
        return
    flags = ["-std=c++20"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mavxvnni")
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", str(ROOT / "csrc/common/isa.cpp")]
    status, said = captured([*command, f"-I{ROOT / 'csrc'}"])
    if status:
        raise SetupError(
            f"the C++ compiler {compiler} cannot compile ktcore's kernels:\n{tail(said, 8)}\n"
            f"GCC 11, Clang 12 and newer can; CXX=g++-12 names another. {WITHOUT}"
        )
