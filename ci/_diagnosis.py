"""What the output of a failed pip, venv or compiler means, and what to do about it."""

from __future__ import annotations

WITHOUT = "To do without compiled kernels (many times slower): set KTCORE_BUILD_NATIVE=0."

# Name, what the output then contains, what to do. The first that fits counts.
DIAGNOSES = (
    (
        "disk",
        ("No space left on device", "Errno 28", "not enough space", "disk is full"),
        "The disk is full: about 3 GB are needed, 10 GB where pip picks a torch with CUDA; "
        "pip's temporary files (TMPDIR) count, too.",
    ),
    (
        "certificate",
        ("CERTIFICATE_VERIFY_FAILED",),
        "The package index's certificate is not trusted here. Behind a company proxy set PIP_CERT "
        "to its certificate bundle.",
    ),
    (
        "network",
        (
            "Temporary failure in name resolution",
            "Name or service not known",
            "getaddrinfo failed",
            "Failed to establish a new connection",
            "Network is unreachable",
            "Connection refused",
            "Connection reset",
            "ConnectTimeoutError",
            "Read timed out",
            "ProxyError",
        ),
        "The package index cannot be reached. Check the network; pip honours HTTPS_PROXY, "
        "PIP_INDEX_URL and PIP_FIND_LINKS. Then run this again: what was downloaded is kept.",
    ),
    (
        "version",
        ("No matching distribution found", "ResolutionImpossible"),
        "The package index has no such version for this Python and system. Python 3.10 to 3.13 are "
        "known to work; other pins go into ci/constraints.txt.",
    ),
    (
        "memory",
        ("Killed signal terminated program", "out of memory", "virtual memory exhausted"),
        "The compiler ran out of memory: set CMAKE_BUILD_PARALLEL_LEVEL=1 and run this again.",
    ),
    (
        "compiler",
        ("CMake Error", "CMake failed", "CMake build failed", "ninja: build stopped"),
        f"The kernels did not compile. They need GCC 11, Clang 12 or Visual Studio 2022. {WITHOUT}",
    ),
    (
        "permission",
        ("Permission denied", "Access is denied", "Errno 13"),
        "A file may not be written. The set-up writes to this checkout and to pip's cache.",
    ),
)


def diagnose(output: str, only: tuple[str, ...] = ()) -> str | None:
    """What to do about a failure with this output, None if it is not a known one."""
    for name, signs, hint in DIAGNOSES:
        if (not only or name in only) and any(sign in output for sign in signs):
            return hint
    return None
