#!/usr/bin/env python3
"""What rounding activations costs: the relative L2 error of a gated expert layer whose activations
are integers of so many bits, with one scale for so many columns, and everything else exact.

    python examples/activation_bits.py

Why integer kernels take activations as they do: see docs/design.md. Activations and weights are
normal; "with outliers", one column in 500 is 20 times as large, as in trained models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import typer
from torch import Tensor
from torch.nn.functional import silu

HIDDEN, INTERMEDIATE = 2048, 768

Rounding = Callable[[Tensor], Tensor]


def symmetric(bits: int, group: int) -> Rounding:
    """Integers of `bits` bits around zero, the largest of a group the largest there is."""
    largest = 2 ** (bits - 1) - 1

    def rounded(x: Tensor) -> Tensor:
        v = x.unflatten(-1, (-1, group))
        step = v.abs().amax(-1, keepdim=True) / largest
        return ((v / step).round() * step).flatten(-2)

    return rounded


def centred(bits: int, group: int, alike: int = 1) -> Rounding:
    """Integers of `bits` bits around a multiple of their step: between the smallest and the largest
    of a group, so that zeros are exact. So many neighbouring groups share a step."""

    def rounded(x: Tensor) -> Tensor:
        v = x.unflatten(-1, (-1, group))
        low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        spread = (high - low).unflatten(-2, (-1, alike)).amax(-2, keepdim=True)
        step = spread.expand(*spread.shape[:-2], alike, 1).flatten(-3, -2) / (2**bits - 3)
        centre = ((high + low) / 2 / step).round() * step
        return (centre + ((v - centre) / step).round() * step).flatten(-2)

    return rounded


# For gate and up, and for down.
CASES: dict[str, tuple[Rounding, Rounding]] = {
    "8 bits, groups of 32": (symmetric(8, 32), symmetric(8, 32)),
    "8 bits, groups of 32; down 16 bits": (symmetric(8, 32), symmetric(16, 32)),
    "8 bits, groups of 16": (symmetric(8, 16), symmetric(8, 16)),
    "8 bits, groups of 16; down 16 bits": (symmetric(8, 16), symmetric(16, 32)),
    "8 bits centred, groups of 32": (centred(8, 32), centred(8, 32)),
    "8 bits centred, groups of 16": (centred(8, 16), centred(8, 16)),
    "8 bits centred, groups of 16; down 16 bits": (centred(8, 16), symmetric(16, 32)),
    "8 bits centred, groups of 32; down 16 bits": (centred(8, 32), symmetric(16, 32)),
    "8 bits centred, groups of 16, a scale for two; down 16 bits": (
        centred(8, 16, alike=2),
        symmetric(16, 32),
    ),
    "8 bits, groups of 8": (symmetric(8, 8), symmetric(8, 8)),
    "16 bits, groups of 32": (symmetric(16, 32), symmetric(16, 32)),
}


def errors(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> dict[str, float]:
    """Relative L2 error of each case on tokens [T, H]."""

    def layer(into: Rounding, inner: Rounding) -> Tensor:
        v = into(x)
        return inner(silu(v @ gate.T) * (v @ up.T)) @ down.T

    exact = layer(lambda v: v, lambda v: v)
    return {
        name: float((layer(*case) - exact).norm() / exact.norm()) for name, case in CASES.items()
    }


def main() -> None:
    """Print the errors as a Markdown table."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    gate, up = (random(INTERMEDIATE, HIDDEN) * HIDDEN**-0.5 for _ in range(2))
    down = random(HIDDEN, INTERMEDIATE)
    x = random(64, HIDDEN)
    outliers = torch.where(torch.arange(HIDDEN) % 500 == 0, 20.0, 1.0)
    columns = [errors(tokens, gate, up, down) for tokens in (x, x * outliers)]
    print("| activations | error | with outliers |\n| --- | ---: | ---: |")
    for name in CASES:
        print(f"| {name} | {' | '.join(f'{c[name]:.3%}' for c in columns)} |")


if __name__ == "__main__":
    typer.run(main)
