"""Formats that store weights as floating-point numbers, without scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.formats.base import Floats, Format, Parts, Shape


class Plain(Format):
    """Numbers of one floating-point type, as most models are published.

    Parts: data, of that type, [..., O, I].
    """

    arithmetic = "bf16"

    def __init__(
        self,
        name: str,
        aliases: tuple[str, ...],
        dtype: torch.dtype,
        tolerance: float,
        exact_tolerance: float,
    ):
        self.name, self.aliases, self.dtype = name, aliases, dtype
        self.bits = 8.0 * dtype.itemsize
        self.tolerance, self.exact_tolerance = tolerance, exact_tolerance

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"data": (shape, self.dtype)}

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        return {"data": weight.to(self.dtype)}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["data"].to(dtype)

    def floats(self, parts: Parts, shape: Shape) -> Floats:
        return Floats(parts["data"])


FORMATS = [
    Plain("bf16", ("bfloat16",), torch.bfloat16, 0.004, 5e-4),
    Plain("f16", ("float16",), torch.float16, 0.004, 5e-4),
    Plain("f32", ("float32",), torch.float32, 1e-6, 1e-6),
]
