"""`moe` of every backend and instruction set, over all cases and formats."""

from __future__ import annotations

import pytest
import torch

import ktcore
from ktcore.testing import oracle
from ktcore.testing.cases import inputs, pairs
from ktcore.testing.variants import all_variants


@pytest.mark.parametrize(
    ("format", "case"), [pytest.param(f, c, id=f"{f}-{c.name}") for f, c in pairs("moe")]
)
def test_case(check, format, case):
    check(case, format)


@pytest.mark.parametrize("variant", all_variants(), ids=lambda v: v.name)
def test_dispatched_to(variant):
    """Forcing a variant leads to it: the tests here would otherwise test something else."""
    if variant.why_not:
        pytest.skip(variant.why_not)
    with variant.forced():
        first = ktcore.explain("moe", format="bf16", tokens=4).candidates[0]
    assert first.backend == variant.backend
    assert first.detail in ("", variant.name)


def test_no_gradient_is_needed_of_inputs_that_require_one(variant, rng):
    experts = inputs.experts("bf16", 5, 65, 48)
    x = torch.randn(3, 65, generator=rng, requires_grad=True)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5, requires_grad=True)
    with torch.inference_mode():
        direct = ktcore.ops.moe(x, experts, ids, weights)
    with torch.no_grad():
        assert torch.equal(ktcore.ops.moe(x, experts, ids, weights), direct)


def test_inputs_are_not_written_to(variant, rng):
    experts = inputs.experts("int4_g32", 5, 65, 48)
    x = torch.randn(9, 65, generator=rng)
    ids = torch.randint(-1, 5, (9, 2), generator=rng)
    weights = torch.rand(9, 2, generator=rng)
    before = [t.clone() for t in (x, ids, weights)]
    ktcore.ops.moe(x, experts, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, ids, weights), strict=True))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4_g32"])
def test_no_read_beyond_the_last_row(variant, format, rng):
    """Rows at the very end of their storage, with NaNs before and after the others."""
    experts = inputs.experts(format, 5, 65, 48)
    storage = torch.full((4, 70), float("nan"))
    x = storage[:, 5:]
    x.copy_(torch.randn(4, 65, generator=rng))
    ids, weights = torch.tensor([[0, 4]] * 4), torch.ones(4, 2)
    want, magnitude = oracle.moe(x, experts, ids, weights, "silu")
    outcome = oracle.judge(
        ktcore.ops.moe(x, experts, ids, weights), want, experts.format.tolerance, magnitude
    )
    assert not outcome.problem, outcome.problem


@pytest.mark.parametrize("format", ["int8", "int4_g32", "ct4_g32_asym"])
def test_each_token_is_taken_as_finely_as_it_needs(variant, format, rng):
    """Eight bits for normal activations, where byte dot products are exact or weights have few
    bits; sixteen where each 16 columns hold a far larger one of either sign, and for all with
    exact=True. (Tiles are of bf16, for all that need not be exact.)"""
    experts = inputs.experts(format, 5, 512, 256)
    x = torch.randn(32, 512, generator=rng)
    x[::2, ::16], x[::2, 1::16] = 20, -20
    x[::2] /= 10
    ids = torch.tensor([[0, 4]] * 32)
    weights = torch.ones(32, 2)
    want, _ = oracle.moe(x, experts, ids, weights, "silu")

    def errors(exact):
        got = ktcore.ops.moe(x, experts, ids, weights, exact=exact).double()
        return ((got - want).norm(dim=1) / want.norm(dim=1)).tolist()

    assert max(errors(exact=True)) < 5e-4
    uneven, normal = errors(exact=False)[::2], errors(exact=False)[1::2]
    if variant.name == "amx":  # whose bf16 has one exponent for each number
        assert max(uneven) < 8e-3 and min(normal) > 1e-3 and max(normal) < 8e-3
        return
    assert max(uneven) < 5e-4
    exact_dots = variant.name in ("avx2_vnni", "avx512_vnni", "avx512_bf16")
    if exact_dots or (variant.name in ("avx2", "avx512") and format != "int8"):
        assert min(normal) > 2e-3 and max(normal) < 8e-3
    else:
        assert max(normal) < 5e-4


@pytest.mark.parametrize("tokens", [1, 12, 13, 25, 33, 48, 49, 97, 260])
@pytest.mark.parametrize("formats", [("q4_k", "f16"), ("f16", "q6_k"), ("int4_g32", "bf16")])
def test_projections_of_two_formats(variant, formats, tokens, rng):
    """Both are multiplied with the same tiles of tokens, whose sizes suit the one and the other."""
    experts, of_down = (inputs.experts(f, 2, 256, 256) for f in formats)
    experts = ktcore.ExpertWeights(experts.gate, experts.up, of_down.down)
    x = torch.randn(tokens, 256, generator=rng)
    if not all(inputs.can_quantize(f) for f in formats):
        x = (x + 0.2) / 32
    ids, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    got = ktcore.ops.moe(x, experts, ids, weights)
    want, magnitude = oracle.moe(x, experts, ids, weights, "silu")
    tolerance = max(inputs.get_format(f).tolerance for f in formats)
    outcome = oracle.judge(got, want, max(tolerance, 3 * 2**-9), magnitude)
    assert not outcome.problem, outcome.problem
    for t in (0, tokens // 2, tokens - 1):
        alone = ktcore.ops.moe(x[t : t + 1], experts, ids[:1], weights[:1])
        assert variant.name == "reference" or torch.equal(alone[0], got[t])


class TestOracle:
    """The judge itself must be able to say no."""

    def judge(self, got, want=None, tolerance=1e-3):
        want = torch.ones(64, 8, dtype=torch.float64) if want is None else want
        return oracle.judge(got, want, tolerance).problem

    def test_equal(self):
        assert not self.judge(torch.ones(64, 8))

    def test_one_wrong_token_in_many(self):
        got = torch.ones(64, 8)
        got[5] *= 1.005  # 0.06 % of the whole
        assert "token 5" in self.judge(got)

    def test_slightly_wrong_everywhere(self):
        assert "relative error" in self.judge(torch.full((64, 8), 1.0015))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        got = torch.ones(64, 8)
        got[3, 2] = value
        assert "[3, 2]" in self.judge(got)

    def test_finite_where_it_must_not_be(self):
        want = torch.ones(64, 8, dtype=torch.float64)
        want[3, 2] = float("nan")
        assert "[3, 2]" in self.judge(torch.ones(64, 8), want)

    def test_beyond_the_range_of_the_type(self):
        want = torch.full((2, 2), 1e6, dtype=torch.float64)
        assert not self.judge(torch.full((2, 2), float("inf"), dtype=torch.float16), want)
        assert self.judge(torch.full((2, 2), 65504.0, dtype=torch.float16), want)

    def test_rounding_of_the_type_costs_nothing(self):
        want = torch.linspace(1, 2, 512, dtype=torch.float64).reshape(64, 8)
        assert not self.judge(want.to(torch.bfloat16), want, 1e-6)
        assert self.judge((want * 1.01).to(torch.bfloat16), want, 1e-3)

    def test_shape(self):
        assert "shape" in self.judge(torch.ones(64, 7))

    def test_bits(self):
        one = torch.ones(3)
        assert not oracle.same_bits(one, one.clone(), "").problem
        assert oracle.same_bits(one, torch.nextafter(one, 2 * one), "").problem

    def test_activations(self):
        x = torch.linspace(-9, 9, 101, dtype=torch.float64)
        up = x.flip(0) * 1.1
        silu, gelu = torch.nn.functional.silu(x), torch.nn.functional.gelu(x, approximate="tanh")
        torch.testing.assert_close(oracle.activate(x, up, "silu"), silu * up)
        torch.testing.assert_close(oracle.activate(x, up, "gelu_tanh"), gelu * up)
