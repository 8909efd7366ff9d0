"""Activations and stored weights of all kinds."""

from __future__ import annotations

import functools
import zlib

import torch
from torch import Tensor

from ktcore.formats import get_format
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


def applies(stored: str, format: str) -> bool:
    """Whether a format can be stored that way."""
    specs = get_format(format).part_specs((32, 32))
    if stored.startswith("scales_"):
        return "scales" in specs
    if stored == "every_code":
        return not specs["data"][1].is_floating_point
    if stored == "denormal_weights":
        return specs["data"][1].is_floating_point
    return True


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


@functools.lru_cache(maxsize=64)
def matrix(format: str, rows: int, columns: int, stored: str = "quantised") -> QuantTensor:
    """A weight [rows, columns]."""
    rng = generator(f"matrix {rows} {columns}")
    dense = torch.randn(rows, columns, generator=rng) / columns**0.5
    weight = _altered(QuantTensor.quantize(dense, format), stored, rng)
    if stored == "scales_huge":
        weight.parts["scales"].mul_(1e30)
    elif stored == "scales_nan":
        weight.parts["scales"][0].fill_(float("nan"))
    return weight


@functools.lru_cache(maxsize=64)
def experts(
    format: str,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    stored: str = "quantised",
) -> ExpertWeights:
    """The experts of a layer."""
    rng = generator(f"experts {num_experts} {hidden_size} {intermediate_size}")

    def weight(rows: int, columns: int) -> QuantTensor:
        dense = torch.randn(num_experts, rows, columns, generator=rng) / columns**0.5
        return _altered(QuantTensor.quantize(dense, format), stored, rng)

    gate = weight(intermediate_size, hidden_size)
    up = weight(intermediate_size, hidden_size)
    down = weight(hidden_size, intermediate_size)
    if stored == "scales_huge":
        down.parts["scales"].mul_(1e30)
    elif stored == "scales_nan":
        gate.parts["scales"][0, 0].fill_(float("nan"))  # spoils every output of expert 0
        down.parts["scales"][1, 3].fill_(float("nan"))  # spoils one output of expert 1
    return ExpertWeights(gate, up, down)


@functools.lru_cache(maxsize=8)
def shut_experts(format: str, hidden_size: int, intermediate_size: int) -> ExpertWeights:
    """Experts whose gate is far below zero for positive activations, so that they give nothing."""
    rng = generator("shut")
    gate = -torch.rand(2, intermediate_size, hidden_size, generator=rng) - 0.5
    up = torch.rand(2, intermediate_size, hidden_size, generator=rng)
    down = torch.randn(2, hidden_size, intermediate_size, generator=rng) / intermediate_size**0.5
    return ExpertWeights.from_dense(gate, up, down, format)
