"""What is read from files against what the libraries that write them compute, bit for bit: on
random bits and on extremes (every code point, subnormals, the largest numbers, zeros of both signs,
NaN).

compressed-tensors and transformers themselves run here; torchao where it is installed. AutoGPTQ,
GPTQModel, AutoAWQ and ModelOpt are heavy: of those, the arithmetic of the published source is
written out, and was held against the packages by hand (the versions stand beside each).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ktcore.formats import get_format
from ktcore.formats._packing import pack
from ktcore.formats.awq import awq
from ktcore.formats.fp8 import fp8_block
from ktcore.formats.gptq import gptq
from ktcore.models.config import Fields
from ktcore.weights import Checkpoint, QuantTensor
from ktcore.weights.quantization import QuantizedCheckpoint

Tensors = dict[str, torch.Tensor]

E8M0 = getattr(torch, "float8_e8m0fnu", None)
# Bits of floating-point numbers at their extremes.
EXTREME = {
    torch.float32: [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7FC00000],
    torch.float16: [0, 1 << 15, 1, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7E00],
    torch.bfloat16: [0, 1 << 15, 1, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x7FC0],
}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Every bit at random."""
    bits = torch.randint(0, 1 << (8 * dtype.itemsize), shape, generator=rng)
    return bits.to(INTEGER[dtype.itemsize]).view(dtype)


def some_scales(
    shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, extreme: bool
) -> torch.Tensor:
    """Scales: of about one or, `extreme`, half of them at the extremes of their type."""
    usual = (torch.rand(shape, generator=rng) + 0.5).to(dtype)
    if not extreme:
        return usual
    choice = torch.randint(8, shape, generator=rng)
    bits = torch.tensor(EXTREME[dtype])[choice].to(INTEGER[dtype.itemsize]).view(dtype)
    return torch.where(torch.rand(shape, generator=rng) < 0.5, bits, usual)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal in type, value and the sign of zeros; NaN for NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, want.dtype)
    equal = (got == want) & (got.signbit() == want.signbit())
    return bool((equal | (got.isnan() & want.isnan())).all())


def read(folder: Path, tensors: Tensors, settings: dict) -> QuantTensor:
    """A layer stored as these tensors, read from a file of them."""
    named = {f"m.proj.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / Checkpoint.SINGLE)
    fields = Fields(folder / "config.json", settings, "quantization_config.")
    weight = QuantizedCheckpoint(Checkpoint(folder), fields).tensor("m.proj.weight")
    assert isinstance(weight, QuantTensor)
    return weight


# ------------------------------------------------------------------------- compressed-tensors

ROWS, COLUMNS = 64, 128
INT = dict(type="int", symmetric=True)
FP8 = dict(num_bits=8, type="float")
ASYM = dict(type="int", symmetric=False)


def group(size: int) -> dict:
    return dict(strategy="group", group_size=size)


# Layout, settings of the weights, shape of the scales, their type.
COMPRESSED = {
    "packed int4 g32": ("pack-quantized", dict(num_bits=4, **INT, **group(32)), (64, 4), "bf16"),
    "packed int4 g64": ("pack-quantized", dict(num_bits=4, **INT, **group(64)), (64, 2), "f16"),
    "packed int4 channel": (
        "pack-quantized", dict(num_bits=4, **INT, strategy="channel"), (64, 1), "f32",
    ),
    "packed int4 g32 asym": (
        "pack-quantized", dict(num_bits=4, **ASYM, **group(32)), (64, 4), "bf16",
    ),
    "packed int4 channel asym": (
        "pack-quantized", dict(num_bits=4, **ASYM, strategy="channel"), (64, 1), "f16",
    ),
    "packed int8 g128": ("pack-quantized", dict(num_bits=8, **INT, **group(128)), (64, 1), "bf16"),
    "packed int8 g32 asym": (
        "pack-quantized", dict(num_bits=8, **ASYM, **group(32)), (64, 4), "f16",
    ),
    "int8 channel": ("int-quantized", dict(num_bits=8, **INT, strategy="channel"), (64, 1), "bf16"),
    "int8 tensor": ("int-quantized", dict(num_bits=8, **INT, strategy="tensor"), (1,), "f32"),
    "int8 channel asym": (
        "int-quantized", dict(num_bits=8, **ASYM, strategy="channel"), (64, 1), "f16",
    ),
    "int8 g32": ("int-quantized", dict(num_bits=8, **INT, **group(32)), (64, 4), "f32"),
    "int8 g64 asym": ("int-quantized", dict(num_bits=8, **ASYM, **group(64)), (64, 2), "bf16"),
    "naive int8": ("naive-quantized", dict(num_bits=8, **INT, strategy="channel"), (64, 1), "f16"),
    "fp8 channel": ("float-quantized", dict(**FP8, strategy="channel"), (64, 1), "bf16"),
    "fp8 tensor": ("float-quantized", dict(**FP8, strategy="tensor"), (1,), "f32"),
    "fp8 block": (
        "float-quantized", dict(**FP8, strategy="block", block_structure=[48, 32]), (2, 4), "bf16",
    ),
    "mxfp8": (
        "mxfp8-quantized", dict(**FP8, **group(32), scale_dtype="uint8"), (64, 4), "e8m0",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        dict(num_bits=4, type="float", **group(32), scale_dtype="uint8"), (64, 4), "e8m0",
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        dict(num_bits=4, type="float", strategy="tensor_group", group_size=16), (64, 8), "e4m3",
    ),
}  # fmt: skip
SCALES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Peer:
    """One of compressed-tensors' compressors, and what it takes."""

    def __init__(self, name: str):
        base = pytest.importorskip("compressed_tensors.compressors.base")
        quantization = pytest.importorskip("compressed_tensors.quantization")
        self.layout, self.weights, self.scale_shape, self.scale_type = COMPRESSED[name]
        args = dict(self.weights)
        if "scale_dtype" in args:
            args["scale_dtype"] = getattr(torch, args["scale_dtype"])
        self.args = quantization.QuantizationArgs(**args)
        self.scheme = quantization.QuantizationScheme(targets=["Linear"], weights=self.args)
        self.compressor = base.BaseCompressor.get_value_from_registry(self.layout)
        group = {"targets": ["Linear"], "weights": self.args.model_dump(mode="json")}
        self.settings = {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "config_groups": {"group_0": group},
        }
        self.symmetric = self.weights.get("symmetric", True)

    def any_tensors(self, rng: torch.Generator, extreme: bool) -> Tensors:
        """What a file may hold."""
        bits, shape = self.weights["num_bits"], (ROWS, COLUMNS)
        if self.scale_type == "e8m0":
            # (As its powers are rounded to bfloat16's range, 255 is infinity there, NaN here.)
            low, high = (0, 255) if extreme else (120, 135)
            scale = torch.randint(low, high, self.scale_shape, generator=rng, dtype=torch.uint8)
        elif self.scale_type == "e4m3":
            scale = any_bits(self.scale_shape, torch.float8_e4m3fn, rng)
        else:
            scale = some_scales(self.scale_shape, SCALES[self.scale_type], rng, extreme)
        tensors = {"weight_scale": scale}
        if self.layout == "pack-quantized":
            words = COLUMNS * bits // 32
            tensors["weight_packed"] = any_bits((ROWS, words), torch.int32, rng)
            tensors["weight_shape"] = torch.tensor(shape)
            if not self.symmetric:
                words = (ROWS * bits // 32, self.scale_shape[1])
                tensors["weight_zero_point"] = any_bits(words, torch.int32, rng)
        elif self.weights["type"] == "float" and bits == 4:
            tensors["weight_packed"] = any_bits((ROWS, COLUMNS // 2), torch.uint8, rng)
        elif self.weights["type"] == "float":
            tensors["weight"] = any_bits(shape, torch.float8_e4m3fn, rng)
        else:
            tensors["weight"] = any_bits(shape, torch.int8, rng)
            if not self.symmetric:
                tensors["weight_zero_point"] = any_bits(self.scale_shape, torch.int8, rng)
        return tensors

    def decompress(self, tensors: Tensors) -> torch.Tensor:
        return self.compressor.decompress(tensors, self.scheme)["weight"]


@pytest.mark.parametrize("extreme", [False, True], ids=["usual", "extreme"])
@pytest.mark.parametrize("name", [n for n in COMPRESSED if n != "nvfp4"])
def test_compressed_tensors_decompresses_the_same(name, extreme, tmp_path, rng):
    peer = Peer(name)
    tensors = peer.any_tensors(rng, extreme)
    want = peer.decompress(tensors)
    assert same(read(tmp_path, tensors, peer.settings).dequantize(want.dtype), want)


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-20, 448.0 * 6, 1234.567])
def test_compressed_tensors_nvfp4(global_scale, tmp_path, rng):
    """Every scale and every pair of codes. Theirs rounds the quotient of the scales first, to
    float32, ours the value alone: by powers of two nothing is rounded, else the last bit may
    differ."""
    peer = Peer("nvfp4")
    tensors = peer.any_tensors(rng, True)
    codes = torch.arange(256, dtype=torch.uint8)
    tensors["weight_packed"][:4] = codes.view(4, 64)
    tensors["weight_scale"][32:] = codes.view(torch.float8_e4m3fn).view(32, 8)
    tensors["weight_global_scale"] = torch.tensor([global_scale])
    ours = read(tmp_path, tensors, peer.settings)
    want = peer.decompress(tensors)
    got = ours.dequantize(want.dtype)
    if torch.tensor(global_scale).frexp().mantissa == 0.5:
        assert same(got, want)
        return
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    unpacked = helpers.unpack_fp4_from_uint8(
        tensors["weight_packed"], ROWS, COLUMNS, dtype=torch.float32
    )
    scale = tensors["weight_scale"].to(torch.float32)
    single = forward.dequantize(
        unpacked, scale, args=peer.args, global_scale=tensors["weight_global_scale"]
    )
    torch.testing.assert_close(ours.dequantize(), single, rtol=2**-22, atol=0, equal_nan=True)
    assert ((got != want) & ~want.isnan()).float().mean() < 0.001


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_compressed_tensors_compresses(name, tmp_path, rng):
    """Its own file of a weight, read here, is what it reads itself."""
    peer = Peer(name)
    weight = torch.randn(ROWS, COLUMNS, generator=rng).to(torch.bfloat16)
    top = 6.0 if peer.weights["num_bits"] == 4 else 127.0
    scale = some_scales(peer.scale_shape, torch.float32, rng, False) * 3 / top
    tensors = {"weight": weight}
    if peer.scale_type == "e8m0":
        scale = torch.exp2(scale.log2().floor())
    elif peer.scale_type == "e4m3":
        tensors["weight_global_scale"] = torch.tensor([64.0])
        scale = (scale * 64).to(torch.float8_e4m3fn).to(torch.bfloat16)
    else:
        scale = scale.to(SCALES[peer.scale_type])
    tensors["weight_scale"] = scale
    if not peer.symmetric:
        top = 1 << (peer.weights["num_bits"] - 1)
        tensors["weight_zero_point"] = torch.randint(
            -top, top, peer.scale_shape, generator=rng, dtype=torch.int8
        )
    stored = peer.compressor.compress(tensors, peer.scheme)
    want = peer.decompress(stored)
    assert same(read(tmp_path, stored, peer.settings).dequantize(want.dtype), want)


def test_compressed_tensors_in_act_order(rng):
    """Version 0.20 no longer has it. By hand the same bits from 0.12.2's `dequantize(..., g_idx=)`,
    which sorts the columns by group and takes groups of neighbours, as here."""
    format, shape = get_format("ct4_g128_act"), (64, 512)
    parts = format.example(shape, rng)
    parts["weight_packed"] = any_bits((64, 64), torch.int32, rng)
    order = parts["weight_g_idx"].argsort(stable=True)
    codes = ((parts["weight_packed"][..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2) - 8
    grouped = codes[:, order].unflatten(-1, (4, 128)).to(torch.bfloat16)
    want = (grouped * parts["weight_scale"][..., None]).flatten(-2)[:, order.argsort()]
    assert same(format.dequantize(parts, shape, torch.bfloat16), want)


# -------------------------------------------------------------------------------- transformers


def test_transformers_mxfp4_every_code_and_scale():
    """All of gpt-oss's blocks; 255 is NaN by the specification, 2^128 there."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).expand(16, 256, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).expand(16, 256).contiguous()
    got = get_format("mxfp4").dequantize({"blocks": blocks, "scales": scales}, (16, 256 * 32))
    want = mxfp4.convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)
    assert same(got[:, : 255 * 32], want[0].T[:, : 255 * 32])
    assert got[:, 255 * 32 :].isnan().all()


class _Quantizer:
    class quantization_config:
        weight_block_size = (128, 128)


@pytest.mark.parametrize("extreme", [False, True], ids=["usual", "extreme"])
@pytest.mark.parametrize("scale_type", ["f32", "bf16", "e8m0"])
@pytest.mark.parametrize(("shape", "block"), [((256, 384), (128, 128)), ((64, 96), (32, 48))])
def test_transformers_fp8_blocks(shape, block, scale_type, extreme, tmp_path, rng):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    size = (shape[0] // block[0], shape[1] // block[1])
    if scale_type == "e8m0":
        if E8M0 is None:
            pytest.skip("this torch has no float8_e8m0fnu")
        scales = any_bits(size, torch.uint8, rng) if extreme else torch.full(size, 125).byte()
        scales = scales.view(E8M0)
    else:
        scales = some_scales(size, SCALES[scale_type], rng, extreme)
    data = any_bits(shape, torch.float8_e4m3fn, rng)
    want = fp8.Fp8Dequantize(_Quantizer())._dequantize_one(data, scales, torch.float32)
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    weight = read(tmp_path, {"weight": data, "weight_scale_inv": scales}, settings)
    assert weight.format is fp8_block(*block)
    assert same(weight.dequantize(), want)


def test_transformers_mxfp8(rng):
    """Every scale but NaN over every code."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    data = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(torch.float8_e4m3fn)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 8).contiguous()
    want = fp8.Fp8Dequantize(_Quantizer())._dequantize_one(data, scales, torch.float32)
    got = get_format("mxfp8").dequantize({"data": data, "scales": scales}, (255, 256))
    assert same(got, want)


# ------------------------------------------------------------------------------------- torchao


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_torchao_mx(name):
    """Every code under every scale; NaN as the specification has it (seen with torchao 0.18)."""
    tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    codes = torch.arange(256, dtype=torch.uint8)
    scales = codes[:, None].expand(256, 8).contiguous()
    if name == "mxfp4":
        data = codes.repeat(256, 1)[:, :128].contiguous()
        parts = {"blocks": data.view(256, 8, 16), "scales": scales}
        data = data.view(torch.float4_e2m1fn_x2) if data.dtype != torch.uint8 else data
        kind = torch.float4_e2m1fn_x2
    else:
        data = codes.repeat(256, 1).view(torch.float8_e4m3fn)
        parts = {"data": data, "scales": scales}
        kind = torch.float8_e4m3fn
    want = tensor.to_dtype(data, scales.view(E8M0), kind, 32, torch.float32)
    assert same(get_format(name).dequantize(parts, (256, 256)), want)


# ------------------------------------------------------------------------------ GPTQ and AWQ


def gptq_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[N * bits / 32, O] to [N, O], as AutoGPTQ's QuantLinear.forward unpacks: by shifts and, with
    3 bits, 32 codes of three words with two that lie across."""
    if bits != 3:
        shifts = torch.arange(0, 32, bits)[None, :, None]
        return ((words[:, None] >> shifts) & ((1 << bits) - 1)).flatten(0, 1)
    a, b, c = words.to(torch.int64).unflatten(0, (-1, 3)).unbind(1)
    codes = [(a >> (3 * i)) & 7 for i in range(10)]
    codes.append(((a >> 30) & 3) | ((b << 2) & 4))
    codes += [(b >> (3 * i + 1)) & 7 for i in range(10)]
    codes.append(((b >> 31) & 1) | ((c << 1) & 6))
    codes += [(c >> (3 * i + 2)) & 7 for i in range(10)]
    return torch.stack(codes, 1).flatten(0, 1).to(torch.int32)


def any_gptq(bits: int, act_order: bool, rng: torch.Generator) -> Tensors:
    """Any bits but those of a zero point that version 1's sum would wrap."""
    rows, columns, size = 64, 256, 32
    groups = columns // size
    g_idx = torch.arange(columns) // size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=rng)]
    zeros = torch.randint(0, (1 << bits) - 1, (groups, rows), generator=rng, dtype=torch.uint8)
    return {
        "qweight": any_bits((columns * bits // 32, rows), torch.int32, rng),
        "qzeros": pack(zeros, bits),
        "scales": some_scales((groups, rows), torch.float16, rng, True),
        "g_idx": g_idx.to(torch.int32),
    }


def gptq_weight(tensors: Tensors, bits: int, zeros: torch.Tensor, dtype=torch.float16):
    """QuantLinear's `scales[g_idx] * (weight - zeros[g_idx])`, [O, I]."""
    g_idx = tensors["g_idx"].long()
    q = gptq_codes(tensors["qweight"], bits) - zeros[g_idx]
    return (tensors["scales"][g_idx] * q).to(dtype).T


def gptq_settings(bits: int, **more) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, **more}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, act_order, tmp_path, rng):
    """By hand, the same bits from AutoGPTQ 0.7.1 (qlinear_cuda and qlinear_cuda_old) and GPTQModel
    7.7.0 (`convert_gptq_file`, versions 1 and 2; sums of words on loading)."""
    tensors = any_gptq(bits, act_order, rng)
    stored = gptq_codes(tensors["qzeros"].T, bits).T
    want = {1: gptq_weight(tensors, bits, stored + 1), 2: gptq_weight(tensors, bits, stored)}
    for version, form in ((1, "gptq"), (2, "gptq_v2")):
        settings = gptq_settings(bits, checkpoint_format=form, desc_act=act_order)
        weight = read(tmp_path, tensors, settings)
        assert weight.format is gptq(bits, 32, False, act_order, version)
        assert same(weight.dequantize(torch.float16), want[version])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_zero_points_of_zero(bits, tmp_path, rng):
    """Version 1 stores zero - 1, which zero does not have. GPTQModel subtracts from whole words and
    so borrows from the next, and adds to them on loading; with 3 bits it wraps each number, as
    others do with all. AutoGPTQ 0.7.1 spoils the rest of the word: its files cannot be helped."""
    tensors = any_gptq(bits, False, rng)
    rows, groups = tensors["scales"].shape[1], tensors["scales"].shape[0]
    zeros = torch.randint(0, 1 << bits, (groups, rows), generator=rng, dtype=torch.int32)
    zeros[:, ::5] = 0
    want = gptq_weight(tensors, bits, zeros)
    single = (zeros - 1) & ((1 << bits) - 1)
    tensors["qzeros"] = pack(single.to(torch.uint8), bits)
    weight = read(tmp_path, tensors, gptq_settings(bits))
    assert same(weight.dequantize(torch.float16), want)
    if bits != 3:
        ones = sum(1 << i for i in range(0, 32, bits))
        tensors["qzeros"] = pack(zeros.to(torch.uint8), bits) - ones
    for meta in ({"quantizer": ["gptqmodel:5.4.0"]}, {"quantizer": "optimum:1, gptqmodel:2.0"}):
        weight = read(tmp_path, tensors, gptq_settings(bits, meta=meta))
        assert same(weight.dequantize(torch.float16), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq(dtype, tmp_path, rng):
    """`dequantize_gemm` of AutoAWQ's packing_utils, by hand the same bits from AutoAWQ 0.2.9 and
    GPTQModel 7.7.0: shifts in order, then places 0, 4, 1, 5, 2, 6, 3, 7 of each eight."""
    rows, columns, size = 64, 256, 32

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        places = (words[..., None] >> torch.arange(0, 32, 4)) & 15
        return places[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)

    tensors = {
        "qweight": any_bits((columns, rows // 8), torch.int32, rng),
        "qzeros": any_bits((columns // size, rows // 8), torch.int32, rng),
        "scales": some_scales((columns // size, rows), dtype, rng, True),
    }
    q = unpacked(tensors["qweight"]) - unpacked(tensors["qzeros"]).repeat_interleave(size, 0)
    want = (q * tensors["scales"].repeat_interleave(size, 0)).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    weight = read(tmp_path, tensors, settings)
    assert weight.format is awq(size, dtype)
    assert same(weight.dequantize(dtype), want)


# ------------------------------------------------------------------------------------ ModelOpt


@given(seed=st.integers(0, 1 << 30), exponent=st.integers(-20, 4))
def test_modelopt_nvfp4(seed, exponent):
    """`NVFP4QTensor.dequantize` of ModelOpt: the scales' product in float32, then times the weight.
    By hand the same values from 0.47.0, but that its negative zero is positive; and where the
    second scale is no power of two, it rounds twice, at most one last bit away."""
    rng = torch.Generator().manual_seed(seed)
    data = any_bits((16, 32), torch.uint8, rng)
    scales = any_bits((16, 4), torch.float8_e4m3fn, rng)
    second = torch.tensor([2.0**exponent])
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    block = (scales.to(torch.float32) * second).repeat_interleave(16, -1)
    got = get_format("nvfp4").dequantize(
        {"data": data, "scales": scales, "global_scale": second}, (16, 64)
    )
    assert same(got, table[codes.long()] * block)
