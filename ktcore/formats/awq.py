"""AWQ (arXiv 2306.00978) as AutoAWQ's "gemm" version writes it: words along the output rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ktcore.formats._grouped import Calibrated, Grouped
from ktcore.formats._packing import pack, unpack, words
from ktcore.formats.base import Parts, Shape

# The row, of each eight, that lies in each place of a word, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _unpack_rows(packed: Tensor, rows: int) -> Tensor:
    """int32 [..., N, ceil(O/8)] to uint8 [..., O, N]."""
    places = unpack(packed, 4, 8 * packed.shape[-1]).unflatten(-1, (packed.shape[-1], 8))
    inverse = torch.tensor(ORDER, device=packed.device).argsort()
    return places[..., inverse].flatten(-2)[..., :rows].mT


def _pack_rows(codes: Tensor) -> Tensor:
    """The inverse: uint8 [..., O, N] to int32 [..., N, ceil(O/8)]."""
    missing = -codes.shape[-2] % 8
    eights = torch.nn.functional.pad(codes.mT, (0, missing)).unflatten(-1, (-1, 8))
    return pack(eights[..., list(ORDER)].flatten(-2), 4)


class Awq(Calibrated):
    """4 bits: value = (q - zero) * scale.

    Parts: qweight int32 [..., I, ceil(O/8)], qzeros int32 [..., groups, ceil(O/8)], both with rows
    0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits up; scales [..., groups, O], float16
    or as the name says.
    """

    method = "AWQ"
    by_rows = False

    def __init__(self, group_size: int | None, scale_dtype: torch.dtype):
        super().__init__(
            "awq4",
            4,
            group_size,
            symmetric=False,
            scale_dtype=scale_dtype,
            usual_scale_dtype=torch.float16,
            zero_bits=4,
        )

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, rows, columns = shape
        count = self.group_count(columns)
        return {
            "qweight": ((*lead, columns, words(rows, 4)), torch.int32),
            "qzeros": ((*lead, count, words(rows, 4)), torch.int32),
            "scales": ((*lead, count, rows), self.scale_dtype),
        }

    def unpack(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Grouped:
        zeros = _unpack_rows(parts["qzeros"], shape[-2]).to(torch.int16)
        codes = _unpack_rows(parts["qweight"], shape[-2])
        return Grouped(codes, parts["scales"].mT, zeros)

    def pack(self, grouped: Grouped) -> Parts:
        return {
            "qweight": _pack_rows(grouped.codes),
            "qzeros": _pack_rows(grouped.zeros.to(torch.uint8)),
            "scales": grouped.scales.mT.to(self.scale_dtype).contiguous(),
        }


_known = functools.cache(Awq)


def awq(group_size: int | None, scale_dtype: torch.dtype = torch.float16) -> Awq:
    """The format of such a kind: always the same object."""
    return _known(group_size, scale_dtype)


FORMATS = [awq(128), awq(64), awq(32)]
