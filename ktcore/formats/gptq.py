"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it: words along the input columns."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ktcore.formats._grouped import Calibrated, Grouped
from ktcore.formats._packing import pack, unpack, words
from ktcore.formats.base import Parts, Shape


class Gptq(Calibrated):
    """2, 3, 4 or 8 bits: value = (q - zero) * scale.

    Parts: qweight int32 [..., ceil(I*bits/32), O], lowest bits first along the columns; qzeros
    int32 [..., groups, ceil(O*bits/32)]; scales [..., groups, O], float16 or as the name says; in
    act-order (`desc_act`), g_idx int32 [..., I]. In the symmetric ones (`sym`) every zero is half
    of the range, and there is no qzeros.

    Version 1 (`checkpoint_format` "gptq") stores zero - 1, modulo 2^bits as GPTQModel's converters
    and AutoGPTQ's kernels have it (but see `add_one_by_words`); version 2 ("gptq_v2") stores zero.
    """

    method = "GPTQ"
    by_rows = False

    def __init__(
        self,
        code_bits: int,
        group_size: int | None,
        symmetric: bool,
        act_order: bool,
        version: int,
        scale_dtype: torch.dtype,
    ):
        super().__init__(
            f"gptq{code_bits}",
            code_bits,
            group_size,
            symmetric=symmetric,
            act_order=act_order,
            scale_dtype=scale_dtype,
            usual_scale_dtype=torch.float16,
            zero_bits=0 if symmetric else code_bits,
            suffix="_sym" if symmetric else "" if version == 1 else f"_v{version}",
        )
        self.version = version

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, rows, columns = shape
        count = self.group_count(columns)
        specs = {
            "qweight": ((*lead, words(columns, self.code_bits), rows), torch.int32),
            "scales": ((*lead, count, rows), self.scale_dtype),
        }
        if not self.symmetric:
            specs["qzeros"] = ((*lead, count, words(rows, self.code_bits)), torch.int32)
        if self.act_order:
            specs["g_idx"] = ((*lead, columns), torch.int32)
        return specs

    def unpack(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Grouped:
        zeros = None if self.symmetric else self.zeros(parts["qzeros"], shape[-2])
        codes = unpack(parts["qweight"].mT, self.code_bits, shape[-1])
        return Grouped(codes, parts["scales"].mT, zeros, parts.get("g_idx"))

    def zeros(self, qzeros: Tensor, rows: int) -> Tensor:
        """What qzeros of a file mean: int16 [..., O, groups]."""
        zeros = unpack(qzeros, self.code_bits, rows).mT.to(torch.int16)
        return (zeros + 1) & ((1 << self.code_bits) - 1) if self.version == 1 else zeros

    def pack(self, grouped: Grouped) -> Parts:
        parts = {
            "qweight": pack(grouped.codes, self.code_bits).mT.contiguous(),
            "scales": grouped.scales.mT.to(self.scale_dtype).contiguous(),
        }
        if grouped.zeros is not None:
            zeros = (grouped.zeros - int(self.version == 1)) & ((1 << self.code_bits) - 1)
            parts["qzeros"] = pack(zeros.to(torch.uint8).mT, self.code_bits)
        if grouped.g_idx is not None:
            parts["g_idx"] = grouped.g_idx.to(torch.int32)
        return parts


def add_one_by_words(qzeros: Tensor, bits: int) -> Tensor:
    """Version 1's qzeros of 2, 4 or 8 bits, as GPTQModel writes them, as version 2's.

    It subtracts ones from whole words (`convert_gptq_v2_to_v1_format`), so a zero point of zero
    borrows from the next one in the word; only their sum gives both back.
    """
    ones = sum(1 << place for place in range(0, 32, bits))
    return qzeros + ones  # wraps, as the subtraction did


_known = functools.cache(Gptq)


def gptq(
    code_bits: int,
    group_size: int | None,
    symmetric: bool = False,
    act_order: bool = False,
    version: int = 1,
    scale_dtype: torch.dtype = torch.float16,
) -> Gptq:
    """The format of such a kind: always the same object."""
    return _known(code_bits, group_size, symmetric, act_order, version, scale_dtype)


FORMATS = [
    gptq(4, 128),
    gptq(4, 128, symmetric=True),
    gptq(4, 32, symmetric=True),
    gptq(4, 128, symmetric=True, act_order=True),
    gptq(4, 128, version=2),
    gptq(2, 128),
    gptq(3, 128),
    gptq(8, 128),
]
