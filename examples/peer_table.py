#!/usr/bin/env python3
"""Tables and plots of ktcore beside its peers, from what `ktcore bench --peers --json` wrote.

    python ci/peers.py
    ktcore bench --peers --json docs/benchmarks/peers-NAME.json ...
    python examples/peer_table.py

writes docs/peers.md, between its markers, from every docs/benchmarks/peers-*.json, and a plot
beside each. Needs ktcore[cli] from a checkout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import format_table  # noqa: E402

from ktcore.formats import get_format  # noqa: E402

PAGE = ROOT / "docs" / "peers.md"
RESULTS = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- tables: examples/peer_table.py -->", "<!-- end of tables -->"
OURS = "ktcore"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

ACROSS = 3  # panels of a plot, side by side

Run = dict[str, Any]
Cells = dict[tuple[str, int, str], dict[str, Any]]  # by format, tokens and who


def measured(run: Run) -> Cells:
    """The cells with numbers; of ktcore's backends the fastest."""
    found: Cells = {}
    for cell in run["cells"]:
        if cell["status"] != "measured":
            continue
        who = cell["backend"] if cell["backend"] in run["settings"]["peers"] else OURS
        key = cell["format"], cell["tokens"], who
        if key not in found or cell["ms"]["median"] < found[key]["ms"]["median"]:
            found[key] = cell
    return found


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def share(cell: dict[str, Any]) -> str:
    """Of the limit that is nearer."""
    read, peak = (cell[f"{limit}_fraction"] for limit in ("read", "peak"))
    if read is None or peak is None:
        return "—"
    of = ("read", read) if read["median"] >= peak["median"] else ("peak", peak)
    return f"{of[1]['median']:.0%} of {of[0]}"


def goals(format: str, tokens: int, backend: str) -> tuple[float, float]:
    """The share of the nearer limit, and how far ahead of the fastest other, that we want to be."""
    quantised = get_format(format).arithmetic != "bf16"
    if tokens == 1:
        if format.startswith(("iq1", "iq2", "iq3")):
            return 0.60, 1.0
        if format in ("q2_k", "q3_k", "q5_k", "iq4_xs"):
            return 0.80, 1.0
        return 0.88 if backend == "avx2" else 0.92, 1.0
    if tokens <= 64:
        return 0.85, 1.5
    if format == "bf16":
        return 0.85, 1.0
    return 0.70 if backend == "avx2" else 0.75, 1.5 if quantised else 1.0


def short(cell: dict[str, Any], lead: dict[str, Any] | None) -> str:
    """Why a cell misses its goals, in letters that docs/peers.md explains; "" if it does not."""
    share, ahead = goals(cell["format"], cell["tokens"], cell["backend"])
    fractions = [cell[f"{limit}_fraction"] for limit in ("read", "peak")]
    if None in fractions:
        return ""
    by_read, by_peak = (fraction["median"] for fraction in fractions)
    quantised = get_format(cell["format"]).arithmetic != "bf16"
    if by_read >= by_peak:
        reason = "a" if cell["tokens"] == 1 else "b"
    else:
        reason = "c" if quantised else "d"
    letters = [reason] if round(max(by_read, by_peak), 2) < share else []
    if lead is not None and round(lead["ratio"], 2) < ahead:
        letters.append("e" if by_read >= by_peak else reason)
    return " ".join(dict.fromkeys(letters))


def error(cell: dict[str, Any]) -> str:
    return "—" if cell["relative_error"] is None else f"{cell['relative_error']:.2%}"


def table(run: Run) -> list[str]:
    cells, settings = measured(run), run["settings"]
    peers = [name for name in settings["peers"] if any(name == who for *_, who in cells)]
    ahead = {(lead["format"], lead["tokens"]): lead for lead in run["ahead"]}
    head = ["format", "tokens", "ktcore, ms", "limit", "ahead", "goals", "short"]
    head += [f"{p}, ms" for p in peers]
    lines = [format_table.line(head), format_table.line(["---", *["---:"] * (len(head) - 1)])]
    for format in settings["formats"]:
        for tokens in settings["tokens"]:
            own = cells.get((format, tokens, OURS))
            lead = ahead.get((format, tokens))
            theirs = [cells.get((format, tokens, peer)) for peer in peers]
            limit, ratio = goals(format, tokens, settings["backends"][0])
            lines.append(
                format_table.line(
                    [
                        f"`{format}`",
                        str(tokens),
                        "—" if own is None else number(own["ms"]["median"]),
                        "—" if own is None else share(own),
                        "—" if lead is None else f"{lead['ratio']:.2f}",
                        f"{limit:.0%}, {ratio}",
                        "" if own is None else short(own, lead),
                        *("" if c is None else number(c["ms"]["median"]) for c in theirs),
                    ]
                )
            )
    return lines


def errors(run: Run) -> list[str]:
    """The largest error of each, by format."""
    cells, settings = measured(run), run["settings"]
    whos = [OURS, *settings["peers"]]
    whos = [who for who in whos if any(who == w for *_, w in cells)]
    lines = [format_table.line(["error", *whos]), format_table.line(["---", *["---:"] * len(whos)])]
    for format in settings["formats"]:
        shown = []
        for who in whos:
            mine = [c for (f, _, w), c in cells.items() if (f, w) == (format, who)]
            shown.append(error(max(mine, key=lambda c: c["relative_error"] or 0)) if mine else "")
        lines.append(format_table.line([f"`{format}`", *shown]))
    return lines


def subject(settings: dict[str, Any]) -> str:
    """What was computed."""
    if settings["op"] == "moe":
        return settings["model"] or "A layer"
    sizes = f"[{settings['intermediate_size']}, {settings['hidden_size']}]"
    model = settings["model"]
    what = f"the gate matrix of an expert of {model}" if model else "a matrix"
    return f"`linear` with {what} {sizes}"


def section(path: Path, run: Run) -> list[str]:
    settings, limits = run["settings"], run["limits"]
    versions = ", ".join(f"{n} {v}" for n, v in run["versions"].items() if n != "python")
    read = limits["read_gbps"]
    failed = dict.fromkeys(
        f"{c['backend']} {c['format']}: {c['reason'].replace('|', '/')}"
        for c in run["cells"]
        if c["status"] != "measured"
    )
    lines = [
        f"## {path.stem.removeprefix('peers-')}: {run['machine']['cpu']}",
        "",
        f"{subject(settings)}, {settings['threads']} threads, {run['date'][:10]}; "
        f"read bandwidth {read['median']:.1f} GB/s ({read['min']:.1f} to {read['max']:.1f}); "
        f"{versions}. `{' '.join(settings['command'])}` ([all figures](benchmarks/{path.name})).",
        "",
        *table(run),
        "",
        *errors(run),
        "",
        *(f"- {note}" for note in (*run["notes"], *failed)),
        *([""] if run["notes"] or failed else []),
        f"![Time per token by batch size](benchmarks/{path.with_suffix('.png').name})",
        "",
    ]
    return lines


def plot(path: Path, run: Run) -> None:
    """Time per token against tokens, one panel a format."""
    from matplotlib.figure import Figure

    from ktcore.bench.report import replacing

    cells, settings = measured(run), run["settings"]
    whos = [OURS, *settings["peers"]]
    colours = dict(zip(whos, COLOURS * 2, strict=False))
    formats = settings["formats"]
    across = min(len(formats), ACROSS)
    down = -(-len(formats) // across)
    figure = Figure(figsize=(3.2 * across + 1.8, 2.9 * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    panels = grid.flatten()[: len(formats)]
    for unused in grid.flatten()[len(formats) :]:
        unused.set_axis_off()
    for axes, format in zip(panels, formats, strict=True):
        for who in whos:
            mine = sorted((t, c) for (f, t, w), c in cells.items() if (f, w) == (format, who))
            if not mine:
                continue
            tokens = [t for t, _ in mine]
            per_token = [c["ms"]["median"] / t for t, c in mine]
            axes.plot(
                tokens, per_token, color=colours[who], label=who, marker="o", markersize=4,
                linewidth=2.2 if who == OURS else 1.2,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(format, fontsize=10)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    figure.supxlabel("tokens of a call", fontsize=10)
    figure.supylabel("ms per token and layer", fontsize=10)
    known: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Write the tables and the plots."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("peers-*.json")):
        run = json.loads(path.read_text("utf-8"))
        lines += section(path, run)
        plot(path.with_suffix(".png"), run)
    try:
        format_table.put(PAGE, "\n".join(lines[:-1]), BEGIN, END)
    except (format_table.Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
