"""What a stored weight format is."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Codes:
    """A weight [..., O, I] as small integers: what integer kernels pack, whatever the file.

    With g = i // group_size, exactly::

        value[..., i] = scales[..., g] * levels[codes[..., i]] + offsets[..., g]

    Scales and offsets are float32, which the products of the stored numbers fit without rounding.

    Attributes:
        codes: uint8 [..., O, I].
        levels: int8 [number of codes], the integer that each code stands for.
        scales: float32 [..., O, ceil(I / group_size)].
        offsets: the same shape, or None where they are all zero.
        group_size: how many neighbouring weights of a row share a scale; I for one scale a row.
        columns: int64 [I] or None. Where given, column i above is column columns[i] of the weight:
            formats whose groups are not neighbours (GPTQ's act-order) sort them so.
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor
    offsets: Tensor | None
    group_size: int
    columns: Tensor | None = None


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

    def codes(self, parts: Parts, shape: Shape) -> Codes | None:
        """The weight as small integers, None for a format that does not store such."""
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
