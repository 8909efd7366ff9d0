"""The dense weights of a model: everything but the experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore import ops
from ktcore.dispatch import Request
from ktcore.formats import get_format
from ktcore.weights import QuantTensor

# A matrix of at most so many weights stays in the cache, where rounding activations saves nothing:
# it is computed in float32.
SMALL = 1 << 16


class Projection:
    """``x @ weight.T + bias`` on float32 activations, through `ktcore.ops.linear`.

    A quantised or floating weight stays as it is, a small one becomes float32.

    Attributes:
        exact: keep activations from being rounded (a router's choice of experts hangs on it).
    """

    def __init__(
        self, weight: Tensor | QuantTensor, bias: Tensor | None = None, *, exact: bool = False
    ):
        """weight [O, I], bias [O] or None."""
        self.shape = tuple(weight.shape)
        self.exact = exact
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        if not isinstance(weight, QuantTensor):
            name = str(weight.dtype).removeprefix("torch.")
            if name not in ("bfloat16", "float16", "float32"):
                name, weight = "float32", weight.to(torch.float32)
            weight = QuantTensor(name, self.shape, {"data": weight})
        if weight.numel() <= SMALL and weight.format is not get_format("f32"):
            weight = QuantTensor("f32", self.shape, {"data": weight.dequantize(torch.float32)})
        self.stored = weight

    @property
    def numel(self) -> int:
        return self.stored.numel()

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.stored, self.bias, exact=self.exact)

    def split(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """The outputs for neighbouring rows of the weight, so many each."""
        return list(self(x).split(sizes, -1))

    def prepare(self, release: bool) -> None:
        """Have the backend pack the weight now; with `release`, keep only what it packed."""
        self(torch.zeros(1, self.shape[1]))
        if release and self.stored.packed:
            self.stored.release()

    def packed_weights(self, name: str) -> Iterator[tuple[str, Request, QuantTensor]]:
        """What a backend may have packed, as `name`, with the operator call that reads it."""
        for request in self.requests(1):
            yield name, request, self.stored

    def requests(self, tokens: int) -> list[Request]:
        """The operator calls that this makes."""
        return [
            Request(
                op="linear",
                format=self.stored.format.name,
                tokens=tokens,
                hidden_size=self.shape[1],
                intermediate_size=self.shape[0],
                dtype="float32",
                exact=self.exact,
            )
        ]


class SideBySide:
    """Projections of the same input as one, their outputs one after the other: for those whose
    weights, being stored differently, cannot be one matrix.
    """

    def __init__(self, parts: list[Projection]):
        self.parts = parts

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)

    def split(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """The outputs for neighbouring rows of the weights, so many each, none from two parts."""
        out, sizes = [], list(sizes)
        for part in self.parts:
            mine = []
            while sum(mine) < part.shape[0]:
                mine.append(sizes.pop(0))
            out += part.split(x, mine)
        return out

    def prepare(self, release: bool) -> None:
        for part in self.parts:
            part.prepare(release)

    def packed_weights(self, name: str) -> Iterator[tuple[str, Request, QuantTensor]]:
        for part in self.parts:
            yield from part.packed_weights(name)

    def requests(self, tokens: int) -> list[Request]:
        return [request for part in self.parts for request in part.requests(tokens)]


def joined(
    weights: list[Tensor | QuantTensor], biases: list[Tensor] | None
) -> Projection | SideBySide:
    """Projections of the same input as one; neighbours that are stored alike become one matrix.

    weights: each [O, I], the same I; biases: an [O] for each, or None.
    """
    runs: list[list[int]] = []
    for i, weight in enumerate(weights):
        if runs and _join(weights[runs[-1][0]], weight):
            runs[-1].append(i)
        else:
            runs.append([i])
    matrices = [_concatenated([weights[i] for i in run]) for run in runs]
    return beside(matrices, None if biases is None else torch.cat(biases))


def beside(matrices: list[Tensor | QuantTensor], bias: Tensor | None) -> Projection | SideBySide:
    """Matrices [O, I] of the same input, as they are; bias [sum of O] or None."""
    sizes = [matrix.shape[0] for matrix in matrices]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    parts = [Projection(matrix, b) for matrix, b in zip(matrices, biases, strict=True)]
    return parts[0] if len(parts) == 1 else SideBySide(parts)


def _join(a: Tensor | QuantTensor, b: Tensor | QuantTensor) -> bool:
    """Whether two weights can become one; plain tensors promote each other."""
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        return a.format is b.format and a.format.by_rows
    return isinstance(a, Tensor) and isinstance(b, Tensor)


def _concatenated(weights: list[Tensor] | list[QuantTensor]) -> Tensor | QuantTensor:
    first = weights[0]
    if len(weights) == 1:
        return first
    if not isinstance(first, QuantTensor):
        return torch.cat(weights)
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in first.parts}
    rows = sum(w.shape[0] for w in weights)
    return QuantTensor(first.format, (rows, first.shape[1]), parts)


ROWS = 4096  # of an embedding, that are kept as float32


class Embedding:
    """Rows of a matrix as float32, the stored form kept: a token reads its row only.

    What single tokens read is kept for the next time: the formats' own dequantisers take 0.3 ms for
    a row, as long as a decode step needs for half a layer.
    """

    def __init__(self, weight: Tensor | QuantTensor):
        """weight [vocab_size, hidden_size]."""
        if isinstance(weight, QuantTensor) and not weight.format.by_rows:
            weight = weight.dequantize(torch.float32)
        self.weight = weight
        self._rows: dict[int, Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] to [T, hidden_size]. Raises IndexError if an id is not in the vocabulary."""
        if len(ids) != 1:
            return self._read(ids)
        token = int(ids)
        row = self._rows.get(token)
        if row is None:
            if len(self._rows) >= ROWS:
                self._rows.clear()
            row = self._rows[token] = self._read(ids)
        return row

    def _read(self, ids: Tensor) -> Tensor:
        if not isinstance(self.weight, QuantTensor):
            return F.embedding(ids, self.weight).to(torch.float32)
        parts = {name: part.index_select(0, ids) for name, part in self.weight.parts.items()}
        shape = (ids.shape[0], self.weight.shape[1])
        return self.weight.format.dequantize(parts, shape, torch.float32)
