"""Norms, rotation and attention of every backend and instruction set, over all cases."""

from __future__ import annotations

import pytest

from ktcore.testing.cases import pairs

OPS = ("rms_norm", "rotary", "store_kv", "attention")


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{op}-{c.name}") for op in OPS for _, c in pairs(op)]
)
def test_case(check, case):
    check(case, None)
