"""A benchmark's results as JSON, and as a table for a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ktcore
from ktcore.bench.measure import Bench, Cell
from ktcore.bench.peers import peers
from ktcore.dispatch import probe

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1  # of the JSON's layout


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, smallest and largest of what rounds measured; None where nothing was."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def _median(values: Iterable[float | None]) -> float | None:
    found = spread(values)
    return found and found["median"]


def _cell(cell: Cell) -> dict:
    out = {
        "backend": cell.backend,
        "format": cell.format,
        "tokens": cell.tokens,
        "status": cell.status,
        "reason": cell.reason,
        # JSON knows no NaN; `wrong` says it in words.
        "relative_error": cell.error if math.isfinite(cell.error or 0.0) else None,
        "wrong": cell.wrong,
    }
    if cell.status != "measured":
        return out
    ms = spread(r.ms for r in cell.rounds)
    assert ms is not None
    return {
        **out,
        "isa": cell.isa,
        "peak_kind": cell.kind,
        "read_ratio": cell.read_ratio,
        "ms": ms,
        "tokens_per_second": cell.tokens / ms["median"] * 1e3,
        "gbps": spread(r.gbps for r in cell.rounds),
        "gops": spread(r.gops for r in cell.rounds),
        "read_fraction": spread(r.read_fraction for r in cell.rounds),
        "peak_fraction": spread(r.peak_fraction for r in cell.rounds),
        "rounds": [
            {
                "round": r.number,
                "calls": r.calls,
                "ms": r.ms,
                "bytes_per_call": r.nbytes,
                "operations_per_call": r.operations,
                "read_gbps": r.read_gbps,
                "peak_gops": r.peak_gops,
            }
            for r in cell.rounds
        ],
    }


def _machine() -> dict:
    machine = probe.machine()
    return {
        "cpu": probe.cpu_brand(),
        "architecture": machine.cpu.architecture,
        "logical_cores": machine.cpu.logical_cores,
        "physical_cores": machine.cpu.physical_cores,
        "usable_cpus": len(machine.cpu.affinity),
        "quota": machine.cpu.quota,
        "caches": [
            {"level": c.level, "kind": c.kind, "bytes": c.bytes, "shared_by": c.shared_by}
            for c in machine.cpu.caches
        ],
        "memory_total_bytes": machine.memory.total_bytes,
        "memory_available_bytes": machine.memory.available_bytes,
        "system": machine.system,
    }


@dataclasses.dataclass(frozen=True)
class Lead:
    """How far the fastest backend is ahead of the fastest peer: the peer's time over the backend's,
    each against the same round, in the median.
    """

    format: str
    tokens: int
    backend: str
    peer: str
    ratio: float


def leads(cells: Iterable[Cell]) -> list[Lead]:
    """Of every format and token count that both a backend and a peer were measured in."""
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.rounds:
            found.setdefault((cell.format, cell.tokens), []).append(cell)

    def ms(cell: Cell) -> float:
        return statistics.median(r.ms for r in cell.rounds)

    out = []
    for (format, tokens), both in found.items():
        theirs = [c for c in both if c.is_peer]
        own = [c for c in both if not c.is_peer]
        if not theirs or not own:
            continue
        best, peer = min(own, key=ms), min(theirs, key=ms)
        at = {r.number: r.ms for r in best.rounds}
        paired = [r.ms / at[r.number] for r in peer.rounds if r.number in at]
        ratio = statistics.median(paired) if paired else ms(peer) / ms(best)
        out.append(Lead(format, tokens, best.backend, peer.backend, ratio))
    return out


def to_dict(bench: Bench, model: str | None) -> dict:
    """Everything that a run found out, ready for JSON; docs/benchmarks/README.md explains it.

    `model` is the preset's name, None for sizes given one by one.
    """
    s, plan = bench.settings, bench.plan
    dot: dict[str, dict[str, dict | None]] = {}
    for isa, kind in dict.fromkeys(key for limits in bench.limits for key in limits.dot_gops):
        values = (limits.dot_gops.get((isa, kind)) for limits in bench.limits)
        dot.setdefault(isa, {})[kind] = spread(values)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "bench",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {**_machine(), "load_average": bench.load_average},
        "versions": {
            "ktcore": ktcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: peers()[name].version() for name in s.peers},
        },
        "settings": {
            "op": s.op,
            "model": model,
            "hidden_size": s.shape.hidden_size,
            "intermediate_size": s.shape.intermediate_size,
            "num_experts": s.shape.num_experts if s.op == "moe" else None,
            "top_k": s.shape.top_k if s.op == "moe" else None,
            "dtype": "bfloat16",
            "backends": list(s.backends),
            "formats": list(s.formats),
            "tokens": list(s.tokens),
            "threads": s.threads,
            "seconds": s.seconds,
            "seed": s.seed,
            "skew": s.skew,
            "peers": list(s.peers),
            "command": ["ktcore", *sys.argv[1:]],
        },
        "materialised": plan
        and {
            "experts": plan.experts if s.op == "moe" else None,
            "layers": dict(plan.layers),
            "bytes": plan.nbytes,
            "budget_bytes": plan.budget,
        },
        "limits": {
            "read_gbps": spread(limits.read_gbps for limits in bench.limits),
            "dot_gops": dot,
        },
        "cells": [_cell(cell) for cell in bench.cells],
        "ahead": [dataclasses.asdict(lead) for lead in leads(bench.cells)],
        "passed_over": dict(bench.passed_over),
        "notes": list(bench.notes),
    }


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` if the block ends well, else it goes."""
    if path.exists() and not path.is_file():  # a device or a pipe is written to, not replaced
        yield path
        return
    target = path.resolve()
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- terminal


# Limits that differ this much between rounds tell of a machine that others use as well.
BUSY = 1.25


def _number(value: float | None) -> str:
    """With three significant digits, but never in powers of ten, and not below 0.01."""
    if value is None:
        return ""
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(bench: Bench, title: str) -> Table:
    """The cells, one a row; those without numbers say so."""
    from rich import box
    from rich.table import Table

    # Fits a terminal of 80 columns.
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("format", "backend"):
        out.add_column(name, no_wrap=True, vertical="bottom")
    for name in (
        *("tokens", "ms", "±", "tokens\nper s", "GB/s", "of\nread", "Gop/s", "of\npeak"),
        "error",
    ):
        out.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    previous = None
    for cell in bench.cells:
        if previous not in (None, (cell.format, cell.backend)):
            out.add_section()
        previous = cell.format, cell.backend
        out.add_row(cell.format, cell.backend, str(cell.tokens), *_columns(cell))
    return out


def comparison(bench: Bench) -> Table | None:
    """The best peer's times over ktcore's, by format and tokens; None where none was measured."""
    from rich import box
    from rich.table import Table

    known = {(lead.format, lead.tokens): lead for lead in leads(bench.cells)}
    if not known:
        return None
    counts = sorted({tokens for _, tokens in known})
    out = Table(
        title="the best peer's time, over ktcore's",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    out.add_column("format", no_wrap=True)
    for tokens in counts:
        out.add_column(f"{tokens} token{'s' * (tokens > 1)}", justify="right")
    for format in dict.fromkeys(format for format, _ in known):
        row = (known.get((format, tokens)) for tokens in counts)
        out.add_row(format, *(f"{lead.ratio:.2f} {lead.peer}" if lead else "" for lead in row))
    return out


def _columns(cell: Cell) -> list[str]:
    error = "" if cell.error is None else f"{cell.error:.2%}"
    if cell.wrong:
        error = f"[bold red]{error or 'wrong'}[/]"
    if cell.status in ("skipped", "failed"):
        style = "dim" if cell.status == "skipped" else "bold red"
        return [f"[{style}]{cell.status}[/]", *[""] * 6, error]
    if not cell.rounds:
        return ["[dim]…[/]", *[""] * 6, error]
    ms = spread(r.ms for r in cell.rounds)
    assert ms is not None
    return [
        _number(ms["median"]),
        _percent((ms["max"] - ms["min"]) / 2 / ms["median"]),
        _number(cell.tokens / ms["median"] * 1e3),
        _number(_median(r.gbps for r in cell.rounds)),
        _percent(_median(r.read_fraction for r in cell.rounds)),
        _number(_median(r.gops for r in cell.rounds)),
        _percent(_median(r.peak_fraction for r in cell.rounds)),
        error,
    ]


def remarks(bench: Bench) -> list[str]:
    """Lines to stand under the table: limits, notes, what has no numbers or wrong ones, and why."""
    out = []
    read = spread(limits.read_gbps for limits in bench.limits)
    if read is not None:
        line = f"limits: read {read['median']:.1f} GB/s ({read['min']:.1f}-{read['max']:.1f})"
        for key in bench.limits[0].dot_gops:
            peak = spread(limits.dot_gops.get(key) for limits in bench.limits)
            assert peak is not None
            line += (
                f"; {' '.join(key)} {peak['median']:.0f} Gop/s "
                f"({peak['min']:.0f}-{peak['max']:.0f})"
            )
        out.append(line)
        if read["max"] > BUSY * read["min"]:
            out.append(
                "the machine was busy with other things as well: trust the shares of its limits, "
                "measured at the same time, more than the times"
            )
    out += bench.notes
    for cell in bench.cells:
        if cell.reason:
            out.append(f"{cell.status}: {cell}: {cell.reason}")
        if cell.wrong:
            out.append(f"WRONG: {cell}: {cell.wrong}")
    out += [f"not run: {name}: {why}" for name, why in bench.passed_over.items()]
    return out
