"""Run every case on every backend that can run here: `ktcore-probe --selftest`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ktcore.dispatch import registry
from ktcore.testing.cases import CASES, Case, pairs
from ktcore.testing.variants import variants


@dataclass(frozen=True)
class Result:
    """How one case went on one backend. `message` says what is wrong, or is empty."""

    backend: str
    op: str
    format: str | None
    case: str
    error: float | None
    tolerance: float | None
    passed: bool
    message: str


def check(case: Case, format: str | None, backend: str) -> Result:
    """Run one case on the backend that is forced; whatever it raises is a failure."""
    error = tolerance = None
    try:
        outcome = case.run(format, backend)
        error, tolerance, problem = outcome.error, outcome.tolerance, outcome.problem
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}"
    return Result(backend, case.op, format, case.name, error, tolerance, not problem, problem)


def cases_of(backend: str) -> list[tuple[Case, str | None]]:
    """Every case of what a backend implements, with its format."""
    implemented = {i.op: i.formats for i in registry.implementations(backend)}
    return [
        (case, format)
        for op in CASES
        if op in implemented
        for format, case in pairs(op)
        if format is None or format in implemented[op]
    ]


def run(
    backends: list[str] | None = None, *, progress: Callable[[str, int, int], None] | None = None
) -> list[Result]:
    """Hold backends against the oracle, each with the instruction set that it would choose.

    Args:
        backends: names; None for all that can run here.
        progress: called before each case with the backend, the number of cases done and of all.

    Raises:
        BackendUnavailable: a named backend does not exist or cannot run here.
    """
    if backends is None:
        names = [name for name in registry.backends() if registry.why_not(name) is None]
    else:
        names = list(backends)
    for name in names:
        if (reason := registry.why_not(name)) is not None:
            raise registry.BackendUnavailable(f"backend {name!r} cannot be tested here: {reason}")
    work = {name: cases_of(name) for name in names}
    total = sum(len(cases) for cases in work.values())
    results: list[Result] = []
    with quiet_torch():
        for name, cases in work.items():
            best = [v for v in variants(name) if v.why_not is None][-1]
            with best.forced():
                for case, format in cases:
                    if progress:
                        progress(name, len(results), total)
                    results.append(check(case, format, name))
    if progress and names:
        progress(names[-1], total, total)
    return results


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch to one thread: over the oracle's small products more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
