"""The dense weights of a model: everything but the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore import ops
from ktcore.dispatch import Request
from ktcore.weights import QuantTensor

# A matrix of at most so many weights stays in the cache, and torch multiplies by it in less time
# than calling `ktcore.ops.linear` from Python takes: 8 us against 24 for [320, 192] on Zen 3.
SMALL = 1 << 16


class Projection:
    """``x @ weight.T + bias`` on float32 activations.

    A bfloat16 weight stays as it is and goes through `ktcore.ops.linear`, which reads half the
    bytes that a float32 copy would have. A float32 or float16 weight, and a small one, is computed
    in float32 by torch.

    Attributes:
        exact: keep activations from being rounded (a router's choice of experts hangs on it).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False):
        """weight [O, I], bias [O] or None."""
        self.shape = tuple(weight.shape)
        self.exact = exact
        self.bias = None if bias is None else bias.to(torch.float32)
        self.stored: QuantTensor | None = None
        self.dense: Tensor | None = None
        if weight.dtype == torch.bfloat16 and weight.numel() > SMALL:
            self.stored = QuantTensor("bf16", self.shape, {"data": weight})
        else:
            self.dense = weight.to(torch.float32)

    @property
    def torch_weights(self) -> int:
        """How many weights torch multiplies by; 0 where `ktcore.ops.linear` does."""
        return 0 if self.dense is None else self.dense.numel()

    def __call__(self, x: Tensor) -> Tensor:
        if self.stored is not None:
            return ops.linear(x, self.stored, self.bias, exact=self.exact)
        return F.linear(x, self.dense, self.bias)

    def prepare(self, release: bool) -> None:
        """Have the backend pack the weight now; with `release`, keep only what it packed."""
        if self.stored is None:
            return
        self(torch.zeros(1, self.shape[1]))
        if release and self.stored.packed:
            self.stored.release()

    def request(self, tokens: int) -> Request | None:
        """The operator call that this makes; None where torch computes it."""
        if self.stored is None:
            return None
        return Request(
            op="linear",
            format=self.stored.format.name,
            tokens=tokens,
            hidden_size=self.shape[1],
            intermediate_size=self.shape[0],
            dtype="float32",
            exact=self.exact,
        )
