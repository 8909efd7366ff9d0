"""What formats share: small integers packed into words, and scales spread over their groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in for a result of a dtype: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def spread(scales: Tensor, group_size: int, columns: int) -> Tensor:
    """One scale per group [..., G] to one per column [..., columns]."""
    return scales.repeat_interleave(group_size, -1)[..., :columns]


def groups(x: Tensor, group_size: int) -> Tensor:
    """[..., I] to [..., ceil(I / group_size), group_size], the end filled with zeros."""
    count = ceil_div(x.shape[-1], group_size)
    padded = F.pad(x, (0, count * group_size - x.shape[-1]))
    return padded.reshape(*x.shape[:-1], count, group_size)


# Of the mean: columns that calibration never saw still count a little, so that no group of weights
# is left without any error to go by.
LEAST_IMPORTANCE = 1e-4


def column_weights(importance: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """`importance` [..., I] of a weight of a shape [..., O, I], as float32 of mean 1 a matrix.

    A matrix whose columns all have none counts them alike.

    Raises:
        ValueError: another shape, or numbers that are negative or not finite.
    """
    if importance is None:
        return None
    expected = (*shape[:-2], shape[-1])
    if tuple(importance.shape) != expected:
        raise ValueError(
            f"importance: expected shape {expected} for a weight of shape {tuple(shape)}, got "
            f"{tuple(importance.shape)}"
        )
    wide = importance.to(torch.float64)
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise ValueError("importance: expected finite numbers of at least 0")
    mean = wide.mean(-1, keepdim=True)
    relative = torch.where(mean > 0, wide / torch.where(mean > 0, mean, 1.0), 1.0)
    return relative.clamp(min=LEAST_IMPORTANCE).to(torch.float32)


def total(x: Tensor, importance: Tensor | None) -> Tensor:
    """The sum over the last dimension, kept; each weighed by its importance, which broadcasts."""
    return (x if importance is None else x * importance).sum(-1, keepdim=True)


def words(count: int, bits: int) -> int:
    """How many int32 so many codes take."""
    return ceil_div(count * bits, 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., N] of so many bits to int32 [..., words(N)], lowest bits first.

    One stream of bits from word to word: 3-bit codes lie across the end of some words, as GPTQ has
    them.
    """
    count = words(codes.shape[-1], bits)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = ((codes[..., None] >> place[:bits]) & 1).flatten(-2)
    stream = F.pad(stream, (0, 32 * count - stream.shape[-1]))
    data = (stream.reshape(*codes.shape[:-1], 4 * count, 8) << place).sum(-1, dtype=torch.uint8)
    # (Flat: a tensor of no or one element a row may have any stride, which `view` minds.)
    return data.flatten().view(torch.int32).reshape(*codes.shape[:-1], count)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 [..., words(count)] to codes uint8 [..., count]."""
    data = packed.flatten().view(torch.uint8).reshape(*packed.shape[:-1], 4 * packed.shape[-1])
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        codes = (data[..., None] >> shifts) & ((1 << bits) - 1)
    else:  # eight codes in so many bytes
        data = groups(data, bits).to(torch.int32)
        places = torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=data.device)
        eight = (data << places).sum(-1, dtype=torch.int32)
        shifts = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=data.device)
        codes = ((eight[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count]
