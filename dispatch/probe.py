"""Find out what this machine is: processor, operating system state, memory, accelerators.

Nothing here raises because of what a machine lacks: what cannot be read is left out, and a broken
driver becomes a line in `Machine.absent`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ktcore import _cgroup, _native
from ktcore._cgroup import read as _read
from ktcore._settings import SettingError
from ktcore.dispatch.machine import Cache, Cpu, Device, Feature, Machine, Memory, NumaNode

SYS = Path("/sys")
PROC = Path("/proc")

# The order in which reports list them; also what the extension reports.
FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)

_override: list[Machine] = []


def machine() -> Machine:
    """The machine, probed once. `KTCORE_CPU_DISABLE=avx512f,...` hides CPU features."""
    return _override[-1] if _override else _probed()


@contextlib.contextmanager
def override(
    replacement: Machine | None = None, *, disable: tuple[str, ...] = ()
) -> Iterator[Machine]:
    """Within the block, pretend to be on another machine, or on this one without some features.

    What a pretended machine lacks is not used; what it claims beyond the real one still is not
    executed, because the native kernels check the processor themselves.
    """
    from ktcore.dispatch import registry

    unknown = [name for name in disable if name not in FEATURES]
    if unknown:
        raise ValueError(f"disable: unknown CPU feature {unknown[0]!r}; known: {FEATURES}")
    _override.append((replacement or machine()).without(*disable))
    registry.forget_machine()
    try:
        yield _override[-1]
    finally:
        _override.pop()
        registry.forget_machine()


@functools.lru_cache(maxsize=1)
def _probed() -> Machine:
    devices, absent = _devices()
    found = Machine(
        cpu=_cpu(),
        memory=_memory(),
        devices=tuple(devices),
        absent=absent,
        system=f"{platform.system()} {platform.release()}",
    )
    hidden = [n.strip() for n in os.environ.get("KTCORE_CPU_DISABLE", "").split(",") if n.strip()]
    for name in hidden:
        if name not in FEATURES:
            raise SettingError(
                f"KTCORE_CPU_DISABLE: unknown CPU feature {name!r}; known: {' '.join(FEATURES)}"
            )
    return found.without(*hidden)


@functools.lru_cache(maxsize=1)
def cpu_brand() -> str:
    """The processor's name for people."""
    for line in (_read(PROC / "cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    with contextlib.suppress(Exception):  # slow: it starts processes
        import cpuinfo

        return cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or "unknown"
    return platform.processor() or "unknown"


def _cpu_list(text: str) -> tuple[int, ...]:
    """`0-3,8` as (0, 1, 2, 3, 8)."""
    out: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        out.extend(range(int(first), int(last or first) + 1))
    return tuple(out)


def _bytes(text: str) -> int:
    """`32K` as 32768."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


# ------------------------------------------------------------------------------------ processor


def _features() -> dict[str, Feature]:
    if _native.ext is not None:
        return {n: Feature(*state) for n, state in _native.ext.cpu_features().items()}
    # What the system lists, it has also enabled.
    flags: set[str] = set()
    for line in (_read(PROC / "cpuinfo") or "").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    else:
        with contextlib.suppress(Exception):
            import cpuinfo

            flags = set(cpuinfo.get_cpu_info().get("flags", ()))
    return {name: Feature(name in flags, name in flags) for name in FEATURES}


def _affinity() -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except AttributeError:
        return tuple(range(os.cpu_count() or 1))


def _caches() -> tuple[Cache, ...]:
    out = []
    for folder in sorted((SYS / "devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / n) for n in ("level", "type", "size"))
        if level and kind and size:
            shared = _cpu_list(_read(folder / "shared_cpu_list") or "0")
            out.append(Cache(int(level), kind.lower(), _bytes(size), len(shared)))
    return tuple(out)


def _numa() -> tuple[NumaNode, ...]:
    out = []
    for folder in sorted((SYS / "devices/system/node").glob("node[0-9]*")):
        cpus = _cpu_list(_read(folder / "cpulist") or "")
        memory = 0
        for line in (_read(folder / "meminfo") or "").splitlines():
            if "MemTotal:" in line:
                memory = int(line.split()[-2]) * 1024
        out.append(NumaNode(int(folder.name[4:]), cpus, memory))
    return tuple(out)


def _physical_cores(logical: int) -> int:
    siblings = {
        text
        for path in (SYS / "devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
        if (text := _read(path))
    }
    return len(siblings) or logical


def _cpu() -> Cpu:
    logical = os.cpu_count() or 1
    return Cpu(
        architecture=platform.machine(),
        features=_features(),
        logical_cores=logical,
        physical_cores=_physical_cores(logical),
        affinity=_affinity(),
        quota=_cgroup.cpu_quota(),
        caches=_caches(),
        numa=_numa(),
    )


# --------------------------------------------------------------------------------------- memory


def _memory() -> Memory:
    fields = {}
    for line in (_read(PROC / "meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            fields[name] = int(value.split()[0]) * 1024
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    if not total and sys.platform == "win32":
        total, available = _windows_memory()
    elif not total:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            page = os.sysconf("SC_PAGE_SIZE")
            total = available = page * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup.memory_limit()
    if limit is not None and total and limit >= total:
        limit = None
    return Memory(total, min(available, limit) if limit else available, limit)


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "pt", "pa", "vt", "va", "eva")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total, status.available


# ---------------------------------------------------------------------------------- accelerators


def _torch_devices(kind: str, api: str) -> list[Device]:
    import torch

    module = getattr(torch, api)
    out = []
    for i in range(module.device_count()):
        p = module.get_device_properties(i)
        detail = f"sm_{p.major}{p.minor}" if kind == "cuda" else getattr(p, "gcnArchName", "")
        out.append(Device(kind, i, p.name, p.total_memory, detail))
    return out


def _cuda() -> list[Device] | str:
    import torch

    if torch.version.hip:
        return "this torch is built for ROCm"
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    return _torch_devices("cuda", "cuda") or "no CUDA device is visible"


def _rocm() -> list[Device] | str:
    import torch

    if not torch.version.hip:
        return "this torch is built without ROCm"
    return _torch_devices("rocm", "cuda") or "no ROCm device is visible"


def _xpu() -> list[Device] | str:
    import torch

    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return "torch sees no Intel GPU"
    return _torch_devices("xpu", "xpu")


def _ascend() -> list[Device] | str:
    import importlib.util

    if importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    import torch
    import torch_npu  # noqa: F401  (registers torch.npu)

    out = []
    for i in range(torch.npu.device_count()):
        p = torch.npu.get_device_properties(i)
        out.append(Device("ascend", i, p.name, p.total_memory))
    return out or "no Ascend device is visible"


ACCELERATORS: dict[str, Callable[[], list[Device] | str]] = {
    "cuda": _cuda,
    "rocm": _rocm,
    "xpu": _xpu,
    "ascend": _ascend,
}


def _devices() -> tuple[list[Device], dict[str, str]]:
    devices: list[Device] = []
    absent: dict[str, str] = {}
    for kind, find in ACCELERATORS.items():
        try:
            found = find()
        except Exception as error:  # a broken driver must not break the probe
            found = f"probing failed: {type(error).__name__}: {error}"
        if isinstance(found, str):
            absent[kind] = " ".join(found.split())
        else:
            devices.extend(found)
    return devices, absent
