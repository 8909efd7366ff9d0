"""x86 processors with AVX2, FMA and F16C; AVX-VNNI where present.

The kernels are in csrc/avx2 and csrc/kernels.
"""

from __future__ import annotations

from ktcore.backends.native.backend import cpu_backend

# How each instruction set has been verified.
EVIDENCE = {"avx2": "run on hardware", "avx2_vnni": "run on hardware"}

BACKEND = cpu_backend(
    name="avx2",
    description="x86 processors with AVX2, FMA and F16C; AVX-VNNI where present",
    rank=20,
    evidence=EVIDENCE,
)
