"""What is tried of each operator: shapes, types, layouts, values and weights at their extremes.

A case has `op`, `name`, `applies(format)` and `run(format, backend) -> Outcome`; it calls the
public operator, so whatever backend is forced serves it.
"""

from __future__ import annotations

from typing import Protocol

from ktcore.dispatch.registry import WITHOUT_WEIGHTS
from ktcore.formats import format_names
from ktcore.testing.cases import convert, decoder, linear, moe, route
from ktcore.testing.oracle import Outcome

__all__ = ["CASES", "Case", "pairs"]


class Case(Protocol):
    op: str
    name: str

    def applies(self, format: str | None) -> bool: ...

    def run(self, format: str | None, backend: str) -> Outcome: ...


CASES: dict[str, tuple[Case, ...]] = {
    "moe": moe.CASES,
    "linear": linear.CASES,
    "route": route.CASES,
    "quantize": convert.QUANTIZE,
    "dequantize": convert.DEQUANTIZE,
    "rms_norm": decoder.NORM,
    "rotary": decoder.ROTARY,
    "store_kv": decoder.STORE,
    "attention": decoder.ATTENTION,
    "store_latent": decoder.STORE_LATENT,
    "mla_attention": decoder.LATENT,
}


def pairs(op: str) -> list[tuple[str | None, Case]]:
    """Every format with every case of an operator that applies to it; some have no formats."""
    formats = [None] if op in WITHOUT_WEIGHTS else format_names()
    return [(f, case) for f in formats for case in CASES[op] if case.applies(f)]
