"""Source distribution, wheel and editable install: the same package from each, from anywhere.

Everything is built and installed from what is at hand, without a network. The kernels are compiled
once, from the source distribution; what does not depend on them is tested on wheels without them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("build", reason="packages are built with the packages of the test extra")
pytest.importorskip("scikit_build_core")
pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "ktcore", "backends", "dispatch", "tests", "ci", "docs", "examples")
FILES = (
    *("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(".gitignore", ".clang-format"),
)
# What must not get into any package.
STRAY = (
    *("build/cp311/_C.so", ".ktcore-env/bin/python", ".venv/bin/python", "dist/old.whl", ".ci/run"),
    *("ktcore/_C.so", "ktcore/_C.pyd", "ktcore/__pycache__/x.pyc", ".git/config", ".ruff_cache/x"),
    *(".ktcore-env.lock", ".hypothesis/x", ".github/workflows/x.yml", "docs/benchmarks/x.json"),
)
SOURCES = {"ktcore": "ktcore", "backends": "ktcore/backends", "dispatch": "ktcore/dispatch"}
EXTENSION = re.compile(r"ktcore/_C\..*(so|pyd)")

# Run by an installed package's Python; prints what the tests look at.
REPORT = """
import importlib.resources, json, os, pkgutil, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ktcore
    from ktcore import _native, ops
from ktcore.weights import ExpertWeights

def files(folder, path=""):
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}" if path else entry.name
        if entry.is_dir():
            yield from files(entry, name)
        else:
            yield name

generator = torch.Generator().manual_seed(0)
def random(*shape):
    return torch.randn(shape, generator=generator)

experts = ExpertWeights.from_dense(
    random(4, 64, 96) / 10, random(4, 64, 96) / 10, random(4, 96, 64) / 8, "int8"
)
x, weights = random(3, 96), torch.tensor([[0.5, 0.5]] * 3)
ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
chosen = ktcore.explain("moe", format="int8", tokens=3, hidden_size=96, dtype="float32").chosen
got = ops.moe(x, experts, ids, weights)
with ktcore.use("reference"):
    want = ops.moe(x, experts, ids, weights)
print(json.dumps({
    "where": [os.path.realpath(p) for p in ktcore.__path__],
    "version": ktcore.__version__,
    "warnings": [str(w.message) for w in caught],
    "native": None if _native.ext is None else [i["name"] for i in _native.ext.isas()
                                                if i["supported"]],
    "modules": sorted(m.name for m in pkgutil.walk_packages(ktcore.__path__, "ktcore.")),
    "data": sorted(files(importlib.resources.files("ktcore") / "data")),
    "typed": (importlib.resources.files("ktcore") / "py.typed").is_file(),
    "chosen": chosen,
    "error": ((got - want).norm() / want.norm()).item(),
    "tolerance": experts.format.tolerance,
}))
"""


def environment(native: bool) -> dict[str, str]:
    """This process's variables, less what would change the build or lead an import astray."""
    dropped = ("PYTHONPATH", "KTCORE_BACKEND", "KTCORE_CPU_DISABLE", "CMAKE_ARGS", "PIP_TARGET")
    out = {k: v for k, v in os.environ.items() if k not in dropped}
    # Debug: what is in a package does not depend on it, and it compiles in a third of the time.
    speed = {"SKBUILD_CMAKE_BUILD_TYPE": "Debug"}
    return {**out, **speed, "KTCORE_BUILD_NATIVE": "1" if native else "0"}


def call(*command: object, native: bool = False, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment(native),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(kind: str, source: Path, out: Path, *, native: bool = False) -> Path:
    """Build "sdist" or "wheel" of a source folder; the file it makes."""
    call(
        *(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source),
        native=native,
    )
    (made,) = out.iterdir()
    return made


def on_disk(root: Path) -> set[str]:
    """The package's files in a clean checkout, by their path in the wheel."""
    found = set()
    for folder, target in SOURCES.items():
        for path in (root / folder).rglob("*"):
            if path.is_file():
                found.add(f"{target}/{path.relative_to(root / folder).as_posix()}")
    return found


def inside(wheel: Path) -> set[str]:
    """The package's files in a wheel, without its metadata and the extension."""
    names = zipfile.ZipFile(wheel).namelist()
    return {n for n in names if n.startswith("ktcore/") and not EXTENSION.fullmatch(n)}


@dataclass(frozen=True)
class Installed:
    """An environment with ktcore and, of this one, everything but ktcore."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @classmethod
    def make(cls, folder: Path) -> Installed:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        (packages,) = folder.glob("Lib/site-packages" if os.name == "nt" else "lib/*/site-packages")
        # Last on the path: the ktcore installed there wins. Editable installs here do not come
        # along, because path files of these folders are not read.
        shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (packages / "shared.pth").write_text("\n".join(shared))
        return cls(folder)

    def pip(self, *what: object, native: bool = False) -> None:
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet")
        call(*pip, *options, *what, native=native)

    def report(self, away: Path) -> dict:
        return json.loads(call(self.python, "-c", REPORT, cwd=away).splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this one, clean: it stays as it is while somebody edits this one."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.pyc")
    for name in (*FOLDERS, *FILES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif name in FILES:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """Made where work has left its traces."""
    used = tmp_path_factory.mktemp("used") / "checkout"
    shutil.copytree(checkout, used)
    for name in STRAY:
        (used / name).parent.mkdir(parents=True, exist_ok=True)
        (used / name).write_text("stray")
    return build("sdist", used, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def plain_wheel(unpacked, tmp_path_factory) -> Path:
    """Without kernels."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def native_wheel(unpacked, tmp_path_factory) -> Path:
    """With kernels: compiled here, once."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        pytest.skip("there is no C++ compiler")
    return build("wheel", unpacked, tmp_path_factory.mktemp("native"), native=True)


@pytest.fixture(scope="module")
def plain(plain_wheel, tmp_path_factory) -> dict:
    installed = Installed.make(tmp_path_factory.mktemp("plain-env"))
    installed.pip(plain_wheel)
    return installed.report(tmp_path_factory.mktemp("away"))


@pytest.fixture(scope="module")
def native(native_wheel, tmp_path_factory) -> dict:
    installed = Installed.make(tmp_path_factory.mktemp("native-env"))
    installed.pip(native_wheel)
    return installed.report(tmp_path_factory.mktemp("away"))


# ----------------------------------------------------------------------------------- what is inside


def test_the_source_distribution_is_the_checkout(unpacked, checkout):
    def contents(root):
        found = {
            p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()
        }
        return {n: data for n, data in found.items() if not n.startswith("docs/benchmarks/")}

    assert contents(unpacked) == {
        **contents(checkout),
        "PKG-INFO": (unpacked / "PKG-INFO").read_bytes(),
    }


def test_the_wheel_has_the_package_and_nothing_else(plain_wheel, unpacked):
    assert inside(plain_wheel) == on_disk(unpacked)
    names = zipfile.ZipFile(plain_wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"ktcore", _dist_info(names)}
    assert "ktcore/py.typed" in names
    assert "ktcore/data/kjv-moe/model.safetensors" in names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_checkout_and_source_distribution_make_the_same_wheel(checkout, plain_wheel, tmp_path):
    direct = build("wheel", checkout, tmp_path)
    assert direct.name == plain_wheel.name

    def contents(wheel):
        archive = zipfile.ZipFile(wheel)
        return {n: archive.read(n) for n in archive.namelist()}

    assert contents(direct) == contents(plain_wheel)


def test_kernels_add_one_file(native_wheel, plain_wheel):
    names = zipfile.ZipFile(native_wheel).namelist()
    assert inside(native_wheel) == inside(plain_wheel)
    assert len([n for n in names if EXTENSION.fullmatch(n)]) == 1
    assert {n.split("/")[0] for n in names} == {"ktcore", _dist_info(names)}
    assert not native_wheel.name.endswith("-any.whl")
    assert plain_wheel.name.endswith("-py3-none-any.whl")


def _dist_info(names: list[str]) -> str:
    return next(n.split("/")[0] for n in names if ".dist-info/" in n)


def test_the_entry_points(plain_wheel):
    archive = zipfile.ZipFile(plain_wheel)
    text = archive.read(f"{_dist_info(archive.namelist())}/entry_points.txt").decode()
    assert "ktcore = ktcore.cli:main" in text
    assert "ktcore-probe = ktcore.cli:probe_main" in text


# ------------------------------------------------------------------------------------- what it does


def test_a_wheel_computes_on_its_kernels(native, tmp_path_factory):
    assert native["warnings"] == []
    assert native["native"] is not None
    if native["native"]:
        assert native["chosen"] != "reference"
    assert native["error"] <= native["tolerance"]
    for name in ("ktcore.backends.avx2", "ktcore.backends.reference", "ktcore.dispatch.probe"):
        assert name in native["modules"]
    assert "kjv-moe/model.safetensors" in native["data"]
    assert native["typed"]
    assert not any(Path(p).is_relative_to(ROOT) for p in native["where"])


def test_without_a_compiler_everything_runs_on_the_reference(plain):
    assert plain["native"] is None
    assert plain["chosen"] == "reference"
    assert plain["error"] == 0
    assert any("ktcore._C" in w for w in plain["warnings"])


def test_kernels_change_nothing_else(native, plain):
    same = ("version", "data", "typed")
    assert {k: native[k] for k in same} == {k: plain[k] for k in same}
    assert set(native["modules"]) - {"ktcore._C"} == set(plain["modules"])


def test_an_editable_install_is_the_same_package(unpacked, plain, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    installed = Installed.make(tmp_path / "env")
    installed.pip("--editable", source)
    report = installed.report(tmp_path)
    assert any(Path(p).is_relative_to(source) for p in report["where"])
    report["modules"] = without_self(report["modules"])
    for key in ("version", "modules", "data", "typed", "chosen", "native", "error"):
        assert report[key] == plain[key], key

    # Edits, and files that are new, need no installation.
    (source / "ktcore/later.py").write_text("x = 1\n")
    (source / "backends/later").mkdir()
    (source / "backends/later/__init__.py").write_text("from ktcore.later import x\n")
    code = "import ktcore.backends.later as m; print(m.x)"
    assert call(installed.python, "-c", code, cwd=tmp_path).strip() == "1"
    assert "ktcore.backends.later" in installed.report(tmp_path)["modules"]


def without_self(modules: list[str]) -> list[str]:
    """An editable package whose parts lie side by side also finds itself inside: let it."""
    return [m for m in modules if not m.startswith("ktcore.ktcore")]


@pytest.mark.slow
def test_an_editable_install_computes_on_its_kernels(unpacked, native, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    installed = Installed.make(tmp_path / "env")
    installed.pip("--editable", source, native=True)
    report = installed.report(tmp_path)
    report["modules"] = without_self(report["modules"])
    for key in ("version", "modules", "data", "typed", "chosen", "native", "error", "warnings"):
        assert report[key] == native[key], key
