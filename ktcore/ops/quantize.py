"""quantize: store a float tensor in a weight format."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.formats import Format, get_format
from ktcore.ops import _check
from ktcore.ops._direct import direct
from ktcore.weights import QuantTensor


def quantize(tensor: Tensor, format: str | Format) -> QuantTensor:
    """Store a tensor in a format, by the format's quantiser (see `ktcore.formats`).

    Args:
        tensor: [..., O, I], float32, float16 or bfloat16.
        format: name, alias or `Format`.

    Returns:
        The `QuantTensor`. A group of weights with a NaN or an infinity gets a NaN scale.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check.tensor(tensor, "tensor", _check.FLOATS, None)
    if tensor.dim() < 2:
        raise ValueError(f"tensor: expected shape [..., O, I], got {tuple(tensor.shape)}")
    format = get_format(format)
    shape = tuple(tensor.shape)
    call = _compute if direct(tensor) else torch.ops.ktcore.quantize
    parts = call(tensor, format.name)
    return QuantTensor(format, shape, dict(zip(format.part_specs(shape), parts, strict=True)))


def _compute(tensor: Tensor, format: str) -> list[Tensor]:
    chosen = select(
        Request(
            op="quantize",
            format=get_format(format).name,
            tokens=1,
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=tensor.device.type,
        )
    )
    parts = chosen.run(tensor.detach(), format).parts
    # A custom operator must not return its own input: bf16 stored as bf16 is that.
    return [p.clone() if p.data_ptr() == tensor.data_ptr() else p for p in parts.values()]


_quantize = torch.library.custom_op("ktcore::quantize", _compute, mutates_args=())


@_quantize.register_fake
def _(tensor, format):
    specs = get_format(format).part_specs(tuple(tensor.shape))
    return [tensor.new_empty(shape, dtype=dtype) for shape, dtype in specs.values()]
