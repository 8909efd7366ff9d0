"""Formats that store weights as floating-point numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.formats.base import Format, Parts, Shape


class BFloat16(Format):
    """bfloat16, as most models are published. Parts: data bfloat16 [..., O, I]."""

    name = "bf16"
    aliases = ("bfloat16",)
    bits = 16.0
    arithmetic = "bf16"
    tolerance = 0.004

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"data": (shape, torch.bfloat16)}

    def quantize(self, weight: Tensor) -> Parts:
        return {"data": weight.to(torch.bfloat16)}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["data"].to(dtype)


FORMATS = [BFloat16()]
