"""Reading GGUF files: one file, or all that a model was split into."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ktcore.formats import format_names
from ktcore.weights.gguf_header import GgufHeader, GgufTensorInfo, Value, read_header, shown
from ktcore.weights.quant_tensor import QuantTensor
from ktcore.weights.reading import read_into
from ktcore.weights.safetensors_file import CheckpointError

SPLIT_NAME = re.compile(r"(?s)(.*)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"


def find_gguf(folder: Path) -> Path | None:
    """The model's GGUF file in a folder (its first, if it is split), None if there is none.

    Raises:
        CheckpointError: there are several.
    """
    try:
        names = sorted(path.name for path in folder.glob("*.gguf"))
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read: {error.strerror or error}") from error
    splits = {name: SPLIT_NAME.fullmatch(name) for name in names}
    found = [name for name, split in splits.items() if split is None or int(split[2]) == 1]
    found = [name for name in found if not name.startswith("mmproj")]  # of images, not a model
    if len(found) > 1:
        shown = ", ".join(found[:5])
        raise CheckpointError(folder, f"holds several GGUF models, name one of them: {shown}")
    return folder / found[0] if found else None


class GgufFile:
    """The tensors and the metadata of a GGUF file, read one tensor (or range of rows) at a time.

    Of a split model any of its files stands for all: the others are found beside it. What is not
    asked for is not read. Files are read, not mapped: one that is cut short while in use is then
    an error, where a mapping would kill the process.

    Attributes:
        path: the file that was asked for.
        version: of the format.
        metadata: its keys and values, those of the first file of a split model.
        kinds: the value types of those keys, see `GgufHeader`.
        files: every file of the model.
        keep_cached: leave what was read in the system's file cache, see `read_into`.
    """

    keep_cached = True

    def __init__(self, path: str | Path):
        """Raises CheckpointError if there is no sound GGUF file, or a part of it is missing."""
        self.path = Path(path)
        headers = self._headers()
        self.version = headers[0].version
        self.metadata: dict[str, Value] = headers[0].metadata
        self.kinds = headers[0].kinds
        self.files = [header.path for header in headers]
        self._where: dict[str, tuple[Path, GgufTensorInfo]] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if name in self._where:
                    other = self._where[name][0]
                    raise CheckpointError(
                        header.path, f"holds the tensor {name!r}, which {other.name} holds too"
                    )
                self._where[name] = (header.path, info)

    # -------------------------------------------------------------------------- split models

    def _headers(self) -> list[GgufHeader]:
        """The headers of all files, in order."""
        header = read_header(self.path)
        count = _split_number(header, SPLIT_COUNT, 1)
        if count <= 1:
            return [header]
        number = _split_number(header, SPLIT_NO, None)
        matched = SPLIT_NAME.fullmatch(self.path.name)
        expected = f"{number + 1:05}-of-{count:05}.gguf"
        if matched is None or f"{matched[2]}-of-{matched[3]}.gguf" != expected:
            raise CheckpointError(
                self.path,
                f"is part {number + 1} of {count} of a split model, so its name must end in "
                f"-{expected}",
            )
        headers = []
        for i in range(count):
            sibling = self.path.with_name(f"{matched[1]}-{i + 1:05}-of-{count:05}.gguf")
            headers.append(header if i == number else _sibling(sibling, i, count))
        total = sum(len(h.tensors) for h in headers)
        promised = _split_number(headers[0], SPLIT_TENSORS, total)
        if total != promised:
            raise CheckpointError(
                headers[0].path,
                f"{SPLIT_TENSORS} promises {promised} tensors, the {count} files hold {total}",
            )
        return headers

    # ------------------------------------------------------------------------------- tensors

    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> GgufTensorInfo:
        """Raises CheckpointError if there is no such tensor."""
        if name not in self._where:
            raise CheckpointError(self.path, f"lacks the tensor {name!r}")
        return self._where[name][1]

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, rows: slice = slice(None)
    ) -> Tensor | QuantTensor:
        """A copy of a tensor, as stored: a `QuantTensor` if its type is a quantised one.

        Args:
            name: which.
            shape: what its whole shape must be.
            rows: of its first dimension only these, which follow each other: some of the experts
                of a stack.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape or an unsupported
                type.
        """
        info = self.info(name)
        file = self._where[name][0]
        if shape is not None and info.shape != tuple(shape):
            raise CheckpointError(
                file, f"tensor {name!r} has shape {list(info.shape)}, expected {list(shape)}"
            )
        first, last, step = rows.indices(info.shape[0])
        if step != 1 or last <= first:
            raise ValueError(f"rows: expected some rows that follow each other, got {rows}")
        row_bytes = (info.end - info.begin) // info.shape[0]
        taken = (last - first, *info.shape[1:])
        quantised = info.dtype is None
        why = unsupported(info)
        if why is not None:
            raise CheckpointError(file, f"tensor {name!r} {why}")
        data = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        begin, target = info.begin + first * row_bytes, memoryview(data.numpy())
        try:
            whole = read_into(file, begin, target, self.keep_cached)
        except OSError as error:
            raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
        if not whole:
            raise CheckpointError(file, f"tensor {name!r} is cut short")
        if not quantised:
            return data.view(info.dtype).reshape(taken)
        line = info.shape[-1] // info.type.block * info.type.nbytes
        return QuantTensor(info.type.format, taken, {"data": data.view(*taken[:-1], line)})


def unsupported(info: GgufTensorInfo) -> str | None:
    """Why a tensor cannot be made use of, None if it can."""
    if info.dtype is None and info.type.format not in format_names():
        return f"is of type {info.type.name}, which is not supported"
    if info.dtype is None and len(info.shape) < 2:
        return f"is of type {info.type.name} but no matrix: shape {list(info.shape)}"
    return None


def _split_number(header: GgufHeader, key: str, default: int | None) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise CheckpointError(
            header.path, f"{key}: expected an integer of at least 0, got {shown(value)}"
        )
    return value


def _sibling(path: Path, number: int, count: int) -> GgufHeader:
    """The header of another part of a split model."""
    if not path.exists():
        raise CheckpointError(path, f"no such file: part {number + 1} of {count} is missing")
    header = read_header(path)
    found = _split_number(header, SPLIT_NO, None), _split_number(header, SPLIT_COUNT, None)
    if found != (number, count):
        raise CheckpointError(
            path,
            f"should be part {number + 1} of {count} of a split model, but says that it is part "
            f"{found[0] + 1} of {found[1]}",
        )
    return header
