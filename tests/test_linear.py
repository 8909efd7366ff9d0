"""`linear` of every backend and instruction set, over all cases and formats."""

from __future__ import annotations

import pytest
import torch

from ktcore import ops
from ktcore.testing.cases import inputs, pairs
from ktcore.weights import QuantTensor


@pytest.mark.parametrize(
    ("format", "case"), [pytest.param(f, c, id=f"{f}-{c.name}") for f, c in pairs("linear")]
)
def test_case(check, format, case):
    check(case, format)


@pytest.mark.parametrize("format", ["q4_1", "gptq4_g128_sym", "int8", "mxfp4"])
def test_packing_gives_the_same_every_time(variant, format):
    """Memory that packing reads must not have been given back meanwhile."""
    matrix = inputs.matrix(format, 96, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    first = ops.linear(x, matrix)
    for _ in range(20):
        again = QuantTensor(matrix.format, matrix.shape, matrix.parts)
        assert torch.equal(ops.linear(x, again), first)
