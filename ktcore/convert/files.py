"""Files whose every byte has its place before the first is written: safetensors shards and GGUF.

Since a weight's stored size is known beforehand, headers are written first and tensors go to their
places in any order, a piece at a time; what a conversion has done survives if it is interrupted.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktcore.convert.targets import GGUF_TYPES
from ktcore.convert.weights import Weight
from ktcore.formats import Format, Parts
from ktcore.formats.floating import Plain
from ktcore.models.family import TensorNames
from ktcore.weights import Checkpoint
from ktcore.weights.gguf_header import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING
from ktcore.weights.safetensors_file import DTYPES

SHARD_BYTES = 5_000_000_000  # as transformers cuts them
SAFETENSORS_TYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Out:
    """A tensor of the output, as its file describes it."""

    name: str
    type: str | int  # safetensors' name, ggml's number
    shape: tuple[int, ...]
    nbytes: int
    align: int = 1


@dataclass(frozen=True)
class FilePlan:
    """One file: its header, its size, and where each tensor begins."""

    name: str
    header: bytes
    size: int
    begins: dict[str, int]


@dataclass
class Layout:
    """All files of an output.

    Attributes:
        files: in order.
        extra: small files beside them, by name.
    """

    files: list[FilePlan]
    extra: dict[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files) + sum(map(len, self.extra.values()))


Piece = tuple[str, int, Tensor | bytes]  # of which tensor, from which of its bytes, which bytes


# ------------------------------------------------------------------------------------ safetensors


class FolderTensors:
    """How a weight lies in a Hugging Face folder: experts apart from each other, quantised ones as
    compressed-tensors' `pack-quantized` has them."""

    def __init__(self, names: TensorNames):
        self.names = names

    def modules(self, weight: Weight) -> list[str]:
        """The names of the modules that the weight belongs to."""
        return [name.removesuffix(".weight") for name in self._names(weight)]

    def _names(self, weight: Weight) -> list[str]:
        if not weight.experts:
            return [weight.name(self.names)]
        return [weight.name(self.names, e) for e in range(weight.shape[0])]

    def tensors(self, weight: Weight, format: Format) -> list[Out]:
        """All tensors that a weight becomes."""
        shape = weight.shape[1:] if weight.experts else weight.shape
        empty = {
            part: torch.empty(size, dtype=dtype, device="meta")
            for part, (size, dtype) in format.part_specs(shape).items()
        }
        out = []
        for name in self._names(weight):
            for suffix, data in _as_stored(format, empty).items():
                kind, size = SAFETENSORS_TYPES[data.dtype], data.dtype.itemsize
                nbytes = data.numel() * size
                out.append(Out(_part(name, suffix), kind, tuple(data.shape), nbytes, size))
            if not isinstance(format, Plain):
                out.append(Out(_part(name, "weight_shape"), "I64", (2,), 16, 8))
        return out

    def pieces(self, weight: Weight, format: Format, parts: Parts, begin: int) -> Iterator[Piece]:
        """Where the parts of a range of a weight's first dimension go."""
        for suffix, data in _as_stored(format, parts).items():
            if weight.experts:
                for i, matrix in enumerate(data):
                    yield _part(weight.name(self.names, begin + i), suffix), 0, matrix
            else:
                row = data[0].numel() * data.dtype.itemsize
                yield _part(weight.name(self.names), suffix), begin * row, data
        if isinstance(format, Plain):
            return
        said = struct.pack("<2q", *weight.shape[-2:])
        count = len(next(iter(parts.values())))
        if weight.experts:
            for e in range(begin, begin + count):
                yield _part(weight.name(self.names, e), "weight_shape"), 0, said
        elif begin == 0:
            yield _part(weight.name(self.names), "weight_shape"), 0, said


def _part(name: str, suffix: str) -> str:
    """What a tensor is called that belongs to the weight of a name."""
    return name.removesuffix("weight") + suffix if suffix else name


def _as_stored(format: Format, parts: Parts) -> Parts:
    """A format's parts as the file has them, by the ends of their names ("" for a plain weight)."""
    if isinstance(format, Plain):
        return {"": parts["data"]}
    if format.name == "int8":  # stored without signs
        data = parts["data"]
        words = (data.shape[-1] // 4,)
        packed = data.new_empty((*data.shape[:-1], *words), dtype=torch.int32)
        if not data.is_meta:
            packed = (data.contiguous().view(torch.uint8) ^ 128).view(torch.int32)
        return {"weight_packed": packed, "weight_scale": parts["scales"][..., None]}
    if format.name == "int4_g32":  # the same bytes
        data = parts["data"]
        packed = data.new_empty((*data.shape[:-1], data.shape[-1] // 4), dtype=torch.int32)
        if not data.is_meta:
            packed = data.contiguous().view(torch.int32)
        return {"weight_packed": packed, "weight_scale": parts["scales"]}
    return parts


def folder_layout(tensors: Iterable[Out], shard_bytes: int = SHARD_BYTES) -> Layout:
    """Safetensors files for tensors in this order, with an index if they are several."""
    shards: list[list[Out]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    count = len(shards)
    files = []
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else Checkpoint.SINGLE
        files.append(_shard(name, shard))
    layout = Layout(files)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
            "weight_map": {n: file.name for file in files for n in sorted(file.begins)},
        }
        layout.extra[Checkpoint.INDEX] = json.dumps(index, indent=2).encode()
    return layout


def _shard(name: str, tensors: list[Out]) -> FilePlan:
    """Wider types first, as the package safetensors does it: each then begins at a multiple of its
    size without gaps, which the format does not allow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in sorted(tensors, key=lambda t: -t.align):
        entries[tensor.name] = {
            "dtype": tensor.type,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    begins = {t.name: len(header) + entries[t.name]["data_offsets"][0] for t in tensors}
    return FilePlan(name, header, len(header) + at, begins)


# ------------------------------------------------------------------------------------------ GGUF


class GgufTensors:
    """How a weight lies in a GGUF file: one tensor."""

    def __init__(self, names: TensorNames):
        self.names = names

    def tensors(self, weight: Weight, format: Format) -> list[Out]:
        kind = GGUF_TYPES[format.name]
        return [Out(weight.name(self.names), kind, weight.shape, format.nbytes(weight.shape))]

    def pieces(self, weight: Weight, format: Format, parts: Parts, begin: int) -> Iterator[Piece]:
        data = parts["data"]
        row = data[0].numel() * data.dtype.itemsize
        yield weight.name(self.names), begin * row, data


U32, I32, F32, U64 = 4, 5, 6, 10


def kind_of(value: object) -> tuple[int, ...]:
    """The GGUF type in which llama.cpp's converters write a value."""
    if isinstance(value, bool):
        return (BOOL,)
    if isinstance(value, int):
        return (I32,) if value < 0 else (U32,) if value < 1 << 32 else (U64,)
    if isinstance(value, float):
        return (F32,)
    if isinstance(value, str):
        return (STRING,)
    assert isinstance(value, list), value
    if value and isinstance(value[0], int) and not isinstance(value[0], bool):
        return (ARRAY, I32)
    return (ARRAY, *kind_of(value[0] if value else ""))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, kinds: tuple[int, ...]) -> bytes:
    kind = kinds[0]
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        head = struct.pack("<IQ", kinds[1], len(value))
        return head + b"".join(_value(v, kinds[1:]) for v in value)
    return struct.pack("<B" if kind == BOOL else f"<{SCALARS[kind]}", value)


def gguf_layout(
    name: str,
    metadata: dict[str, Any],
    kinds: dict[str, tuple[int, ...]],
    tensors: Iterable[Out],
) -> Layout:
    """A GGUF file of version 3.

    kinds: value types of keys where they are known; others as `kind_of` has them.
    """
    tensors = list(tensors)
    metadata = {k: v for k, v in metadata.items() if k != "general.alignment"}
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        types = kinds.get(key) or kind_of(value)
        head += _text(key) + struct.pack("<I", types[0]) + _value(value, types)
    at, offsets = 0, {}
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        head += _text(tensor.name)
        head += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.type, at)
        offsets[tensor.name] = at
        at += _aligned(tensor.nbytes)
    head += bytes(_aligned(len(head)) - len(head))
    begins = {n: len(head) + offset for n, offset in offsets.items()}
    return Layout([FilePlan(name, head, len(head) + at, begins)])


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


# --------------------------------------------------------------------------------------- writing


def raw(data: Tensor | bytes) -> memoryview:
    """The bytes of a tensor, row by row."""
    if isinstance(data, bytes):
        return memoryview(data)
    flat = data.contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


class Writer:
    """Writes pieces to their places in a folder."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self._where = {n: (f, begin) for f in layout.files for n, begin in f.begins.items()}
        self._handles: dict[str, Any] = {}
        self._sums: dict[str, int] = {}

    def create(self) -> None:
        """The files with their headers, at their full size."""
        for file in self.layout.files:
            with (self.folder / file.name).open("wb") as handle:
                handle.write(file.header)
                handle.truncate(file.size)
        for name, data in self.layout.extra.items():
            with (self.folder / name).open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())

    def sound(self) -> bool:
        """Whether the files are there, as `create` left them."""
        for file in self.layout.files:
            path = self.folder / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                return False
            with path.open("rb") as handle:
                if handle.read(len(file.header)) != file.header:
                    return False
        extra = ((self.folder / name, data) for name, data in self.layout.extra.items())
        return all(path.is_file() and path.read_bytes() == data for path, data in extra)

    def write(self, pieces: Iterable[Piece]) -> None:
        """Pieces of a tensor come in order."""
        for name, offset, data in pieces:
            file, begin = self._where[name]
            view = raw(data)
            handle = self._handle(file.name)
            handle.seek(begin + offset)
            handle.write(view)
            self._sums[name] = zlib.crc32(view, self._sums.get(name, 0))

    def finish(self, tensors: Iterable[Out]) -> int:
        """Have the disk hold what was written of these tensors; a checksum of it."""
        for handle in self._handles.values():
            handle.flush()
            os.fsync(handle.fileno())
        sums = [self._sums.pop(tensor.name) for tensor in tensors]
        return zlib.crc32(struct.pack(f"<{len(sums)}I", *sums))

    def checksum(self, tensors: Iterable[Out]) -> int:
        """The same of what the files hold."""
        sums = []
        for tensor in tensors:
            file, begin = self._where[tensor.name]
            handle = self._handle(file.name)
            handle.seek(begin)
            left, found = tensor.nbytes, 0
            while left and (data := handle.read(min(left, 1 << 24))):
                found = zlib.crc32(data, found)
                left -= len(data)
            sums.append(found)
        return zlib.crc32(struct.pack(f"<{len(sums)}I", *sums))

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self._handles[name] = (self.folder / name).open("r+b")
        return self._handles[name]

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
