"""Reading ranges of large files."""

from __future__ import annotations

import os
from pathlib import Path


def read_into(file: Path, begin: int, target: memoryview, keep_cached: bool = True) -> bool:
    """Fill `target` [bytes] with the file's bytes from `begin`; whether there were so many.

    Args:
        keep_cached: leave them in the system's file cache. Otherwise they are dropped from it at
            once, so that a model that is nearly as large as memory does not push out what was made
            of it.

    Raises OSError.
    """
    done = 0
    advise = getattr(os, "posix_fadvise", None)  # not everywhere
    with file.open("rb", buffering=0) as handle:
        if advise:
            advise(handle.fileno(), begin, target.nbytes, os.POSIX_FADV_SEQUENTIAL)
        handle.seek(begin)
        while done < target.nbytes:  # one call reads 2 GiB at most
            count = handle.readinto(target[done:])
            if not count:
                return False
            done += count
        if advise and not keep_cached:
            advise(handle.fileno(), begin, target.nbytes, os.POSIX_FADV_DONTNEED)
    return True
