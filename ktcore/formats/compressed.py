"""What compressed-tensors writes (https://github.com/vllm-project/compressed-tensors): integers in
groups, its `int-quantized` and `pack-quantized`. Per-channel int8 without zero points is "int8".
"""

from __future__ import annotations

import functools

import torch

from ktcore.formats._grouped import Grouped, GroupedInteger
from ktcore.formats._packing import pack, unpack, words
from ktcore.formats.base import Parts, Shape
from ktcore.formats.integer import nibbles


class Int8Group(GroupedInteger):
    """int8 with one scale per group of columns.

    Parts: data int8 [..., O, I]; scales [..., O, ceil(I / group_size)], bfloat16 or as the name
    says; unless symmetric, zero_points int8 of the scales' shape. value = (data - zero) * scale.
    """

    def __init__(self, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype):
        super().__init__(
            "int8",
            8,
            group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            usual_scale_dtype=torch.bfloat16,
            zero_bits=0 if symmetric else 8,
            suffix="" if symmetric else "_asym",
        )

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        size = (*shape[:-1], self.group_count(shape[-1]))
        specs = {"data": (shape, torch.int8), "scales": (size, self.scale_dtype)}
        if not self.symmetric:
            specs["zero_points"] = (size, torch.int8)
        return specs

    def unpack(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Grouped:
        zeros = None if self.symmetric else parts["zero_points"].to(torch.int16) + 128
        return Grouped(parts["data"].view(torch.uint8) ^ 128, parts["scales"], zeros)

    def pack(self, grouped: Grouped) -> Parts:
        parts = {
            "data": (grouped.codes ^ 128).view(torch.int8),
            "scales": grouped.scales.to(self.scale_dtype),
        }
        if grouped.zeros is not None:
            parts["zero_points"] = (grouped.zeros - 128).to(torch.int8)
        return parts


class PackedInteger(GroupedInteger):
    """`pack-quantized`: 4 or 8 bits in int32 words along the columns.

    Parts: weight_packed int32 [..., O, ceil(I*bits/32)], lowest bits first; weight_scale [..., O,
    ceil(I / group_size)], bfloat16 or as the name says; unless symmetric, weight_zero_point int32
    [..., ceil(O*bits/32), groups], packed along the rows; in act-order, weight_g_idx int32
    [..., I].
    """

    def __init__(
        self,
        code_bits: int,
        group_size: int | None,
        symmetric: bool,
        act_order: bool,
        scale_dtype: torch.dtype,
    ):
        super().__init__(
            f"ct{code_bits}",
            code_bits,
            group_size,
            symmetric=symmetric,
            act_order=act_order,
            scale_dtype=scale_dtype,
            usual_scale_dtype=torch.bfloat16,
            zero_bits=0 if symmetric else code_bits,
            suffix="" if symmetric else "_asym",
        )
        self.by_rows = symmetric and not act_order

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, rows, columns = shape
        count = self.group_count(columns)
        specs = {
            "weight_packed": ((*lead, rows, words(columns, self.code_bits)), torch.int32),
            "weight_scale": ((*lead, rows, count), self.scale_dtype),
        }
        if not self.symmetric:
            packed = (*lead, words(rows, self.code_bits), count)
            specs["weight_zero_point"] = (packed, torch.int32)
        if self.act_order:
            specs["weight_g_idx"] = ((*lead, columns), torch.int32)
        return specs

    def unpack(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Grouped:
        zeros = None
        if not self.symmetric:
            packed = parts["weight_zero_point"].mT
            zeros = unpack(packed, self.code_bits, shape[-2]).mT.to(torch.int16)
        packed = parts["weight_packed"]
        if blocks and self.code_bits == 4 and shape[-1] % 32 == 0 and packed.is_contiguous():
            codes = nibbles(packed.view(torch.uint8))
        else:
            codes = unpack(packed, self.code_bits, shape[-1])
        return Grouped(codes, parts["weight_scale"], zeros, parts.get("weight_g_idx"))

    def pack(self, grouped: Grouped) -> Parts:
        parts = {
            "weight_packed": pack(grouped.codes, self.code_bits),
            "weight_scale": grouped.scales.to(self.scale_dtype),
        }
        if grouped.zeros is not None:
            packed = pack(grouped.zeros.to(torch.uint8).mT, self.code_bits)
            parts["weight_zero_point"] = packed.mT.contiguous()
        if grouped.g_idx is not None:
            parts["weight_g_idx"] = grouped.g_idx.to(torch.int32)
        return parts


_known_int8 = functools.cache(Int8Group)
_known_packed = functools.cache(PackedInteger)


def int8_group(
    group_size: int | None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Int8Group:
    """The format of such a kind: always the same object."""
    return _known_int8(group_size, symmetric, scale_dtype)


def packed_integer(
    code_bits: int,
    group_size: int | None,
    symmetric: bool = True,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> PackedInteger:
    """The format of such a kind: always the same object."""
    return _known_packed(code_bits, group_size, symmetric, act_order, scale_dtype)


FORMATS = [
    int8_group(32),
    int8_group(64),
    int8_group(128),
    packed_integer(4, 32),
    packed_integer(4, 64),
    packed_integer(4, 128),
    packed_integer(4, 32, False),
    packed_integer(4, 128, False),
    packed_integer(4, 128, True, True),
]
