"""Reading safetensors checkpoints: one file, or shards with an index.

A file's header is checked in full before a byte of its data is used: sizes, offsets, overlaps and
names (format: https://huggingface.co/docs/safetensors). A file that is cut short or damaged is
a `CheckpointError` that names it, never a crash or silently wrong numbers.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktcore.weights.reading import read_into

MAX_HEADER = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 1 << 10
MAX_JSON = 1 << 27  # bytes; a sound configuration or index stays far below

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Exponents, as `ktcore.formats.mx` reads them: torch has had a type of them since 2.7 only.
    "F8_E8M0": torch.uint8,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""

    def __init__(self, path: Path | str, what: str):
        super().__init__(f"{path}: {what}")
        self.path = Path(path)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int


def regular_size(path: Path) -> int:
    """Bytes of a regular file: to open a pipe would wait for ever, a device may have no end.

    Raises:
        OSError: there is no such file.
        CheckpointError: it is something else.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(path, "is not a file")
    return status.st_size


def read_json(path: Path, **options: Any) -> object:
    """The value in a JSON file; options as for `json.loads`.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is no JSON.
        CheckpointError: it is not a file, or too large.
    """
    size = regular_size(path)
    if size > MAX_JSON:
        raise CheckpointError(path, f"has {size} bytes, more than {MAX_JSON}: damaged")
    return json.loads(path.read_text("utf-8"), **options)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    out: dict[str, object] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"the name {name[:200]!r} appears twice")
        out[name] = value
    return out


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file.

    Raises:
        CheckpointError: the file cannot be opened or is not a sound safetensors file.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(path, f"too short for a safetensors file ({size} bytes)")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    path,
                    f"its header claims {length} bytes, but the file has {size}: cut short, or not "
                    "a safetensors file",
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its header is not valid: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, "its header is not a JSON object")
    tensors = {
        name: _tensor_info(path, name, entry, 8 + length, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_overlaps(path, tensors)
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_info(path: Path, name: str, entry: object, data: int, size: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(path, f"tensor {name[:200]!r}: {what}")

    if len(name) > MAX_NAME_LENGTH:
        raise bad(f"its name has {len(name)} characters, more than {MAX_NAME_LENGTH}")
    if not isinstance(entry, dict):
        raise bad("its entry is not an object")
    dtype = DTYPES.get(entry.get("dtype")) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise bad(f"unknown dtype {entry.get('dtype')!r:.80}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_count(n) for n in shape)
        # Also where a zero makes it hold nothing: torch multiplies the strides out all the same.
        or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63
    ):
        raise bad(f"bad shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"bad data_offsets {offsets!r:.80}")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise bad(
            f"shape {shape} of {dtype} takes {expected} bytes, its offsets span {end - begin}"
        )
    if data + end > size:
        raise bad(f"ends at byte {data + end}, but the file has {size}: cut short?")
    return TensorInfo(dtype, tuple(shape), data + begin, data + end)


def _check_overlaps(path: Path, tensors: dict[str, TensorInfo]) -> None:
    previous = None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin == info.end:
            continue
        if previous is not None and info.begin < tensors[previous].end:
            raise CheckpointError(path, f"tensors {previous!r} and {name!r} overlap")
        previous = name


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", "..")
        # Control characters would reach the terminal with an error message, and half a surrogate
        # pair is the name of no file.
        and name.isprintable()
        and Path(name).name == name
    )


class Checkpoint:
    """The tensors of a model folder (or one .safetensors file), read one at a time.

    What is not asked for is not read. Files are read, not mapped: one that is cut short while in
    use is then an error, where a mapping would kill the process.

    Attributes:
        keep_cached: leave what was read in the system's file cache, see `read_into`.
    """

    keep_cached = True

    INDEX = "model.safetensors.index.json"
    SINGLE = "model.safetensors"

    def __init__(self, path: str | Path):
        """Raises CheckpointError if there is no sound checkpoint at `path`."""
        self.path = Path(path)
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        for file, expected in self._files().items():
            tensors = read_header(file)
            for name in expected or tensors:
                if name not in tensors:
                    raise CheckpointError(
                        file, f"lacks the tensor {name[:200]!r}, which the index names"
                    )
                self._where[name] = (file, tensors[name])

    def _files(self) -> dict[Path, list[str] | None]:
        """The files, each with the tensors an index says it holds (None: whatever it holds)."""
        if self.path.is_file():
            return {self.path: None}
        if not self.path.is_dir():
            raise CheckpointError(self.path, "no such file or folder")
        index = self.path / self.INDEX
        if not index.is_file():
            single = self.path / self.SINGLE
            if single.is_file():
                return {single: None}
            raise CheckpointError(self.path, f"holds neither {self.SINGLE} nor {self.INDEX}")
        try:
            content = read_json(index, object_pairs_hook=_no_duplicates)
            names = content["weight_map"]
            if not isinstance(names, dict):
                raise TypeError("its weight_map is not an object")
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(index, f"not a valid index: {error}") from None
        files: dict[Path, list[str] | None] = {}
        for name, file in names.items():
            # A shard lies beside its index: a name that leads elsewhere is not one.
            if not _is_file_name(file):
                raise CheckpointError(
                    index, f"bad file name {file!r:.200} for tensor {name[:200]!r}"
                )
            files.setdefault(self.path / file, []).append(name)
        return files

    def files(self) -> list[Path]:
        """The files that hold its tensors."""
        return list(dict.fromkeys(file for file, _ in self._where.values()))

    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError if there is no such tensor."""
        if name not in self._where:
            raise CheckpointError(self.path, f"lacks the tensor {name!r}")
        return self._where[name][1]

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A copy of a tensor; with `shape`, which it must have.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape.
        """
        info = self.info(name)
        file = self._where[name][0]
        if shape is not None and info.shape != tuple(shape):
            raise CheckpointError(
                file, f"tensor {name!r} has shape {list(info.shape)}, expected {list(shape)}"
            )
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        data = torch.empty(info.end - info.begin, dtype=torch.uint8)
        try:
            whole = read_into(file, info.begin, memoryview(data.numpy()), self.keep_cached)
        except OSError as error:
            raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
        if not whole:
            raise CheckpointError(file, f"tensor {name!r} is cut short")
        return data.view(info.dtype).reshape(info.shape)
