"""torchao's int4 weights in groups of 32 on the CPU (`Int4OpaqueTensor`), in a loop over the
experts that have tokens. Activations and scales are bfloat16: for others it has no fast kernel.

https://github.com/pytorch/ao/tree/main/torchao/prototype/quantization/int4
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.bench.peers import Peer, Session, Timed, each_matrix, matrices_of, timed
from ktcore.bench.peers.torch import moe
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call, Weights
from ktcore.formats import Codes, Format
from ktcore.weights import QuantTensor

GROUP = 32
MIDDLE = 8  # the code that stands for zero


class Loop(Session):
    def __init__(self) -> None:
        self.layers: list[list[list[Tensor]]] = []

    def add(self, weights: Weights) -> None:
        self.layers.append([tensors(w) for w in matrices_of(weights)])

    def run(self, call: Call) -> Timed:
        x, *routing = call.inputs
        x, matrices = x.to(torch.bfloat16), self.layers[call.layer]
        if not routing:
            return timed(lambda: F.linear(x, matrices[0][0]))
        ids, topk_weights = routing
        topk_weights = topk_weights.to(torch.bfloat16)
        return timed(lambda: moe(x, ids, topk_weights, *matrices))


def tensors(weight: QuantTensor) -> list[Tensor]:
    """Each expert's matrix, or the one of `linear`, as torchao's tensor of the same codes and
    scales.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of its GPU kernels
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    stored = weight.format.codes(weight.parts, weight.shape)
    assert isinstance(stored, Codes) and isinstance(stored.codes, Tensor)
    out = []
    for codes, scales in zip(*(each_matrix(t) for t in (stored.codes, stored.scales)), strict=True):
        integers = stored.levels.to(torch.int32)[codes.int()] + MIDDLE
        scales = scales.to(torch.bfloat16)
        out.append(
            Int4OpaqueTensor(
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1),
                pack_tinygemm_scales_and_zeros(scales, torch.zeros_like(scales), scales.dtype),
                [1, GROUP],
                integers.shape,
            )
        )
    return out


class TorchAo(Peer):
    name = "torchao"
    ops = ("moe", "linear")
    formats = ("int4_g32",)

    def missing(self) -> str:
        return "" if importlib.util.find_spec("torchao") else "torchao is not installed"

    def version(self) -> str:
        return importlib.metadata.version("torchao")

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        return Loop()


PEERS = [TorchAo()]
