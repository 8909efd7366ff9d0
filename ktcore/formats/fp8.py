"""8-bit floating-point weights (e4m3: 4 bits of exponent, 3 of mantissa; arXiv 2209.05433).

value = data * scale. The largest finite number is 448; the codes 0x7f and 0xff are NaN, there is no
infinity.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.formats._packing import ceil_div, wide
from ktcore.formats.base import Floats, Format, Parts, Shape

LARGEST = 448.0
# Weights that are all below this are stored as zeros: dividing by their scale would leave the range
# of float32.
SMALLEST = 1e-30


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to the nearest e4m3, what is beyond the largest to it; NaN to zero."""
    return x.nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def scale_of(largest: Tensor) -> Tensor:
    """The scale that takes the largest weight to 448: zero for none, NaN if it is not finite."""
    usable = largest.isfinite() & (largest >= SMALLEST)
    return torch.where(usable, largest, largest - largest) / LARGEST


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scales, zero where a scale is zero or not a number."""
    return torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))


class Fp8Channel(Format):
    """e4m3 with one scale per output row.

    Parts: data float8_e4m3fn [..., O, I], scales float32 [..., O].
    """

    name = "fp8_e4m3"
    bits = 8.0
    arithmetic = "bf16"
    tolerance = 0.004

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"data": (shape, torch.float8_e4m3fn), "scales": (shape[:-1], torch.float32)}

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        weight = weight.to(torch.float32)
        scales = scale_of(weight.abs().amax(dim=-1))
        return {"data": to_e4m3(weight * reciprocal(scales)[..., None]), "scales": scales}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        w = wide(dtype)
        return (parts["data"].to(w) * parts["scales"].to(w)[..., None]).to(dtype)

    def floats(self, parts: Parts, shape: Shape) -> Floats:
        return Floats(parts["data"], parts["scales"][..., None], max(1, shape[-1]))


class Fp8Block(Format):
    """e4m3 with one scale per block of rows and columns, as DeepSeek-V3 is published (arXiv
    2412.19437, section 3.3; the files call the scale `weight_scale_inv`).

    Parts: data float8_e4m3fn [..., O, I], scales float32 [..., ceil(O/rows), ceil(I/columns)];
    blocks at the lower and right edge are cut off.
    """

    arithmetic = "bf16"
    tolerance = 0.004
    by_rows = False

    def __init__(self, rows: int, columns: int):
        self.rows, self.group_size = rows, columns
        size = f"{rows}" if rows == columns else f"{rows}x{columns}"
        self.name = f"fp8_e4m3_b{size}"
        self.bits = 8 + 32 / (rows * columns)

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, rows, columns = shape
        blocks = (*lead, ceil_div(rows, self.rows), ceil_div(columns, self.group_size))
        return {"data": (shape, torch.float8_e4m3fn), "scales": (blocks, torch.float32)}

    def _of_rows(self, scales: Tensor, shape: Shape) -> Tensor:
        return scales.repeat_interleave(self.rows, -2)[..., : shape[-2], :]

    def _spread(self, scales: Tensor, shape: Shape) -> Tensor:
        scales = self._of_rows(scales, shape)
        return scales.repeat_interleave(self.group_size, -1)[..., : shape[-1]]

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        weight = weight.to(torch.float32)
        shape = tuple(weight.shape)
        *lead, down, across = self.part_specs(shape)["scales"][0]
        missing = (down * self.rows - shape[-2], across * self.group_size - shape[-1])
        padded = F.pad(weight.abs(), (0, missing[1], 0, missing[0]))
        blocks = padded.reshape(*lead, down, self.rows, across, self.group_size)
        scales = scale_of(blocks.amax(dim=(-3, -1)))
        return {"data": to_e4m3(weight * self._spread(reciprocal(scales), shape)), "scales": scales}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        w = wide(dtype)
        return (parts["data"].to(w) * self._spread(parts["scales"].to(w), shape)).to(dtype)

    def floats(self, parts: Parts, shape: Shape) -> Floats:
        return Floats(parts["data"], self._of_rows(parts["scales"], shape), self.group_size)


_known = functools.cache(Fp8Block)


def fp8_block(rows: int, columns: int) -> Fp8Block:
    """The format for blocks of a size: always the same object."""
    return _known(rows, columns)


FORMATS = [fp8_block(128, 128), Fp8Channel()]
