"""Formats that store weights as small integers with scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.formats.base import Codes, Format, Parts, Shape

# Weights that are all below this are stored as zeros: the reciprocal of their scale would leave the
# range of float32.
SMALLEST = 1e-30


# What the bytes of int8 stand for, in their order as unsigned numbers.
BYTES = torch.arange(256, dtype=torch.uint8).view(torch.int8)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Int8Channel(Format):
    """int8 with one scale per output row: value = data * scale.

    Parts: data int8 [..., O, I], scales float32 [..., O]. The quantiser rounds to the nearest of
    -127..127; a stored -128 is honoured. A row with a NaN or an infinity gets a NaN scale.
    """

    name = "int8"
    bits = 8.0
    arithmetic = "int16"
    tolerance = 0.008

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"data": (shape, torch.int8), "scales": (shape[:-1], torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        weight = weight.to(torch.float32)
        largest = weight.abs().amax(dim=-1)
        usable = largest.isfinite() & (largest >= SMALLEST)
        # (127 / largest would be torch's reciprocal times 127: rounded twice.)
        inverse = torch.where(usable, torch.full_like(largest, 127) / largest, 0.0)
        q = (weight * inverse[..., None]).round().clamp(-127, 127)
        # Zero for a row of zeros, NaN for one that is not finite.
        scales = torch.where(usable, largest, largest - largest) / 127
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

    def quantize(self, weight: Tensor) -> Parts:
        columns = weight.shape[-1]
        groups = -(-columns // self.group_size)
        padded = F.pad(weight.to(torch.float32), (0, groups * self.group_size - columns))
        x = padded.reshape(*weight.shape[:-1], groups, self.group_size)
        scales = self._search(x).to(torch.bfloat16)
        stored = scales.to(torch.float32)[..., None]
        inverse = torch.where(stored != 0, 1 / stored, torch.zeros_like(stored))
        q = (x * inverse).round().clamp(-8, 7).nan_to_num(0).add(8).to(torch.uint8)
        q = q.reshape(*weight.shape[:-1], groups * self.group_size)
        return {"data": q[..., 0::2] | (q[..., 1::2] << 4), "scales": scales}

    @staticmethod
    def _search(x: Tensor) -> Tensor:
        """The best scale of each group; x [..., groups, 32]."""
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        best_gain = torch.full_like(extreme, -1.0)
        best = torch.zeros_like(extreme)
        usable = extreme.abs() >= SMALLEST
        safe = torch.where(usable, extreme, torch.ones_like(extreme))
        for step in range(-12, 13):
            q = (x * ((-8 + 0.1 * step) / safe)).round().clamp(-8, 7)
            dot, norm = (x * q).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
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
        return Codes(
            codes=torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., : shape[-1]],
            levels=torch.arange(-8, 8, dtype=torch.int8),
            scales=parts["scales"].to(torch.float32),
            offsets=None,
            group_size=self.group_size,
            scale_size=self.group_size,
        )

    def exact_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16


FORMATS = [Int8Channel(), Int4Group32()]
