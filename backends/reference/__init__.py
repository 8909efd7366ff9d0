"""Plain torch, for every format, operator and device: what the other backends are held against."""

from __future__ import annotations

from ktcore.dispatch.registry import Backend, Implementation


def _implementations() -> list[Implementation]:
    from ktcore.backends.reference.operators import operators

    return operators()


BACKEND = Backend(
    name="reference",
    description="plain torch, on any device",
    rank=0,
    missing=lambda machine: [],
    implementations=_implementations,
    evidence="run on hardware",
)
