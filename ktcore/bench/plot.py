"""A roofline: what was measured against what the machine can do.

Below the machine's balance of operations and bytes a call is bound by reading weights (the slope),
above it by dot products (the flat part). Williams, Waterman, Patterson, 2009,
https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ktcore.bench.measure import Bench, Cell
from ktcore.bench.report import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

# A colour a format, a marker a backend; Okabe and Ito's colours, which colour-blind people tell
# apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ((0, (5, 2)), (0, (1, 1.5)), "-.", (0, (3, 1, 1, 1, 1, 1)), "-")


def save(bench: Bench, path: Path, title: str) -> None:
    """Write the roofline as a PNG (or whatever the suffix says), whole or not at all.

    Raises:
        ValueError: nothing was measured, or the suffix is none that matplotlib writes.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    cells = [cell for cell in bench.cells if cell.rounds]
    if not cells:
        raise ValueError("plot: nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _points(axes, cells)
    _frame(axes, cells)
    _roofs(axes, bench)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("arithmetic intensity: operations per byte of weights read")
    axes.set_ylabel("Gop/s (a multiply-add is two operations)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
        fontsize=9,
        title="numbers at points: tokens of a call",
        title_fontsize=9,
        alignment="left",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))


def point(cell: Cell) -> tuple[float, float]:
    """Where a cell stands: operations per byte, and Gop/s."""
    intensity = statistics.median(r.operations / r.nbytes for r in cell.rounds)
    return intensity, statistics.median(r.gops for r in cell.rounds)


def _points(axes: Axes, cells: list[Cell]) -> None:
    """Measured points, joined per backend and format in the order of tokens; peers' are hollow."""
    colours = {f: COLOURS[i % len(COLOURS)] for i, f in enumerate(_seen(c.format for c in cells))}
    markers = {b: MARKERS[i % len(MARKERS)] for i, b in enumerate(_seen(c.backend for c in cells))}
    for backend, format in _seen((c.backend, c.format) for c in cells):
        mine = [c for c in cells if (c.backend, c.format) == (backend, format)]
        mine.sort(key=lambda c: c.tokens)
        x, y = zip(*(point(c) for c in mine), strict=True)
        axes.plot(
            x,
            y,
            color=colours[format],
            marker=markers[backend],
            markersize=7,
            markerfacecolor="white" if mine[0].is_peer else colours[format],
            linewidth=0.8,
            alpha=0.9,
            zorder=3,
            label=f"{backend}, {format}",
        )
        for cell, at in zip(mine, zip(x, y, strict=True), strict=True):
            axes.annotate(
                str(cell.tokens),
                at,
                xytext=(5, -10),
                textcoords="offset points",
                fontsize=7,
                color=colours[format],
            )


def _frame(axes: Axes, cells: list[Cell]) -> None:
    """Room for the points, and what their labels need."""
    x, y = zip(*(point(c) for c in cells), strict=True)
    axes.set_xlim(min(x) / 1.6, max(x) * 1.6)
    axes.set_ylim(min(y) / 2, max(y) * 2)


def _roofs(axes: Axes, bench: Bench) -> None:
    """The machine's limits, medians of all rounds, over the width of the points."""
    reads = [limits.read_gbps for limits in bench.limits if limits.read_gbps]
    if not reads:
        return
    read = statistics.median(reads)
    peaks: dict[tuple[str, str], float] = {}
    for key in _seen(key for limits in bench.limits for key in limits.dot_gops):
        peaks[key] = statistics.median(
            limits.dot_gops[key] for limits in bench.limits if key in limits.dot_gops
        )
    low, high = axes.get_xlim()
    high = max(high, 1.6 * max(peaks.values(), default=0) / read)
    top = max(peaks.values(), default=read * high)
    axes.plot([low, top / read], [low * read, top], color="#555555", label=f"read {read:.1f} GB/s")
    for style, ((isa, kind), peak) in zip(LINES * len(peaks), peaks.items(), strict=False):
        axes.plot(
            [peak / read, high],
            [peak, peak],
            color="#555555",
            linestyle=style,
            label=f"{isa} {kind} dot products {peak:,.0f} Gop/s",
        )
    axes.set_xlim(low, high)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.6 * top))


def _seen(items: Iterable[T]) -> list[T]:
    """The distinct items, in order of appearance."""
    return list(dict.fromkeys(items))
