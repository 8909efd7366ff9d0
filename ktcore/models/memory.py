"""What loading asks of the system's memory: to keep weights in it, and to take back the rest."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable

from ktcore.weights import ExpertWeights, QuantTensor

if sys.platform == "win32":
    REMEDY = "give the account the right to lock pages in memory (secpol.msc, User Rights)"
else:
    REMEDY = (
        "raise its limit (`ulimit -l`; memlock in /etc/security/limits.conf; LimitMEMLOCK= of a "
        "systemd unit; `docker run --ulimit memlock=-1`)"
    )


class Locker:
    """Locks packed weights, one after the other, until the system refuses; it then warns once."""

    def __init__(self) -> None:
        self.locked_bytes = 0
        self._refused = False

    def __call__(self, weight: QuantTensor | ExpertWeights) -> None:
        for packed in weight.packed.values():
            if self._refused or not hasattr(packed, "lock"):
                return
            if why := packed.lock():
                self._refused = True
                warnings.warn(
                    f"mlock: after {self.locked_bytes / 1e6:,.0f} MB of weights the system refuses "
                    f"to keep more in memory ({why}); the rest may be paged out. {_limit()}To have "
                    f"all of them locked, {REMEDY}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self.locked_bytes += packed.nbytes


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return ""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"This process may lock {limit / 1e6:,.0f} MB. "


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def trim_heap() -> None:
    """Give memory that was freed back to the system: glibc keeps what it cannot cut off the end,
    which was seen to add up to several layers."""
    if (trim := _malloc_trim()) is not None:
        trim(0)
