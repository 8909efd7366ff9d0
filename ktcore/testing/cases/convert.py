"""Cases of `quantize` and `dequantize`, held against the formats' own references."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore import ops
from ktcore.formats import Parts, get_format
from ktcore.testing import oracle
from ktcore.testing.cases import inputs
from ktcore.testing.oracle import Outcome
from ktcore.weights import QuantTensor

# A quantiser that searches for its scales may find others than the reference, not worse ones.
SEARCH_SLACK = 0.005
# Share of the error of rounding by the largest weight alone that a search must stay below.
SEARCH_GAIN = 0.9

COLUMNS = (1, 31, 32, 33, 64, 129)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _loss(tensor: Tensor, weight: QuantTensor) -> float:
    """Relative L2 error of a stored weight, of the rows that are finite and stored so."""
    got = weight.dequantize(torch.float64)
    finite = (tensor.isfinite() & got.isfinite()).all(-1)
    want, got = tensor.to(torch.float64)[finite], got[finite]
    return ((got - want).norm() / want.norm().clamp(min=oracle.NEGLIGIBLE)).item()


def _plain_loss(tensor: Tensor, group_size: int) -> float:
    """What rounding to 4 bits by each group's largest weight alone loses."""
    x = tensor.to(torch.float64)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    scale = x.abs().amax(-1, keepdim=True).clamp(min=oracle.NEGLIGIBLE) / 7
    return (((x / scale).round() * scale - x).norm() / x.norm()).item()


def _four_bits(weight: QuantTensor) -> bool:
    """Whether weights are integers of four bits."""
    codes = weight.format.codes(weight.parts, weight.shape)
    if codes is None or len(codes.levels) != 16:
        return False
    levels = codes.levels.to(torch.int64)
    return bool((levels.diff() == 1).all())


@dataclass(frozen=True)
class QuantizeCase:
    """A tensor quantised by the operator and by its format's reference.

    Columns are rounded up to whole blocks of the format. `brief` cases are for every format.
    """

    name: str
    shape: tuple[int, ...] = (17, 129)
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "dense"
    brief: bool = False

    op = "quantize"

    def applies(self, format: str | None) -> bool:
        return (
            format is not None
            and inputs.can_quantize(format)
            and (self.brief or inputs.thorough(format))
        )

    def tensor(self, columns: int) -> Tensor:
        x = torch.randn(*self.shape[:-1], columns, generator=inputs.generator(self.name))
        if self.values == "zero_rows":
            x[::2] = 0
        elif self.values == "spoiled":  # in one group of one row each
            x[0, 0], x[1, -1], x[2, 33] = float("nan"), float("inf"), -float("inf")
        elif self.values == "small":
            x = x * 1e-12
        elif self.values == "large":
            x = x * 1e12
        elif self.values == "heavy_tailed":
            x = x**5
        elif self.values == "equal":
            x = torch.full_like(x, -0.37)
        else:
            assert self.values == "normal", self.values
        x = x.to(self.dtype)
        return inputs.lay_out(x, self.layout) if x.dim() == 2 else x

    def run(self, format: str | None, backend: str) -> Outcome:
        assert format is not None
        tensor = self.tensor(inputs.whole_blocks(format, self.shape[-1]))
        weight = ops.quantize(tensor, format)
        reference = get_format(format).quantize(tensor)
        if set(weight.parts) != set(reference) or weight.shape != tensor.shape:
            return Outcome(problem=f"got {weight} with parts {sorted(weight.parts)}")
        if get_format(format).group_size is None:
            return self._equal(weight.parts, reference)
        return self._searched(tensor, weight, QuantTensor(format, weight.shape, reference))

    def _equal(self, parts: Parts, reference: Parts) -> Outcome:
        """The same bits, but for the codes of rows that have no scale."""
        sound = slice(None)
        if "scales" in reference:
            outcome = oracle.same_bits(parts["scales"], reference["scales"], "of scales")
            if outcome.problem:
                return outcome
            sound = reference["scales"].isfinite()
        return oracle.same_bits(parts["data"][sound], reference["data"][sound], "of data")

    def _searched(self, tensor: Tensor, weight: QuantTensor, reference: QuantTensor) -> Outcome:
        spoiled, expected = (~w.dequantize().isfinite() for w in (weight, reference))
        if not torch.equal(spoiled, expected):
            return Outcome(problem="not the same values as in the reference are not finite")
        if tensor.numel() == 0:
            return Outcome(0.0, 0.0)
        loss = _loss(tensor, weight)
        limit = _loss(tensor, reference) * (1 + SEARCH_SLACK) + 1e-7
        if self.values == "normal" and tensor.numel() >= 500 and _four_bits(weight):  # typical
            plain = _plain_loss(tensor, weight.format.group_size or 1)
            limit = min(limit, SEARCH_GAIN * plain)
        return Outcome(loss, limit, "" if loss <= limit else f"loses {loss:.4g} of {limit:.4g}")


@dataclass(frozen=True)
class DequantizeCase:
    """A stored weight read by the operator and by its format's reference: the same bits.

    Columns are rounded up to whole blocks of the format. `brief` cases are for every format.
    """

    name: str
    shape: tuple[int, int] = (17, 129)
    dtype: torch.dtype = torch.float32
    stored: str = "quantised"
    stacked: int = 0
    brief: bool = False

    op = "dequantize"

    def applies(self, format: str | None) -> bool:
        return (
            format is not None
            and inputs.applies(self.stored, format)
            and (self.brief or inputs.thorough(format))
        )

    def run(self, format: str | None, backend: str) -> Outcome:
        assert format is not None
        rows, columns = self.shape[0], inputs.whole_blocks(format, self.shape[1])
        if self.stacked:
            rows = inputs.whole_blocks(format, rows)
            weight = inputs.experts(format, self.stacked, columns, rows).gate
        else:
            weight = inputs.matrix(format, rows, columns, self.stored)
        want = get_format(format).dequantize(weight.parts, weight.shape, self.dtype)
        return oracle.same_bits(ops.dequantize(weight, self.dtype), want, "from the reference")


QUANTIZE = (
    *(QuantizeCase(f"{r}x{c}", (r, c)) for c in COLUMNS for r in (1, 17)),
    *(QuantizeCase(f"{_name(dtype)}", dtype=dtype, brief=True) for dtype in DTYPES[1:]),
    *(QuantizeCase(f"{layout}", layout=layout) for layout in inputs.LAYOUTS[1:]),
    QuantizeCase("stack [2, 3, 33, 65]", (2, 3, 33, 65), brief=True),
    QuantizeCase("no rows", (0, 65), brief=True),
    *(
        QuantizeCase(
            f"{values} {_name(dtype)}",
            values=values,
            dtype=dtype,
            brief=values in ("zero_rows", "heavy_tailed", "equal") and dtype == torch.float32,
        )
        for values in ("zero_rows", "spoiled", "small", "large", "heavy_tailed", "equal")
        for dtype in DTYPES
        if not (values in ("small", "large") and dtype == torch.float16)
    ),
)

DEQUANTIZE = (
    *(
        DequantizeCase(f"{r}x{c} {_name(dtype)}", (r, c), dtype, brief=(r, c) == (17, 129))
        for c in COLUMNS
        for r in (1, 17)
        for dtype in DTYPES
    ),
    *(
        DequantizeCase(
            f"stored {stored} {_name(dtype)}", (48, 65), dtype, stored, brief=dtype == DTYPES[0]
        )
        for stored in inputs.STORED[1:]
        for dtype in DTYPES
    ),
    *(
        DequantizeCase(f"stack {_name(dtype)}", dtype=dtype, stacked=3, brief=dtype == DTYPES[0])
        for dtype in DTYPES
    ),
)
