"""The header of a GGUF file: its key/value metadata and where its tensors lie.

Every number in it is a claim: counts, lengths, sizes and offsets are checked against the file's
size before anything is read, allocated or multiplied by them. What is wrong is a `CheckpointError`
that names the file. (Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ktcore.weights.safetensors_file import CheckpointError, regular_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

# What a sound file stays far below: a tokenizer's vocabulary and merges are some ten MB.
MAX_HEADER = 1 << 28
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ARRAY = 1 << 24
MAX_KEY_LENGTH = (1 << 16) - 1  # the format's own limit
MAX_NAME_LENGTH = 1 << 10
MAX_ALIGNMENT = 1 << 24

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
SMALLEST_KEY = 8 + 4 + 1  # bytes that an entry takes at least
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8

# Types whose names other files use too, for numbers that are laid out otherwise.
NAMED_ELSEWHERE = ("mxfp4", "nvfp4")


@dataclass(frozen=True)
class TensorType:
    """How GGUF stores a tensor.

    Attributes:
        name: as llama.cpp calls it.
        block: weights of a row that are stored together.
        nbytes: bytes of such a block.
        dtype: the plain torch dtype that it is, None for a quantised type.
    """

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype | None = None

    @property
    def format(self) -> str:
        """What `ktcore.formats` calls it, or would."""
        name = self.name.lower()
        return f"gguf_{name}" if name in NAMED_ELSEWHERE else name


def _plain(name: str, dtype: torch.dtype) -> TensorType:
    return TensorType(name, 1, dtype.itemsize, dtype)


# Numbers and block sizes of `enum ggml_type` (ggml.h, ggml-common.h).
TENSOR_TYPES = {
    0: _plain("F32", torch.float32),
    1: _plain("F16", torch.float16),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: _plain("I8", torch.int8),
    25: _plain("I16", torch.int16),
    26: _plain("I32", torch.int32),
    27: _plain("I64", torch.int64),
    28: _plain("F64", torch.float64),
    29: TensorType("IQ1_M", 256, 56),
    30: _plain("BF16", torch.bfloat16),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}
REMOVED = {4, 5, 31, 32, 33, 36, 37, 38}  # numbers of types that ggml no longer has

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]


@dataclass(frozen=True)
class GgufTensorInfo:
    """Where a tensor lies in a file; `shape` as torch orders it, the innermost dimension last."""

    type: TensorType
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype, None for a quantised type."""
        return self.type.dtype


@dataclass(frozen=True)
class GgufHeader:
    """One file's header."""

    path: Path
    version: int
    metadata: dict[str, Value]
    kinds: dict[str, tuple[int, ...]]  # the value type of each key; an array's elements' behind it
    tensors: dict[str, GgufTensorInfo]


def shown(value: Value) -> str:
    """A value as an error message shows it: short whatever it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value[:80] if isinstance(value, str) else value)


def is_gguf(path: Path) -> bool:
    """Whether a file calls itself one, by its name or its first bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) in (MAGIC, MAGIC[::-1])
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> GgufHeader:
    """The header of one file.

    Raises:
        CheckpointError: the file cannot be opened or is not a sound GGUF file.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            return _Parser(path, file, size).header()
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        # ValueError: a path with a zero in it.
        what = getattr(error, "strerror", None) or error
        raise CheckpointError(path, f"cannot be read: {what}") from error


class _Parser:
    """Reads a header front to back, never more than the file has."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.limit = min(size, MAX_HEADER)
        self.at = 0

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(self.path, what)

    def take(self, count: int, what: str) -> bytes:
        """The next bytes. Raises CheckpointError if the file, or a sound header, ends before."""
        if count > self.limit - self.at:
            if self.size <= MAX_HEADER:
                raise self.bad(
                    f"{what} would end at byte {self.at + count}, but the file has {self.size}: "
                    "cut short, or damaged"
                )
            raise self.bad(f"{what} takes its header beyond {MAX_HEADER} bytes: damaged")
        data = self.file.read(count)
        if len(data) != count:
            raise self.bad(f"{what}: the file is cut short")
        self.at += count
        return data

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, most: int = MAX_HEADER) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.bad(f"{what} claims a length of {length}, more than {most}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not valid UTF-8: {error.reason}") from None

    def count(self, claimed: int, what: str, most: int, smallest: int) -> int:
        """A claimed count of things that take at least `smallest` bytes each."""
        if claimed > most or claimed * smallest > self.limit - self.at:
            raise self.bad(
                f"claims {claimed} {what}, more than a file of {self.size} bytes can hold"
                if claimed * smallest > self.size - self.at
                else f"claims {claimed} {what}, more than can make sense"
            )
        return claimed

    # ------------------------------------------------------------------------------- the parts

    def header(self) -> GgufHeader:
        if self.size < 24:
            raise self.bad(f"too short for a GGUF file ({self.size} bytes)")
        magic = self.take(4, "the magic number")
        if magic != MAGIC:
            raise self.bad(
                "is a big-endian GGUF file; only little-endian ones are supported"
                if magic == MAGIC[::-1]
                else f"not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}"
            )
        version = self.number("I", "the version")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in range(1, 256):
                raise self.bad("is a big-endian GGUF file; only little-endian ones are supported")
            raise self.bad(f"is GGUF version {version}; versions 2 and 3 are supported")
        tensors = self.number("Q", "the number of tensors")
        keys = self.number("Q", "the number of keys")
        self.count(keys, "keys", MAX_KEYS, SMALLEST_KEY)
        self.count(tensors, "tensors", MAX_TENSORS, SMALLEST_TENSOR)
        metadata: dict[str, Value] = {}
        kinds: dict[str, tuple[int, ...]] = {}
        for i in range(keys):
            key = self.text(f"the name of key {i}", MAX_KEY_LENGTH)
            if key in metadata:
                raise self.bad(f"the key {key[:200]!r} appears twice")
            kinds[key], metadata[key] = self.value(key)
        self.count(tensors, "tensors", MAX_TENSORS, SMALLEST_TENSOR)
        alignment = self.alignment(metadata)
        entries = [self.tensor(i) for i in range(tensors)]
        data = -(-self.at // alignment) * alignment
        placed = self.placed(entries, data, alignment)
        return GgufHeader(self.path, version, metadata, kinds, placed)

    def alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not 1 <= value <= MAX_ALIGNMENT
            or value & (value - 1)
        ):
            raise self.bad(
                f"general.alignment: expected a power of two up to {MAX_ALIGNMENT}, "
                f"got {shown(value)}"
            )
        return value

    def value(self, key: str) -> tuple[tuple[int, ...], Value]:
        what = f"key {key[:200]!r}"
        kind = self.number("I", what)
        if kind == STRING:
            return (kind,), self.text(what)
        if kind == ARRAY:
            inner, values = self.array(what)
            return (kind, inner), values
        return (kind,), self.scalars(kind, 1, what)[0]

    def array(self, what: str) -> tuple[int, list[Scalar]]:
        kind, claimed = self.number("I", what), self.number("Q", what)
        if kind == ARRAY:
            raise self.bad(f"{what} is an array of arrays, which is not supported")
        if kind != STRING:
            width = 1 if kind == BOOL else struct.calcsize(SCALARS.get(kind, "B"))
            return kind, self.scalars(kind, self.length(claimed, width, what), what)
        return kind, [self.text(what) for _ in range(self.length(claimed, 8, what))]

    def length(self, claimed: int, smallest: int, what: str) -> int:
        return self.count(claimed, f"elements in {what}", MAX_ARRAY, smallest)

    def scalars(self, kind: int, count: int, what: str) -> list[Scalar]:
        if kind == BOOL:
            data = self.take(count, what)
            if data.translate(None, b"\0\1"):
                raise self.bad(f"{what}: a truth value is neither 0 nor 1")
            return [byte == 1 for byte in data]
        if kind not in SCALARS:
            raise self.bad(f"{what} has the unknown value type {kind}")
        code = SCALARS[kind]
        return list(
            struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code), what))
        )

    def tensor(self, i: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.text(f"the name of tensor {i}", MAX_NAME_LENGTH)
        what = f"tensor {name!r}"
        dimensions = self.number("I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.bad(f"{what} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        sizes = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, what))
        number = self.number("I", what)
        offset = self.number("Q", what)
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            why = (
                "which current versions of llama.cpp no longer have: download a newer file"
                if number in REMOVED
                else "which is unknown"
            )
            raise self.bad(f"{what} has type {number}, {why}")
        shape = tuple(reversed(sizes))
        if 0 in shape or math.prod(shape) // kind.block * kind.nbytes >= 1 << 63:
            raise self.bad(f"{what} has the bad shape {list(shape)}")
        if shape[-1] % kind.block:
            raise self.bad(
                f"{what} has rows of {shape[-1]}, no multiple of {kind.block}, the block of "
                f"{kind.name}"
            )
        return name, shape, kind, offset

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], TensorType, int]], data: int, alignment: int
    ) -> dict[str, GgufTensorInfo]:
        """Where the tensors lie, given where the data begins."""
        tensors: dict[str, GgufTensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.bad(f"the tensor {name!r} appears twice")
            if offset % alignment:
                raise self.bad(
                    f"tensor {name!r} begins at offset {offset}, no multiple of the alignment "
                    f"{alignment}"
                )
            begin = data + offset
            end = begin + math.prod(shape) // kind.block * kind.nbytes
            if end > self.size:
                raise self.bad(
                    f"tensor {name!r} ends at byte {end}, but the file has {self.size}: cut short?"
                )
            tensors[name] = GgufTensorInfo(kind, shape, begin, end)
        previous = None
        for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
            if previous is not None and info.begin < tensors[previous].end:
                raise self.bad(f"tensors {previous!r} and {name!r} overlap")
            previous = name
        return tensors
