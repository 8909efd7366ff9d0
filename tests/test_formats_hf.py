"""The formats of Hugging Face checkpoints against decoders written from their specifications, one
number at a time, and against what transformers computes."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scale_types import fits

from ktcore.formats import format_names, get_format
from ktcore.formats._grouped import GroupedInteger
from ktcore.formats._packing import pack, unpack, words
from ktcore.formats.awq import awq
from ktcore.formats.compressed import int8_group, packed_integer
from ktcore.formats.fp8 import fp8_block
from ktcore.formats.gptq import gptq
from ktcore.weights import QuantTensor

NAN, INF = float("nan"), float("inf")

# --------------------------------------------------------------------- numbers, from their bits


def raw(tensor: torch.Tensor):
    """Nested lists of the bits of each number."""
    size = tensor.dtype.itemsize
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    mask = (1 << (8 * size)) - 1
    return (tensor.contiguous().view(integer).to(torch.int64) & mask).tolist()


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * mantissa * 0.5
    return sign * (2 + mantissa) * 2.0 ** (exponent - 2)


def e8m0(code: int) -> float:
    return NAN if code == 255 else math.ldexp(1.0, code - 127)


def f32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def f16(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def bf16(bits: int) -> float:
    return f32(bits << 16)


NUMBER = {torch.float32: f32, torch.float16: f16, torch.bfloat16: bf16}


def bits_at(stream: list[int], bits: int, index: int) -> int:
    """The index-th number of so many bits in a list of 32-bit words, lowest bits first."""
    whole = sum(word << (32 * i) for i, word in enumerate(stream))
    return (whole >> (bits * index)) & ((1 << bits) - 1)


# --------------------------------------------------------------------------- one matrix each


def decode(weight: QuantTensor) -> list[list[float]]:
    """The values of a matrix [O, I], from its stored bits, one by one."""
    name, parts = weight.format.name, {n: raw(p) for n, p in weight.parts.items()}
    value = {
        "fp8_e4m3_b": _fp8_block, "fp8_e4m3": _fp8_channel, "mxfp4": _mxfp4, "mxfp8": _mxfp8,
        "nvfp4": _nvfp4, "int8": _int8, "ct": _packed, "gptq": _gptq, "awq": _awq, "f": _plain,
    }  # fmt: skip
    of = next(f for prefix, f in value.items() if name.startswith(prefix))
    rows, columns = weight.shape
    return [[of(weight, parts, o, i) for i in range(columns)] for o in range(rows)]


def _plain(w, p, o, i):
    return NUMBER[w.parts["data"].dtype](p["data"][o][i])


def _fp8_block(w, p, o, i):
    return e4m3(p["data"][o][i]) * f32(p["scales"][o // w.format.rows][i // w.format.group_size])


def _fp8_channel(w, p, o, i):
    return e4m3(p["data"][o][i]) * f32(p["scales"][o])


def _mxfp4(w, p, o, i):
    byte = p["blocks"][o][i // 32][i % 32 // 2]
    return e2m1(byte >> 4 if i % 2 else byte & 15) * e8m0(p["scales"][o][i // 32])


def _mxfp8(w, p, o, i):
    return e4m3(p["data"][o][i]) * e8m0(p["scales"][o][i // 32])


def _nvfp4(w, p, o, i):
    byte = p["data"][o][i // 2]
    product = e2m1(byte >> 4 if i % 2 else byte & 15) * e4m3(p["scales"][o][i // 16])
    factor = f32(p["global_scale"][0])
    if w.format.name == "nvfp4":
        return product * factor
    if factor:
        return product / factor
    # Python has no quotient by zero.
    return NAN if product == 0 or math.isnan(product) else product * math.copysign(1, factor) * INF


def _group(w, i):
    return i // (w.format.group_size or w.shape[1])


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _int8(w, p, o, i):
    g = _group(w, i)
    zero = _signed(p["zero_points"][o][g]) if "zero_points" in p else 0
    return (_signed(p["data"][o][i]) - zero) * NUMBER[w.parts["scales"].dtype](p["scales"][o][g])


def _packed(w, p, o, i):
    bits = w.format.code_bits
    g = p["weight_g_idx"][i] if "weight_g_idx" in p else _group(w, i)
    zero = 1 << (bits - 1)
    if "weight_zero_point" in p:
        zero = bits_at([row[g] for row in p["weight_zero_point"]], bits, o)
    scale = NUMBER[w.parts["weight_scale"].dtype](p["weight_scale"][o][g])
    return (bits_at(p["weight_packed"][o], bits, i) - zero) * scale


def _gptq(w, p, o, i):
    bits = w.format.code_bits
    g = p["g_idx"][i] if "g_idx" in p else _group(w, i)
    zero = 1 << (bits - 1)
    if "qzeros" in p:
        zero = bits_at(p["qzeros"][g], bits, o)
        if "_v2" not in w.format.name:
            zero = (zero + 1) % (1 << bits)
    q = bits_at([row[o] for row in p["qweight"]], bits, i)
    return (q - zero) * f16(p["scales"][g][o])


def _awq(w, p, o, i):
    place = [0, 2, 4, 6, 1, 3, 5, 7].index(o % 8)

    def at(row):
        return (row[o // 8] >> (4 * place)) & 15

    g = _group(w, i)
    return (at(p["qweight"][i]) - at(p["qzeros"][g])) * f16(p["scales"][g][o])


OURS = [
    *(f for f in format_names() if f.startswith(("f16", "f32", "fp8", "mxfp", "nvfp", "int8_", "ct",
                                                 "gptq", "awq"))),
    # Made for files.
    fp8_block(64, 32), int8_group(None, False), int8_group(24, False, torch.float16),
    int8_group(48, True, torch.float32), packed_integer(8, 32), packed_integer(8, 32, False),
    packed_integer(4, None), packed_integer(4, 16, False, True, torch.float16),
    packed_integer(4, 48, True, False, torch.float32), gptq(2, 16, False, True), gptq(3, 32),
    gptq(3, 64, True, True), gptq(8, None, False, True, 2), gptq(4, 40, True), awq(None), awq(48),
]  # fmt: skip
FORMATS = [get_format(f) for f in OURS]
INTEGERS = [f for f in FORMATS if isinstance(f, GroupedInteger)]
SHAPES = [(1, 1), (3, 33), (9, 64), (5, 129), (130, 40)]


def ids(format):
    return format.name


def equal(got: torch.Tensor, want) -> bool:
    """In value and in the sign of zeros, NaN for NaN."""
    want = torch.as_tensor(want, dtype=got.dtype)
    same = torch.equal(got.nan_to_num(7e77), want.nan_to_num(7e77))
    return same and torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_dequantize_is_exact(format, shape, rng):
    weight = QuantTensor(format, shape, format.example(shape, rng))
    want = torch.tensor(decode(weight), dtype=torch.float64)
    assert torch.equal(weight.dequantize(torch.float64), want)
    assert torch.equal(weight.dequantize(torch.float32), want.to(torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), want.to(torch.float32).to(dtype))


# Bits of scales at their extremes: zeros of both signs, subnormals, the largest, NaN.
EXTREME = {
    torch.float32: [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7FC00000],
    torch.float16: [0, 1 << 15, 1, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7E00],
    torch.bfloat16: [0, 1 << 15, 1, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x7FC0],
}


def extreme(format, shape, rng) -> QuantTensor:
    """Every bit of what is stored at random, floating-point scales at their extremes."""
    parts = format.example(shape, rng)
    for name, part in parts.items():
        if name.endswith("g_idx"):
            continue
        size = part.dtype.itemsize
        if part.dtype in EXTREME and name != "data":
            choice = torch.randint(8, part.shape, generator=rng)
            values = torch.tensor(EXTREME[part.dtype])[choice]
        else:
            values = torch.randint(0, 1 << (8 * size), part.shape, generator=rng)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        parts[name] = values.to(integer).view(part.dtype)
    return QuantTensor(format, shape, parts)


@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_every_bit_means_what_it_should(format, rng):
    for shape in ((16, 96), (3, 33)):
        weight = extreme(format, shape, rng)
        got = weight.dequantize(torch.float64)
        assert equal(got, decode(weight))
        single = weight.dequantize(torch.float32)
        assert equal(single, got.to(torch.float32))


@pytest.mark.parametrize("name", ["mxfp8", "fp8_e4m3", "fp8_e4m3_b128"])
def test_every_e4m3(name):
    """With a scale of 1: subnormals, negative zero, 448 and both NaN among them."""
    format, shape = get_format(name), (4, 64)
    parts = format.quantize(torch.ones(shape))
    parts["data"] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(shape)
    parts["scales"].fill_(127 if name == "mxfp8" else 1.0)
    want = [[e4m3(64 * r + c) for c in range(64)] for r in range(4)]
    assert equal(format.dequantize(parts, shape), want)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_every_e8m0(name):
    format, shape = get_format(name), (256, 32)
    parts = format.quantize(torch.ones(shape))
    parts["scales"] = torch.arange(256, dtype=torch.uint8)[:, None]
    if name == "mxfp4":
        parts["blocks"] = torch.arange(16, dtype=torch.uint8).mul(16).add(2).expand(256, 1, 16)
    weight = QuantTensor(format, shape, {n: p.contiguous() for n, p in parts.items()})
    assert equal(weight.dequantize(torch.float64), decode(weight))
    assert weight.dequantize()[255].isnan().all() and weight.dequantize()[:255].isfinite().any()


# --------------------------------------------------------------------- other implementations


def test_mxfp4_as_transformers(rng):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    shape = (3, 40, 96)
    blocks = torch.randint(0, 256, (3, 40, 3, 16), generator=rng, dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 40, 3), generator=rng, dtype=torch.uint8)
    got = get_format("mxfp4").dequantize({"blocks": blocks, "scales": scales}, shape)
    want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(got, want.transpose(1, 2))


@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)])
def test_fp8_blocks_as_transformers(shape, rng):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    format = get_format("fp8_e4m3_b128")
    parts = format.example(shape, rng)

    class Quantizer:
        class quantization_config:
            weight_block_size = (128, 128)

    operation = fp8.Fp8Dequantize(Quantizer())
    want = operation._dequantize_one(parts["data"], parts["scales"])
    got = format.dequantize(parts, shape)
    assert torch.equal(got.to(want.dtype), want)


# ------------------------------------------------------------------------------ small integers


WITH_CODES = [f for f in FORMATS if f.codes(f.example((1, 16), torch.Generator()), (1, 16))]


WITHOUT = [f for f in FORMATS if f not in WITH_CODES]


def test_which_formats_have_codes():
    names = {"f16", "f32", "fp8_e4m3", "fp8_e4m3_b128", "fp8_e4m3_b64x32", "mxfp8"}
    assert {f.name for f in WITHOUT} == names


@pytest.mark.parametrize("format", WITHOUT, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1), (9, 64), (5, 129), (2, 130, 200)], ids=str)
def test_floats_mean_the_same(format, shape, rng):
    weight = QuantTensor(format, shape, format.example(shape, rng))
    floats = format.floats(weight.parts, shape)
    got = floats.data.to(torch.float64)
    if floats.scales is not None:
        assert floats.scales.dtype == torch.float32
        assert floats.scales.shape == (*shape[:-1], -(-shape[-1] // floats.scale_size))
        spread = floats.scales.double().repeat_interleave(floats.scale_size, -1)
        got = got * spread[..., : shape[-1]]
    assert torch.equal(got, weight.dequantize(torch.float64))


@pytest.mark.parametrize("format", WITH_CODES, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1), (9, 64), (5, 129), (2, 3, 200)], ids=str)
def test_codes_mean_the_same(format, shape, rng):
    weight = QuantTensor(format, shape, format.example(shape, rng))
    codes = format.codes(weight.parts, shape)
    outer, inner = (
        (*shape[:-1], -(-shape[-1] // size)) for size in (codes.scale_size, codes.group_size)
    )
    assert codes.codes.dtype == torch.uint8 and codes.codes.shape == shape
    assert codes.levels.dtype == torch.int8
    assert codes.scales.dtype == torch.float32 and codes.scales.shape == outer
    for factors in (codes.inner_scales, codes.inner_offsets):
        assert factors is None or (factors.dtype == torch.int8 and factors.shape == inner)
    if format.exact_scale_dtype() is not None:
        assert fits(codes.scales, format.exact_scale_dtype())

    def spread(x):
        return x.repeat_interleave(codes.group_size, -1)[..., : shape[-1]]

    scales, offsets = codes.factors(torch.float64)
    got = spread(scales) * codes.levels[codes.codes.long()].double()
    if offsets is not None:
        got += spread(offsets)
    want = weight.dequantize(torch.float64)
    if codes.columns is not None:
        want = want.gather(-1, codes.columns[..., None, :].expand(shape))
    if format.name == "nvfp4_ct":  # the inverse of its global scale is rounded
        assert torch.allclose(got, want, rtol=2**-24, atol=0)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["gptq4_g128_sym_act", "ct4_g128_act"])
def test_act_order_with_uneven_groups(name, rng):
    """Dequantised as stored; what needs groups of neighbours refuses."""
    format, shape = get_format(name), (8, 256)
    parts = format.example(shape, rng)
    g_idx = next(n for n in parts if n.endswith("g_idx"))
    parts[g_idx] = torch.tensor([0] * 100 + [1] * 156, dtype=torch.int32)
    weight = QuantTensor(format, shape, parts)
    assert torch.equal(weight.dequantize(torch.float64), torch.tensor(decode(weight)).double())
    with pytest.raises(ValueError, match="g_idx"):
        format.codes(parts, shape)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    count=st.integers(0, 70),
    rows=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_packed_words(bits, count, rows, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=rng, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)
    for stream, row in zip(raw(packed), codes.tolist(), strict=True):
        assert [bits_at(stream, bits, i) for i in range(count)] == row


@pytest.mark.parametrize("format", INTEGERS, ids=ids)
def test_unpack_is_the_inverse_of_pack(format, rng):
    for shape in ((3, 33), (2, 5, 64), (2, 3, 9, 130)):
        parts = format.example(shape, rng)
        again = format.pack(format.unpack(parts, shape))
        assert again.keys() == parts.keys() == format.part_specs(shape).keys()
        assert all(torch.equal(again[n], parts[n]) for n in parts)


# ---------------------------------------------------------------------------------- quantising

# Largest relative L2 error on Gaussian weights, a little above what is reached.
LOSS = {
    "f32": 1e-7, "f16": 3e-4, "fp8_e4m3": 0.0268, "fp8_e4m3_b128": 0.0268, "mxfp8": 0.0268,
    "mxfp4": 0.113, "nvfp4": 0.084, "nvfp4_ct": 0.084, "int8_g32": 0.0056, "int8_g64": 0.0062,
    "int8_g128": 0.0067, "ct4_g32": 0.082, "ct4_g64": 0.091, "ct4_g128": 0.098,
    "ct4_g32_asym": 0.079, "ct4_g128_asym": 0.097, "ct4_g128_act": 0.098,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSS)
def test_loss_on_gaussian_weights(name, rng):
    dense = torch.randn(64, 1024, generator=rng)
    for factor in (1.0, 1e-3):
        got = QuantTensor.quantize(dense * factor, name).dequantize() / factor
        assert ((got - dense).norm() / dense.norm()).item() <= LOSS[name]


def test_zero_points_serve_weights_to_one_side(rng):
    dense = torch.rand(16, 256, generator=rng) + 0.2
    loss = {
        name: (QuantTensor.quantize(dense, name).dequantize() - dense).norm()
        for name in ("ct4_g32", "ct4_g32_asym")
    }
    assert loss["ct4_g32_asym"] < 0.75 * loss["ct4_g32"]


# (NVFP4's global scale follows the largest weight, which moves the grid of its scales.)
@pytest.mark.parametrize("name", [n for n in LOSS if not n.startswith("nvfp4")])
def test_what_is_stored_stays(name, rng):
    """Numbers of the format survive being quantised, but for the rounding of 16-bit scales."""
    format, shape = get_format(name), (4, 128)
    dense = format.dequantize(format.quantize(torch.randn(shape, generator=rng)), shape)
    again = format.dequantize(format.quantize(dense), shape)
    assert ((again - dense).norm() / dense.norm()).item() < 0.012


@pytest.mark.parametrize("format", [f for f in FORMATS if f.name in LOSS], ids=ids)
def test_quantize_extremes(format):
    x = torch.ones(5, 160)
    x[1] = 0
    x[2, 40], x[3, 70] = NAN, float("inf")
    x[4] = 1e-38
    parts = format.quantize(x)
    format.check(parts, (5, 160))
    got = format.dequantize(parts, (5, 160))
    if format.name == "fp8_e4m3_b128":
        assert got[:, :128].isnan().all() and got[:, 128:].isfinite().all()
        return
    assert (got[1] == 0).all() and (got[0] - 1).abs().max() < 0.1
    assert not got[2, 40].isfinite() and not got[3, 70].isfinite()
    assert got[4].abs().max() <= 1.1e-38
    if format.group_size and "_act" not in format.name:
        group = torch.arange(160) // format.group_size
        assert torch.equal(got[2].isfinite(), group != 40 // format.group_size)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (2, 3, 4, 40)], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_stacks_and_nothing(format, shape, rng):
    parts = format.example(shape, rng)
    format.check(parts, shape)
    weight = QuantTensor(format, shape, parts)
    got = weight.dequantize()
    assert got.shape == shape
    if len(shape) > 2:
        for i in range(shape[0]):
            assert torch.equal(weight[i].dequantize(), got[i])


@pytest.mark.parametrize("name", [n for n in format_names() if n.startswith(("gptq", "awq"))])
def test_calibrated_formats_are_read_only(name):
    with pytest.raises(TypeError, match=rf"{name}.*calibration"):
        get_format(name).quantize(torch.ones(8, 128))


def test_formats_of_a_kind_are_one_object():
    assert gptq(4, 128) is gptq(4, 128, False, act_order=False) is get_format("gptq4_g128")
    assert packed_integer(4, 32) is packed_integer(4, 32, True, False, torch.bfloat16)
    assert awq(48) is awq(48, torch.float16) and int8_group(32) is int8_group(32, symmetric=True)
    assert fp8_block(128, 128) is get_format("fp8_e4m3_b128")
    names = [f.name for f in FORMATS]
    assert len(set(names)) == len(names)


def test_zero_points_with_float32_scales_are_refused():
    with pytest.raises(ValueError, match="scale_dtype"):
        packed_integer(4, 32, False, False, torch.float32)


@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_by_rows(format, rng):
    """Where it says so, matrices stacked part by part are the matrices stacked."""
    weights = [format.example((n, 64), rng) for n in (3, 5)]

    def joined() -> QuantTensor:
        parts = {n: torch.cat([w[n] for w in weights]) for n in weights[0]}
        return QuantTensor(format, (8, 64), parts)

    if format.by_rows:
        want = torch.cat(
            [format.dequantize(w, (n, 64)) for w, n in zip(weights, (3, 5), strict=True)]
        )
        assert torch.equal(joined().dequantize(), want)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            joined()


@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_bits(format):
    """Stored bits per weight, but for what a whole row, column or matrix shares."""
    shape = (512, 1920 * 2)
    shared = 0
    if isinstance(format, GroupedInteger):
        shared += 32 * shape[1] if format.act_order else 0
        if format.group_size is None:
            zero = 0 if format.symmetric else format.code_bits
            shared += (8 * format.scale_dtype.itemsize + zero) * shape[0]
    elif format.name == "fp8_e4m3":
        shared = 32 * shape[0]
    elif format.name.startswith("nvfp4"):
        shared = 32
    stored = 8 * format.nbytes(shape) - shared
    assert stored / math.prod(shape) == pytest.approx(format.bits, rel=1e-9)
