"""A model's packed weights in a cache file (see `ktcore.weights.packed_cache`): which file it is,
whether it still fits the model's own files, storing weights in it and restoring them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ktcore._settings import flag
from ktcore.dispatch import BackendUnavailable, Request, figures, registry
from ktcore.formats import Format
from ktcore.models.source import Source
from ktcore.weights import CheckpointError, ExpertWeights, GgufFile, QuantTensor
from ktcore.weights.packed_cache import (
    SUFFIX,
    CacheError,
    CacheFile,
    CacheWriter,
    Entry,
    Layout,
)
from ktcore.weights.quantization import QuantizedCheckpoint

SWITCH = "KTCORE_PACKED_CACHE"
VERIFY = "KTCORE_CACHE_VERIFY"
SAMPLE = 1 << 20  # bytes at either end of a model's file that are looked at, beside size and time

# Called with each weight that a backend has packed: its name, the operator call, the weight.
Packed = Callable[[str, Request, QuantTensor | ExpertWeights], None]


def cache_folder() -> Path:
    """Where packed weights are kept unless a folder is named."""
    return figures.cache_folder() / "packed"


def chosen_folder(cache: bool | str | Path | None) -> Path | None:
    """The folder that `load_model(cache=...)` means, None for no cache.

    Raises SettingError if it is left to the environment and that is malformed.
    """
    if cache is None:
        cache = flag(SWITCH)
    if isinstance(cache, bool):
        return cache_folder() if cache else None
    return Path(cache)


def layouts() -> dict[str, Layout]:
    """The layouts that backends which can run here pack into, by name."""
    found = (i.packs for name in registry.backends() for i in registry.implementations(name))
    return {layout.name: layout for layout in found if layout is not None}


def source_files(source: Source) -> list[Path]:
    """The files that decide what a model's weights are."""
    checkpoint = source.checkpoint
    if isinstance(checkpoint, GgufFile):
        return checkpoint.files
    files = [source.path / "config.json"]
    if isinstance(checkpoint, QuantizedCheckpoint):
        checkpoint = checkpoint.checkpoint
    index = source.path / checkpoint.INDEX
    return [*files, *([index] if index.is_file() else []), *checkpoint.files()]


def fingerprint(path: Path) -> dict:
    """What tells whether a file has changed, without reading all of it. Raises OSError."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.blake2b(file.read(SAMPLE), digest_size=16)
        file.seek(max(0, stat.st_size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return {
        "path": str(path.absolute()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "digest": digest.hexdigest(),
    }


def why_stale(identity: dict) -> str | None:
    """Why what a cache file was made from is no longer what there is, None if it is."""
    try:
        for file in identity["files"]:
            path = Path(file["path"])
            if not path.exists():
                return f"the model's file {path} is gone"
            if fingerprint(path) != file:
                return f"the model's file {path} has changed"
        known = layouts()
        for name, made_by in identity["layouts"].items():
            if name not in known:
                return f"no backend that can run here reads the layout {name!r}"
            if known[name].identity != made_by:
                return "it was written by another version of ktcore"
    except OSError as error:
        return f"the model's files cannot be read: {error}"
    except (KeyError, TypeError, AttributeError):
        return "damaged: it does not say what it was made from"
    return None


class ModelCache:
    """The cache file of one model with its experts in one format.

    Args:
        folder: where it is, or is to be.
        source: the model.
        format: what the experts are quantised to, None for as stored.
        keep_cached: see `CacheWriter`.

    Raises:
        CheckpointError: a file of the model cannot be read.
    """

    def __init__(self, folder: Path, source: Source, format: Format | None, keep_cached: bool):
        self.source, self.keep_cached = source, keep_cached
        self.format = None if format is None else format.name
        stored = self.format or "stored"
        key = hashlib.blake2b(f"{source.path.absolute()}\0{stored}".encode(), digest_size=8)
        name = re.sub(r"[^\w.-]", "_", source.name)[:80]
        self.path = folder / f"{name}-{stored}-{key.hexdigest()}{SUFFIX}"
        self.identity = self._identity()

    def _identity(self) -> dict:
        try:
            files = [fingerprint(path) for path in source_files(self.source)]
        except OSError as error:
            raise CheckpointError(
                self.source.path, f"cannot be read: {error.strerror or error}"
            ) from error
        return {
            "model": str(self.source.path.absolute()),
            "format": self.format,
            "files": files,
            "layouts": {name: layout.identity for name, layout in layouts().items()},
        }

    def restored(self) -> Restored | None:
        """The weights in the file, None if there is none, or none that fits this model, this
        ktcore and the backends that would be chosen now. A damaged one is warned about.
        """
        try:
            file = CacheFile(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (CacheError, OSError) as error:
            warn(f"{error}; it is made anew")
            return None
        if file.identity != self.identity:
            return None
        try:
            restored = Restored(file)
        except CacheError as error:
            warn(f"{error}; it is made anew")
            return None
        return restored if restored.wanted() else None

    @contextlib.contextmanager
    def storing(self) -> Iterator[Packed]:
        """Within it, weights are stored in the file, which takes its place at the end.

        What goes wrong with the file (a full disk, say) is warned about, never raised.
        """
        try:
            writer = CacheWriter(self.path, self.keep_cached)
        except OSError as error:
            warn(f"{self.path.parent}: cannot be written to ({error.strerror or error}); loading "
                 "goes on without it")  # fmt: skip
            yield lambda name, request, weight: None
            return

        def store(name: str, request: Request, weight: QuantTensor | ExpertWeights) -> None:
            layout = registry.select(request).packs
            if layout is not None and layout.name in weight.packed:
                packed = weight.packed[layout.name]
                about = {"layout": layout.name, "request": request._asdict()}
                about["description"] = layout.describe(packed)
                writer.add(name, about, layout.memory(packed))

        try:
            yield store
        except BaseException:
            writer.abort()
            raise
        try:
            if self._identity() != self.identity:
                writer.abort()
                warn(f"{self.source.path}: changed while it was loaded, so nothing is cached")
            else:
                writer.commit(self.identity)
        except OSError as error:
            warn(f"{self.path}: cannot be written ({error.strerror or error}); the model is loaded "
                 "all the same, and packed again next time")  # fmt: skip


class Restored:
    """Weights of a cache file. Whatever is wrong with them is a CacheError."""

    def __init__(self, file: CacheFile):
        self.file, self.verify = file, flag(VERIFY, True)
        self._entries: dict[str, list[tuple[Entry, Request, str]]] = {}
        for entry in file.entries:
            with self._sound(entry):
                request = Request(**entry.about["request"])
                found = (entry, request, entry.about["layout"])
                self._entries.setdefault(entry.name, []).append(found)

    @contextlib.contextmanager
    def _sound(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CacheError(self.file.path, f"damaged: {entry.name!r:.80}: {error}") from None

    def wanted(self) -> bool:
        """Whether the backends that would serve the weights now read them packed so."""
        try:
            for entries in self._entries.values():
                for _, request, layout in entries:
                    packs = registry.select(request).packs
                    if packs is None or packs.name != layout:
                        return False
        except BackendUnavailable:
            return False
        return True

    def _packed(self, entry: Entry, layout: str) -> dict[str, object]:
        memory = self.file.memory(entry, self.verify)
        return {layout: layouts()[layout].restore(entry.about["description"], memory)}

    def matrices(self, name: str) -> list[QuantTensor] | None:
        """The matrices that together are a projection; None if they are not in the file."""
        out = []
        for entry, request, layout in self._entries.get(name, ()):
            with self._sound(entry):
                shape = (request.intermediate_size, request.hidden_size)
                packed = self._packed(entry, layout)
                out.append(QuantTensor.from_packed(request.format, shape, packed))
        return out or None

    def experts(self, name: str, biases: dict[str, Tensor]) -> ExpertWeights | None:
        """The experts of a layer; None if they are not in the file.

        biases: those of the model's files, by their names as arguments of `ExpertWeights`.
        """
        for entry, request, layout in self._entries.get(name, ()):
            with self._sound(entry):
                hidden, inner = request.hidden_size, request.intermediate_size
                down_format = request.down_format or request.format
                up, down = (
                    (request.num_experts, inner, hidden),
                    (request.num_experts, hidden, inner),
                )
                experts = ExpertWeights(
                    QuantTensor.from_packed(request.format, up, {}),
                    QuantTensor.from_packed(request.format, up, {}),
                    QuantTensor.from_packed(down_format, down, {}),
                    **biases,
                )
                experts.packed = self._packed(entry, layout)
                return experts
        return None


def warn(what: str) -> None:
    warnings.warn(f"packed-weight cache: {what}", RuntimeWarning, stacklevel=3)
