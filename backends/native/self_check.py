"""A small `moe` in formats of every kind against plain torch, before a CPU backend is first used.

It is there for what tests elsewhere cannot know: a miscompiled wheel, a hypervisor that misreports
the processor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktcore.backends.native.operators import operators
from ktcore.weights import ExpertWeights

# One format for each kind of kernel, with hidden_size and intermediate_size: large ones where
# activations are then of eight bits.
CHECKED = (
    *((format, 40, 48) for format in ("bf16", "f16", "fp8_e4m3", "int8", "int4_g32", "mxfp4")),
    *((format, 512, 256) for format in ("int8", "int4_g32")),
)


def self_check(backend: str) -> None:
    """Raises RuntimeError if a backend's `moe` is wrong."""
    moe = next(i.run for i in operators(backend) if i.op == "moe")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # So many tokens that what activations lose by rounding is near its mean.
    weights = torch.rand(24, 2, generator=generator)
    ids = torch.tensor([[0, 1], [2, -1], [1, 1]]).repeat(8, 1)
    for format, hidden_size, intermediate_size in CHECKED:
        x = random(24, hidden_size)
        experts = ExpertWeights.from_dense(
            random(3, intermediate_size, hidden_size) / hidden_size**0.5,
            random(3, intermediate_size, hidden_size) / hidden_size**0.5,
            random(3, hidden_size, intermediate_size) / intermediate_size**0.5,
            format,
        )
        gate, up, down = (
            getattr(experts, name).dequantize(torch.float32) for name in ("gate", "up", "down")
        )
        expected = torch.zeros_like(x)
        for t, k in torch.nonzero(ids >= 0).tolist():
            e = ids[t, k]
            h = F.silu(gate[e] @ x[t]) * (up[e] @ x[t])
            expected[t] += weights[t, k] * (down[e] @ h)
        got = moe(x, experts, ids, weights, activation="silu", exact=False)
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= experts.format.tolerance:
            raise RuntimeError(f"moe in {format} is off by {error:.1%} on a known example")
