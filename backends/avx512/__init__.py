"""x86 processors with AVX-512 (F, BW, DQ, VL); VNNI and BF16 where present.

The kernels are in csrc/avx512 and csrc/kernels.
"""

from __future__ import annotations

from ktcore.backends.native.backend import cpu_backend

# How each instruction set has been verified.
EVIDENCE = {
    "avx512": "run on hardware",
    "avx512_vnni": "run on hardware",
    "avx512_bf16": "run on hardware",
}

BACKEND = cpu_backend(
    name="avx512",
    description="x86 processors with AVX-512 (F, BW, DQ, VL); VNNI and BF16 where present",
    rank=30,
    evidence=EVIDENCE,
)
