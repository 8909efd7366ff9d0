"""kt-kernel, KTransformers' CPU experts, with the kernels that its `NativeMoEWrapper` takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

from torch import Tensor

from ktcore.bench.peers import Peer, Session, _kt_kernel
from ktcore.bench.peers._process import Process, why_not
from ktcore.bench.presets import Shape
from ktcore.formats import Format
from ktcore.weights import QuantTensor


def stored(weight: QuantTensor) -> list[Tensor]:
    """A matrix as kt-kernel takes it: the same numbers in the same order."""
    return [weight.parts[name] for name in ("data", "scales") if name in weight.parts]


class KtKernel(Peer):
    name = "kt-kernel"
    formats = tuple(_kt_kernel.FORMATS)

    def missing(self) -> str:
        if why := why_not():
            return why
        return "" if importlib.util.find_spec("kt_kernel") else "kt-kernel is not installed"

    def version(self) -> str:
        return importlib.metadata.version("kt-kernel")

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        command = (sys.executable, "-m", _kt_kernel.__name__, threads, format.name)
        return Process(command, shape, stored)


PEERS = [KtKernel()]
