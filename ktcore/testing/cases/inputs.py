"""Activations and stored weights of all kinds."""

from __future__ import annotations

import functools
import zlib

import torch
from torch import Tensor

from ktcore import _native
from ktcore.backends.native.operators import FINER_THAN_TILES, TILES
from ktcore.dispatch import probe, registry
from ktcore.formats import Format, get_format
from ktcore.weights import ExpertWeights, QuantTensor


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the case's name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


# ----------------------------------------------------------------------------------- activations


def activations(kind: str, tokens: int, columns: int, dtype: torch.dtype, seed: str) -> Tensor:
    """[tokens, columns] of a kind; the kinds "nan" and "inf" spoil tokens 1 and 2 alone."""
    x = torch.randn(tokens, columns, generator=generator(seed))
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "huge":
        x = x * (60.0 if dtype == torch.float16 else 1e15)
    elif kind == "largest":
        x = x.abs() * 1e30
    elif kind == "outlier":
        x[:, columns // 2] *= 1000
    elif kind == "some_outliers":  # in every second token, ever larger ones
        x[::2, columns // 2] *= torch.logspace(0, 4, len(x[::2]))
    elif kind == "off_centre":  # numbers far from zero beside others that are not
        x[:, columns // 3 :] += 100
    elif kind == "uneven":  # tokens of very different size
        x = x * torch.logspace(-4, 4, tokens)[:, None]
    elif kind == "nan":
        x[1, columns - 1] = float("nan")
    elif kind == "inf":
        x[1, 0] = float("inf")
        x[2, columns // 2] = -float("inf")
    else:
        assert kind == "normal", kind
    return x.to(dtype)


SPOILED = {"nan": [1], "inf": [1, 2]}

LAYOUTS = ("dense", "row_stride", "inner_stride", "transposed", "expanded", "unaligned")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values [T, N] at other addresses ("expanded": the first token T times)."""
    tokens, columns = x.shape
    if layout == "dense":
        return x
    if layout == "row_stride":
        wide = x.new_full((tokens, columns + 7), float("nan"))
        wide[:, 3 : 3 + columns] = x
        return wide[:, 3 : 3 + columns]
    if layout == "inner_stride":
        wide = x.new_full((tokens, 2 * columns), float("nan"))
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(tokens, columns)
    assert layout == "unaligned", layout
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.flatten()
    return flat[1:].view(tokens, columns)


# --------------------------------------------------------------------------------------- weights

# How the stored parts differ from what the quantiser makes of Gaussian weights.
STORED = (
    "quantised",
    "every_code",
    "denormal_weights",
    "scales_zero",
    "scales_negative",
    "scales_huge",
    "scales_nan",
)


# Formats that every case is tried on, one for each way in which weights enter the arithmetic:
# floats, scales per row, per group and per tile, offsets, levels that are no range, whole blocks.
# The many others differ in their decoding alone; they are tried on the cases called brief.
THOROUGH = (
    *("bf16", "f16", "f32", "int8", "int4_g32"),
    *("ct4_g32_asym", "fp8_e4m3_b128", "mxfp4", "q4_1"),
)


# What activations of long rows, which are of eight bits, are tried on with every operator.
LONG_ROWS = {
    "x zero": {"x": "zero"},
    "x denormal": {"x": "denormal"},
    "x huge": {"x": "huge"},
    "x outlier": {"x": "outlier"},
    "x outlier bfloat16": {"x": "outlier", "dtype": torch.bfloat16},
    "x outlier in some": {"x": "some_outliers", "brief": True},
    "x off centre": {"x": "off_centre", "brief": True},
    "x uneven": {"x": "uneven"},
    "exact": {"exact": True},
}


def thorough(format: str) -> bool:
    """Whether a format is tried on every case."""
    return any(get_format(format) is get_format(name) for name in THOROUGH)


def whole_blocks(format: str, columns: int) -> int:
    """The next number of columns that the format can store."""
    block = get_format(format).block_size
    return -(-columns // block) * block


@functools.cache
def can_quantize(format: str) -> bool:
    """Whether the format offers a quantiser; else weights are its examples."""
    try:
        get_format(format).quantize(torch.zeros(1, whole_blocks(format, 1)))
    except TypeError:
        return False
    return True


def applies(stored: str, format: str) -> bool:
    """Whether a format can be stored that way."""
    rows = 48
    specs = get_format(format).part_specs((rows, whole_blocks(format, 32)))
    if stored.startswith("scales_"):  # by rows first, and of a type that torch computes in
        shape, dtype = specs.get("scales", ((0,), None))
        return shape[0] == rows and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if stored in ("every_code", "denormal_weights"):
        floating = stored == "denormal_weights"
        return "data" in specs and specs["data"][1].is_floating_point == floating
    return True


def _stored(format: str, shape: tuple[int, ...], stored: str, rng: torch.Generator) -> QuantTensor:
    """A weight [..., O, I] with entries of about 1/sqrt(I), or of about 1 if it is an example."""
    f = get_format(format)
    every_code = stored == "every_code" and f.block_size > 1  # scales are among the data
    if every_code or not can_quantize(format):
        weight = QuantTensor(f, shape, f.example(shape, rng))
        return weight if every_code else _altered(weight, stored, rng)
    dense = torch.randn(shape, generator=rng) / shape[-1] ** 0.5
    return _altered(QuantTensor.quantize(dense, f), stored, rng)


def _altered(weight: QuantTensor, stored: str, rng: torch.Generator) -> QuantTensor:
    parts = {name: part.clone() for name, part in weight.parts.items()}
    if stored == "every_code":  # int8: -128 too; bytes of nibbles: every pair
        size, dtype = parts["data"].shape, parts["data"].dtype
        info = torch.iinfo(dtype)
        parts["data"] = torch.randint(info.min, info.max + 1, size, generator=rng).to(dtype)
        parts["data"].view(-1)[::5] = info.min
    elif stored == "denormal_weights":
        parts["data"][..., ::3] = 1e-39
    elif stored == "scales_zero":
        rows = len(weight.shape) - 2
        parts["scales"].index_fill_(rows, torch.arange(0, weight.shape[-2], 2), 0)
    elif stored == "scales_negative":
        parts["scales"].neg_()
    return QuantTensor(weight.format, weight.shape, parts)


@functools.lru_cache(maxsize=1024)
def matrix(format: str, rows: int, columns: int, stored: str = "quantised") -> QuantTensor:
    """A weight [rows, columns]; columns are whole blocks."""
    rng = generator(f"matrix {rows} {columns}")
    weight = _stored(format, (rows, columns), stored, rng)
    if stored == "scales_huge":
        weight.parts["scales"].mul_(1e30)
    elif stored == "scales_nan":
        weight.parts["scales"][0].fill_(float("nan"))
    return weight


@functools.lru_cache(maxsize=1024)
def experts(
    format: str,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    stored: str = "quantised",
    biases: tuple[str, ...] = (),
) -> ExpertWeights:
    """The experts of a layer; sizes are whole blocks.

    Biases of gate and up are so large that many sums are beyond the limits of "swiglu_oai".
    """
    rng = generator(f"experts {num_experts} {hidden_size} {intermediate_size}")
    gate, up = (
        _stored(format, (num_experts, intermediate_size, hidden_size), stored, rng) for _ in "gu"
    )
    down = _stored(format, (num_experts, hidden_size, intermediate_size), stored, rng)
    if stored == "scales_huge":
        down.parts["scales"].mul_(1e30)
    elif stored == "scales_nan":
        gate.parts["scales"][0, 0].fill_(float("nan"))  # spoils every output of expert 0
        down.parts["scales"][1, 3].fill_(float("nan"))  # spoils one output of expert 1
    found = {}
    for name in biases:
        size, scale = (hidden_size, 1) if name == "down_bias" else (intermediate_size, 5)
        found[name] = scale * torch.randn(num_experts, size, generator=generator(name))
    return ExpertWeights(gate, up, down, **found)


@functools.lru_cache(maxsize=8)
def shut_experts(format: str, hidden_size: int, intermediate_size: int) -> ExpertWeights:
    """Experts whose gate is far below zero for positive activations, so that they give nothing."""
    rng = generator("shut")
    gate = -torch.rand(2, intermediate_size, hidden_size, generator=rng) - 0.5
    up = torch.rand(2, intermediate_size, hidden_size, generator=rng)
    down = torch.randn(2, hidden_size, intermediate_size, generator=rng) / intermediate_size**0.5
    return ExpertWeights.from_dense(gate, up, down, format)


def floats_as_integers(backend: str) -> bool:
    """Whether a backend's `moe` multiplies bf16 weights as integers of 16 bits."""
    machine = probe.machine()
    details = {i.detail(machine) for i in registry.implementations(backend) if i.op == "moe"}
    isas = [] if _native.ext is None else _native.ext.isas()
    return any(isa["name"] in details and isa["bf16_products"] == "int16" for isa in isas)


def rounds_to_bf16(backend: str, format: str | Format = "bf16") -> bool:
    """Whether a backend's `moe` multiplies a format's weights by activations rounded to bf16."""
    name, machine = get_format(format).name, probe.machine()
    details = [i.detail(machine) for i in registry.implementations(backend) if i.op == "moe"]
    if TILES in details:
        return name not in FINER_THAN_TILES
    return name in ("bf16", "fp8_e4m3", "fp8_e4m3_b128", "mxfp8") and "avx512_bf16" in details
