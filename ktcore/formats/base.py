"""What a stored weight format is."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Parts = dict[str, Tensor]

# e8m0 as a type of scales: powers of two (torch has one of its own from 2.7 on alone).
E8M0 = torch.uint8


@dataclass(frozen=True)
class Field:
    """Where a block of codes has some of their bits.

    Bytes come in runs; of each run first the lowest bits of all its bytes are codes in turn, then
    the next higher.

    Attributes:
        at, size: bytes [at, at + size) of a block.
        bits: 1, 2, 4 or 8 of each code.
        run: bytes of a run.
        shift: which bits of the code they are: [shift, shift + bits).
    """

    at: int
    size: int
    bits: int
    run: int
    shift: int = 0


@dataclass(frozen=True)
class BlockCodes:
    """Codes as a file has them: rows of blocks.

    Attributes:
        data: uint8 [..., O, I / block_size * type_size].
        fields: where a block's codes are.
        block_size: codes of a block.
        type_size: bytes of a block.
    """

    data: Tensor
    fields: tuple[Field, ...]
    block_size: int
    type_size: int


@dataclass(frozen=True)
class Codes:
    """A weight [..., O, I] as small integers: what integer kernels pack, whatever the file.

    With g = i // group_size and s = i // scale_size, exactly::

        value[..., i] = scale * levels[codes[..., i]] + offset
            scale = scales[..., s] * inner_scales[..., g]
            offset = offsets[..., s] * inner_offsets[..., g]

    where an inner factor that is None is left out, and so is the offset where both are. With
    `inner_offsets` alone, scales take the place of offsets: that is what zero points are. Where
    there are `row_scales`, those of the row multiply both.

    Attributes:
        codes: uint8 [..., O, I], or as a file has them.
        levels: int8 [number of codes], the integer that each code stands for.
        scales: float32 [..., O, ceil(I / scale_size)].
        offsets: float32, the same shape, or None.
        group_size: how many neighbouring weights of a row share the inner factors.
        scale_size: how many share a scale and an offset, a multiple of group_size; I for one a row.
        inner_scales: int8 [..., O, ceil(I / group_size)], or None.
        inner_offsets: likewise.
        row_scales: float32 [..., O, 1], or None.
        inner_bits: 4 where both inner factors are there and 0 to 15, whatever the weight.
        columns: int64 [I] or None. Where given, column i above is column columns[i] of the weight:
            formats whose groups are not neighbours (GPTQ's act-order) sort them so.
    """

    codes: Tensor | BlockCodes
    levels: Tensor
    scales: Tensor
    offsets: Tensor | None
    group_size: int
    scale_size: int
    inner_scales: Tensor | None = None
    inner_offsets: Tensor | None = None
    columns: Tensor | None = None
    row_scales: Tensor | None = None
    inner_bits: int = 8

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets of every group, [..., O, ceil(I / group_size)]."""
        assert isinstance(self.codes, Tensor)
        count = -(-self.codes.shape[-1] // self.group_size)

        def spread(outer: Tensor) -> Tensor:
            times = self.scale_size // self.group_size
            return outer.to(dtype).repeat_interleave(times, -1)[..., :count]

        scales = spread(self.scales)
        offsets = None if self.offsets is None else spread(self.offsets)
        if self.inner_offsets is not None:
            offsets = (scales if offsets is None else offsets) * self.inner_offsets
        if self.inner_scales is not None:
            scales = scales * self.inner_scales
        if self.row_scales is not None:
            scales = scales * self.row_scales
            offsets = None if offsets is None else offsets * self.row_scales
        return scales, offsets


@dataclass(frozen=True)
class Floats:
    """A weight [..., O, I] as floating-point numbers: what other kernels pack.

    value[..., i] = data[..., i] * scales[..., i // scale_size], exactly.

    Attributes:
        data: [..., O, I], of a floating-point type.
        scales: float32 [..., O, ceil(I / scale_size)], or None for none.
        scale_size: how many neighbouring weights of a row share a scale; I for one a row.
    """

    data: Tensor
    scales: Tensor | None = None
    scale_size: int = 0


class Format(abc.ABC):
    """How a weight of logical shape [..., O, I] is stored, as named tensors ("parts").

    The descriptor is the single source of truth: its `dequantize` defines what the stored numbers
    mean, kernels are tested against it, and readers produce its parts.

    Attributes:
        name: canonical name.
        aliases: other names that users may give.
        bits: stored bits per weight, scales included, for sizes that need no padding.
        group_size: how many neighbouring weights of a row share a scale; None if they do not.
        block_size: the number of columns must be a multiple of it.
        by_rows: every part has the weight's rows for its own, so that matrices can be stacked row
            upon row part by part.
        arithmetic: what default kernels round activations to, "bf16" or "int16".
        tolerance: largest relative L2 error of `moe` against exact arithmetic on the stored
            weights.
        exact_tolerance: the same with ``exact=True``.
    """

    name: str
    aliases: tuple[str, ...] = ()
    bits: float
    group_size: int | None = None
    block_size: int = 1
    by_rows: bool = True
    arithmetic: str
    tolerance: float
    exact_tolerance: float = 5e-4

    @property
    def dot_kind(self) -> str:
        """The dot product whose peak bounds default kernels, "bf16" or "int8"."""
        return "bf16" if self.arithmetic == "bf16" else "int8"

    @abc.abstractmethod
    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each part of a weight of a logical shape."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        """Store a float tensor [..., O, I]. The reference quantiser, in plain torch.

        Args:
            weight: [..., O, I].
            importance: [..., I], of at least 0: how much the squared error of each column counts,
                in every row of a matrix; None: all alike. Only their ratios matter. Formats that do
                not search for scales leave it aside.

        Raises:
            ValueError: importance has another shape, or holds what is negative or not finite.
        """

    @abc.abstractmethod
    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., O, I] that parts stand for, computed in float32 (or float64)."""

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes | None:
        """The weight as small integers, None for a format that does not store such.

        With `blocks`, codes may be left as the file has them (`BlockCodes`).
        """
        return None

    def floats(self, parts: Parts, shape: Shape) -> Floats | None:
        """The weight as floating-point numbers, None for a format that does not store such."""
        return None

    def exact_scale_dtype(self) -> torch.dtype | None:
        """The smallest type that holds the scales and offsets of `codes` or `floats` without loss,
        whatever the weight; None if that depends on the weight. `E8M0` for powers of two.
        """
        return None

    def example(self, shape: Shape, generator: torch.Generator) -> Parts:
        """Random parts of about unit size, as files hold them: for tests and benchmarks."""
        return self.quantize(torch.randn(shape, generator=generator))

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all parts of a weight of a logical shape."""
        return sum(
            math.prod(part) * dtype.itemsize for part, dtype in self.part_specs(shape).values()
        )

    def check(self, parts: Parts, shape: Shape, name: str = "parts") -> None:
        """Raises ValueError or TypeError if parts do not fit the format and logical shape."""
        specs = self.part_specs(shape)
        if set(parts) != set(specs):
            raise ValueError(
                f"{name}: {self.name} is stored as {sorted(specs)}, got {sorted(parts)}"
            )
        for part, (expected, dtype) in specs.items():
            got = parts[part]
            if got.dtype != dtype:
                raise TypeError(f"{name}[{part!r}]: expected {dtype}, got {got.dtype}")
            if tuple(got.shape) != tuple(expected):
                raise ValueError(
                    f"{name}[{part!r}]: expected shape {tuple(expected)} for a {self.name} weight "
                    f"of shape {tuple(shape)}, got {tuple(got.shape)}"
                )

    def __repr__(self) -> str:
        return f"<Format {self.name}>"
