"""What an interrupted conversion has done, so that the next one goes on from there.

A journal is a text file: its first line says what is converted how (`identity`), every other line
is one step that is done, written after its data has reached the disk. A last line that is cut off
counts as not written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ktcore.convert.errors import ConversionError


class Journal:
    """The steps that are done, by name.

    Attributes:
        done: what `add` was given.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self.done: dict[str, Any] = {}

    def read(self) -> bool:
        """Whether there is a journal of this very conversion; what it says is then in `done`."""
        try:
            first, *lines = self.path.read_text("utf-8").split("\n")
            if json.loads(first) != {"identity": self.identity}:
                return False
        except (OSError, ValueError):
            return False
        for line in lines:
            try:
                entry = json.loads(line)
                self.done[entry["step"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                break  # the line that an interruption cut off, or the end
        return True

    def begin(self) -> None:
        """Write what `read` found, and nothing that it could not read."""
        self._append({"identity": self.identity}, "w")
        for step, result in self.done.items():
            self._append({"step": step, "result": result})

    def add(self, step: str, result: Any) -> None:
        self.done[step] = result
        self._append({"step": step, "result": result})

    def _append(self, entry: dict[str, Any], mode: str = "a") -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def only_one(path: Path, what: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it if the process dies.

    Raises:
        ConversionError: another process holds it.
    """
    with path.open("w") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConversionError(f"{what}: another conversion is writing it") from None
        yield
