"""GGUF's types of 32 weights with one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; and MXFP4.

Layout: llama.cpp's `ggml-common.h` (block_q4_0 and following), read by `gguf.quants`. Columns i and
i + 16 of a block share a byte of 4-bit codes; the fifth bits come in column order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ktcore.formats._packing import total
from ktcore.formats.base import E8M0, Codes, Field, Parts, Shape
from ktcore.formats.gguf_blocks import (
    BlockFormat,
    Scales,
    half,
    half_bytes,
    look_up,
    rounded,
    unfields,
)
from ktcore.formats.gguf_search import Levels, affine, encode_affine, symmetric
from ktcore.formats.integer import BYTES


class _Legacy(BlockFormat):
    block_size = 32
    group_size = 32
    halves = ((0, 1.0),)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0))


def _codes_at(at: int, high: int | None = None) -> tuple[Field, ...]:
    """4-bit codes at a byte offset, with the fifth bits at `high`."""
    low = Field(at, 16, 4, 16)
    return (low,) if high is None else (low, Field(high, 4, 1, 1, 4))


def _symmetric(highest: int) -> list[float]:
    return [-highest + 0.1 * step for step in range(-12, 13)]


class Q4_0(_Legacy):
    """value = d * (q - 8)."""

    name = "q4_0"
    type_size = 18
    code_fields = _codes_at(2)
    levels = tuple(range(-8, 8))
    targets = _symmetric(8)  # what trials map the largest weight to

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        levels = Levels(self.levels)
        d = symmetric(x, levels, self.targets, importance)
        q = levels.encode(x, rounded(d))
        return torch.cat([half_bytes(d), unfields(q, 4, 16)], -1)


class Q4_1(_Legacy):
    """value = d * q + m."""

    name = "q4_1"
    type_size = 20
    code_fields = _codes_at(4)
    levels = tuple(range(16))
    halves = ((0, 1.0), (2, -7.5))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0), offsets=half(blocks, 2))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        d, m = affine(x, 15, positive_offset=True, steps=_AFFINE, importance=importance)
        q = encode_affine(x, rounded(d), rounded(m), 15)
        return torch.cat([half_bytes(d), half_bytes(m), unfields(q, 4, 16)], -1)


class Q5_0(_Legacy):
    """value = d * (q - 16)."""

    name = "q5_0"
    type_size = 22
    code_fields = _codes_at(6, high=2)
    levels = tuple(range(-16, 16))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        levels = Levels(self.levels)
        d = symmetric(x, levels, _symmetric(16), importance)
        q = levels.encode(x, rounded(d))
        return torch.cat([half_bytes(d), unfields(q >> 4, 1, 1), unfields(q & 15, 4, 16)], -1)


class Q5_1(_Legacy):
    """value = d * q + m."""

    name = "q5_1"
    type_size = 24
    code_fields = _codes_at(8, high=4)
    levels = tuple(range(32))
    halves = ((0, 1.0), (2, -15.5))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0), offsets=half(blocks, 2))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        d, m = affine(x, 31, positive_offset=True, steps=_AFFINE, importance=importance)
        q = encode_affine(x, rounded(d), rounded(m), 31)
        high, low = unfields(q >> 4, 1, 1), unfields(q & 15, 4, 16)
        return torch.cat([half_bytes(d), half_bytes(m), high, low], -1)


class Q8_0(_Legacy):
    """value = d * q, q int8. The quantiser uses -127..127; a stored -128 is honoured."""

    name = "q8_0"
    type_size = 34
    code_fields = (Field(2, 32, 8, 32),)
    levels = tuple(BYTES.tolist())

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        levels = Levels(range(-127, 128))
        d = symmetric(x, levels, [-127 + 0.25 * step for step in range(-2, 3)], importance)
        q = levels.encode(x, rounded(d)) - 127
        return torch.cat([half_bytes(d), q.to(torch.int8).view(torch.uint8)], -1)


class MXFP4(_Legacy):
    """4-bit floats (E2M1) with a power of two (E8M0) as GGUF stores them, one byte a block.

    value = 2^(e - 128) * level, levels being twice the E2M1 values. GGUF has no NaN here: e = 255
    is one more power of two. The quantiser therefore refuses what is not finite.
    """

    name = "gguf_mxfp4"
    type_size = 17
    code_fields = _codes_at(1)
    levels = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
    scale_dtype = E8M0
    halves = ()

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(self._power(blocks[:, :1]))

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        """With scales twice as large, which are e8m0's numbers; not in rows that have its largest
        (where 2^-128 is none: it becomes 2^-127)."""
        stored = super().codes(parts, shape, blocks=blocks)
        largest = (stored.scales == 2.0**127).any(-1, keepdim=True)
        return dataclasses.replace(
            stored,
            scales=torch.where(largest, stored.scales.clamp(min=2.0**-127), 2 * stored.scales),
            row_scales=torch.where(largest, 1.0, 0.5),
        )

    @staticmethod
    def _power(e: Tensor) -> Tensor:
        """2^(e - 128); the two smallest are subnormal."""
        e = e.to(torch.int32)
        return torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        if not weight.isfinite().all():
            raise ValueError(
                "weight: expected finite numbers, got a NaN or an infinity, which gguf_mxfp4 "
                "cannot store"
            )
        return super().quantize(weight, importance)

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        magnitudes = Levels(self.levels[:8])
        largest = x.abs().amax(-1, keepdim=True)
        # The largest weight falls to 8..16 with the power that most writers take, or twice or half.
        e = torch.frexp(largest).exponent.to(torch.float32) + 124
        best, best_error = torch.zeros_like(x), torch.full_like(largest, float("inf"))
        best_e = torch.zeros_like(largest)
        for step in (0, 1, -1):
            trial = torch.where(largest > 0, (e + step).clamp(0, 254), 0.0)
            scale = self._power(trial)
            # (The reciprocal of the smallest power would leave the range of float32.)
            index = magnitudes.index((x.abs() / scale).clamp(max=1e6))
            value = look_up(torch.tensor(magnitudes.values, device=x.device), index) * scale
            # In float64: squares of the smallest weights vanish in float32.
            error = total((value - x.abs()).to(torch.float64).square(), importance)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_e = torch.where(better, trial, best_e)
            best = torch.where(better, index.to(x.dtype), best)
        q = best.to(torch.uint8) | ((x < 0) & (best > 0)).to(torch.uint8) << 3
        return torch.cat([best_e.to(torch.uint8), unfields(q, 4, 16)], -1)

    def set_scales(self, blocks: Tensor, size: Tensor, generator: torch.Generator) -> None:
        blocks[:, 0] = 125 + (size.flatten() > 0).to(torch.uint8)


_AFFINE = tuple(-1 + 0.1 * step for step in range(21))

FORMATS = [Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), MXFP4()]
