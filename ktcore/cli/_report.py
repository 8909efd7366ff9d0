"""What `ktcore-probe` reports, as plain data (docs/probe.schema.json); `_render` makes it readable.

Nothing here raises because of what the machine lacks.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ktcore import __version__, _native
from ktcore.dispatch import figures, probe, registry
from ktcore.dispatch.machine import Cpu, Machine
from ktcore.formats import format_names

SCHEMA_VERSION = 1

# One MoE layer of Qwen3-30B-A3B: the shapes that requests are judged by unless told otherwise.
SHAPE = {"hidden_size": 2048, "intermediate_size": 768, "num_experts": 128, "top_k": 8}
PHASES = {"decode": 1, "prefill": 512}  # tokens of a call

# Of `Machine.devices`, what torch calls their device.
TORCH_DEVICES = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu", "ascend": "npu"}

WITHOUT_TOKENS = ("dequantize", "quantize")  # requests of theirs are all alike

# What a driver leaves behind: a device that torch does not see may still be there.
TRACES = {
    "cuda": ("/dev/nvidiactl", "an NVIDIA driver is loaded", "a torch built for CUDA"),
    "rocm": ("/dev/kfd", "an AMD compute driver is loaded", "a torch built for ROCm"),
    "ascend": ("/dev/davinci_manager", "an Ascend driver is loaded", "torch and torch_npu"),
}
# Packages that only some commands need.
EXTRAS = ("tokenizers", "matplotlib")


def header(kind: str) -> dict[str, Any]:
    """How every document begins."""
    return {"schema_version": SCHEMA_VERSION, "kind": kind, "ktcore": __version__}


def report(machine: Machine, required: Iterable[str] = ()) -> dict[str, Any]:
    """The whole report. Raises SettingError if KTCORE_BACKEND is malformed."""
    known = figures.load(machine)
    forced = _forced()
    serves, seen = _serves(machine)
    out = header("report")
    out |= {
        "software": _software(),
        "machine": _machine(machine),
        "threads": {"usable": _native.available_threads(), "compute": _native.get_num_threads()},
        "instruction_sets": _instruction_sets(machine.cpu),
        "backends": [_backend(b, machine, seen) for b in registry.backends().values()],
        "import_failures": registry.import_failures(),
        "forced": forced,
        "serves": serves,
        "figures": None if known is None else asdict(known),
        "figures_file": str(figures.path()),
        "gains": list(_gains(machine, serves, known is not None)),
        "problems": [*_forced_problems(forced), *requirement_problems(required)],
    }
    return out


def explanation(found: registry.Explanation) -> dict[str, Any]:
    return header("explanation") | found.to_dict()


def requirement_problems(required: Iterable[str]) -> list[str]:
    """For each named backend that cannot run here, why."""
    return [
        f"--require: {unavailable(name, reason)}"
        for name in dict.fromkeys(required)
        if (reason := registry.why_not(name)) is not None
    ]


def unavailable(name: str, reason: str) -> str:
    if name in registry.backends() or name in registry.import_failures():
        return f"backend {name!r} cannot run: {reason}"
    return f"there is no backend {name!r}; there are: {', '.join(registry.backends())}"


# --------------------------------------------------------------------------------------- machine


def _software() -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "extension_missing": _native.why,
    }


def feature_state(cpu: Cpu, name: str) -> str:
    feature = cpu.features.get(name)
    if feature is None or not feature.cpu:
        return "absent"
    if not feature.os:
        return "os_disabled"
    return "hidden" if name in cpu.disabled else "usable"


def _machine(machine: Machine) -> dict[str, Any]:
    cpu = machine.cpu
    return {
        "system": machine.system,
        "cpu": {
            "brand": probe.cpu_brand(),
            "architecture": cpu.architecture,
            "physical_cores": cpu.physical_cores,
            "logical_cores": cpu.logical_cores,
            "affinity": list(cpu.affinity),
            "quota": cpu.quota,
            "caches": [asdict(c) for c in cpu.caches],
            "numa": [asdict(n) | {"cpus": list(n.cpus)} for n in cpu.numa],
            "features": {name: feature_state(cpu, name) for name in cpu.features},
        },
        "memory": asdict(machine.memory),
        "devices": [asdict(d) for d in machine.devices],
        "no_devices": dict(machine.absent),
    }


def _instruction_sets(cpu: Cpu) -> list[dict[str, Any]]:
    """What the extension has kernels for, and what is missing to run each."""
    if _native.ext is None:
        return []
    return [
        {
            "name": isa["name"],
            "backend": isa["backend"],
            "requires": list(isa["requires"]),
            "missing": cpu.missing(*isa["requires"]),
        }
        for isa in _native.ext.isas()
    ]


# -------------------------------------------------------------------------------------- backends


def _backend(
    backend: registry.Backend,
    machine: Machine,
    seen: dict[str, list[tuple[dict, registry.Candidate]]],
) -> dict[str, Any]:
    mine = seen.get(backend.name, [])
    passed_over: dict[str, list] = {}
    for request, candidate in mine:
        if not candidate.reason.startswith("chosen"):
            passed_over.setdefault(candidate.reason, []).append(request)
    operators: dict[str, list[str]] = {}
    for i in registry.implementations(backend.name):
        operators.setdefault(i.op, []).extend(i.formats)
    return {
        "name": backend.name,
        "description": backend.description,
        "evidence": backend.evidence_on(machine),
        "rank": backend.rank,
        "reason": registry.why_not(backend.name),
        "variants": sorted({c.detail for _, c in mine if c.detail}),
        "operators": operators,
        "passed_over": [
            {"reason": reason, "requests": requests} for reason, requests in passed_over.items()
        ],
    }


def _forced() -> list[dict[str, str]]:
    """What KTCORE_BACKEND demands, per operator."""
    found = ((op, registry.forced_backend(op)) for op in registry.OPS)
    return [{"op": op, "backend": f[0], "source": f[1]} for op, f in found if f is not None]


def _forced_problems(forced: list[dict[str, str]]) -> Iterator[str]:
    for source, name in dict.fromkeys((f["source"], f["backend"]) for f in forced):
        if (reason := registry.why_not(name)) is not None:
            yield f"{source}: {unavailable(name, reason)}"


def _serves(
    machine: Machine,
) -> tuple[list[dict[str, Any]], dict[str, list[tuple[dict, registry.Candidate]]]]:
    """Who serves each operator and format; and by backend that runs, each question and answer."""
    rows: list[dict[str, Any]] = []
    seen: dict[str, list[tuple[dict, registry.Candidate]]] = {}
    kinds = dict.fromkeys(TORCH_DEVICES.get(d.kind, d.kind) for d in machine.devices)
    for device in ("cpu", *kinds):
        for op in registry.OPS:
            for format in (None,) if op in registry.WITHOUT_WEIGHTS else format_names():
                request = {"device": device, "op": op, "format": format}
                row: dict[str, Any] = dict(request)
                for phase, tokens in PHASES.items():
                    tokens = 1 if op in WITHOUT_TOKENS else tokens
                    row[phase], candidates = _cell(request, tokens)
                    for c in candidates:
                        if registry.why_not(c.backend) is None:
                            seen.setdefault(c.backend, []).append((request | {"phase": phase}, c))
                rows.append(row)
    return rows, seen


def _cell(
    request: dict[str, Any], tokens: int
) -> tuple[dict[str, Any], tuple[registry.Candidate, ...]]:
    try:
        found = registry.explain(**request, tokens=tokens, **SHAPE)
    except registry.BackendUnavailable as error:  # what is forced cannot run
        return {"backend": None, "variant": "", "reason": str(error)}, ()
    if found.chosen is None:
        reason = "; ".join(f"{c.backend}: {c.reason}" for c in found.candidates)
        return {"backend": None, "variant": "", "reason": reason}, found.candidates
    first = found.candidates[0]
    cell = {"backend": first.backend, "variant": first.detail, "reason": first.reason}
    return cell, found.candidates


# ----------------------------------------------------------------------------------------- gains


def _gains(machine: Machine, serves: list[dict], measured: bool) -> Iterator[dict[str, str]]:
    """What would make it faster, each with what to do."""
    cpu, threads = machine.cpu, _native.get_num_threads()

    def gain(what: str, how: str) -> dict[str, str]:
        return {"what": what, "how": how}

    if _native.ext is None:
        yield gain(
            f"{_native.why}; everything is computed with plain torch, many times slower",
            "install a ktcore wheel for this platform, or build it with a C++20 compiler",
        )
    by_state: dict[str, list[str]] = {}
    for name in cpu.features:
        by_state.setdefault(feature_state(cpu, name), []).append(name)
    if names := by_state.get("os_disabled"):
        yield gain(
            f"the processor has {', '.join(names)}, but the operating system does not enable it",
            "use a newer kernel, or let the hypervisor or boot options pass it on",
        )
    if names := by_state.get("hidden"):
        yield gain(f"{', '.join(names)} is hidden on request", "unset KTCORE_CPU_DISABLE")
    if cpu.quota is not None and cpu.quota < len(cpu.affinity):
        yield gain(
            f"the container's quota is {cpu.quota:g} of {len(cpu.affinity)} CPUs",
            "raise the container's CPU limit",
        )
    if len(cpu.affinity) < cpu.logical_cores:
        yield gain(
            f"this process may run on {len(cpu.affinity)} of {cpu.logical_cores} CPUs",
            "widen its affinity mask (taskset, numactl, the container's cpuset)",
        )
    usable = _native.available_threads()
    if _native.ext is not None and threads != usable:
        few = "fewer" if threads < usable else "more"
        yield gain(
            f"kernels compute with {threads} thread(s), {few} than the {usable} usable CPU(s)",
            "unset KTCORE_NUM_THREADS, or set it to that number",
        )
    if (limit := machine.memory.limit_bytes) is not None:
        yield gain(
            f"the container may use {size(limit)} of {size(machine.memory.total_bytes)} memory",
            "raise the container's memory limit if models do not fit",
        )
    present = {d.kind for d in machine.devices}
    for kind, (path, what, package) in TRACES.items():
        if kind not in present and os.path.exists(path):
            yield gain(
                f"{what}, but: {machine.absent.get(kind, 'no device')}", f"install {package}"
            )
    for device in dict.fromkeys(row["device"] for row in serves if row["device"] != "cpu"):
        moe = [r for r in serves if r["device"] == device and r["op"] == "moe"]
        if all(r[phase]["backend"] in (None, "reference") for r in moe for phase in PHASES):
            yield gain(
                f"there are {device} devices, but no backend with kernels for them",
                "install a backend for them; without one ktcore uses plain torch there",
            )
    if absent := [name for name in EXTRAS if importlib.util.find_spec(name) is None]:
        yield gain(f"commands lack {', '.join(absent)}", "pip install 'ktcore[cli]'")
    if not measured and _native.ext is not None and any(_runs(cpu)):
        yield gain(
            "backends are ranked by rough estimates, as this machine has not been measured",
            "run ktcore-probe --bench (some seconds)",
        )


def _runs(cpu: Cpu) -> list[str]:
    return [isa["name"] for isa in _instruction_sets(cpu) if not isa["missing"]]


def size(nbytes: int) -> str:
    """Bytes for people: 1536 as "1.5 KiB"."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


# -------------------------------------------------------------------------------------- self-test


def selftest(results: list) -> dict[str, Any]:
    """Results of `ktcore.testing.selftest.run`, with a line per backend, operator and format."""
    groups: dict[tuple, list] = {}
    for r in results:
        groups.setdefault((r.backend, r.op, r.format or None), []).append(r)
    out = header("selftest")
    out["passed"] = bool(results) and all(r.passed for r in results)
    out["summary"] = [
        {
            "backend": backend,
            "op": op,
            "format": format,
            "cases": len(group),
            "passed": sum(r.passed for r in group),
            **_worst(group),
        }
        for (backend, op, format), group in groups.items()
    ]
    out["results"] = [
        asdict(r) | {"error": _finite(r.error), "tolerance": _finite(r.tolerance)} for r in results
    ]
    return out


def _worst(group: list) -> dict[str, float | None]:
    """The error that comes nearest to its tolerance, or is furthest beyond it."""
    judged = [r for r in group if _finite(r.error) is not None and _finite(r.tolerance)]
    worst = max(judged, key=lambda r: r.error / r.tolerance, default=None)
    return {
        "worst_error": worst and worst.error,
        "tolerance": worst and worst.tolerance,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity; the result's message says what happened."""
    return value if value is not None and math.isfinite(value) else None
