"""Argument checks: every message names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32)


def tensor(value: object, name: str, dtypes: tuple[torch.dtype, ...], dims: int | None) -> Tensor:
    """`value`, if it is a dense tensor of one of the dtypes and of `dims` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {known}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if dims is not None and value.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimension(s), got {value.dim()}: shape {tuple(value.shape)}"
        )
    return value


def device(value: Tensor, name: str, expected: torch.device, whose: str) -> None:
    if value.device != expected:
        raise ValueError(f"{name}: expected device {expected}, like {whose}, got {value.device}")


def choice(value: object, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def positive(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def number(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def as_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value.to(dtype)`, without a call where it is that already: such a one takes 2 us."""
    return value if value.dtype is dtype else value.to(dtype)


def detached(value: Tensor) -> Tensor:
    """`value.detach()`, likewise: inside an operator nothing is to be recorded."""
    return value.detach() if value.requires_grad else value


def rows_dense(value: Tensor) -> Tensor:
    """`value` with neighbouring elements of a row side by side; rows themselves may be strided."""
    # An overlapping or backwards view would be legal to read, but kernels take row strides >= 0.
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()
