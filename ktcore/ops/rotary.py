"""rotary: positions, as angles by which pairs of columns are turned."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.ops import _check
from ktcore.ops._direct import direct


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Rotate queries or keys by their positions (arXiv 2104.09864).

    Args:
        x: [T, heads, head_size], float32, float16 or bfloat16.
        cos, sin: [P, R / 2] float32, of the angle of each position and pair; R, even and at most
            head_size, is how many columns are rotated. The others stay as they are.
        positions: [T] int64, each 0 to P - 1.
        interleaved: pairs are neighbouring columns (0, 1), (2, 3), ... (GPT-J, DeepSeek); by
            default they are the first and the second half of the R columns (GPT-NeoX, Qwen).

    Returns:
        As `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a position is outside the tables.
    """
    _check.tensor(x, "x", _check.FLOATS, 3)
    for name, table in (("cos", cos), ("sin", sin)):
        _check.tensor(table, name, (torch.float32,), 2)
        _check.device(table, name, x.device, "x")
    if not 1 <= cos.shape[1] <= x.shape[2] // 2:
        raise ValueError(
            f"cos: expected shape [P, R / 2] with R / 2 from 1 to {x.shape[2] // 2}, half of x's "
            f"head_size, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"sin: expected shape {tuple(cos.shape)}, like cos, got {tuple(sin.shape)}"
        )
    _check.tensor(positions, "positions", (torch.int64,), 1)
    if positions.shape[0] != x.shape[0]:
        raise ValueError(
            f"positions: expected shape [{x.shape[0]}], one for each token of x, got "
            f"{tuple(positions.shape)}"
        )
    _check.device(positions, "positions", x.device, "x")
    call = _compute if direct(x) else torch.ops.ktcore.rotary
    return call(x, cos, sin, positions, bool(interleaved))


def _compute(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    chosen = select(
        Request(
            op="rotary",
            tokens=x.shape[0],
            hidden_size=x.shape[2],
            dtype=str(x.dtype).removeprefix("torch."),
            device=x.device.type,
        )
    )
    cos, sin = (_check.detached(table).contiguous() for table in (cos, sin))
    return chosen.run(_check.detached(x), cos, sin, positions.contiguous(), interleaved)


_rotary = torch.library.custom_op("ktcore::rotary", _compute, mutates_args=())


@_rotary.register_fake
def _(x, cos, sin, positions, interleaved):
    return x.new_empty(x.shape)
