"""Files of weights as backends have packed them, so that the next start need not pack again.

A file is a page of its own, the weights' bytes, each at a multiple of 4096, and at the end a header
in JSON that says what they are; the first page tells where the header is and its digest. It is
mapped, not read: processes share its memory.

A file appears under its name when it is whole and on the disk, and is never changed after: it is
written under a temporary name, synchronised and renamed. So it does not matter who writes at the
same time, or is killed while writing. What a dead process left is known by its lock being free.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ktcore import _native

try:
    import fcntl
except ImportError:  # Windows, where a file that somebody writes cannot be deleted
    fcntl = None

SUFFIX, TEMPORARY = ".ktcache", ".ktcache-tmp"
MAGIC = b"ktpacked"
VERSION = 1  # of this file's structure; what the weights look like is the layout's identity
PAGE = 4096
MAX_HEADER = 100_000_000
_START = struct.Struct("<8sIQQ32s")  # magic, version, where the header begins, its bytes, digest


class CacheError(ValueError):
    """A cache file cannot be used; the message names it and says why."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: {what}")
        self.path, self.what = path, what


@dataclass(frozen=True)
class Layout:
    """A form that backends pack weights into.

    Attributes:
        name: what `packed` of weights holds them by.
        identify: gives `identity`; called when somebody asks for that first.
        memory: the bytes of packed weights, which it keeps alive; on every machine the same.
        describe: what is not in these bytes, as plain data for JSON.
        restore: the packed weights of a description and the memory with their bytes, which they
            read and keep alive. Raises ValueError or TypeError if the two do not fit.
    """

    name: str
    identify: Callable[[], str]
    memory: Callable[[object], memoryview]
    describe: Callable[[object], dict]
    restore: Callable[[dict, memoryview], object]

    @functools.cached_property
    def identity(self) -> str:
        """Changes whenever the same weights could be packed to other bytes."""
        return self.identify()


@dataclass(frozen=True)
class Entry:
    """One packed weight.

    Attributes:
        name: what it is of the model.
        about: what is known of it besides its bytes.
        offset, size: where its bytes are in the file.
        checksum: of its bytes.
    """

    name: str
    about: dict
    offset: int
    size: int
    checksum: int


class CacheFile:
    """A cache file, open for reading. Its header is checked, its weights are not: see `memory`.

    Attributes:
        path: the file.
        identity: what it was made from, as plain data.
        entries: its weights, in the order of their bytes.
        created: when, in seconds since 1970.
        size: bytes of the file.
    """

    def __init__(self, path: Path):
        """Raises CacheError if it is damaged or of another version, OSError if it cannot be read
        (FileNotFoundError if it is not there)."""
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            header = self._header(file.read(_START.size), file)
            try:
                self.identity, self.created = dict(header["identity"]), int(header["created"])
                self.entries = [Entry(**entry) for entry in header["entries"]]
            except (TypeError, KeyError, ValueError) as error:
                raise CacheError(path, f"damaged: bad header: {error}") from None
            for entry in self.entries:
                self._check(entry)
            self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)

    def _header(self, start: bytes, file) -> dict:
        if len(start) < _START.size or not start.startswith(MAGIC):
            raise CacheError(self.path, "damaged: it does not begin as a cache file does")
        _, version, begin, length, digest = _START.unpack(start)
        if version != VERSION:
            raise CacheError(
                self.path, f"is of version {version}, this ktcore writes version {VERSION}"
            )
        # Also so that nothing is mapped beyond the end, where touching it would end the process.
        if length > MAX_HEADER or begin + length != self.size:
            raise CacheError(
                self.path,
                f"damaged: expected {begin + length} bytes, got {self.size}: cut short?",
            )
        file.seek(begin)
        text = file.read(length)
        if hashlib.blake2b(text, digest_size=32).digest() != digest:
            raise CacheError(self.path, "damaged: its header is not what was written")
        self._data_end = begin
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CacheError(self.path, f"damaged: its header is not valid: {error}") from None
        if not isinstance(header, dict):
            raise CacheError(self.path, "damaged: its header is not an object")
        return header

    def _check(self, entry: Entry) -> None:
        numbers = (entry.offset, entry.size, entry.checksum)
        if (
            not all(isinstance(n, int) and n >= 0 for n in numbers)
            or entry.offset % PAGE
            or entry.offset + entry.size > self._data_end
            or not isinstance(entry.about, dict)
        ):
            raise CacheError(self.path, f"damaged: bad entry {entry.name!r:.80}")

    def memory(self, entry: Entry, verify: bool = True) -> memoryview:
        """The bytes of an entry, in the mapped file.

        With `verify` they are read and compared with their checksum, which also brings them into
        memory before a first token has to wait for each page.

        Raises:
            CacheError: they are not what was written.
        """
        found = self._bytes[entry.offset : entry.offset + entry.size]
        if verify and _native.ext.checksum(found) != entry.checksum:
            raise CacheError(self.path, f"damaged: {entry.name!r} is not what was written")
        return found


class CacheWriter:
    """Writes a cache file, in a thread of its own, while weights are being packed.

    Args:
        path: the file; its folder is made.
        keep_cached: leave what was written in the system's file cache: the next start is faster,
            but it takes memory until somebody needs it.
    """

    def __init__(self, path: Path, keep_cached: bool = True):
        """Raises OSError if the folder cannot be made or written to."""
        self.path, self.keep_cached = path, keep_cached
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        self._temporary, self._file = _temporary_beside(path)
        self._entries: list[Entry] = []
        self._end = PAGE
        self._writes: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "ktcore-cache")

    def add(self, name: str, about: dict, memory: memoryview) -> None:
        """Write the bytes of packed weights, soon; a failure to do so shows at `commit`."""
        entry = Entry(name, about, self._end, memory.nbytes, _native.ext.checksum(memory))
        self._entries.append(entry)
        self._end += -(-memory.nbytes // PAGE) * PAGE
        self._writes.append(self._thread.submit(self._write, entry, memory))

    def _write(self, entry: Entry, memory: memoryview) -> None:
        if any(write.done() and write.exception() for write in self._writes):
            return  # the disk is full, say: no use going on
        self._file.seek(entry.offset)
        _write_all(self._file, memory)
        # Here and not all at the end, so that no gigabytes wait in memory for the disk.
        _synchronise(self._file)
        if not self.keep_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), entry.offset, entry.size, os.POSIX_FADV_DONTNEED)

    def commit(self, identity: dict) -> None:
        """Put the file in its place. Raises OSError if something could not be written; then, and
        if there is nothing to write, what was in its place before stays.
        """
        try:
            for write in self._writes:
                write.result()
            if self._entries:
                self._finish(identity)
        finally:
            self.abort()

    def _finish(self, identity: dict) -> None:
        header = {
            "identity": identity,
            "created": int(time.time()),
            "entries": [asdict(entry) for entry in self._entries],
        }
        text = json.dumps(header, allow_nan=False).encode()
        digest = hashlib.blake2b(text, digest_size=32).digest()
        self._file.seek(self._end)
        _write_all(self._file, memoryview(text))
        self._file.seek(0)
        _write_all(
            self._file,
            memoryview(_START.pack(MAGIC, VERSION, self._end, len(text), digest)),
        )
        _synchronise(self._file)
        if fcntl is None:
            self._file.close()  # Windows renames no open file
        os.replace(self._temporary, self.path)
        with contextlib.suppress(OSError):  # not every system and file system can
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _write_all(file, memory: memoryview) -> None:
    """A raw file may take less than it is given, and on Linux no 2 GiB at a time."""
    done = 0
    while done < memory.nbytes:
        done += file.write(memory[done:])


def _synchronise(file) -> None:
    (os.fsync if sys.platform in ("win32", "darwin") else os.fdatasync)(file.fileno())


# -------------------------------------------------------------------------------- temporary files


def _temporary_beside(path: Path):
    """A new file, locked while it is written, and its path."""
    while True:
        temporary = path.with_name(f"{path.stem}-{secrets.token_hex(4)}{TEMPORARY}")
        file = temporary.open("xb", buffering=0)
        _try_lock(file)
        if temporary.exists():  # else somebody took it for abandoned before it was locked
            return temporary, file
        file.close()


def _try_lock(file) -> bool:
    """Whether nobody else has a file locked; then we do, until it is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(folder: Path) -> int:
    """Delete what killed processes left half written; how many bytes that freed."""
    freed = 0
    for path in folder.glob(f"*{TEMPORARY}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if not _try_lock(file):
                continue
            size = os.fstat(file.fileno()).st_size
            if fcntl is None:
                file.close()
            path.unlink()
            freed += size
    return freed


def cache_files(folder: Path) -> Iterator[Path]:
    """The cache files in a folder, finished ones."""
    return iter(sorted(folder.glob(f"*{SUFFIX}")))
