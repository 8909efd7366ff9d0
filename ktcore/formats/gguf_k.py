"""GGUF's K-quants: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Blocks of 256 weights; groups of 16 or 32 with integer scales (and mins), which share one float16
factor (or two) a block. Layout: llama.cpp's `ggml-common.h` (block_q2_K and following), read by
`gguf.quants`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.formats.base import Field
from ktcore.formats.gguf_blocks import BlockFormat, Scales, fields, half, half_bytes, unfields
from ktcore.formats.gguf_search import Levels, nested_affine, nested_symmetric


class _K(BlockFormat):
    block_size = 256


def _grouped(importance: Tensor | None, size: int) -> Tensor | None:
    return None if importance is None else importance.unflatten(-1, (-1, size))


def _bytes(integers: Tensor) -> Tensor:
    return integers.to(torch.uint8)


class Q2_K(_K):
    """value = d * scale * q - dmin * m; scale and m are 4-bit, one each for 16 weights."""

    name = "q2_k"
    type_size = 84
    group_size = 16
    code_fields = (Field(16, 64, 2, 32),)
    inner_bits = 4
    levels = (0, 1, 2, 3)
    halves = ((80, 1.0), (82, 1.5))

    def unpack_scales(self, blocks: Tensor) -> Scales:
        scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
        return Scales(half(blocks, 80), scales, -half(blocks, 82), mins)

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        steps = [-0.5 + 0.1 * step for step in range(16)]
        d, dmin, scales, mins, q = nested_affine(
            x.unflatten(-1, (-1, 16)), 3, steps, 15, _grouped(importance, 16)
        )
        packed = unfields(q.flatten(1), 2, 32)
        return torch.cat([_bytes(scales | mins << 4), packed, half_bytes(d), half_bytes(dmin)], -1)


class Q3_K(_K):
    """value = d * (scale - 32) * (q - 4); scale is 6-bit, one for 16 weights."""

    name = "q3_k"
    type_size = 110
    group_size = 16
    code_fields = (Field(32, 64, 2, 32), Field(0, 32, 1, 32, 2))
    levels = tuple(range(-4, 4))
    halves = ((108, 1.0),)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        scales = fields(blocks[:, 96:104], 4, 8) | fields(blocks[:, 104:108], 2, 4) << 4
        return Scales(half(blocks, 108), scales.to(torch.int8) - 32)

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        targets = [-4 + 0.1 * step for step in range(-14, 10)]
        d, scales, q = nested_symmetric(
            x.unflatten(-1, (-1, 16)),
            Levels(self.levels),
            targets,
            -32,
            31,
            _grouped(importance, 16),
        )
        q, scales = q.flatten(1), scales + 32
        return torch.cat(
            [
                unfields(q >> 2, 1, 32),
                unfields(q & 3, 2, 32),
                unfields(scales & 15, 4, 8),
                unfields(scales >> 4, 2, 4),
                half_bytes(d),
            ],
            -1,
        )


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and mins each out of 12 bytes [N, 12]."""
    a, b, c = packed.split(4, -1)
    scales = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], -1)
    return scales, torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], -1)


def _pack_scales_and_mins(scales: Tensor, mins: Tensor) -> Tensor:
    """The inverse of `_scales_and_mins`."""
    (s, s_last), (m, m_last) = scales.split(4, -1), mins.split(4, -1)
    c = (s_last & 15) | (m_last & 15) << 4
    return _bytes(torch.cat([s | s_last >> 4 << 6, m | m_last >> 4 << 6, c], -1))


class _Affine(_K):
    """What Q4_K and Q5_K share."""

    group_size = 32

    def unpack_scales(self, blocks: Tensor) -> Scales:
        scales, mins = _scales_and_mins(blocks[:, 4:16])
        return Scales(half(blocks, 0), scales, -half(blocks, 2), mins)

    def search(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first 16 bytes of the blocks, and the codes [N, 256]."""
        steps = [-1 + 0.1 * step for step in range(21)]
        d, dmin, scales, mins, q = nested_affine(
            x.unflatten(-1, (-1, 32)),
            len(self.levels) - 1,
            steps,
            63,
            _grouped(importance, 32),
        )
        head = [half_bytes(d), half_bytes(dmin), _pack_scales_and_mins(scales, mins)]
        return torch.cat(head, -1), q.flatten(1)


class Q4_K(_Affine):
    """value = d * scale * q - dmin * m; scale and m are 6-bit, one each for 32 weights."""

    name = "q4_k"
    type_size = 144
    code_fields = (Field(16, 128, 4, 32),)
    levels = tuple(range(16))
    halves = ((0, 1.0), (2, 7.5))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        head, q = self.search(x, importance)
        return torch.cat([head, unfields(q, 4, 32)], -1)


class Q5_K(_Affine):
    """value = d * scale * q - dmin * m; scale and m are 6-bit, one each for 32 weights."""

    name = "q5_k"
    type_size = 176
    code_fields = (Field(48, 128, 4, 32), Field(16, 32, 1, 32, 4))
    levels = tuple(range(32))
    halves = ((0, 1.0), (2, 15.5))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        head, q = self.search(x, importance)
        return torch.cat([head, unfields(q >> 4, 1, 32), unfields(q & 15, 4, 32)], -1)


class Q6_K(_K):
    """value = d * scale * (q - 32); scale is int8, one for 16 weights."""

    name = "q6_k"
    type_size = 210
    group_size = 16
    code_fields = (Field(0, 128, 4, 64), Field(128, 64, 2, 32, 4))
    levels = tuple(range(-32, 32))
    halves = ((208, 1.0),)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 208), blocks[:, 192:208].view(torch.int8))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        targets = [-32 + 0.1 * step for step in range(-9, 10)]
        d, scales, q = nested_symmetric(
            x.unflatten(-1, (-1, 16)),
            Levels(self.levels),
            targets,
            -128,
            127,
            _grouped(importance, 16),
        )
        q = q.flatten(1)
        scales = scales.to(torch.int8).view(torch.uint8)
        return torch.cat(
            [unfields(q & 15, 4, 64), unfields(q >> 4, 2, 32), scales, half_bytes(d)], -1
        )


FORMATS = [Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K()]
