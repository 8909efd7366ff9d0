"""x86 processors with AVX-512 (F, BW, DQ, VL); VNNI and BF16 where present.

The kernels are in csrc/avx512 and csrc/kernels.
"""

from __future__ import annotations

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Backend, Implementation

# How each instruction set has been verified.
EVIDENCE = {
    "avx512": "run on hardware",
    "avx512_vnni": "run on hardware",
    "avx512_bf16": "run on hardware",
}


def _missing(machine: Machine) -> list[str]:
    from ktcore.backends.native.operators import missing

    return missing("avx512", machine)


def _implementations() -> list[Implementation]:
    from ktcore.backends.native.operators import operators

    return operators("avx512")


def _self_check() -> None:
    from ktcore.backends.native.self_check import self_check

    self_check("avx512")


def _evidence(machine: Machine) -> str:
    from ktcore.backends.native.operators import evidence

    return evidence("avx512", EVIDENCE, machine)


BACKEND = Backend(
    name="avx512",
    description="x86 processors with AVX-512 (F, BW, DQ, VL); VNNI and BF16 where present",
    rank=30,
    missing=_missing,
    implementations=_implementations,
    self_check=_self_check,
    evidence=_evidence,
)
