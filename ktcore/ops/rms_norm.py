"""rms_norm: rows over their root mean square."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.ops import _check
from ktcore.ops._direct import direct


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467).

    Args:
        x: [..., N], float32, float16 or bfloat16.
        weight: [N], floating point, on the same device.
        eps: at least 0.

    Returns:
        As `x`; computed in float32, rounded once.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_arguments(x, weight, eps)
    call = _normalised if direct(x) else torch.ops.ktcore.rms_norm
    return call(x, weight, float(eps))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``x + residual``, and that sum: what stands between two blocks of a decoder.

    Args:
        x, weight, eps: see `rms_norm`.
        residual: as `x`, in shape and dtype.

    Returns:
        The normalised sum, and the sum, both as `x`.
    """
    _check_arguments(x, weight, eps)
    _check.tensor(residual, "residual", (x.dtype,), None)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected shape {tuple(x.shape)}, like x, got {tuple(residual.shape)}"
        )
    _check.device(residual, "residual", x.device, "x")
    call = _added if direct(x) else torch.ops.ktcore.add_rms_norm
    return call(x, residual, weight, float(eps))


def _check_arguments(x: Tensor, weight: Tensor, eps: float) -> None:
    _check.tensor(x, "x", _check.FLOATS, None)
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    _check.tensor(weight, "weight", (*_check.FLOATS, torch.float64), 1)
    if weight.shape[0] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected shape [{x.shape[-1]}], at least 1 and as x's last dimension, got "
            f"{tuple(weight.shape)}"
        )
    _check.device(weight, "weight", x.device, "x")
    _check.number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    chosen = select(
        Request(
            op="rms_norm",
            tokens=x.shape[0] if x.dim() > 1 else 1,
            hidden_size=x.shape[-1],
            dtype=str(x.dtype).removeprefix("torch."),
            device=x.device.type,
        )
    )
    weight = _check.as_type(_check.detached(weight), torch.float32).contiguous()
    residual = None if residual is None else _check.detached(residual)
    return chosen.run(_check.detached(x), residual, weight, eps)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _run(x, None, weight, eps)[0]


def _added(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, total = _run(x, residual, weight, eps)
    assert total is not None
    return normalised, total


_rms_norm = torch.library.custom_op("ktcore::rms_norm", _normalised, mutates_args=())
_add_rms_norm = torch.library.custom_op("ktcore::add_rms_norm", _added, mutates_args=())


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)
