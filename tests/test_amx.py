"""What only a backend with tile registers can get wrong."""

from __future__ import annotations

import pytest
import torch

import ktcore
from ktcore.dispatch import registry
from ktcore.testing.cases import inputs

pytestmark = pytest.mark.skipif(
    registry.why_not("amx") is not None, reason=f"amx: {registry.why_not('amx')}"
)


def test_few_tokens_go_to_other_kernels_and_many_do_not():
    sizes = {"hidden_size": 2048, "intermediate_size": 768, "num_experts": 128, "top_k": 8}
    for format in ("int4_g32", "q6_k", "fp8_e4m3"):
        few = ktcore.explain("moe", format=format, tokens=1, **sizes).candidates[0]
        many = ktcore.explain("moe", format=format, tokens=4096, **sizes).candidates[0]
        assert (few.backend, many.backend) == ("avx512", "amx")


@pytest.mark.parametrize("format", ["f16", "f32", "nvfp4"])
def test_formats_finer_than_bf16_are_multiplied_without_tiles(format, rng):
    weight = inputs.matrix(format, 64, 512)
    x = torch.randn(300, 512, generator=rng)
    results = []
    for backend in ("amx", "avx512"):
        with ktcore.use(backend):
            results.append(ktcore.ops.linear(x, weight))
    assert (results[0] - results[1]).norm() < 1e-4 * results[1].norm()


@pytest.mark.parametrize("format", ["bf16", "int4_g32", "fp8_e4m3"])
def test_tile_registers_of_others_stay_as_they_were(format, rng):
    """torch multiplies bf16 with tiles too, on this thread, and remembers how it set them up."""
    weight = inputs.matrix(format, 96, 256)
    a, b = (torch.randn(64, 64, generator=rng).bfloat16() for _ in range(2))
    x = torch.randn(70, 256, generator=rng)
    with ktcore.use("amx"):
        product, own = a @ b, ktcore.ops.linear(x, weight)
        for _ in range(20):
            assert torch.equal(a @ b, product)
            assert torch.equal(ktcore.ops.linear(x, weight), own)
