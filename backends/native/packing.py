"""Weights in the order in which the native kernels read them (see csrc/common/packed.h).

Packed once, at first use, and kept on the weights object; all CPU instruction sets share it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ktcore
from ktcore import _native
from ktcore.formats import BlockCodes, Codes, Floats, Format
from ktcore.formats.base import E8M0
from ktcore.formats.integer import BYTES
from ktcore.weights import ExpertWeights, QuantTensor
from ktcore.weights.packed_cache import Layout

LAYOUT = "native"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALE_TYPES = {**DTYPES, E8M0: 3}

FLOATS = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8",
}

GROUP = 32  # columns that a layout counts by, and half of that with two sets of scales

_lock = threading.Lock()


def is_packable(format: Format) -> bool:
    """Whether the kernels have a layout for a format: for its numbers and for its groups."""
    if type(format).floats is not Format.floats:
        return format.group_size is None or format.group_size % GROUP == 0
    if type(format).codes is not Format.codes:
        return format.group_size is None or format.group_size % (GROUP // 2) == 0
    return False


@dataclass(frozen=True)
class _Matrix:
    """What the extension packs, kept alive while it does."""

    data: Tensor
    scales: Tensor | None = None
    row_scales: Tensor | None = None
    offsets: Tensor | None = None
    inner_scales: Tensor | None = None
    inner_offsets: Tensor | None = None
    columns: Tensor | None = None
    scale_size: int = 0
    group_size: int = 0
    blocks: tuple[int, int, list[tuple[int, ...]]] = (0, 0, [])

    def arguments(self) -> tuple:
        tensors = (
            self.data,
            self.scales,
            self.row_scales,
            self.offsets,
            self.inner_scales,
            self.inner_offsets,
            self.columns,
        )
        addresses = (0 if t is None else t.data_ptr() for t in tensors)
        return (*addresses, self.scale_size, self.group_size, self.blocks)


def _smallest_type(least: torch.dtype | None, *values: Tensor | None) -> torch.dtype:
    """The smallest type, and one that `least` fits, that holds values without loss."""
    tensors = [t for t in values if t is not None]
    for dtype in (torch.bfloat16, torch.float16):
        if least in (None, dtype) and all(
            torch.equal(t.to(dtype).to(torch.float32).nan_to_num(), t.nan_to_num()) for t in tensors
        ):
            return dtype
    return torch.float32


def _span(scale_size: int, columns: int) -> int:
    """How many groups share a scale."""
    if scale_size >= columns:
        # All, in a number that kernels like to divide by.
        return -(-columns // (4 * GROUP)) * 4
    return scale_size // GROUP if scale_size % GROUP == 0 else 1


def _code_layout(levels: list[int]) -> tuple[str, int]:
    """The layout of codes that stand for such levels, and their bias."""
    if levels == list(range(levels[0], levels[0] + len(levels))):
        for bits in (2, 3, 4, 5, 6):
            if len(levels) <= 1 << bits:
                return f"codes{bits}", -levels[0]
    for bits in (3, 4):
        if len(levels) <= 1 << bits:
            return f"table{bits}", 0
    return "codes8", 0


# Activations of eight bits leave an error of 0.4 % in `linear` and 0.6 % in `moe`, where there are
# so many numbers that it is near its mean; smaller matrices meet activations of 16 bits.
BYTE_ROWS, BYTE_COLUMNS = 256, 512


class _Packer:
    """Finds the layout that several matrices of a format share, and their data in it."""

    def __init__(self, format: Format):
        self.format = format
        self.has_codes = type(format).codes is not Format.codes
        self.scale_type = format.exact_scale_dtype()
        self.examines = self.has_codes and self.scale_type is None

    def read(self, weight: QuantTensor) -> Codes | Floats:
        """What a matrix stores."""
        weight.require_parts()
        if not self.has_codes:
            floats = self.format.floats(weight.parts, weight.shape)
            assert floats is not None, self.format.name
            return floats
        codes = self.format.codes(weight.parts, weight.shape, blocks=True)
        assert codes is not None, self.format.name
        return codes

    def widen(self, weight: QuantTensor) -> None:
        """Make the layout hold this matrix's scales as well, where the format does not say."""
        if self.examines:
            codes = self.read(weight)
            self.scale_type = _smallest_type(self.scale_type, codes.scales, codes.offsets)

    def matrix(self, stored: Codes | Floats) -> _Matrix:
        def contiguous(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.contiguous()

        if isinstance(stored, Floats):
            scales = contiguous(stored.scales)
            return _Matrix(stored.data.contiguous(), scales, scale_size=stored.scale_size)
        data, levels = stored.codes, stored.levels
        blocks = (0, 0, [])
        if _code_layout(levels.tolist())[0] == "codes8" and not torch.equal(levels, BYTES):
            assert isinstance(data, Tensor), self.format.name
            data = levels.view(torch.uint8)[data.long()]
        if isinstance(data, BlockCodes):
            fields = [dataclasses.astuple(field) for field in data.fields]
            data, blocks = data.data, (data.block_size, data.type_size, fields)
        return _Matrix(
            data.contiguous(),
            contiguous(stored.scales),
            contiguous(stored.row_scales),
            contiguous(stored.offsets),
            contiguous(stored.inner_scales),
            contiguous(stored.inner_offsets),
            contiguous(stored.columns),
            stored.scale_size,
            stored.group_size,
            blocks,
        )

    def layout(self, stored: Codes | Floats, shape: Sequence[int]) -> object:
        """The layout of matrices like this one, [..., O, I]."""
        rows, columns = shape[-2:]
        scale_type = SCALE_TYPES[self.scale_type or torch.float32]
        if isinstance(stored, Floats):
            name = FLOATS[stored.data.dtype]
            if stored.scales is None:
                return _native.ext.WeightLayout(name)
            return _native.ext.WeightLayout(
                name, scale_type=scale_type, span=_span(stored.scale_size, columns)
            )
        levels = stored.levels.tolist()
        name, bias = _code_layout(levels)
        others = (stored.row_scales, stored.offsets, stored.inner_scales, stored.inner_offsets)
        bytes_will_do = (
            self.format.tolerance >= 0.008 and rows >= BYTE_ROWS and columns >= BYTE_COLUMNS
        )
        if name == "codes8" and stored.scale_size >= columns and all(t is None for t in others):
            return _native.ext.WeightLayout("int8", byte_activations=bytes_will_do)
        small_groups = stored.group_size % GROUP != 0 and stored.group_size < columns
        name += "_g16" if small_groups else ""
        return _native.ext.WeightLayout(
            name,
            scale_type=scale_type,
            span=_span(stored.scale_size, columns),
            inner_scales=stored.inner_scales is not None,
            row_scales=stored.row_scales is not None,
            offsets=stored.offsets is not None,
            inner_offsets=stored.inner_offsets is not None,
            inner_nibbles=name == "codes2_g16" and stored.inner_bits == 4,
            bias=bias,
            levels=levels if name.startswith("table") else [],
            largest=max(1, *map(abs, levels)),
            reordered=stored.columns is not None,
            byte_activations=bytes_will_do,
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


def _in_order(stored: Codes | Floats, order: Tensor) -> Codes | Floats:
    """The rows of a matrix in another order."""

    def take(value: object) -> object:
        if isinstance(value, BlockCodes):
            return dataclasses.replace(value, data=value.data[order])
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.dtype == torch.float8_e4m3fn:  # which torch does not index
            return value.view(torch.uint8)[order].view(value.dtype)
        return value[order]

    return dataclasses.replace(stored, **{f: take(v) for f, v in vars(stored).items()})


def _pack_experts(experts: ExpertWeights) -> object:
    packers = {"gate": _Packer(experts.format), "down": _Packer(experts.down_format)}
    packers["up"] = packers["gate"]

    def read(name: str, e: int) -> Codes | Floats:
        return packers[name].read(getattr(experts, name)[e])

    def of_expert(e: int) -> dict[str, Codes | Floats]:
        matrices = {name: read(name, e) for name in packers}
        order = getattr(matrices["down"], "columns", None)
        if order is not None:
            # Gate and up put out what down takes in: they have their rows in its order.
            for name in ("gate", "up"):
                matrices[name] = _in_order(matrices[name], order)
        return matrices

    indices = range(experts.num_experts)
    for name, packer in packers.items():
        for e in indices if packer.examines else ():
            packer.widen(getattr(experts, name)[e])
    example = of_expert(0)
    packed = _native.ext.PackedExperts(
        *(
            packers[name].layout(example[name], weight.shape)
            for name, weight in (("gate", experts.gate), ("down", experts.down))
        ),
        experts.num_experts,
        experts.hidden_size,
        experts.intermediate_size,
    )
    for e in indices:
        for name, stored in of_expert(e).items():
            matrix = packers[name].matrix(stored)  # holds what its addresses point to
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
            stored = packer.read(weight)
            packed = _native.ext.PackedMatrix(packer.layout(stored, weight.shape), *weight.shape)
            matrix = packer.matrix(stored)  # holds what its addresses point to
            packed.pack(*matrix.arguments())
            weight.packed[LAYOUT] = packed
    return weight.packed[LAYOUT]


# ---------------------------------------------------------------------------------- storing them


@functools.cache
def layout() -> Layout:
    """This form of weights, for those who store and restore it."""
    return Layout(LAYOUT, _identity, _memory, _describe, _restore)


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


def _memory(packed: object) -> memoryview:
    if isinstance(packed, _native.ext.PackedExperts):
        packed = packed.in_one_piece()
    return memoryview(packed)


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
