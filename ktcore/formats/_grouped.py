"""Integers with scales, and perhaps zero points, per group of columns: value = (q - zero) * scale.

GPTQ, AWQ and compressed-tensors mean the same by it and differ in where they put the bits.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore.formats._packing import ceil_div, column_weights, groups, spread, total, wide
from ktcore.formats.base import BlockCodes, Codes, Format, Parts, Shape
from ktcore.formats.integer import Int4Group32, search_symmetric

# Weights that are all below this are stored as zeros: the reciprocal of their scale would leave the
# range of float16.
SMALLEST = 1e-30

SUFFIXES = {torch.bfloat16: "_bf16", torch.float16: "_f16", torch.float32: "_f32"}


@dataclass(frozen=True)
class Grouped:
    """A weight [..., O, I] in the terms that all these formats share.

    Attributes:
        codes: uint8 [..., O, I], unsigned, or as the file has them.
        scales: [..., O, G], of the format's type.
        zeros: int16 [..., O, G], unsigned as the codes are; None: half of their range.
        g_idx: int32 [..., I], the group of each column; None: neighbours share one.
    """

    codes: Tensor | BlockCodes
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None


class GroupedInteger(Format):
    """A family of such formats; an instance is one choice of:

    Attributes:
        code_bits: of a weight.
        group_size: columns that share a scale; None: all.
        symmetric: no zero points are stored, zero is half of the range.
        act_order: the group of each column is stored.
        scale_dtype: the type of the scales.
    """

    arithmetic = "int16"
    tolerance = 0.008

    def __init__(
        self,
        prefix: str,
        code_bits: int,
        group_size: int | None,
        *,
        symmetric: bool,
        act_order: bool = False,
        scale_dtype: torch.dtype,
        usual_scale_dtype: torch.dtype,
        zero_bits: int = 0,
        suffix: str = "",
    ):
        if not symmetric and scale_dtype == torch.float32:
            # `codes` could not be exact: zero points times such scales take more than 24 bits.
            raise ValueError("scale_dtype: zero points need scales of float16 or bfloat16")
        self.code_bits, self.group_size = code_bits, group_size
        self.symmetric, self.act_order, self.scale_dtype = symmetric, act_order, scale_dtype
        self.name = prefix + (f"_g{group_size}" if group_size else "") + suffix
        if act_order:
            self.name += "_act"
        if scale_dtype != usual_scale_dtype:
            self.name += SUFFIXES[scale_dtype]
        per_group = 8 * scale_dtype.itemsize + zero_bits
        # What a whole row or column shares is not counted: it depends on the other size.
        self.bits = code_bits + (per_group / group_size if group_size else 0.0)

    @abc.abstractmethod
    def unpack(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Grouped:
        """Parts in the shared terms; with `blocks`, codes may be left as the file has them."""

    @abc.abstractmethod
    def pack(self, grouped: Grouped) -> Parts:
        """The inverse of `unpack`. Scales are rounded to the format's type."""

    def group_count(self, columns: int) -> int:
        return ceil_div(columns, self.group_size) if self.group_size else 1

    def _size(self, columns: int) -> int:
        return self.group_size or max(1, columns)

    # ------------------------------------------------------------------------------- decoding

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        w, grouped = wide(dtype), self.unpack(parts, shape)
        zeros = grouped.zeros
        q = grouped.codes.to(w)
        q = q - (1 << (self.code_bits - 1) if zeros is None else self._of_columns(zeros, grouped))
        return (q * self._of_columns(grouped.scales.to(w), grouped)).to(dtype)

    def _of_columns(self, values: Tensor, grouped: Grouped) -> Tensor:
        """What each column's group has: [..., O, G] to [..., O, I]."""
        shape = grouped.codes.shape
        if grouped.g_idx is None:
            return spread(values, self._size(shape[-1]), shape[-1])
        return values.gather(-1, grouped.g_idx.to(torch.int64)[..., None, :].expand(shape))

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        """In act-order `columns` is [..., I], as the experts of a stack differ.

        Raises:
            ValueError: act-order groups that are not all of group_size columns (the last excepted).
        """
        grouped = self.unpack(parts, shape, blocks=blocks and not self.act_order)
        half = 1 << (self.code_bits - 1)
        scales, offsets, inner_offsets = grouped.scales.to(torch.float32), None, None
        if grouped.zeros is not None and self._zeros_are_bytes:
            inner_offsets = (half - grouped.zeros).to(torch.int8)
        elif grouped.zeros is not None:
            offsets = (half - grouped.zeros) * scales
        q, columns, size = grouped.codes, None, self._size(shape[-1])
        if grouped.g_idx is not None:
            columns = grouped.g_idx.sort(dim=-1, stable=True).indices
            place = torch.arange(shape[-1], device=columns.device) // size
            if not bool((grouped.g_idx.gather(-1, columns) == place).all()):
                raise ValueError(
                    f"g_idx: {self.name} needs groups of {size} columns each, in any order; these "
                    "have other sizes"
                )
            q = q.gather(-1, columns[..., None, :].expand(q.shape))
        return Codes(
            codes=q,
            levels=torch.arange(-half, half, dtype=torch.int16).to(torch.int8),
            scales=scales,
            offsets=offsets,
            group_size=size,
            scale_size=size,
            inner_offsets=inner_offsets,
            columns=columns,
        )

    @property
    def _zeros_are_bytes(self) -> bool:
        """Whether half of the range less any zero point is a signed byte."""
        return self.code_bits < 8

    def exact_scale_dtype(self) -> torch.dtype | None:
        return self.scale_dtype if self.symmetric or self._zeros_are_bytes else None

    # ------------------------------------------------------------------------------- encoding

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        """With the scale, and zero point, of least squared error among several tried.

        (In 8 bits without importance: the scale of the largest weight, where nothing is to gain.)
        """
        g_idx = None
        if self.act_order:  # as it comes: no calibration says which columns matter
            place = torch.arange(weight.shape[-1], device=weight.device) // self._size(
                weight.shape[-1]
            )
            g_idx = place.to(torch.int32).expand(*weight.shape[:-2], -1).contiguous()
        return self.pack(self.round(weight, g_idx, importance))

    def round(
        self, weight: Tensor, g_idx: Tensor | None = None, importance: Tensor | None = None
    ) -> Grouped:
        """The nearest codes under the best scales, with act-order under given groups [..., I]."""
        columns, half = weight.shape[-1], 1 << (self.code_bits - 1)
        weights = column_weights(importance, tuple(weight.shape))
        weight, order = weight.to(torch.float32), None
        if g_idx is not None:
            order = g_idx.sort(dim=-1, stable=True).indices[..., None, :].expand(weight.shape)
            weight = weight.gather(-1, order)
            if weights is not None:
                weights = weights.gather(-1, order[..., 0, :])
        x = groups(weight, self._size(columns))
        if weights is not None:
            weights = groups(weights[..., None, :], self._size(columns))
        if self.symmetric:
            zeros, offset = None, half
            scales = self._symmetric_scales(x, weights)
        else:
            scales, zeros = self._asymmetric_scales(x, weights)
            offset = zeros[..., None]
        scales = scales.to(self.scale_dtype)
        stored = scales.to(torch.float32)[..., None]
        inverse = torch.where(stored != 0, 1 / stored, torch.zeros_like(stored))
        least = 0
        if self.symmetric and self.code_bits == 8:
            least = 1  # -128 would leave the range that int8 kernels like to rely on
        q = ((x * inverse).round().nan_to_num(0) + offset).clamp(least, 2 * half - 1)
        q = q.to(torch.uint8).flatten(-2)[..., :columns]
        if order is not None:
            q = torch.empty_like(q).scatter_(-1, order, q)
        return Grouped(q, scales, zeros, g_idx)

    def _symmetric_scales(self, x: Tensor, importance: Tensor | None) -> Tensor:
        """[..., G] for groups x [..., G, size]."""
        if self.code_bits == 4:
            return Int4Group32._search(x, importance)
        largest = x.abs().amax(-1)
        usable = largest.isfinite() & (largest >= SMALLEST)
        most = (1 << (self.code_bits - 1)) - 1
        scales = torch.where(usable, largest, largest - largest) / most
        if importance is None:
            return scales
        return torch.where(usable, search_symmetric(x, importance, most).squeeze(-1), scales)

    def _asymmetric_scales(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales [..., G] and zeros int16 [..., G] for groups x [..., G, size]."""
        most = (1 << self.code_bits) - 1
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        span = high - low
        usable = span.isfinite() & (span >= SMALLEST)
        best = best_zero = best_error = None
        for step in range(13 if self.code_bits < 8 else 1):
            scale = torch.where(usable, span * (1 - 0.025 * step) / most, torch.ones_like(span))
            zero = (most / 2 - (low + high) / 2 / scale).nan_to_num(0).round().clamp(0, most)
            q = ((x / scale).round().nan_to_num(0) + zero).clamp(0, most) - zero
            dot, norm = total(x * q, importance), total(q * q, importance)
            scale = torch.where((dot > 0) & (norm > 0), dot / norm, scale)
            error = total((q * scale - x).square(), importance)
            if best is None:
                best, best_zero, best_error = scale, zero, error
            else:
                better = error < best_error
                best = torch.where(better, scale, best)
                best_zero = torch.where(better, zero, best_zero)
                best_error = torch.minimum(error, best_error)
        # Zero for a group of zeros, NaN for one that is not finite.
        best = torch.where(usable, best, span - span)
        return best.squeeze(-1), best_zero.squeeze(-1).to(torch.int16)

    def example(self, shape: Shape, generator: torch.Generator) -> Parts:
        *lead, rows, columns = shape
        top = 1 << self.code_bits
        half = top // 2
        size = (*lead, rows, self.group_count(columns))
        zeros = g_idx = None
        if not self.symmetric:
            around = (max(1, half - 2), half + 2)
            zeros = torch.randint(*around, size, generator=generator, dtype=torch.int16)
        if self.act_order:
            order = torch.rand((*lead, columns), generator=generator).argsort(-1)
            g_idx = (order // self._size(columns)).to(torch.int32)
        codes = torch.randint(0, top, shape, generator=generator, dtype=torch.int16)
        # Codes that are chosen evenly deviate by top / sqrt(12).
        scales = (torch.rand(size, generator=generator) + 0.5) * (12**0.5 / top)
        return self.pack(Grouped(codes.to(torch.uint8), scales, zeros, g_idx))


class Calibrated(GroupedInteger):
    """A format whose codes come from a calibration method, which ktcore does not have."""

    method: str

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        raise TypeError(
            f"format: {self.name} is made by {self.method} with calibration data; ktcore reads it, "
            "but does not quantise to it: choose int4, or another format"
        )
