"""`linear` of every backend and instruction set, over all cases and formats."""

from __future__ import annotations

import pytest
import torch

from ktcore import ops
from ktcore.formats import get_format
from ktcore.testing.cases import inputs, pairs
from ktcore.weights import QuantTensor


@pytest.mark.parametrize(
    ("format", "case"), [pytest.param(f, c, id=f"{f}-{c.name}") for f, c in pairs("linear")]
)
def test_case(check, format, case):
    check(case, format)


@pytest.mark.parametrize("format", ["q4_1", "gptq4_g128_sym", "int8", "mxfp4"])
def test_packing_gives_the_same_every_time(variant, format):
    """Memory that packing reads must not have been given back meanwhile."""
    matrix = inputs.matrix(format, 96, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    first = ops.linear(x, matrix)
    for _ in range(20):
        again = QuantTensor(matrix.format, matrix.shape, matrix.parts)
        assert torch.equal(ops.linear(x, again), first)


def extreme(name: str, rows: int, columns: int) -> QuantTensor:
    """All codes and all inner scales the largest that there are, their sign left out."""
    format = get_format(name)
    one = torch.tensor([2.0**-12]).half().view(torch.uint8)
    blocks = torch.zeros(rows, columns // 256, format.type_size, dtype=torch.uint8)
    if name == "q2_k":  # codes 3, scales 15, and offsets that add to their product
        blocks[..., :80] = 0xFF
        blocks[..., 80:82], blocks[..., 82:] = one, (-one.view(torch.half)).view(torch.uint8)
    elif name == "q3_k":  # codes -4, scales -32
        blocks[..., 108:] = one
    else:  # codes -32, scales -128
        blocks[..., 192:208], blocks[..., 208:] = 0x80, one
    return QuantTensor(format, (rows, columns), {"data": blocks.flatten(1)})


@pytest.mark.parametrize("least", [1, 0], ids=["alike", "from zero"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [1, 3, 5, 12, 40])
@pytest.mark.parametrize(("format", "rows"), [("q2_k", 288), ("q3_k", 288), ("q6_k", 40)])
def test_the_largest_integers_do_not_overflow(variant, format, rows, tokens, sign, least):
    weight = extreme(format, rows, 512)
    x = torch.full((tokens, 512), 0.7 * sign)
    x[:, ::3] *= least
    want = x.double() @ weight.dequantize(torch.float32).double().T
    rounded = inputs.rounds_to_bf16(variant.backend, format)  # all activations alike
    rtol = 2**-9 if rounded else 1e-4 if least else 1e-3  # 0.7 may lie between two bytes
    torch.testing.assert_close(ops.linear(x, weight).double(), want, rtol=rtol, atol=0)


def e4m3(codes: torch.Tensor) -> QuantTensor:
    """Codes of e4m3 as they are: all scales are 1."""
    format = get_format("fp8_e4m3")
    parts = format.quantize(torch.ones(codes.shape))
    parts["data"] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    parts["scales"].fill_(1)
    return QuantTensor(format, codes.shape, parts)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_e4m3(variant, tokens):
    """Small ones may be rounded to multiples of 1/32, 0.007 % of the largest."""
    codes = (torch.arange(256) + 7 * torch.arange(40)[:, None]) % 256
    codes[codes % 128 == 127] = 0  # NaN
    weight = e4m3(codes)
    x = torch.zeros(tokens, 256)
    x[torch.arange(tokens), torch.arange(tokens) * 53 % 256] = 1
    want = x @ weight.dequantize(torch.float32).T
    torch.testing.assert_close(ops.linear(x, weight), want, rtol=1e-6, atol=1 / 64)
    torch.testing.assert_close(ops.linear(x, weight, exact=True), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_largest_e4m3_do_not_overflow(variant, tokens, sign):
    weight = e4m3(torch.full((40, 512), 0x7E))
    x = torch.full((tokens, 512), 0.75 * sign)
    want = torch.full((tokens, 40), 448 * 512 * 0.75 * sign)
    torch.testing.assert_close(ops.linear(x, weight), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("name", ["mxfp4", "gguf_mxfp4"])
def test_every_power_of_two_of_mxfp4(variant, name, tokens):
    """Each as the scale of a row; in mxfp4 the last one is NaN."""
    generator = torch.Generator().manual_seed(0)
    format, powers = get_format(name), torch.arange(256)
    parts = format.example((256, 64), generator)
    if name == "mxfp4":
        parts["scales"][:] = powers[:, None]
    else:
        parts["data"].view(256, 2, 17)[..., 0] = powers[:, None]
    weight = QuantTensor(format, (256, 64), parts)
    exact = weight.dequantize(torch.float64)
    x = torch.randn(tokens, 64, generator=generator)
    in_tiles = variant.backend == "amx"  # which take subnormal numbers for zero
    unseen = torch.ones(256, dtype=torch.bool)
    for power in (90, 0, -90):
        got = ops.linear(x * 2.0**power, weight)
        want = x.double() * 2.0**power @ exact.T
        usual = x.norm() * 2.0**power * exact.norm(dim=1) / 64**0.5
        sound = (usual > 2.0**-100) & (usual < 2.0**110)
        if in_tiles:
            sound &= (powers > 16) & (powers < 240)
        if variant.backend == "reference":  # which has weights in float32
            sound &= exact.to(torch.float32).isfinite().all(1)
        assert ((got - want).norm(dim=0) / usual)[sound].max() < (1e-2 if in_tiles else 1e-3)
        assert got[:, exact.isnan().any(1)].isnan().all()
        unseen &= ~sound
    if variant.backend in ("avx2", "avx512"):
        assert powers[unseen].tolist() == ([255] if name == "mxfp4" else [])


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_rows_of_bf16_of_any_size(variant, tokens):
    """Also where a row's numbers are taken as so many to its largest."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 300, generator=generator)
    w[1] *= 1e36
    w[2] *= 1e-28
    w[3] *= 2.0**-130  # subnormal
    w[4] = 0
    w[5, 7] = 3000  # beside it the others are small
    w[6] = 0.5
    w[7, 3], w[8, 299] = torch.nan, -torch.inf
    weight = QuantTensor.quantize(w, "bf16")
    x = torch.randn(tokens, 300, generator=generator)
    exact = weight.dequantize(torch.float32).double()
    got, want = ops.linear(x, weight), x.double() @ exact.T
    usual = x.norm() * exact.norm(dim=1) / 300**0.5
    assert not got[:, 7:9].isfinite().any()
    error = (got - want).norm(dim=0) / usual
    most = 1e-2 if inputs.rounds_to_bf16(variant.backend) else 1e-3  # of a single output
    assert error[[0, 1, 2, 5, 6, *range(9, 40)]].max() < most
    assert got[:, 3].abs().max() < 1e-30 and not got[:, 4].any()


@pytest.mark.parametrize("format", ["int4_g32", "int8", "q6_k"])
@pytest.mark.parametrize("power", [-70, -40, 30, 70])
def test_a_token_is_rounded_alike_whatever_its_size(variant, format, power):
    """Not even where its squares are too large or too small for float32."""
    weight = inputs.matrix(format, 288, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
    x[::2, ::16], x[::2, 1::16] = 200, -200  # eight bits would lose too much of the others
    got = ops.linear(x * 2.0**power, weight)
    assert torch.equal(got, ops.linear(x, weight) * 2.0**power)
    want = x.double() @ weight.dequantize(torch.float32).double().T
    error = (got * 2.0**-power - want).norm(dim=1) / want.norm(dim=1)
    finely = 3e-3 if inputs.rounds_to_bf16(variant.backend, format) else 5e-4
    assert error[::2].max() < finely and error[1::2].max() < 8e-3
