"""ci/: the environment of the one-step commands, their arguments, and what they say in trouble."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / "ci"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """ci/_environment.py, on a checkout of its own that has little in it."""
    monkeypatch.syspath_prepend(str(CI))
    module = importlib.import_module("_environment")
    checkout = tmp_path / "checkout"
    for name, text in {
        "pyproject.toml": "[project]",
        "ci/constraints.txt": "torch==2.0",
        "ci/_environment.py": "",
        "csrc/common/isa.cpp": "int main() {}",
        "ktcore/__init__.py": "",
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    monkeypatch.setattr(module, "ROOT", checkout)
    monkeypatch.setattr(module, "ENVIRONMENT", checkout / ".ktcore-env")
    for name in module.BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def work(environment, monkeypatch):
    """What `ready` does, written down instead of done; `work.failure` stops the installation."""

    class Work(list):
        failure: BaseException | None = None

        def make(self):
            self.append("make")
            environment.ENVIRONMENT.mkdir(exist_ok=True)

        def install(self, python, extras, before):
            self.append(f"install {','.join(extras)}")
            if self.failure:
                raise self.failure

        def done(self):
            done = list(self)
            self.clear()
            return done

    work = Work()
    monkeypatch.setattr(environment, "check_compiler", lambda: None)
    monkeypatch.setattr(environment, "make_environment", work.make)
    monkeypatch.setattr(environment, "install", work.install)
    monkeypatch.setattr(environment, "python_of", lambda folder: sys.executable)
    return work


def script(name, monkeypatch):
    """ci/<name>.py as a module."""
    monkeypatch.syspath_prepend(str(CI))
    spec = importlib.util.spec_from_file_location(f"ci_{name}", CI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------ what is done again


def test_second_run_does_nothing(environment, work):
    assert environment.ready("cli") == sys.executable
    assert work.done() == ["make", "install cli"]
    environment.ready("cli")
    assert work.done() == []


def test_tests_after_demo_add_their_packages_and_demo_after_tests_nothing(environment, work):
    environment.ready("cli")
    work.clear()
    environment.ready("test")
    assert work.done() == ["install cli,test"]
    environment.ready("cli")
    assert work.done() == []


@pytest.mark.parametrize("name", ["csrc/common/isa.cpp", "pyproject.toml", "ci/constraints.txt"])
def test_a_change_of_what_is_compiled_or_needed_installs_again(environment, work, name):
    environment.ready("cli")
    work.clear()
    with (environment.ROOT / name).open("a") as file:
        file.write("\n")
    environment.ready("cli")
    assert work.done() == ["install cli"]


def test_a_new_source_file_installs_again(environment, work):
    environment.ready("cli")
    work.clear()
    (environment.ROOT / "csrc/more.h").write_text("")
    environment.ready("cli")
    assert work.done() == ["install cli"]


def test_a_change_of_python_code_does_not(environment, work):
    environment.ready("cli")
    work.clear()
    (environment.ROOT / "ktcore/__init__.py").write_text("x = 1")
    environment.ready("cli")
    assert work.done() == []


def test_another_compiler_installs_again(environment, work, monkeypatch):
    environment.ready("cli")
    work.clear()
    monkeypatch.setenv("CXX", "clang++")
    environment.ready("cli")
    assert work.done() == ["install cli"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_installation_starts_afresh(environment, work, error):
    work.failure = error
    with pytest.raises(type(error)):
        environment.ready("cli")
    work.clear()
    work.failure = None
    environment.ready("cli")
    assert work.done() == ["make", "install cli"]


def test_an_environment_of_another_python_is_made_again(environment, work, monkeypatch):
    environment.ready("cli")
    work.clear()
    monkeypatch.setattr(environment, "identity", lambda: ["another"])
    environment.ready("cli")
    assert work.done() == ["make", "install cli"]


def test_an_environment_whose_python_is_gone_is_made_again(environment, work, monkeypatch):
    environment.ready("cli")
    work.clear()
    monkeypatch.setattr(environment, "python_of", lambda folder: str(folder / "gone"))
    environment.ready("cli")
    assert work.done() == ["make", "install cli"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"status": "installing"}'])
def test_half_an_environment_is_made_again(environment, work, content):
    environment.ENVIRONMENT.mkdir()
    if content is not None:
        (environment.ENVIRONMENT / "ktcore-state.json").write_text(content)
    environment.ready("cli")
    assert work.done() == ["make", "install cli"]


def test_one_set_up_at_a_time(environment):
    with environment.only_one(), open(environment.ROOT / ".ktcore-env.lock", "w") as second:
        assert not environment._lock(second.fileno())
    with open(environment.ROOT / ".ktcore-env.lock", "w") as third:
        assert environment._lock(third.fileno())


# ---------------------------------------------------------------------------------- installing


@pytest.fixture
def pip(environment, monkeypatch):
    """pip's answers, by what the command line contains; the commands as they came."""

    class Pip(list):
        fails: str | None = None
        says = ""

    pip = Pip()

    def logged(command, log):
        pip.append(command)
        if pip.fails and pip.fails in command:
            with log.open("a") as file:
                file.write(pip.says)
            return 1
        with log.open("a") as file:
            file.write("Installing collected packages: cmake\n")
        return 0

    monkeypatch.setattr(environment, "logged", logged)
    monkeypatch.setattr(environment, "pip_version", lambda python: (23, 0))
    environment.ENVIRONMENT.mkdir()
    return pip


def test_installs_the_build_tools_then_ktcore_with_the_pins(environment, pip):
    environment.install("python", ["cli"], {})
    tools, ktcore = pip
    assert set(environment.BUILD_TOOLS) < set(tools)
    assert ktcore[-3:] == ["--no-build-isolation", "--editable", f"{environment.ROOT}[cli]"]
    for command in pip:
        assert command[command.index("--constraint") + 1] == str(CI / "constraints.txt")


def test_an_ancient_pip_is_upgraded_first(environment, pip, monkeypatch):
    monkeypatch.setattr(environment, "pip_version", lambda python: (21, 2))
    environment.install("python", ["cli"], {})
    assert pip[0][-2:] == ["--upgrade", "pip"]
    assert len(pip) == 3


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("ninja: build stopped: subcommand failed.", "made"),
        ("Installing collected packages: torch\nERROR: No space left on device", "installing"),
    ],
)
def test_only_a_failure_that_touched_nothing_keeps_the_environment(environment, pip, said, status):
    environment.write_state(status="installing")
    pip.fails, pip.says = "--editable", said
    with pytest.raises(environment.SetupError, match=r"(?s)pip failed.*setup\.log"):
        environment.install("python", ["cli"], {"identity": ["x"]})
    assert environment.read_state()["status"] == status


def test_pip_version_of_the_real_pip(environment):
    assert environment.pip_version(sys.executable) >= (9, 0)
    assert environment.pip_version("no-such-python") == (0, 0)


@pytest.mark.slow
def test_makes_a_real_environment(environment):
    environment.make_environment()
    python = environment.python_of(environment.ENVIRONMENT)
    status, said = environment.captured([python, "-c", "import sys; print(sys.prefix)"])
    assert status == 0
    assert Path(said.strip()).samefile(environment.ENVIRONMENT)
    assert environment.pip_version(python) > (9, 0)
    environment.write_state(status="made", identity=environment.identity())
    assert environment.why_make(environment.read_state()) is None


@pytest.mark.parametrize(
    ("works", "attempts"),
    [
        ("venv --clear .ktcore-env", 1),
        ("virtualenv", 2),
        ("venv --clear --without-pip", 4),
        ("nothing", 3),
    ],
)
def test_ways_to_make_an_environment(environment, monkeypatch, works, attempts):
    commands = []

    def captured(command):
        line = " ".join(command[2:]).replace(str(environment.ROOT) + os.sep, "")
        commands.append(line)
        ok = line.startswith(works) or (works.endswith("pip") and line.startswith("pip"))
        return (0, "") if ok else (1, "ensurepip is not available")

    monkeypatch.setattr(environment, "captured", captured)
    if works == "nothing":
        with pytest.raises(environment.SetupError, match=r"apt install python3\.\d+-venv"):
            environment.make_environment()
    else:
        environment.make_environment()
    assert len(commands) == attempts


def test_a_long_program_leaves_its_output_in_the_log(environment, tmp_path):
    log = tmp_path / "log"
    code = "import sys; print('to out', flush=True); print('to err', file=sys.stderr); sys.exit(3)"
    assert environment.logged([sys.executable, "-c", code], log) == 3
    assert log.read_text().split() == ["to", "out", "to", "err"]


def test_progress_says_what_goes_on(environment):
    assert environment.readable("Downloading torch-2.13.0.whl (526 MB)").startswith("Downloading")
    started = "Building editable for ktcore (pyproject.toml): started"
    assert environment.readable(started) == "Compiling ktcore"
    assert environment.readable("Successfully uninstalled setuptools-66.1.1") is None


def test_programs_stay_in_the_environment(environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "a mirror")
    found = environment.variables()
    assert "PYTHONPATH" not in found
    assert "PIP_TARGET" not in found
    assert found["PIP_INDEX_URL"] == "a mirror"
    assert found["PATH"].startswith(str(environment.ENVIRONMENT))


# ------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        ("Failed to establish a new connection: [Errno -3] Temporary failure in", "Check the net"),
        ("ssl.SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no such version"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "PARALLEL_LEVEL=1"),
        ("CMake Error at CMakeLists.txt:2 (project)", "KTCORE_BUILD_NATIVE=0"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", "may not be written"),
        # pip also says the second when it could not reach the index: the network is the cause.
        ("Network is unreachable\nNo matching distribution found for cmake", "Check the network"),
    ],
)
def test_diagnosis(environment, output, hint):
    assert hint in environment.diagnose(output)


def test_no_diagnosis_is_made_up(environment):
    assert environment.diagnose("Segmentation fault") is None


def test_without_a_compiler(environment, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "captured", lambda command: (127, "no such file"))
    with pytest.raises(environment.SetupError, match=r"no C\+\+ compiler(.|\n)*BUILD_NATIVE=0"):
        environment.check_compiler()
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(environment.SetupError, match=r"CXX=g\+\+-99 is not there"):
        environment.check_compiler()
    monkeypatch.setenv("KTCORE_BUILD_NATIVE", "0")
    environment.check_compiler()


@pytest.mark.skipif(os.name == "nt", reason="Visual Studio is not called directly")
def test_with_a_compiler_that_is_too_old(environment, monkeypatch, tmp_path):
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho \"unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(environment.SetupError, match=r"(?s)old-c\+\+ cannot.*-std=c\+\+20.*GCC"):
        environment.check_compiler()


def test_native_is_read_as_the_build_reads_it(environment, monkeypatch):
    (override,) = PROJECT["tool"]["scikit-build"]["overrides"]
    without = re.compile(override["if"]["env"]["KTCORE_BUILD_NATIVE"])
    for value in ("0", "off", "OFF", "no", "False", "n", "f", "", "1", "on", "yes", "nope", "00"):
        monkeypatch.setenv("KTCORE_BUILD_NATIVE", value)
        assert environment.native() == (without.search(value) is None), value


@pytest.mark.parametrize("name", ["demo", "test"])
def test_an_old_python_is_told_so(name):
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 1, 'final', 0);"
        f"sys.path.insert(0, {str(CI)!r}); runpy.run_path({str(CI / f'{name}.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{name}.py needs Python 3.10 or newer, this is 3.9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["demo.py", "test.py", "_check_python.py"])
def test_an_old_python_can_read_what_tells_it(name):
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Starred, ast.Match, ast.Nonlocal)
    for node in ast.walk(ast.parse((CI / name).read_text(encoding="utf-8"))):
        assert not isinstance(node, newer), f"{name}:{node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert not node.args.kwonlyargs


# --------------------------------------------------------------------------------- the two scripts


@pytest.fixture
def calls(environment, monkeypatch):
    """The commands that a script runs in a ready environment; `calls.failing` names what fails."""

    class Calls(list):
        failing: str | None = None

    calls = Calls()

    def call(command):
        calls.append(command)
        return 7 if calls.failing and calls.failing in " ".join(command) else 0

    def ready(extra):
        calls.append(extra)
        return os.path.join("bin", "python")

    monkeypatch.setattr(environment, "ready", ready)
    monkeypatch.setattr(environment, "call", call)
    return calls


def test_demo_probes_then_runs_with_its_arguments(calls, monkeypatch):
    assert script("demo", monkeypatch).main(["--prompt", "In the beginning"]) == 0
    extra, probe, run = calls
    assert extra == "cli"
    assert probe[1:] == ["-m", "ktcore.cli", "probe"]
    assert run[3:] == ["run", "--explain", "--compare", "--prompt", "In the beginning"]


def test_demo_hands_on_a_failure(calls, monkeypatch):
    calls.failing = "run"
    assert script("demo", monkeypatch).main([]) == 7


def test_test_runs_the_linters_and_pytest(calls, monkeypatch):
    module = script("test", monkeypatch)
    monkeypatch.setattr(module, "workers", lambda: 3)
    assert module.main([]) == 0
    extra, check, style, clang, tests = calls
    assert extra == "test"
    assert check[2:4] == ["ruff", "check"]
    assert style[2:5] == ["ruff", "format", "--check"]
    assert clang[0] == os.path.join("bin", "clang-format")
    assert any(name.endswith("isa.cpp") for name in clang)
    assert tests[2:] == ["pytest", "-m", "not slow", "-n", "3", "--dist", "worksteal"]


@pytest.mark.parametrize(("usable", "count", "workers"), [(2, 64, 2), (64, 64, 8), (None, 4, 4)])
def test_tests_are_shared_out_over_the_cpus_of_this_process(monkeypatch, usable, count, workers):
    module = script("test", monkeypatch)
    monkeypatch.setattr(module.os, "cpu_count", lambda: count)
    if usable is None:  # as on Windows
        monkeypatch.delattr(module.os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(
            module.os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False
        )
    assert module.workers() == workers


def test_test_goes_on_after_a_failure_and_reports_it(calls, monkeypatch, capsys):
    calls.failing = "ruff"
    assert script("test", monkeypatch).main([]) == 1
    assert len(calls) == 5
    assert "failed: ruff check, ruff format" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--", "-k", "moe"], ["-k", "moe"]])
def test_test_with_options_runs_pytest_alone(calls, monkeypatch, arguments):
    assert script("test", monkeypatch).main(arguments) == 0
    assert [c[2:] for c in calls[1:]] == [["pytest", "-m", "not slow", "-k", "moe"]]


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (lambda: 5, 5, ""),
        ("SetupError", 1, "error: reason"),
        (KeyboardInterrupt, 130, "interrupted"),
    ],
)
def test_exit_status(environment, monkeypatch, capsys, outcome, status, said):
    def main(arguments):
        assert arguments == ["--prompt"]
        if outcome == "SetupError":
            raise environment.SetupError("reason")
        return outcome() if outcome is not KeyboardInterrupt else (_ for _ in ()).throw(outcome())

    monkeypatch.setattr(sys, "argv", ["ci/demo.py", "--prompt"])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert environment.run(main, "usage") == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "test"])
def test_help_sets_nothing_up(name):
    command = [sys.executable, str(CI / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python3 ci/{name}.py" in done.stdout
    assert "==>" not in done.stdout


# ------------------------------------------------------------------- what is written down elsewhere


def requirements():
    project = PROJECT["project"]
    lists = [PROJECT["build-system"]["requires"], project["dependencies"]]
    lists += project["optional-dependencies"].values()
    found = [Requirement(text) for texts in lists for text in texts]
    return sorted({str(r) for r in found if r.name != "ktcore"})


def pins():
    lines = (CI / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate()}


@pytest.mark.parametrize("text", requirements())
def test_every_requirement_has_a_pin_that_satisfies_it(text):
    wanted = Requirement(text)
    (pin,) = pins()[wanted.name].specifier
    assert pin.operator == "=="
    assert wanted.specifier.contains(pin.version)


def test_the_build_tools_are_those_of_the_project(environment):
    required = {Requirement(text).name for text in PROJECT["build-system"]["requires"]}
    extra = {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"]["test"]}
    assert required <= set(environment.BUILD_TOOLS) <= extra


def test_ci_runs_the_tests():
    file = ROOT / ".ci" / "run"
    if not file.exists():
        pytest.skip("not part of a source distribution")
    if os.name != "nt":
        assert os.access(file, os.X_OK)
    assert "python3 ci/test.py" in file.read_text(encoding="utf-8")


def commands(name):
    """The lines of a document's fenced blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.S | re.M)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_documented_commands_exist():
    found = {
        name: [c for c in commands(name) if re.match(r"python3? (ci|examples)/", c)]
        for name in ("README.md", "CONTRIBUTING.md")
    }
    assert found["CONTRIBUTING.md"]
    for name, lines in found.items():
        for line in lines:
            assert (ROOT / line.split()[1]).is_file(), f"{name}: {line}"
