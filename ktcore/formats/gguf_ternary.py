"""GGUF's ternary types: TQ1_0 and TQ2_0.

Blocks of 256 weights with one float16 scale. Layout: llama.cpp's `ggml-common.h` (block_tq1_0,
block_tq2_0), read by `gguf.quants`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.formats.base import Field
from ktcore.formats.gguf_blocks import (
    BlockFormat,
    Scales,
    half,
    half_bytes,
    rounded,
    unfields,
)
from ktcore.formats.gguf_search import Levels, symmetric


class _Ternary(BlockFormat):
    block_size = 256
    group_size = 256

    def search(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales [N, 1] and codes 0, 1, 2 [N, 256] for -1, 0, 1."""
        # Weights from 1 / (2 * target) of the largest on are not zero.
        levels, targets = Levels((-1, 0, 1)), [0.75 + 0.125 * step for step in range(30)]
        d = symmetric(x, levels, targets, importance)
        return d, levels.encode(x, rounded(d))


class TQ1_0(_Ternary):
    """value = d * (q - 1); five ternary digits a byte, as the fraction byte / 256 in base 3."""

    name = "tq1_0"
    type_size = 54
    levels = (-1, 0, 1)
    halves = ((52, 1.0),)

    # Runs of bytes: where they begin, how many, digits in each.
    runs = ((0, 32, 5), (32, 16, 5), (48, 4, 4))

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        codes = []
        for at, size, digits in self.runs:
            powers = torch.tensor([3**n for n in range(digits)], device=blocks.device)
            shifted = blocks[:, None, at : at + size].to(torch.int64) * powers[:, None] & 255
            codes.append((shifted * 3 >> 8).flatten(1).to(torch.uint8))
        return torch.cat(codes, -1)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 52))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        d, q = self.search(x, importance)
        packed = []
        column = 0
        for _, size, digits in self.runs:
            run = q[:, column : column + size * digits].unflatten(-1, (digits, size))
            powers = torch.tensor([3 ** (4 - n) for n in range(digits)], device=x.device)
            number = (run * powers[:, None]).sum(1)
            packed.append(((number * 256 + 242) // 243).to(torch.uint8))
            column += size * digits
        return torch.cat([*packed, half_bytes(d)], -1)


class TQ2_0(_Ternary):
    """value = d * (q - 1), q two bits; a stored 3 means 2 d, though no quantiser writes it."""

    name = "tq2_0"
    type_size = 66
    code_fields = (Field(0, 64, 2, 32),)
    levels = (-1, 0, 1, 2)
    halves = ((64, 1.0),)

    def unpack_scales(self, blocks: Tensor) -> Scales:
        return Scales(half(blocks, 64))

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        d, q = self.search(x, importance)
        return torch.cat([unfields(q, 2, 32), half_bytes(d)], -1)


FORMATS = [TQ1_0(), TQ2_0()]
