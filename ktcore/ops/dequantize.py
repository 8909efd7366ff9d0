"""dequantize: the floats that a stored weight stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.formats import get_format
from ktcore.ops import _check
from ktcore.ops._direct import direct
from ktcore.weights import QuantTensor


def dequantize(weight: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a plain tensor.

    Args:
        weight: `QuantTensor` of any shape [..., O, I], not released.
        dtype: float32, float16 or bfloat16; values are computed in float32 and rounded once.

    Returns:
        A tensor of the weight's shape.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the weight's stored form was released.
    """
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"weight: expected a QuantTensor, got {type(weight).__name__}")
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    weight.require_parts()
    parts = [weight.parts[name] for name in weight.format.part_specs(weight.shape)]
    call = _compute if direct(parts[0]) else torch.ops.ktcore.dequantize
    return call(parts, weight.format.name, list(weight.shape), dtype)


def _compute(parts: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    names = get_format(format).part_specs(tuple(shape))
    weight = QuantTensor(format, tuple(shape), dict(zip(names, parts, strict=True)))
    chosen = select(
        Request(
            op="dequantize",
            format=weight.format.name,
            tokens=1,
            dtype=str(dtype).removeprefix("torch."),
            device=weight.device.type,
        )
    )
    out = chosen.run(weight, dtype)
    # A custom operator must not return its own input: bf16 dequantised to bf16 is that.
    return out.clone() if out.data_ptr() == parts[0].data_ptr() else out


_dequantize = torch.library.custom_op("ktcore::dequantize", _compute, mutates_args=())


@_dequantize.register_fake
def _(parts, format, shape, dtype):
    return parts[0].new_empty(shape, dtype=dtype)
