"""x86 processors with AMX (tiles of bf16) beside AVX-512: many tokens at a time.

The kernels are in csrc/amx and csrc/kernels/formats/tiles.h. They take weights as the other CPU
backends pack them, so that calls with few tokens can go to those.
"""

from __future__ import annotations

from ktcore.backends.native.backend import cpu_backend

# How each instruction set has been verified.
EVIDENCE = {"amx": "run on hardware"}

BACKEND = cpu_backend(
    name="amx",
    description="x86 processors with AMX (tiles of bf16) beside AVX-512: many tokens at a time",
    rank=25,  # where tiles do not matter, its kernels are those of avx512
    evidence=EVIDENCE,
)
