"""The compiled extension `ktcore._C`, where there is one, and its thread count.

ktcore works without it, on its reference backend: `ext` is then None and `why` says why.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from types import ModuleType

from ktcore import _cgroup
from ktcore._settings import SettingError


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("ktcore._C"), None
    except ImportError as error:
        return None, f"the native extension ktcore._C cannot be loaded: {error}"


ext, why = _load()


def available_threads() -> int:
    """CPUs this process may use: its affinity mask, limited by the container's quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    quota = _cgroup.cpu_quota()
    return max(1, min(cpus, int(quota + 0.5))) if quota else cpus


def set_num_threads(threads: int) -> None:
    """Compute with this many threads (the caller's included) in the native CPU kernels.

    More threads than cores is allowed, and slower. The default is `KTCORE_NUM_THREADS`, else every
    CPU that the process may use.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads: expected an int of at least 1, got {threads!r}")
    if ext is not None:
        ext.set_num_threads(threads)


def get_num_threads() -> int:
    """How many threads the native CPU kernels compute with (1 without the extension)."""
    return ext.get_num_threads() if ext is not None else 1


def _default_threads() -> int:
    text = os.environ.get("KTCORE_NUM_THREADS")
    if text is None:
        pretended = _pretended_nodes()
        return pretended[0] * pretended[1] if pretended else available_threads()
    try:
        threads = int(text)
    except ValueError:
        threads = 0
    if threads < 1:
        raise SettingError(f"KTCORE_NUM_THREADS: expected an integer of at least 1, got {text!r}")
    return threads


def _pretended_nodes() -> tuple[int, int] | None:
    """The nodes, and threads of each, that KTCORE_NUMA_NODES=2x1 and the like pretend."""
    text = os.environ.get("KTCORE_NUMA_NODES", "").strip()
    found = re.fullmatch("([1-9][0-9]?)x([1-9][0-9]?)", text)
    return (int(found[1]), int(found[2])) if found else None


def _memory_nodes() -> list[int] | None:
    """The NUMA nodes over which KTCORE_NUMA_NODES wants weights and threads; None: no word."""
    text = os.environ.get("KTCORE_NUMA_NODES", "").strip()
    if not text:
        return None
    if text == "none":
        return []
    if pretended := _pretended_nodes():
        return [-1] * pretended[0]
    allowed = ext.allowed_nodes()
    try:
        nodes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        nodes = [-1]
    if not set(nodes) <= set(allowed):
        raise SettingError(
            f"KTCORE_NUMA_NODES: expected none, or some of the nodes "
            f"{','.join(map(str, allowed))}, or 2x1 for two pretended ones with one thread each, "
            f"got {text!r}"
        )
    return nodes


if ext is None:
    warnings.warn(
        f"{why}; ktcore computes with plain torch (backend reference), many times slower. "
        "`ktcore-probe` shows what is missing.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    if (_nodes := _memory_nodes()) is not None:
        ext.set_memory_nodes(_nodes)
    ext.set_num_threads(_default_threads())
