"""`ktcore bench`: how fast the operators are here, and how near to the machine's limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli._options import size_option

if TYPE_CHECKING:
    from ktcore.bench.measure import Bench, Progress

_SIZES = "Sizes, for a layer that is no preset"
_DEFAULT_MODEL = "Qwen3-30B-A3B"
_DEFAULT_FORMATS = ["bf16", "int8", "int4"]


def command(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", show_default=False, help="Of --json.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help=f"Expert shapes of a model, by its name in any case ({_DEFAULT_MODEL}). A wrong "
            "name lists them.",
        ),
    ] = None,
    op: Annotated[
        str, typer.Option("--op", metavar="OP", help="moe, or linear (one expert's gate matrix).")
    ] = "moe",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", metavar="NAME", help="Only this backend (all that can run); repeatable."
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"Stored weight format ({', '.join(_DEFAULT_FORMATS)}); repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N,...", help="Tokens of a call.")
    ] = "1,16,512",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="Threads (all the CPUs that may be used)."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="Measure this other implementation as well, in those of the formats that it takes "
            "(torch, llama.cpp, onnxruntime, ...); repeatable.",
        ),
    ] = None,
    all_peers: Annotated[
        bool, typer.Option("--peers", help="All other implementations that are installed.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="S",
            help="Time for each line of the table. What takes longer for one call is skipped.",
        ),
    ] = 2.0,
    skew: Annotated[
        float,
        typer.Option(
            "--skew",
            metavar="S",
            help="Uneven routing: the n-th most popular expert is drawn in proportion to 1/n^S.",
        ),
    ] = 0.0,
    experts: Annotated[
        int | None,
        typer.Option(
            "--experts",
            metavar="N",
            min=1,
            help="Materialise only N experts (as many as fit in half of the available memory).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of everything random.")] = 0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Write JSON (docs/benchmarks/README.md) to FILE, or print it without one.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw a roofline of the results."),
    ] = None,
    hidden_size: Annotated[int | None, size_option("--hidden-size", _SIZES)] = None,
    intermediate_size: Annotated[int | None, size_option("--intermediate-size", _SIZES)] = None,
    num_experts: Annotated[int | None, size_option("--num-experts", _SIZES)] = None,
    top_k: Annotated[int | None, size_option("--top-k", _SIZES)] = None,
) -> None:
    """Compare backends, formats and token counts, beside the machine's own limits.

    Weights come from memory, routing is fresh at every call, and everything
    is measured in interleaved rounds, so that what else runs here disturbs
    all alike.

    Examples:
      ktcore bench
      ktcore bench --model deepseek-v3 --format int4 --tokens 1,8,64
      ktcore bench --peer torch --json out.json --plot roofline.png
      ktcore bench --peers --format q4_k --format int4
      ktcore bench --hidden-size 1024 --intermediate-size 512 \\
        --num-experts 32 --top-k 4
      ktcore bench --op linear --model mixtral-8x7b

    Exit status:
      0  all is well
      1  a result was wrong, a call failed, or a file could not be written
      2  the command line is wrong
    """
    if file is not None and not as_json:
        raise typer.BadParameter(f"unexpected argument {str(file)!r}; a FILE goes with --json")
    if op == "linear" and experts is not None:
        raise typer.BadParameter("--experts narrows --op moe; linear has no experts")
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    name, shape = _shape(model, sizes, op)
    counts = _tokens(tokens)
    for option, path in (("FILE", file), ("--plot", plot)):
        _check_target(option, path)
    _check_picture(plot)

    from ktcore import _native
    from ktcore.bench import measure
    from ktcore.bench.peers import peers
    from ktcore.bench.plan import DoesNotFit

    _check_backends(backend or [])
    absent = {}
    if all_peers:
        absent = {name: p.missing() for name, p in peers().items() if p.missing()}
        peer = [name for name, p in peers().items() if name not in absent and op in p.ops]
    try:
        bench = measure.Bench(
            measure.Settings(
                shape=shape,
                op=op,
                backends=tuple(backend or ()),
                formats=tuple(format or _DEFAULT_FORMATS),
                tokens=counts,
                threads=threads or _native.available_threads(),
                seconds=seconds,
                seed=seed,
                skew=skew,
                experts=experts,
                peers=tuple(peer or ()),
            )
        )
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    bench.passed_over |= absent
    try:
        with _progress(bench) as progress:
            bench.run(progress)
    except DoesNotFit as error:
        raise typer.BadParameter(f"--{error}") from None
    problems = _show(bench, name, file, as_json, plot)
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _shape(model: str | None, sizes: dict[str, int | None], op: str) -> tuple[str | None, Any]:
    """The preset's name, None for sizes, and the shape."""
    from ktcore.bench.presets import Shape, find_preset

    given = {name: size for name, size in sizes.items() if size is not None}
    if model is not None and given:
        option = next(iter(given)).replace("_", "-")
        raise typer.BadParameter(f"--model and --{option} cannot be combined")
    try:
        if not given:
            preset = find_preset(model or _DEFAULT_MODEL)
            return preset.name, preset.shape
        if op == "linear":  # experts do not matter to it
            given = {"num_experts": 1, "top_k": 1} | given
        if missing := [name for name in sizes if name not in given]:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise typer.BadParameter(f"a layer's sizes are not complete: {options} missing")
        return None, Shape(**given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _tokens(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise typer.BadParameter(
            f"--tokens: expected counts of at least 1, separated by commas, got {text!r}"
        )
    return counts


def _check_backends(names: list[str]) -> None:
    from ktcore.dispatch import registry

    known = {**registry.backends(), **registry.import_failures()}
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"--backend: there is no backend {name!r}; there are: {', '.join(known)}"
            )


def _check_target(option: str, path: Path | None) -> None:
    """Fail before minutes of work, not after them."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{option}: {path} is a folder")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option}: the folder of {path} does not exist")


def _check_picture(plot: Path | None) -> None:
    if plot is None:
        return
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if plot.suffix.lstrip(".").lower() not in known:
        raise typer.BadParameter(
            f"--plot: expected a name ending in .png (or {', '.join(sorted(known))}), got {plot}"
        )


def _title(bench: Bench, model: str | None) -> str:
    from ktcore.dispatch import probe

    s, shape = bench.settings, bench.settings.shape
    what = f"hidden size {shape.hidden_size}, intermediate size {shape.intermediate_size}"
    if s.op == "moe":
        what += f", {shape.num_experts} experts, top {shape.top_k}"
    threads = f"{s.threads} thread{'s' * (s.threads > 1)}"
    return f"{s.op}: {f'{model} ({what})' if model else what}\n{probe.cpu_brand()}, {threads}"


def _show(
    bench: Bench, model: str | None, file: Path | None, as_json: bool, plot: Path | None
) -> list[str]:
    """Write and print everything; what went wrong comes back, one line each."""
    import json

    from rich.console import Console

    from ktcore.bench import report

    # The table goes to standard error where JSON has standard output to itself.
    printed = as_json and file is None
    screen = Console(stderr=printed, soft_wrap=True, highlight=False)
    screen.print(report.table(bench, _title(bench, model)))
    if (comparison := report.comparison(bench)) is not None:
        screen.print(comparison)
    for line in report.remarks(bench):
        screen.print(line, markup=False)
    problems = [
        f"{c}: {c.wrong or c.reason}"
        for c in bench.cells
        if c.wrong or (c.status == "failed" and not c.is_peer)
    ]
    if as_json:
        text = json.dumps(report.to_dict(bench, model), indent=2, allow_nan=False) + "\n"
        if file is None:
            print(text, end="")
        else:
            try:
                with report.replacing(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            except OSError as error:
                problems.append(f"{file}: {error.strerror or error}")
    if plot is not None:
        from ktcore.bench import plot as picture

        try:
            picture.save(bench, plot, _title(bench, model))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


@contextlib.contextmanager
def _progress(bench: Bench) -> Iterator[Progress]:
    """The table as it grows, and a bar, on standard error if that is a terminal."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ktcore.bench import report

    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield lambda what, done, total: None
        return
    bar = Progress(
        BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    )
    task = bar.add_task("", total=None)
    with Live(bar, console=screen, transient=True, auto_refresh=False) as live:

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            measured = any(cell.rounds for cell in bench.cells)
            live.update(Group(report.table(bench, ""), bar) if measured else bar, refresh=True)

        yield progress
