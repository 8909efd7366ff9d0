"""A weight in a stored format."""

from __future__ import annotations

import itertools
import math
import weakref

import torch
from torch import Tensor

from ktcore.formats import Format, Parts, define, get_format

_handles = itertools.count(1)
_by_handle: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def register(weights: object) -> int:
    """A number that stands for weights where only numbers may pass: in torch's operator schemas."""
    handle = next(_handles)
    _by_handle[handle] = weights
    return handle


def resolve(handle: int) -> object:
    """The weights of a handle. Raises RuntimeError if they no longer exist."""
    weights = _by_handle.get(handle)
    if weights is None:
        raise RuntimeError(
            f"the weights with handle {handle} no longer exist: keep a reference to the "
            "QuantTensor or ExpertWeights for as long as a compiled graph uses it"
        )
    return weights


class QuantTensor:
    """A weight of logical shape [..., O, I] in a stored format.

    Attributes:
        format: its `Format`.
        shape: logical shape.
        parts: the stored tensors, named by the format; empty after `release`.
        packed: what backends have made of it for themselves, by name of the layout.
        prepared: what the last call found out, for the next like it: see `ktcore.ops._prepared`.
        handle: number that stands for it in torch operators.
    """

    def __init__(self, format: str | Format, shape: tuple[int, ...], parts: Parts):
        """Raises ValueError or TypeError, naming the part, if parts do not fit."""
        self.format = get_format(format)
        define(self.format)
        self.shape = tuple(int(n) for n in shape)
        if len(self.shape) < 2 or any(n < 0 for n in self.shape):
            raise ValueError(f"shape: expected [..., O, I], got {self.shape}")
        self.format.check(parts, self.shape)
        devices = {str(part.device) for part in parts.values()}
        if len(devices) > 1:
            raise ValueError(f"parts: expected all on one device, got {sorted(devices)}")
        self.parts: Parts = dict(parts)
        self.device = next(iter(parts.values())).device
        self.packed: dict[str, object] = {}
        self.prepared: object = None
        self.handle = register(self)

    @classmethod
    def from_packed(
        cls, format: str | Format, shape: tuple[int, ...], packed: dict[str, object]
    ) -> QuantTensor:
        """A weight on the CPU that exists packed only, as after `release`."""
        format, shape = get_format(format), tuple(shape)
        nothing = {
            part: torch.empty(size, dtype=dtype, device="meta")
            for part, (size, dtype) in format.part_specs(shape).items()
        }
        weight = cls(format, shape, nothing)
        weight.parts, weight.device, weight.packed = {}, torch.device("cpu"), dict(packed)
        return weight

    @classmethod
    def quantize(cls, tensor: Tensor, format: str | Format) -> QuantTensor:
        """Store a float tensor [..., O, I] with the format's reference quantiser."""
        format = get_format(format)
        if not tensor.is_floating_point():
            raise TypeError(f"tensor: expected a floating-point tensor, got {tensor.dtype}")
        return cls(format, tuple(tensor.shape), format.quantize(tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts, released or not."""
        return self.format.nbytes(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, by the format's reference."""
        self.require_parts()
        return self.format.dequantize(self.parts, self.shape, dtype)

    def release(self) -> None:
        """Free the stored parts; a packed form must exist, and only it can be used from then on."""
        if not self.packed:
            raise RuntimeError("release: no packed form exists yet, the weight would be lost")
        self.parts = {}

    def require_parts(self) -> None:
        """Raises RuntimeError if the stored parts have been released."""
        if not self.parts:
            raise RuntimeError(
                "this weight's stored form was released, or never read because a cache had it "
                f"packed; it only exists packed for {', '.join(self.packed) or 'a backend'}: load "
                "it again (release=False) to use it otherwise"
            )

    def __getitem__(self, index: int | slice) -> QuantTensor:
        """A matrix, or a range, of a stack [N, ..., O, I], sharing memory."""
        if len(self.shape) < 3:
            raise IndexError(f"a weight of shape {self.shape} is no stack")
        self.require_parts()
        parts = {name: part[index] for name, part in self.parts.items()}
        size = self.shape[0]
        if isinstance(index, slice):
            return QuantTensor(self.format, (len(range(size)[index]), *self.shape[1:]), parts)
        return QuantTensor(self.format, self.shape[1:], parts)

    def __repr__(self) -> str:
        return f"QuantTensor({self.format.name}, {list(self.shape)}, {self.nbytes / 1e6:.1f} MB)"
