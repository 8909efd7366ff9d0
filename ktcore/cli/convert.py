"""`ktcore convert`: store a model in another format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli._options import json_option

if TYPE_CHECKING:
    from rich.console import Console

_QUALITY, _MEASURE, _OUTPUT = "Quality", "Measuring", "Output"


def command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder as downloaded from Hugging Face, or a .gguf file (any part of one that "
            "was split); the model that ktcore ships unless given.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            "-t",
            metavar="TYPE",
            help="int8, int4 or bf16, for a folder; q4_k, q6_k or q8_0, for a .gguf file.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The folder or file to make.", show_default=False
        ),
    ] = ...,  # type: ignore[assignment]
    group_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="int4: weights that share a scale: 32, 64 or 128.",
            rich_help_panel=_QUALITY,
        ),
    ] = 32,
    experts_only: Annotated[
        bool,
        typer.Option(
            "--experts-only",
            help="Leave everything but the experts as precise as it is.",
            rich_help_panel=_QUALITY,
        ),
    ] = False,
    pure: Annotated[
        bool,
        typer.Option(
            "--pure",
            help="q4_k: no matrix in a better type; else some are q6_k, as in llama.cpp's Q4_K_M.",
            rich_help_panel=_QUALITY,
        ),
    ] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weigh errors by an importance matrix of llama.cpp (.gguf or .dat).",
            show_default=False,
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Weigh errors by the activations of a text: the model is run over it first.",
            show_default=False,
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    save_imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --calibrate: keep what was measured, as llama.cpp has it.",
            show_default=False,
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    perplexity_text: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Measure the perplexity on a text, before and after.",
            show_default=False,
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity/--no-perplexity",
            help="Whether to measure the perplexity of the model that ktcore ships, for which no "
            "text need be given.",
            rich_help_panel=_MEASURE,
        ),
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace OUT if it exists, when all is done.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from where an interrupted conversion stopped.",
            rich_help_panel=_OUTPUT,
        ),
    ] = True,
    as_json: Annotated[bool, json_option(_OUTPUT)] = False,
) -> None:
    """Convert a model to another type of weights.

    What is written is in OUT.partial until all of it is there. If that is
    interrupted, the same command goes on from the last layer that was done.
    Norms and routers are not quantised. The whole report is conversion.json
    in OUT, or beside it.

    Examples:
      ktcore convert ./Qwen3-30B-A3B --to int4 -o ./Qwen3-30B-A3B-int4
      ktcore convert ./Qwen3-30B-A3B --to q4_k -o Qwen3-30B-A3B-Q4_K_M.gguf
      ktcore convert model-Q8_0.gguf --to int8 -o ./model-int8 --experts-only
      ktcore convert ./model --to q4_k -o m.gguf --calibrate calibration.txt
      ktcore convert --to int4 -o kjv-int4 --json

    Exit status: 0 done, 1 it could not be done, 2 the command line is wrong.
    """
    from ktcore.convert import ConversionError, convert

    if save_imatrix is not None and calibrate is None:
        raise typer.BadParameter("--save-imatrix: needs --calibrate, which measures it")
    try:
        with _progress(quiet=as_json) as (progress, say):
            report = convert(
                model,
                to,
                out,
                group_size=group_size,
                experts_only=experts_only,
                pure=pure,
                imatrix=imatrix,
                calibrate=calibrate,
                save_imatrix=save_imatrix,
                perplexity_text=perplexity_text,
                measure_perplexity=perplexity,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
                say=say,
            )
    except KeyboardInterrupt:
        partial = out.with_name(out.name + ".partial")
        if partial.is_dir():
            typer.echo(f"{partial}: what is done is kept; the same command goes on", err=True)
        raise
    except (ConversionError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        if type(error) is not ValueError:  # of a file, not of an option
            raise
        option, _, what = str(error).partition(": ")
        raise typer.BadParameter(f"--{option.replace('_', '-')}: {what}") from None
    if as_json:
        import json

        print(json.dumps(report, indent=2, allow_nan=False))
        return
    from ktcore.cli._render import console

    _render(console(), report)


@contextlib.contextmanager
def _progress(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """A bar on standard error, if that is a terminal, and a way to say something beside it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = bar.add_task("", total=None)
    shown = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        kind = what.split()[0]
        if kind != shown:  # another kind of work, whose time is its own
            bar.reset(task)
            shown = kind
        bar.update(task, description=what, completed=done, total=total)

    with bar:
        yield progress, lambda line: console.print(line, soft_wrap=True)


def _render(out: Console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ktcore.cli._render import TITLE, WEAK, _grid, _section
    from ktcore.cli._report import size

    before, after = report["bytes"]["before"], report["bytes"]["after"]
    bits = report["bits_per_weight"]
    rows: list[tuple[str | Text, ...]] = [
        (
            "weights",
            f"{size(before)} to {size(after)}, {100 * after / before:.1f} %: "
            f"{bits['before']:.2f} to {bits['after']:.2f} bits each",
        )
    ]
    if report["perplexity"]:
        ppl = report["perplexity"]
        change = 100 * (ppl["after"] / ppl["before"] - 1)
        rows.append(("perplexity", f"{ppl['before']:.4f} to {ppl['after']:.4f} ({change:+.2f} %)"))
    if report["imatrix"]:
        about = report["imatrix"]
        rows.append(("importance", about["dataset"] or about["file"]))
    rows += [("note", note) for note in report["notes"]]
    out.print(Text(report["out"], TITLE))
    out.print(_grid(rows))

    _section(out, "By kind of weight")
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    weighted = any("weighted_error" in row for row in report["tensors"])
    columns = ["", "from", "to", "bits", "error", "worst", *(["weighted"] if weighted else []), ""]
    for i in range(len(columns)):
        right = 3 <= i < len(columns) - 1
        table.add_column(justify="right" if right else "left", no_wrap=True)
    table.add_row(*(Text(text, WEAK) for text in columns))
    for kind in kinds(report["tensors"]):
        cells = [f"  {kind['role']}", kind["from"], kind["to"], f"{kind['bits']:.2f}"]
        cells += [_percent(kind["error"]), _percent(kind["worst"])]
        if weighted:
            cells.append(_percent(kind["weighted"]))
        where = "" if kind["layer"] is None else f"layer {kind['layer']}"
        table.add_row(*cells, Text(where, WEAK))
    out.print(table)


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value == 0 else f"{100 * value:.3g} %"


def kinds(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Weights of one role, from and to one format, as one: the mean error, and the worst tensor's.

    Squared errors are averaged by the number of weights.
    """
    import math

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    order = {role: i for i, role in enumerate(dict.fromkeys(row["role"] for row in tensors))}
    for row in sorted(tensors, key=lambda row: order[row["role"]]):
        groups.setdefault((row["role"], row["from"], row["to"]), []).append(row)

    def mean(rows: list[dict[str, Any]], name: str) -> float | None:
        known = [(row[name], math.prod(row["shape"])) for row in rows if name in row]
        weights = sum(size for _, size in known)
        return math.sqrt(sum(e * e * n for e, n in known) / weights) if known else None

    out = []
    for (role, stored, format), rows in groups.items():
        worst = max(rows, key=lambda row: row["relative_error"])
        out.append(
            {
                "role": role,
                "from": stored,
                "to": format,
                "bits": sum(r["bits_per_weight"] for r in rows) / len(rows),
                "error": mean(rows, "relative_error"),
                "worst": worst["relative_error"],
                "weighted": mean(rows, "weighted_error"),
                "layer": worst["layer"] if len(rows) > 1 and worst["relative_error"] else None,
            }
        )
    return out
