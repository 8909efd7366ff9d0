"""Formats that store weights as small integers with scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.formats._packing import column_weights, total
from ktcore.formats._packing import groups as group_columns
from ktcore.formats.base import BlockCodes, Codes, Field, Format, Parts, Shape

# Weights that are all below this are stored as zeros: the reciprocal of their scale would leave the
# range of float32.
SMALLEST = 1e-30


# What the bytes of int8 stand for, in their order as unsigned numbers.
BYTES = torch.arange(256, dtype=torch.uint8).view(torch.int8)


def nibbles(data: Tensor) -> BlockCodes:
    """Codes of 4 bits, two a byte [..., O, I / 2], the first in the low half; 32 divides I."""
    return BlockCodes(data, (Field(0, 16, 4, 1),), block_size=32, type_size=16)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# What trials of `search_symmetric` make of the largest weight, as parts of the largest code.
CLIPPED = tuple(1 + 0.02 * step for step in range(-1, 13))


def search_symmetric(x: Tensor, importance: Tensor | None, most: int) -> Tensor:
    """Scales [..., 1] of x [..., n] for codes -most..most with the least squared error of several
    tried, each refined by projection; one for what is too small to have a scale.

    importance broadcasts against x. Where x is not finite the result means nothing.
    """
    largest = x.abs().amax(-1, keepdim=True)
    safe = torch.where(largest.isfinite() & (largest >= SMALLEST), largest, 1.0)
    unit = x / safe  # so that sums of squares stay within range
    best = torch.full_like(safe, 1 / most)
    best_error = torch.full_like(safe, float("inf"))
    for part in CLIPPED:
        q = (unit * (part * most)).round().clamp(-most, most)
        dot, norm = total(unit * q, importance), total(q * q, importance)
        scale = torch.where(norm > 0, dot / norm, 1 / (part * most))
        # Codes as the scale that is stored will find them, not those it was made from.
        q = (unit / torch.where(scale > 0, scale, 1.0)).round().clamp(-most, most)
        error = total((q * scale - unit).square(), importance)
        better = (error < best_error) & (scale > 0)
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best * safe


class Int8Channel(Format):
    """int8 with one scale per output row: value = data * scale.

    Parts: data int8 [..., O, I], scales float32 [..., O]. The quantiser rounds to the nearest of
    -127..127; a stored -128 is honoured. A row with a NaN or an infinity gets a NaN scale. Given an
    importance of columns, it also tries scales that clip the largest weights.
    """

    name = "int8"
    bits = 8.0
    arithmetic = "int16"
    tolerance = 0.008

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"data": (shape, torch.int8), "scales": (shape[:-1], torch.float32)}

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        weights = column_weights(importance, tuple(weight.shape))
        weight = weight.to(torch.float32)
        largest = weight.abs().amax(dim=-1)
        usable = largest.isfinite() & (largest >= SMALLEST)
        # (127 / largest would be torch's reciprocal times 127: rounded twice.)
        inverse = torch.where(usable, torch.full_like(largest, 127) / largest, 0.0)
        q = (weight * inverse[..., None]).round().clamp(-127, 127)
        # Zero for a row of zeros, NaN for one that is not finite.
        scales = torch.where(usable, largest, largest - largest) / 127
        if weights is not None:
            found = search_symmetric(weight, weights[..., None, :], 127).squeeze(-1)
            scales = torch.where(usable, found, scales)
            inverse = torch.where(usable, 1 / scales, 0.0)
            q = (weight * inverse[..., None]).round().clamp(-127, 127)
        return {"data": q.nan_to_num(0).to(torch.int8), "scales": scales}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = _wide(dtype)
        return (parts["data"].to(wide) * parts["scales"].to(wide)[..., None]).to(dtype)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        return Codes(
            codes=parts["data"].view(torch.uint8),
            levels=BYTES,
            scales=parts["scales"][..., None],
            offsets=None,
            group_size=max(1, shape[-1]),
            scale_size=max(1, shape[-1]),
        )


class Int4Group32(Format):
    """4-bit integers with one bf16 scale per 32 weights: value = (q - 8) * scale, q in 0..15.

    Parts: data uint8 [..., O, ceil(I/32)*16], column 2j in the low and 2j+1 in the high nibble of
    byte j, padding columns 8; scales bfloat16 [..., O, ceil(I/32)].

    The quantiser does not take the scale from the largest weight alone: it tries scales around it
    and keeps, per group, the one with the least squared error, each refined by projection
    (sum(x q) / sum(q^2)), as k-quants do. Plain rounding loses far more.
    """

    name = "int4_g32"
    aliases = ("int4",)
    bits = 4.5
    group_size = 32
    arithmetic = "int16"
    tolerance = 0.008

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        groups = -(-shape[-1] // self.group_size)
        return {
            "data": ((*shape[:-1], groups * self.group_size // 2), torch.uint8),
            "scales": ((*shape[:-1], groups), torch.bfloat16),
        }

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        weights = column_weights(importance, tuple(weight.shape))
        columns = weight.shape[-1]
        groups = -(-columns // self.group_size)
        padded = F.pad(weight.to(torch.float32), (0, groups * self.group_size - columns))
        x = padded.reshape(*weight.shape[:-1], groups, self.group_size)
        if weights is not None:
            weights = group_columns(weights[..., None, :], self.group_size)
        scales = self._search(x, weights).to(torch.bfloat16)
        stored = scales.to(torch.float32)[..., None]
        inverse = torch.where(stored != 0, 1 / stored, torch.zeros_like(stored))
        q = (x * inverse).round().clamp(-8, 7).nan_to_num(0).add(8).to(torch.uint8)
        q = q.reshape(*weight.shape[:-1], groups * self.group_size)
        return {"data": q[..., 0::2] | (q[..., 1::2] << 4), "scales": scales}

    @staticmethod
    def _search(x: Tensor, importance: Tensor | None = None) -> Tensor:
        """The best scale of each group; x [..., groups, 32], importance broadcasts against it."""
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        best_gain = torch.full_like(extreme, -1.0)
        best = torch.zeros_like(extreme)
        usable = extreme.abs() >= SMALLEST
        safe = torch.where(usable, extreme, torch.ones_like(extreme))
        for step in range(-12, 13):
            q = (x * ((-8 + 0.1 * step) / safe)).round().clamp(-8, 7)
            dot, norm = total(x * q, importance), total(q * q, importance)
            scale = torch.where(norm > 0, dot / norm, torch.zeros_like(dot))
            gain = scale * dot
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, scale, best)
        # A group with a NaN or an infinity stays recognisable: its scale is NaN.
        best = torch.where(usable, best, torch.zeros_like(best))
        finite = x.isfinite().all(-1, keepdim=True)
        return torch.where(finite, best, torch.full_like(best, float("nan"))).squeeze(-1)

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = _wide(dtype)
        data, scales = parts["data"], parts["scales"]
        q = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).to(wide) - 8
        grouped = q.unflatten(-1, (scales.shape[-1], self.group_size)) if q.numel() else q
        if q.numel():
            q = (grouped * scales.to(wide)[..., None]).flatten(-2)
        return q[..., : shape[-1]].to(dtype)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        data = parts["data"]
        if blocks and shape[-1] % self.group_size == 0:
            codes = nibbles(data)
        else:
            codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., : shape[-1]]
        return Codes(
            codes=codes,
            levels=torch.arange(-8, 8, dtype=torch.int8),
            scales=parts["scales"].to(torch.float32),
            offsets=None,
            group_size=self.group_size,
            scale_size=self.group_size,
        )

    def exact_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16


FORMATS = [Int8Channel(), Int4Group32()]
