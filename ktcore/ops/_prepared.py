"""Calls for which everything has been looked up, for weights that are multiplied again and again.

Checking arguments and choosing a backend takes longer than it seems: beside weights that stream
through a processor's caches nothing of the interpreter stays there, and a call in a decode step
spends 80 to 160 us in Python. So what a call has found out is kept with the weights, and the next
one like it is made in the extension: csrc/bindings/prepared.h.
"""

from __future__ import annotations

from typing import Any

import torch

from ktcore import _native
from ktcore.dispatch.registry import Implementation

# Larger calls are many and varied, and spend their time elsewhere.
MOST_TOKENS = 16


def nothing(*_: object) -> None:
    """In the extension's place, where there is none."""


moe = nothing if _native.ext is None else _native.ext.prepared_moe
linear = nothing if _native.ext is None else _native.ext.prepared_linear


def prepare(
    generation: int | None,
    chosen: Implementation,
    weights: Any,
    tokens: int,
    *args: Any,
    **options: Any,
) -> None:
    """Prepare for calls like this one, which an implementation was chosen for in a generation."""
    weights.prepared = None
    if torch.is_grad_enabled() or generation is None or tokens > MOST_TOKENS:
        return
    if chosen.prepare is not None:
        weights.prepared = chosen.prepare(generation, *args, **options)
