"""Weights in the order in which the native kernels read them (see csrc/common/packed.h).

Packed once, at first use, and kept on the weights object; all CPU instruction sets share it.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ktcore
from ktcore import _native
from ktcore.formats import Codes, Format
from ktcore.weights import ExpertWeights, QuantTensor
from ktcore.weights.packed_cache import Layout

LAYOUT = "native"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Formats that have a layout of their own; every other is packed from its `Codes`.
OWN_LAYOUT = ("bf16", "int8", "int4_g32")

_lock = threading.Lock()


def is_packable(format: Format) -> bool:
    """Whether the kernels have a layout for a format: small integers with scales that fit it."""
    if format.name in OWN_LAYOUT:
        return True
    if type(format).codes is Format.codes or getattr(format, "act_order", False):
        return False
    return format.group_size is None or format.group_size % 16 == 0


@dataclass(frozen=True)
class _Matrix:
    """What the extension packs, kept alive while it does."""

    data: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None
    group_size: int = 0

    def arguments(self) -> tuple[int, int, int, int]:
        addresses = (
            0 if t is None else t.data_ptr() for t in (self.data, self.scales, self.offsets)
        )
        return (*addresses, self.group_size)


def _scale_type(codes: Codes, least: torch.dtype | None) -> torch.dtype:
    """The smallest type, and one that `least` fits, that holds scales and offsets without loss."""
    tensors = [t for t in (codes.scales, codes.offsets) if t is not None]
    for dtype in (torch.bfloat16, torch.float16):
        if least in (None, dtype) and all(
            torch.equal(t.to(dtype).to(torch.float32).nan_to_num(), t.nan_to_num()) for t in tensors
        ):
            return dtype
    return torch.float32


class _Packer:
    """Finds the layout that several matrices of a format share, and their data in it."""

    def __init__(self, format: Format):
        self.format = format
        self.scale_type: torch.dtype | None = None

    def matrix(self, weight: QuantTensor) -> _Matrix:
        if self.format.name in OWN_LAYOUT:
            parts = weight.parts
            scales = parts.get("scales")
            return _Matrix(
                parts["data"].contiguous(), None if scales is None else scales.contiguous()
            )
        codes = self._codes(weight)
        data = codes.codes
        if len(codes.levels) > 16:
            data = codes.levels.view(torch.uint8)[data.long()]
        offsets = None if codes.offsets is None else codes.offsets.contiguous()
        return _Matrix(data.contiguous(), codes.scales.contiguous(), offsets, codes.group_size)

    def _codes(self, weight: QuantTensor) -> Codes:
        weight.require_parts()
        codes = self.format.codes(weight.parts, weight.shape)
        assert codes is not None
        assert codes.columns is None, self.format.name
        return codes

    def widen(self, weight: QuantTensor) -> None:
        """Make the layout hold this matrix's scales as well."""
        if self.format.name not in OWN_LAYOUT:
            self.scale_type = _scale_type(self._codes(weight), self.scale_type)

    def layout(self, example: QuantTensor) -> object:
        if self.format.name in OWN_LAYOUT:
            return _native.ext.WeightLayout(self.format.name)
        codes = self._codes(example)
        nibbles = len(codes.levels) <= 16
        small_groups = codes.group_size % 32 != 0 and codes.group_size < example.shape[-1]
        name = ("nibbles" if nibbles else "bytes") + ("_g16" if small_groups else "")
        return _native.ext.WeightLayout(
            name,
            scale_type=DTYPES[self.scale_type or torch.float32],
            offsets=codes.offsets is not None,
            levels=codes.levels.tolist() if nibbles else [],
        )


def packed_experts(experts: ExpertWeights) -> object:
    """The packed form of a layer's experts; made at the first call."""
    packed = experts.packed.get(LAYOUT)
    if packed is not None:
        return packed
    with _lock:
        if LAYOUT not in experts.packed:
            experts.packed[LAYOUT] = _pack_experts(experts)
    return experts.packed[LAYOUT]


def _pack_experts(experts: ExpertWeights) -> object:
    packers = {"gate": _Packer(experts.format), "down": _Packer(experts.down_format)}
    packers["up"] = packers["gate"]
    indices = range(experts.num_experts)
    for name, packer in packers.items():
        for e in indices if packer.format.name not in OWN_LAYOUT else ():
            packer.widen(getattr(experts, name)[e])
    packed = _native.ext.PackedExperts(
        packers["gate"].layout(experts.gate[0]),
        packers["down"].layout(experts.down[0]),
        experts.num_experts,
        experts.hidden_size,
        experts.intermediate_size,
    )
    for name, packer in packers.items():
        for e in indices:
            matrix = packer.matrix(getattr(experts, name)[e])  # holds what its addresses point to
            packed.pack(e, name, *matrix.arguments())
    return packed


def packed_matrix(weight: QuantTensor) -> object:
    """The packed form of a matrix [O, I]; made at the first call."""
    packed = weight.packed.get(LAYOUT)
    if packed is not None:
        return packed
    with _lock:
        if LAYOUT not in weight.packed:
            packer = _Packer(weight.format)
            packer.widen(weight)
            packed = _native.ext.PackedMatrix(packer.layout(weight), *weight.shape)
            matrix = packer.matrix(weight)  # holds what its addresses point to
            packed.pack(*matrix.arguments())
            weight.packed[LAYOUT] = packed
    return weight.packed[LAYOUT]


# ---------------------------------------------------------------------------------- storing them


@functools.cache
def layout() -> Layout:
    """This form of weights, for those who store and restore it."""
    return Layout(LAYOUT, _identity(), _describe, _restore)


def _identity() -> str:
    """A digest of all code that decides what a stored weight becomes: no version number has to be
    thought of, and a cache never outlives a change."""
    package = Path(ktcore.__file__).parent
    folders = [Path(__file__).parent, *(package / n for n in ("formats", "weights", "models"))]
    digest = hashlib.blake2b(_native.ext.sources.encode(), digest_size=16)
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return f"{ktcore.__version__}-{digest.hexdigest()}"


def _describe(packed: object) -> dict:
    if isinstance(packed, _native.ext.PackedMatrix):
        return {"layouts": [packed.layout.describe()], "sizes": [packed.rows, packed.cols]}
    return {
        "layouts": [packed.gate_up_layout.describe(), packed.down_layout.describe()],
        "sizes": [packed.num_experts, packed.hidden_size, packed.intermediate_size],
    }


def _restore(description: dict, memory: memoryview) -> object:
    layouts = [_native.ext.WeightLayout(**fields) for fields in description["layouts"]]
    kind = _native.ext.PackedMatrix if len(layouts) == 1 else _native.ext.PackedExperts
    return kind(*layouts, *description["sizes"], memory)
