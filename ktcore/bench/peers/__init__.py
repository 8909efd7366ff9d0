"""Other implementations of the operators, to measure beside ktcore's: same weights, same calls.

The `PEERS` of a module of this package are some; nothing else is edited. A peer that is not
installed says so; `ci/peers.py` installs all in a checkout.
"""

from __future__ import annotations

import abc
import functools
import importlib
import pkgutil
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ktcore.bench.presets import Shape
from ktcore.formats import Format
from ktcore.weights import ExpertWeights, QuantTensor

Timed = tuple[Tensor, float]  # the result [T, ...] of a call, and the seconds that it took


class Session(abc.ABC):
    """A peer at work: the weights of one format that it was given, in its own form."""

    @abc.abstractmethod
    def add(self, weights: Any) -> None:
        """Take a layer's weights, a matrix for `linear`, whose stored parts it may keep but not
        change.
        """

    @abc.abstractmethod
    def run(self, call: Any) -> Timed:
        """A `workload.Call` on the layer that it names."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Give back what is not memory."""


class Peer(abc.ABC):
    """Another implementation.

    Attributes:
        name: as users write it.
        ops: the operators that it has.
        formats: the stored formats whose numbers it computes with exactly as they are.
    """

    name: str
    ops: tuple[str, ...] = ("moe",)
    formats: tuple[str, ...]

    @abc.abstractmethod
    def missing(self) -> str:
        """What it lacks to run here; "" if nothing."""

    @abc.abstractmethod
    def version(self) -> str:
        """Of what is installed."""

    @abc.abstractmethod
    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        """Begin with no layers, for one of `ops`. The shape's experts are those that are
        materialised; `linear` multiplies by matrices [intermediate_size, hidden_size].
        """


def matrices_of(weights: ExpertWeights | QuantTensor) -> tuple[QuantTensor, ...]:
    """Gate, up and down of an expert layer, or the one matrix of `linear`."""
    if isinstance(weights, QuantTensor):
        return (weights,)
    return weights.gate, weights.up, weights.down


def each_matrix(t: Tensor) -> Tensor:
    """[E, O, ...] of experts as it is, [O, ...] of one matrix with an E of 1."""
    return t if t.ndim == 3 else t[None]


def timed(function: Callable[[], Tensor]) -> Timed:
    """Call and time."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


@functools.cache
def peers() -> dict[str, Peer]:
    """All that there are, installed or not, by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [
        peer
        for name in modules
        if not name.startswith("_")
        for peer in importlib.import_module(f"{__name__}.{name}").PEERS
    ]
    return {peer.name: peer for peer in found}
