"""Plain PyTorch in bf16: a loop over the experts that have tokens, as models are often written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.bench.peers import Peer, Session, Timed, matrices_of, timed
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call, Weights
from ktcore.formats import Format


class Loop(Session):
    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, ...]] = []

    def add(self, weights: Weights) -> None:
        self.layers.append(tuple(w.parts["data"] for w in matrices_of(weights)))

    def run(self, call: Call) -> Timed:
        matrices = self.layers[call.layer]
        if len(matrices) == 1:
            return timed(lambda: F.linear(*call.inputs, *matrices))
        return timed(lambda: moe(*call.inputs, *matrices))


def moe(
    x: Tensor, ids: Tensor, topk_weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """[T, H] for x [T, H], ids and topk_weights [T, K], gate and up [E, I, H], down [E, H, I]."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        rows = x[token]
        h = F.silu(F.linear(rows, gate[e])) * F.linear(rows, up[e])
        y = F.linear(h, down[e]) * topk_weights[token, slot, None]
        out.index_add_(0, token, y.to(x.dtype))
    return out


class PlainTorch(Peer):
    name = "torch"
    ops = ("moe", "linear")
    formats = ("bf16",)

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return torch.__version__

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        return Loop()


PEERS = [PlainTorch()]
