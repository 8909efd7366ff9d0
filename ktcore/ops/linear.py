"""linear: a dense layer over a weight in a stored format."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ktcore.dispatch import registry
from ktcore.dispatch.registry import Request
from ktcore.ops import _check, _prepared
from ktcore.ops._direct import direct
from ktcore.weights import QuantTensor
from ktcore.weights.quant_tensor import resolve


def linear(
    x: Tensor, weight: QuantTensor, bias: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [..., I], float32, float16 or bfloat16.
        weight: `QuantTensor` of shape [O, I], on the same device.
        bias: [O], floating point, or None.
        exact: keep the error of activations below 0.05 % where the default rounds them.

    Returns:
        [..., O] in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: a forced backend cannot run here or does not serve this.
    """
    if not is_dynamo_compiling():
        out = _prepared.linear(weight, x, bias, exact)
        if out is not None:
            return out
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"weight: expected a QuantTensor, got {type(weight).__name__}")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [O, I], each at least 1, got {weight.shape}")
    _check.tensor(x, "x", _check.FLOATS, None)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected shape [..., {weight.shape[1]}], the weight's columns, got "
            f"{tuple(x.shape)}"
        )
    _check.device(x, "x", weight.device, "weight")
    if bias is not None:
        _check.tensor(bias, "bias", (*_check.FLOATS, torch.float64), 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        _check.device(bias, "bias", weight.device, "weight")
    call = _compute if direct(x) else torch.ops.ktcore.linear
    return call(x, weight.handle, bias, bool(exact))


def _compute(x: Tensor, weight: int, bias: Tensor | None, exact: bool) -> Tensor:
    matrix = resolve(weight)
    assert isinstance(matrix, QuantTensor)
    rows = _check.rows_dense(_check.detached(x)).reshape(-1, x.shape[-1])
    generation = registry.generation()
    chosen = registry.select(
        Request(
            op="linear",
            format=matrix.format.name,
            tokens=rows.shape[0],
            hidden_size=matrix.shape[1],
            intermediate_size=matrix.shape[0],
            dtype=str(x.dtype).removeprefix("torch."),
            device=x.device.type,
            exact=exact,
        )
    )
    args = (rows, matrix, None if bias is None else _check.detached(bias))
    y = chosen.run(*args, exact=exact)
    _prepared.prepare(generation, chosen, matrix, len(rows), *args, exact=exact)
    return y.reshape(*x.shape[:-1], matrix.shape[0])


_linear = torch.library.custom_op("ktcore::linear", _compute, mutates_args=())


@_linear.register_fake
def _(x, weight, bias, exact):
    matrix = resolve(weight)
    return x.new_empty((*x.shape[:-1], matrix.shape[0]))
