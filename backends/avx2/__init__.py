"""x86 processors with AVX2, FMA and F16C; AVX-VNNI where present.

The kernels are in csrc/avx2 and csrc/kernels.
"""

from __future__ import annotations

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Backend, Implementation

# How each instruction set has been verified.
EVIDENCE = {"avx2": "run on hardware", "avx2_vnni": "run on hardware"}


def _missing(machine: Machine) -> list[str]:
    from ktcore.backends.native.operators import missing

    return missing("avx2", machine)


def _implementations() -> list[Implementation]:
    from ktcore.backends.native.operators import operators

    return operators("avx2")


def _self_check() -> None:
    from ktcore.backends.native.self_check import self_check

    self_check("avx2")


def _evidence(machine: Machine) -> str:
    from ktcore.backends.native.operators import evidence

    return evidence("avx2", EVIDENCE, machine)


BACKEND = Backend(
    name="avx2",
    description="x86 processors with AVX2, FMA and F16C; AVX-VNNI where present",
    rank=20,
    missing=_missing,
    implementations=_implementations,
    self_check=_self_check,
    evidence=_evidence,
)
