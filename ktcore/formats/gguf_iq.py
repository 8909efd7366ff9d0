"""GGUF's I-quants: IQ1_S to IQ3_S, whose codes are entries of codebooks, and IQ4_NL, IQ4_XS.

Blocks of 256 weights (IQ4_NL: 32). An entry gives four or eight magnitudes, a sign bit goes with
each; here code = magnitude + (number of magnitudes) * sign. Layout: llama.cpp's `ggml-common.h`
(block_iq2_xxs and following), read by `gguf.quants`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ktcore.formats.base import Codes, Field, Parts, Shape
from ktcore.formats.gguf_blocks import (
    BlockFormat,
    Scales,
    fields,
    half,
    half_bytes,
    set_half,
    unfields,
    words,
)
from ktcore.formats.gguf_grids import grid, signs_of_eight, signs_of_seven
from ktcore.formats.gguf_legacy import Q4_0
from ktcore.formats.gguf_search import Levels, nested_symmetric

# --------------------------------------------------------------------------------- codebooks


class _Codebook(BlockFormat):
    block_size = 256
    unit: float  # of the scales
    magnitudes: tuple[int, ...]
    halves = ((0, 1.0),)

    def __init__(self) -> None:
        super().__init__()
        self.levels = (*self.magnitudes, *(-m for m in self.magnitudes))

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        """With the unit as the rows' scale: an eighth of a float16 may be too small for one."""
        stored = super().codes(parts, shape, blocks=blocks)
        if self.unit == 1:
            return stored
        unit = torch.full_like(stored.scales[..., :1], self.unit)
        return dataclasses.replace(stored, scales=stored.scales / self.unit, row_scales=unit)

    def signed(self, entries: Tensor, negative: Tensor) -> Tensor:
        """Codes [N, 256] from magnitudes [N, ..., 4 or 8] and sign bits [N, 256]."""
        return entries.flatten(1) + negative * len(self.magnitudes)


def _signs(packed: Tensor) -> Tensor:
    """Sign bits [N, 256] out of one word for each 32 weights [N, 8].

    A word has four times 7 sign bits, the eighth being their parity, and 4 bits of scale.
    """
    at = torch.arange(0, 28, 7, device=packed.device)
    return signs_of_seven((packed[..., None] >> at) & 127).flatten(1)


def _each(values: Tensor, times: int) -> Tensor:
    """Each of values [..., N] so many times, [..., N * times]."""
    return values[..., None].expand(*values.shape, times).flatten(-2)


def _wider(low: Tensor, high: Tensor) -> Tensor:
    """Numbers of entries, int64: eight bits and what lies above them."""
    return low.to(torch.int64) | high.to(torch.int64) << 8


class IQ2_XXS(_Codebook):
    """value = d * (2 * scale + 1) / 8 * level; scale is 4-bit, one for 32 weights."""

    name = "iq2_xxs"
    type_size = 66
    group_size = 32
    unit = 1 / 8
    magnitudes = (8, 25, 43)

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        groups = blocks[:, 2:].unflatten(-1, (8, 8))
        negative = _signs(words(groups[..., 4:].flatten(1), 4))
        return self.signed(grid("iq2_xxs", groups[..., :4]), negative)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        packed = blocks[:, 2:].unflatten(-1, (8, 8))[..., 7]
        return Scales(self.unit * half(blocks, 0), 2 * (packed >> 4) + 1)


class IQ2_XS(_Codebook):
    """value = d * (2 * scale + 1) / 8 * level; scale is 4-bit, one for 16 weights."""

    name = "iq2_xs"
    type_size = 74
    group_size = 16
    unit = 1 / 8
    magnitudes = (8, 25, 43)

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        entries = words(blocks[:, 2:66], 2)
        return self.signed(grid("iq2_xs", entries & 511), signs_of_seven(entries >> 9).flatten(1))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(self.unit * half(blocks, 0), 2 * fields(blocks[:, 66:], 4, 1) + 1)


class IQ2_S(_Codebook):
    """value = d * (2 * scale + 1) / 8 * level; scale is 4-bit, one for 16 weights."""

    name = "iq2_s"
    type_size = 82
    group_size = 16
    unit = 1 / 8
    magnitudes = (8, 25, 43)

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        entries = _wider(blocks[:, 2:34], fields(blocks[:, 66:74], 2, 1))
        return self.signed(grid("iq2_s", entries), signs_of_eight(blocks[:, 34:66]).flatten(1))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(self.unit * half(blocks, 0), 2 * fields(blocks[:, 74:], 4, 1) + 1)


class IQ3_XXS(_Codebook):
    """value = d * (2 * scale + 1) / 4 * level; scale is 4-bit, one for 32 weights."""

    name = "iq3_xxs"
    type_size = 98
    group_size = 32
    unit = 1 / 4
    magnitudes = (4, 12, 20, 28, 36, 44, 52, 62)

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        return self.signed(grid("iq3_xxs", blocks[:, 2:66]), _signs(words(blocks[:, 66:], 4)))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(self.unit * half(blocks, 0), 2 * (blocks[:, 69::4] >> 4) + 1)


class IQ3_S(_Codebook):
    """value = d * (2 * scale + 1) * level; scale is 4-bit, one for 32 weights."""

    name = "iq3_s"
    type_size = 110
    group_size = 32
    unit = 1.0
    magnitudes = (1, 3, 5, 7, 9, 11, 13, 15)

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        entries = _wider(blocks[:, 2:66], signs_of_eight(blocks[:, 66:74]).flatten(1))
        return self.signed(grid("iq3_s", entries), signs_of_eight(blocks[:, 74:106]).flatten(1))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 0), 2 * fields(blocks[:, 106:], 4, 1) + 1)


class _Ternary(_Codebook):
    unit = 1 / 8
    magnitudes = (-7, 1, 9)  # with delta 1/8; codes from 3 on, with -1/8, are -9, -1, 7

    def __init__(self) -> None:
        super().__init__()
        self.levels = (*self.magnitudes, *(m - 2 for m in self.magnitudes))


class IQ1_S(_Ternary):
    """value = d * (2 * scale + 1) * (t + delta), t in -1, 0, 1, delta 1/8 or -1/8.

    Levels are 8 * (t + delta), the scale is an eighth; 3-bit scale and delta are for 32 weights.
    """

    name = "iq1_s"
    type_size = 50
    group_size = 32

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        high = words(blocks[:, 34:], 2)
        at = torch.arange(0, 12, 3, device=blocks.device)
        entries = _wider(blocks[:, 2:34], ((high[..., None] >> at) & 7).flatten(1))
        return self.signed(grid("iq1_s", entries), _each((high >> 15).to(torch.uint8), 32))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(self.unit * half(blocks, 0), 2 * (words(blocks[:, 34:], 2) >> 12 & 7) + 1)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        """With t alone for a code, and delta as an offset: two bits instead of three."""
        stored = super().codes(parts, shape)
        assert isinstance(stored.codes, Tensor) and stored.inner_scales is not None
        eighths = stored.inner_scales
        negative = stored.codes[..., :: self.group_size] >= 3
        first = _each(negative.to(torch.uint8) * 3, self.group_size)
        return dataclasses.replace(
            stored,
            codes=stored.codes - first,
            levels=torch.tensor((-1, 0, 1), dtype=torch.int8, device=stored.levels.device),
            inner_scales=8 * eighths,
            inner_offsets=torch.where(negative, -eighths, eighths),
        )


class IQ1_M(_Ternary):
    """As IQ1_S, with a scale for 16 and a delta for 8 weights.

    The float16 is in four pieces, the highest four bits of each of the scales' words.
    """

    name = "iq1_m"
    type_size = 56
    group_size = 16
    halves = ()

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        high = fields(blocks[:, 32:48], 4, 1)
        entries = _wider(blocks[:, :32], high & 7)
        return self.signed(grid("iq1_s", entries), _each(high >> 3, 8))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        packed = words(blocks[:, 48:], 2)
        at = torch.arange(0, 12, 3, device=blocks.device)
        scales = 2 * ((packed[..., None] >> at) & 7).flatten(1) + 1
        at = torch.arange(0, 16, 4, device=blocks.device)
        bits = (packed >> 12 << at).sum(-1, keepdim=True)
        d = half(torch.cat([bits & 255, bits >> 8], -1).to(torch.uint8), 0)
        return Scales(self.unit * d, scales)

    def set_scales(self, blocks: Tensor, size: Tensor, generator: torch.Generator) -> None:
        """Values are about 7 d: scales 2s + 1 are about 8 and t + delta is 0.8."""
        whole = torch.empty(len(blocks), 2, dtype=torch.uint8)
        set_half(whole, 0, size / 7)
        pieces = fields(whole, 4, 1)
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | pieces << 4


# ------------------------------------------------------------------------ one table of 16 levels

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Trials map the largest weight of a group to about the first level or the last.
_TARGETS = [*range(-141, -119, 3), *range(101, 126, 3)]


class IQ4_NL(Q4_0):
    """value = d * level, laid out as Q4_0 is."""

    name = "iq4_nl"
    levels = NON_LINEAR
    targets = _TARGETS


class IQ4_XS(BlockFormat):
    """value = d * (scale - 32) * level; scale is 6-bit, one for 32 weights."""

    name = "iq4_xs"
    block_size = 256
    type_size = 136
    group_size = 32
    code_fields = (Field(8, 128, 4, 16),)
    levels = NON_LINEAR
    halves = ((0, 1.0),)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        scales = fields(blocks[:, 4:8], 4, 1) | fields(blocks[:, 2:4], 2, 1) << 4
        return Scales(half(blocks, 0), scales.to(torch.int8) - 32)

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        d, scales, q = nested_symmetric(
            x.unflatten(-1, (-1, 32)),
            Levels(self.levels),
            _TARGETS,
            -32,
            31,
            None if importance is None else importance.unflatten(-1, (-1, 32)),
        )
        scales = scales + 32
        high, low = unfields(scales >> 4, 2, 1), unfields(scales & 15, 4, 1)
        return torch.cat([half_bytes(d), high, low, unfields(q.flatten(1), 4, 16)], -1)


FORMATS = [
    IQ1_S(),
    IQ1_M(),
    IQ2_XXS(),
    IQ2_XS(),
    IQ2_S(),
    IQ3_XXS(),
    IQ3_S(),
    IQ4_NL(),
    IQ4_XS(),
]
