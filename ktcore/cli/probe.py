"""`ktcore probe`, also `ktcore-probe`: what this machine is, and what ktcore makes of it."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from ktcore.cli._options import size_option

_CALL = "The call that --explain judges"


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON (docs/probe.schema.json) for scripts.")
    ] = False,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench", help="Measure read bandwidth and dot-product peaks first, and keep them."
        ),
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="OP",
            help="Say which backend serves an operator (moe, linear, route, attention, ...), "
            "and why.",
        ),
    ] = None,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest", help="Hold every kernel that can run here against float64 arithmetic."
        ),
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="With --selftest: only this; repeatable."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require", metavar="NAME", help="Fail if this backend cannot run here; repeatable."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Stored weight format, bf16 unless given.",
            rich_help_panel=_CALL,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help="Tokens (1).", rich_help_panel=_CALL),
    ] = None,
    hidden_size: Annotated[int | None, size_option("--hidden-size", _CALL, 2048)] = None,
    intermediate_size: Annotated[int | None, size_option("--intermediate-size", _CALL, 768)] = None,
    num_experts: Annotated[int | None, size_option("--num-experts", _CALL, 128)] = None,
    top_k: Annotated[int | None, size_option("--top-k", _CALL, 8)] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="Where its tensors are, as torch names it (cpu).",
            rich_help_panel=_CALL,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A call with exact=True.", rich_help_panel=_CALL),
    ] = False,
) -> None:
    """Show this machine, which backend serves what on it, and why.

    Examples:
      ktcore-probe
      ktcore-probe --bench
      ktcore-probe --explain moe --format int4 --tokens 512
      ktcore-probe --selftest --backend avx2
      ktcore-probe --json --require avx512 > report.json

    Exit status:
      0  all is well
      1  a self-test failed; or a backend that is required (--require) or
         forced (KTCORE_BACKEND) cannot run; or the work failed. Standard
         error says what.
      2  the command line is wrong
    """
    shape = {
        "format": format,
        "tokens": tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "device": device,
        "exact": exact or None,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    modes = {"--bench": bench, "--explain": explain is not None, "--selftest": selftest}
    if len(chosen := [name for name, on in modes.items() if on]) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)} cannot be combined")
    if given and explain is None:
        name = next(iter(given)).replace("_", "-")
        raise typer.BadParameter(f"--{name} describes the call of --explain OP, which is missing")
    if backend and not selftest:
        raise typer.BadParameter("--backend narrows --selftest, which is missing")

    if explain is not None:
        problems = _explain(explain, given, as_json)
    elif selftest:
        problems = _selftest(backend or None, as_json)
    else:
        problems = _report(require or [], bench, as_json)
        require = None  # the report holds them
    if require:
        from ktcore.cli._report import requirement_problems

        problems += requirement_problems(require)
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _print_json(document: dict) -> None:
    import json

    print(json.dumps(document, indent=2, allow_nan=False))


def _report(require: list[str], bench: bool, as_json: bool) -> list[str]:
    from ktcore.cli import _render, _report
    from ktcore.dispatch import figures, probe

    machine = probe.machine()
    failed = []
    if bench:
        try:
            with _progress() as progress:
                figures.measure(machine, progress)
        except (RuntimeError, OSError) as error:
            failed.append(f"--bench: {error}")
    data = _report.report(machine, require)
    data["problems"] += failed
    if as_json:
        _print_json(data)
    else:
        _render.report(_render.console(), data)
    return data["problems"]


def _explain(op: str, given: dict, as_json: bool) -> list[str]:
    import torch

    from ktcore.cli import _render, _report
    from ktcore.dispatch import figures, probe, registry
    from ktcore.formats import get_format

    if op not in registry.OPS:
        raise typer.BadParameter(
            f"--explain: unknown operator {op!r}; expected one of {', '.join(registry.OPS)}"
        )
    try:
        if "format" in given:
            get_format(given["format"])
        if "device" in given:
            given["device"] = torch.device(given["device"]).type
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error).splitlines()[0]) from None
    found = registry.explain(op, **(_report.SHAPE | given))
    data = _report.explanation(found)
    if as_json:
        _print_json(data)
    else:
        known = figures.load(probe.machine())
        _render.explanation(_render.console(), data, known and known.measured_at)
    return []


def _selftest(backends: list[str] | None, as_json: bool) -> list[str]:
    from ktcore.cli import _render, _report
    from ktcore.dispatch import registry

    for name in backends or []:
        reason = registry.why_not(name)
        if reason is not None:
            if name not in registry.backends() and name not in registry.import_failures():
                raise typer.BadParameter(f"--backend: {_report.unavailable(name, reason)}")
            return [f"--backend: {_report.unavailable(name, reason)}"]
    from ktcore.testing import selftest

    with contextlib.suppress(OSError, RuntimeError):  # standard error may be no real file
        faulthandler.enable()  # should a kernel crash, say where
    with _progress() as progress:
        results = selftest.run(backends, progress=progress)
    data = _report.selftest(results)
    if as_json:
        _print_json(data)
    else:
        _render.selftest(_render.console(), data)
    if data["passed"]:
        return []
    failed = sum(not r.passed for r in results)
    return [f"self-test: {failed} of {len(results)} cases failed" if results else "no case was run"]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error if that is a terminal; to be told what comes, how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    screen = Console(stderr=True, markup=False)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
