"""Which machine this is, which implementations there are, and which one an operator gets."""

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import (
    Backend,
    BackendUnavailable,
    Candidate,
    Explanation,
    Implementation,
    Request,
    backends,
    explain,
    select,
    use,
)

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Candidate",
    "Explanation",
    "Implementation",
    "Machine",
    "Request",
    "backends",
    "explain",
    "select",
    "use",
]
