"""Small floating-point numbers with a scale per 16 or 32 neighbours: MX formats and NVFP4.

OCP Microscaling Formats (MX) Specification 1.0 defines e2m1 (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
a sign), and the scale type e8m0: a power of two 2^(code - 127), 255 being NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ktcore.formats._packing import ceil_div, groups, spread, wide
from ktcore.formats.base import E8M0, Codes, Floats, Format, Parts, Shape
from ktcore.formats.fp8 import SMALLEST, reciprocal, to_e4m3

E8M0_NAN = 255
E8M0_BIAS = 127

# e2m1 in halves, by code; code 8 is a negative zero.
LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Halfway between neighbours, in units: what lies above goes up. Ties go to the even code.
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def e8m0(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that e8m0 codes stand for."""
    exponents = codes.to(torch.int32) - E8M0_BIAS
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents)
    nan = torch.full_like(powers, float("nan"))
    return torch.where(codes == E8M0_NAN, nan, powers).to(dtype)


def e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that e2m1 codes (uint8, 0 to 15) stand for."""
    table = torch.tensor(LEVELS, dtype=dtype, device=codes.device) / 2
    table[8] = -0.0
    return table[codes.to(torch.int64)]


def to_e2m1(x: Tensor) -> Tensor:
    """The nearest e2m1 codes, ties to even; beyond the largest, the largest. NaN is zero."""
    x = x.nan_to_num(0.0)
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for lower, middle in enumerate(_MIDDLES):
        above = magnitude >= middle if lower % 2 else magnitude > middle
        code += above.to(torch.uint8)
    return code | ((x < 0).to(torch.uint8) << 3)


def _power_of_two(
    x: Tensor, largest_exponent: int, store: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """For groups x [..., G, size]: e8m0 codes of the scales, and the numbers to store.

    The specification takes the exponent of the largest weight; the neighbours are tried too, and
    the one with the least squared error is kept.

    Args:
        largest_exponent: of the element type's largest number.
        store: scaled numbers to the stored type and back, as floats of x's type.
    """
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, torch.ones_like(largest))).exponent - 1
    best = best_error = None
    for step in (-1, 0, 1):
        code = (exponent - largest_exponent + step + E8M0_BIAS).clamp(0, E8M0_NAN - 1)
        power = e8m0(code, torch.float64)
        error = (store(x / power) * power - x).square().sum(-1, keepdim=True)
        if best is None:
            best, best_error = code, error
        else:
            best = torch.where(error < best_error, code, best)
            best_error = torch.minimum(error, best_error)
    best = torch.where(usable, best, torch.zeros_like(best))
    scaled = x / e8m0(best, torch.float64)
    best = torch.where(finite, best, torch.full_like(best, E8M0_NAN))
    return best.squeeze(-1).to(torch.uint8), scaled


class MxFp4(Format):
    """e2m1 with one e8m0 scale per 32, laid out as gpt-oss is published.

    Parts: blocks uint8 [..., O, ceil(I/32), 16], column 2j of a group in the low and 2j+1 in the
    high half of byte j; scales uint8 [..., O, ceil(I/32)].
    """

    name = "mxfp4"
    bits = 4.25
    group_size = 32
    arithmetic = "int16"
    tolerance = 0.004

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        count = ceil_div(shape[-1], 32)
        return {
            "blocks": ((*shape[:-1], count, 16), torch.uint8),
            "scales": ((*shape[:-1], count), torch.uint8),
        }

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        x = groups(weight.to(torch.float64), 32)
        scales, scaled = _power_of_two(x, 2, lambda y: e2m1(to_e2m1(y), y.dtype))
        codes = to_e2m1(scaled)
        return {"blocks": codes[..., 0::2] | (codes[..., 1::2] << 4), "scales": scales}

    def _codes(self, parts: Parts, shape: Shape) -> Tensor:
        blocks = parts["blocks"]
        return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3)[..., : shape[-1]]

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        # In float64: the scale 2^-127 times 6 is a number of float32, 2^127 times 6 is not.
        scales = spread(e8m0(parts["scales"], torch.float64), 32, shape[-1])
        return (e2m1(self._codes(parts, shape), torch.float64) * scales).to(wide(dtype)).to(dtype)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        scales = e8m0(parts["scales"], torch.float32)
        spoilt = scales.isnan().any(-1, keepdim=True)
        return Codes(
            codes=self._codes(parts, shape),
            levels=torch.tensor(LEVELS, dtype=torch.int8),
            scales=scales,
            offsets=None,
            group_size=32,
            scale_size=32,
            # Levels are in halves; kernels look for NaN here.
            row_scales=torch.where(spoilt, torch.nan, 0.5),
        )

    def exact_scale_dtype(self) -> torch.dtype:
        return E8M0


class MxFp8(Format):
    """e4m3 with one e8m0 scale per 32.

    Parts: data float8_e4m3fn [..., O, I], scales uint8 [..., O, ceil(I/32)].
    """

    name = "mxfp8"
    bits = 8.25
    group_size = 32
    arithmetic = "bf16"
    tolerance = 0.004

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {
            "data": (shape, torch.float8_e4m3fn),
            "scales": ((*shape[:-1], ceil_div(shape[-1], 32)), torch.uint8),
        }

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        x = groups(weight.to(torch.float64), 32)
        scales, scaled = _power_of_two(x, 8, lambda y: to_e4m3(y).to(y.dtype))
        return {"data": to_e4m3(scaled).flatten(-2)[..., : weight.shape[-1]], "scales": scales}

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        scales = spread(e8m0(parts["scales"], torch.float64), 32, shape[-1])
        return (parts["data"].to(torch.float64) * scales).to(wide(dtype)).to(dtype)

    def floats(self, parts: Parts, shape: Shape) -> Floats:
        return Floats(parts["data"], e8m0(parts["scales"], torch.float32), 32)

    def exact_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16


class NvFp4(Format):
    """e2m1 with one e4m3 scale per 16 and one float32 scale for the whole matrix.

    Parts: data uint8 [..., O, ceil(I/16)*8], column 2j in the low and 2j+1 in the high half of byte
    j; scales float8_e4m3fn [..., O, ceil(I/16)]; global_scale float32 [..., 1].

    value = e2m1 * scale * global_scale in "nvfp4", as NVIDIA ModelOpt writes it (its
    `weight_scale_2`); value = e2m1 * scale / global_scale in "nvfp4_ct", as compressed-tensors
    does, whose inverse `codes` rounds to float32.
    """

    bits = 4.5
    group_size = 16
    arithmetic = "int16"
    tolerance = 0.004
    by_rows = False

    def __init__(self, divides: bool):
        self.divides = divides
        self.name = "nvfp4_ct" if divides else "nvfp4"

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        count = ceil_div(shape[-1], 16)
        return {
            "data": ((*shape[:-1], 8 * count), torch.uint8),
            "scales": ((*shape[:-1], count), torch.float8_e4m3fn),
            "global_scale": ((*shape[:-2], 1), torch.float32),
        }

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        """A group's scale is the best of those that take its largest weight to 4 up to 7."""
        x = groups(weight.to(torch.float64), 16)
        largest = x.abs().amax(-1, keepdim=True)
        finite = largest.isfinite()
        usable = torch.where(finite, largest, torch.zeros_like(largest))
        most = usable.flatten(-3).amax(-1) if usable.numel() else usable.new_zeros(x.shape[:-3])
        factor = torch.where(most >= SMALLEST, most / (6 * 448), torch.ones_like(most))
        stored = (1 / factor if self.divides else factor).to(torch.float32)[..., None]
        factor = (1 / stored.double() if self.divides else stored.double())[..., None, None]
        x = torch.where(finite, x, torch.zeros_like(x))
        best = best_error = None
        for target in (6.0, 4.0, 4.25, 4.5, 4.75, 5.0, 5.25, 5.5, 5.75, 6.25, 6.5, 6.75, 7.0):
            scale = to_e4m3(usable / (target * factor)).double()
            q = e2m1(to_e2m1(x * reciprocal(scale * factor)), torch.float64)
            error = (q * scale * factor - x).square().sum(-1, keepdim=True)
            if best is None:
                best, best_error = scale, error
            else:
                best = torch.where(error < best_error, scale, best)
                best_error = torch.minimum(error, best_error)
        codes = to_e2m1(x * reciprocal(best * factor)).flatten(-2)
        best = torch.where(finite, best, torch.full_like(best, float("nan")))
        return {
            "data": codes[..., 0::2] | (codes[..., 1::2] << 4),
            "scales": best.squeeze(-1).to(torch.float8_e4m3fn),
            "global_scale": stored,
        }

    def _codes(self, parts: Parts, shape: Shape) -> Tensor:
        data = parts["data"]
        return torch.stack([data & 15, data >> 4], -1).flatten(-2)[..., : shape[-1]]

    def _apply_global(self, x: Tensor, parts: Parts) -> Tensor:
        factor = parts["global_scale"].to(torch.float64)[..., None]
        return x / factor if self.divides else x * factor

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        scales = spread(parts["scales"].to(torch.float64), 16, shape[-1])
        # Products of 2, 4 and 24 bits are exact in float64, and a quotient is rounded once.
        product = e2m1(self._codes(parts, shape), torch.float64) * scales
        return self._apply_global(product, parts).to(wide(dtype)).to(dtype)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        # The global scale is a factor of the rows, but for its power of two: sums that are still to
        # be multiplied by it are then as far from overflow as others.
        halves = torch.full_like(parts["global_scale"], 0.5, dtype=torch.float64)
        half = self._apply_global(halves[..., None], parts)
        exponent = torch.frexp(torch.where(half.isfinite(), half, 1.0)).exponent.clamp(-100, 100)
        unit = torch.ldexp(torch.ones_like(half), exponent)
        return Codes(
            codes=self._codes(parts, shape),
            levels=torch.tensor(LEVELS, dtype=torch.int8),
            scales=(parts["scales"].to(torch.float64) * unit).to(torch.float32),
            offsets=None,
            group_size=16,
            scale_size=16,
            row_scales=(half / unit).to(torch.float32).expand(*shape[:-1], 1),
        )

    def exact_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16


FORMATS = [MxFp4(), MxFp8(), NvFp4(divides=False), NvFp4(divides=True)]
