"""x86 processors with AMX (tiles of bf16) beside AVX-512: many tokens at a time.

The kernels are in csrc/amx and csrc/kernels/tiles.h. They take weights as the other CPU backends
pack them, so that calls with few tokens can go to those.
"""

from __future__ import annotations

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Backend, Implementation

# How each instruction set has been verified.
EVIDENCE = {"amx": "run on hardware"}


def _missing(machine: Machine) -> list[str]:
    from ktcore.backends.native.operators import missing

    return missing("amx", machine)


def _implementations() -> list[Implementation]:
    from ktcore.backends.native.operators import operators

    return operators("amx")


def _self_check() -> None:
    from ktcore.backends.native.self_check import self_check

    self_check("amx")


def _evidence(machine: Machine) -> str:
    from ktcore.backends.native.operators import evidence

    return evidence("amx", EVIDENCE, machine)


BACKEND = Backend(
    name="amx",
    description="x86 processors with AMX (tiles of bf16) beside AVX-512: many tokens at a time",
    rank=25,  # where tiles do not matter, its kernels are those of avx512
    missing=_missing,
    implementations=_implementations,
    self_check=_self_check,
    evidence=_evidence,
)
