"""Norms, rotation and attention of every backend and instruction set, over all cases."""

from __future__ import annotations

import pytest

from ktcore.dispatch.registry import WITHOUT_WEIGHTS
from ktcore.testing.cases import pairs

OPS = WITHOUT_WEIGHTS - {"route"}  # which has tests of its own


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{op}-{c.name}") for op in sorted(OPS) for _, c in pairs(op)]
)
def test_case(check, case):
    check(case, None)
