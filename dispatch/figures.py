"""The machine's measured limits: read bandwidth and dot-product peaks, per thread count.

`ktcore-probe --bench` measures them and keeps them in the user's cache folder, for the processor
they were measured on; without them selection works with estimates.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ktcore import _native
from ktcore.dispatch.machine import Machine

KINDS = ("int8", "bf16", "f32")  # of dot products

# Of a modest core: only the ratios matter, to rank backends until the machine is measured.
ESTIMATED_READ = 12.0
ESTIMATED_PEAK = {
    "avx2": {"int8": 110.0, "bf16": 50.0, "f32": 50.0},
    "avx2_vnni": {"int8": 220.0, "bf16": 110.0, "f32": 50.0},
    "avx512": {"int8": 150.0, "bf16": 70.0, "f32": 70.0},
    "avx512_vnni": {"int8": 400.0, "bf16": 200.0, "f32": 70.0},
    "avx512_bf16": {"int8": 400.0, "bf16": 200.0, "f32": 70.0},
    "amx": {"int8": 4000.0, "bf16": 2000.0, "f32": 70.0},
}


@dataclass(frozen=True)
class Figures:
    """GB/s per thread count, and Gop/s per instruction set, kind and thread count."""

    cpu: str
    measured_at: str
    read_gbps: dict[str, float]
    peak_gops: dict[str, dict[str, dict[str, float]]]


def cache_folder() -> Path:
    """Where ktcore keeps what it may lose: KTCORE_CACHE_DIR, else the system's convention."""
    if own := os.environ.get("KTCORE_CACHE_DIR"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData/Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ktcore"


def processor_key(machine: Machine) -> str:
    """Names the processor: a home folder that moves to another one must not take figures along."""
    from ktcore.dispatch.probe import cpu_brand

    usable = [n for n, f in machine.cpu.features.items() if f.usable]
    return f"{cpu_brand()} | {machine.cpu.logical_cores} CPUs | {' '.join(usable)}"


def path() -> Path:
    """The file that keeps the figures."""
    return cache_folder() / "figures.json"


def load(machine: Machine) -> Figures | None:
    """The figures measured on this processor, None if there are none."""
    try:
        stored = json.loads(path().read_text())
        figures = Figures(**stored)
        _check(figures)
    except (OSError, ValueError, TypeError, AttributeError):  # none, or a damaged file
        return None
    return figures if figures.cpu == processor_key(machine) else None


def _check(figures: Figures) -> None:
    """Raises if a stored file does not hold what `measure` stores."""
    tables = [figures.read_gbps, *(t for k in figures.peak_gops.values() for t in k.values())]
    for table in tables:
        if not table or any(int(n) < 1 or not value > 0 for n, value in table.items()):
            raise ValueError("expected a positive figure per thread count")


def load_cached(machine: Machine) -> Figures | None:
    """`load`, remembered per machine: selection asks often, the file changes rarely."""
    global _loaded
    if _loaded is None or _loaded[0] is not machine:
        _loaded = (machine, load(machine))
    return _loaded[1]


_loaded: tuple[Machine, Figures | None] | None = None


def read_bytes(machine: Machine) -> int:
    """How much a plain loop reads to tell the memory's bandwidth.

    Of four times the last-level cache, that cache still serves a part: up to a sixth more than
    memory gives.
    """
    return min(1 << 30, max(1 << 28, machine.memory.available_bytes // 8))


def measure(machine: Machine, progress: Callable[[str, int, int], None] | None = None) -> Figures:
    """Measure and store the limits for 1 to all threads. Takes some seconds.

    `progress` is told what is measured next, how many measurements are done, and of how many.

    Raises:
        RuntimeError: there is no native extension.
        OSError: the cache folder cannot be written to.
    """
    if _native.ext is None:
        raise RuntimeError(f"cannot measure: {_native.why}")
    path().parent.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    most = _native.available_threads()
    counts = sorted({1, *(1 << i for i in range(1, 11) if 1 << i < most), most})
    read: dict[str, float] = {}
    peak: dict[str, dict[str, dict[str, float]]] = {}
    isas = [
        isa["name"]
        for isa in _native.ext.isas()
        if isa["supported"] and not machine.cpu.missing(*isa["requires"])
    ]
    size = read_bytes(machine)
    done, total = 0, len(counts) * (1 + len(isas) * len(KINDS))

    def step(what: str, threads: int) -> None:
        nonlocal done
        if progress:
            progress(f"{what}, {threads} thread{'s' * (threads > 1)}", done, total)
        done += 1

    for threads in counts:
        step("read bandwidth", threads)
        read[str(threads)] = _native.ext.measure_read_bandwidth(threads, size)
        for isa in isas:
            for kind in KINDS:
                step(f"{isa} {kind} dot products", threads)
                value = _native.ext.measure_dot_peak(isa, kind, threads)
                peak.setdefault(isa, {}).setdefault(kind, {})[str(threads)] = value
    figures = Figures(
        processor_key(machine), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), read, peak
    )
    _store(figures)
    global _loaded
    _loaded = None
    return figures


def _store(figures: Figures) -> None:
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix="figures.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(figures), file, indent=1)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _at(per_threads: dict[str, float], threads: int) -> float:
    """The figure for the nearest measured thread count not above `threads`."""
    counts = sorted(int(n) for n in per_threads)
    return per_threads[str(max((n for n in counts if n <= threads), default=counts[0]))]


def read_bandwidth(figures: Figures | None, threads: int) -> float:
    """GB/s that `threads` threads read, measured or estimated."""
    if figures is None or not figures.read_gbps:
        return ESTIMATED_READ * threads
    return _at(figures.read_gbps, threads)


def dot_peak(figures: Figures | None, isa: str, kind: str, threads: int) -> float:
    """Gop/s that `threads` threads compute, measured or estimated."""
    measured = figures and figures.peak_gops.get(isa, {}).get(kind)
    return _at(measured, threads) if measured else ESTIMATED_PEAK[isa][kind] * threads
