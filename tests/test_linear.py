"""`linear` of every backend and instruction set, over all cases and formats."""

from __future__ import annotations

import pytest

from ktcore.testing.cases import pairs


@pytest.mark.parametrize(
    ("format", "case"), [pytest.param(f, c, id=f"{f}-{c.name}") for f, c in pairs("linear")]
)
def test_case(check, format, case):
    check(case, format)
