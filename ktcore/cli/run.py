"""`ktcore run`: let a model write, and say how fast it did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli._options import json_option

if TYPE_CHECKING:
    from ktcore.models import Generation, Model

PROMPT = "And it came to pass in those days,"
PATIENCE = 0.5  # seconds before loading shows a progress bar
LONG = 20.0  # seconds of loading after which the cache is worth mentioning
_SAMPLING, _MACHINE, _OUTPUT = "Sampling", "Machine", "Output"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder as downloaded from Hugging Face, or a .gguf file; the model that ktcore "
            "ships, a small one that knows the King James Bible, unless given.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=0, help="Stop after so many.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            help="0: the likeliest token each time.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.8,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Choose among the N likeliest tokens; 0: among all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 40,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="X",
            max=1,
            help="Choose among the likeliest tokens that together have this probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=(1 << 63) - 1,
            help="Make the choices repeatable.",
            show_default="a fresh one",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantise the experts while loading: int4, int8 or bf16.",
            show_default="as stored",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Force a backend: `ktcore-probe` lists them.",
            show_default="the fastest that can run",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Compute with so many threads.",
            show_default="every CPU there is",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep the packed weights on disk, as large as the model, and start from there the "
            "next time, in seconds: `ktcore cache` lists them.",
            show_default="as KTCORE_PACKED_CACHE says, else no",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    mlock: Annotated[
        bool | None,
        typer.Option(
            "--mlock/--no-mlock",
            help="Have the system keep the weights in memory.",
            show_default="as KTCORE_MLOCK says, else no",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say which backend serves each operator, and why.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Then generate again with plain PyTorch (backend reference), and compare.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    as_json: Annotated[bool, json_option(_OUTPUT)] = False,
) -> None:
    """Let a model continue a text.

    The text goes to standard output as it comes; what was loaded, how fast it
    ran and on which backend goes to standard error.

    Examples:
      ktcore run
      ktcore run --prompt "In the beginning" --format int4 --compare
      ktcore run ./Qwen3-30B-A3B --format int4 --prompt "Why is the sky blue?"
      ktcore run ./Qwen3-30B-A3B-Q4_K_M.gguf --cache
      ktcore run --temperature 0 --json > result.json

    Exit status: 0 done, 1 it could not be done, 2 the command line is wrong.
    """
    import secrets

    import torch

    import ktcore
    from ktcore.formats import get_format
    from ktcore.models.packing import chosen_folder

    if top_p <= 0:
        raise typer.BadParameter(f"--top-p: expected a number above 0, got {top_p:g}")
    if format is not None:
        try:
            format = get_format(format).name
        except ValueError as error:
            what = str(error).removeprefix("format: ")
            raise typer.BadParameter(f"--format: {what}") from None
    if cache and compare:
        raise typer.BadParameter("--cache: --compare needs the weights as the model stores them")
    if backend is not None:
        ktcore.use(backend)
    if threads is not None:
        ktcore.set_num_threads(threads)
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": secrets.randbelow(1 << 32) if seed is None else seed,
    }

    options = {"release": False if compare else None, "cache": cache, "mlock": mlock}
    loaded, load_seconds = _load(model, format, options)
    try:
        ids = loaded.tokenizer.encode(prompt)
    except ImportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if not ids:
        raise typer.BadParameter("--prompt: expected text, got none")
    explained = _explained(loaded, len(ids))
    if explain and not as_json:
        _print_explained(explained)

    generation, text, first_seconds = _generate(loaded, prompt, ids, settings, show=not as_json)
    result = {
        "ktcore": ktcore.__version__,
        "model": {
            "name": loaded.name,
            "path": str(loaded.path),
            "model_type": loaded.model_type,
            "parameters": loaded.parameters,
            "expert_format": loaded.expert_format.name if loaded.expert_format else None,
            "expert_formats": loaded.expert_formats,
        },
        "prompt": prompt,
        "prompt_tokens": len(ids),
        "text": text,
        "token_ids": generation.tokens,
        "tokens": len(generation.tokens),
        "finish_reason": generation.finish_reason,
        "settings": settings,
        "load_seconds": load_seconds,
        "time_to_first_token_seconds": first_seconds,
        **_speeds(generation, len(ids)),
        "backends": _backends(explained),
        "machine": _machine(),
    }
    if explain:
        result["explanations"] = {
            phase: [{"for": purpose, **found.to_dict()} for purpose, found in rows]
            for phase, rows in explained.items()
        }
    if not as_json:
        _print_statistics(result)
        if load_seconds > LONG and not compare and chosen_folder(cache) is None:
            typer.echo("next time it starts in seconds with --cache, which takes disk", err=True)
    if compare:
        result["compare"] = _compare(loaded, ids, settings, result)
        if not as_json:
            _print_comparison(result)
    if as_json:
        import json

        print(json.dumps(result, indent=2, allow_nan=False))


# ------------------------------------------------------------------------------------ the work


def _load(path: str | None, format: str | None, options: dict[str, Any]) -> tuple[Model, float]:
    import time
    import warnings

    from ktcore.models import load_model

    begin = time.perf_counter()
    with _progress() as progress, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        loaded = load_model(path, format, progress=progress, **options)
    seconds = time.perf_counter() - begin
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    return loaded, seconds


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal and loading takes longer than a moment."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("loading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("loading", total=None)
    begin = time.perf_counter()
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if console.is_terminal and time.perf_counter() - begin > PATIENCE:
            if not started:
                bar.start()
                started = True
            bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        if started:
            bar.stop()


def _generate(
    model: Model, prompt: str, ids: list[int], settings: dict[str, Any], show: bool
) -> tuple[Generation, str, float]:
    """The generation, its text, and the seconds until its first token; shown as it comes."""
    import sys
    import time

    from ktcore.models import generate

    def write(piece: str) -> None:
        pieces.append(piece)
        if show and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    pieces: list[str] = []
    begin = time.perf_counter()
    first_seconds = 0.0
    try:
        generation = generate(model, ids, **settings)
    except ValueError as error:
        raise typer.BadParameter(f"--prompt: {error}") from None
    if show:
        bold = sys.stdout.isatty()
        sys.stdout.write(typer.style(prompt, bold=True) if bold else prompt)
        sys.stdout.flush()
    stream = model.tokenizer.stream(ids)
    try:
        for token in generation:
            if not first_seconds:
                first_seconds = time.perf_counter() - begin
            write(stream.push(token))
        write(stream.finish())
    finally:
        if show:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return generation, "".join(pieces), first_seconds


def _speeds(generation: Generation, prompt_tokens: int) -> dict[str, float | None]:
    """Tokens a second of the model and the choice of tokens; printing is not counted."""
    after_first = generation.decode_steps
    return {
        "prefill_tokens_per_second": (
            prompt_tokens / generation.prefill_seconds if generation.prefill_seconds else None
        ),
        "tokens_per_second": (
            after_first / generation.decode_seconds if generation.decode_seconds else None
        ),
    }


def _compare(
    model: Model, ids: list[int], settings: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """The same generation on the reference backend."""
    import ktcore
    from ktcore.models import generate

    with ktcore.use("reference"):
        generation = generate(model, ids, **settings)
        list(generation)
    speeds = _speeds(generation, len(ids))
    ours = result["token_ids"]
    pairs = enumerate(zip(ours, generation.tokens, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(generation.tokens)))
    return {
        "backend": "reference",
        "tokens": len(generation.tokens),
        "same_tokens": same,
        **speeds,
        "speedup": _ratio(result["tokens_per_second"], speeds["tokens_per_second"]),
        "prefill_speedup": _ratio(
            result["prefill_tokens_per_second"], speeds["prefill_tokens_per_second"]
        ),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


# ---------------------------------------------------------------------------------- explaining


def _explained(model: Model, prompt_tokens: int) -> dict[str, list[tuple[str, Any]]]:
    """For decode and prefill, why each operator call goes where it goes, by purpose."""
    import ktcore

    return {
        phase: [
            (purpose, ktcore.explain(**request._asdict()))
            for purpose, request in model.requests(tokens)
        ]
        for phase, tokens in (("decode", 1), ("prefill", prompt_tokens))
    }


def _backends(explained: dict[str, list[tuple[str, Any]]]) -> dict[str, str]:
    """The backend of each operator; where phases differ, both."""
    found: dict[str, list[str]] = {}
    for rows in explained.values():
        for _, explanation in rows:
            names = found.setdefault(explanation.request.op, [])
            if explanation.chosen not in names:
                names.append(explanation.chosen)
    return {op: ", ".join(names) for op, names in found.items()}


def _machine() -> dict[str, Any]:
    import torch

    import ktcore
    from ktcore.dispatch import probe

    return {
        "cpu": probe.cpu_brand(),
        "system": probe.machine().system,
        "threads": ktcore.get_num_threads(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------- printing


def _print_explained(explained: dict[str, list[tuple[str, Any]]]) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    out = Console(stderr=True, markup=False, highlight=False, emoji=False)
    for phase, rows in explained.items():
        tree = Tree(Text(phase, "bold"))
        for purpose, explanation in rows:
            first, *candidates = str(explanation).splitlines()
            branch = tree.add(Text(f"{purpose}: ").append(first, "bold"))
            for line in candidates:
                branch.add(Text(line.strip(), "green" if line.lstrip().startswith("*") else ""))
        out.print(tree)
    out.print()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _print_statistics(result: dict[str, Any]) -> None:
    model, machine = result["model"], result["machine"]
    ops_of: dict[str, list[str]] = {}
    for op, name in result["backends"].items():
        ops_of.setdefault(name, []).append(op)
    served = "; ".join(f"{name} ({', '.join(ops)})" for name, ops in ops_of.items())
    experts = f"{' + '.join(model['expert_formats']) or 'no'} experts"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    typer.echo(
        f"\n{model['name']}: {_number(model['parameters'] / 1e6)} M weights, {experts}, loaded in "
        f"{_seconds(result['load_seconds'])}; {served}, {threads}",
        err=True,
    )
    parts = [f"{result['tokens']} tokens"]
    if result["tokens"]:
        parts.append(f"first after {_seconds(result['time_to_first_token_seconds'])}")
    if speed := result["prefill_tokens_per_second"]:
        parts.append(f"prefill {_number(speed)} tokens/s ({result['prompt_tokens']} tokens)")
    if speed := result["tokens_per_second"]:
        parts.append(f"decode {_number(speed)} tokens/s")
    typer.echo("; ".join(parts), err=True)
    if result["finish_reason"] == "context":
        total = result["prompt_tokens"] + result["tokens"]
        typer.echo(f"stopped: the model's context is full, at {total} tokens", err=True)


def _print_comparison(result: dict[str, Any]) -> None:
    found = result["compare"]
    if found["speedup"] is None:
        typer.echo("plain PyTorch (reference): too few tokens to compare", err=True)
        return
    same, tokens = found["same_tokens"], result["tokens"]
    agree = (
        f"all {tokens} tokens are the same"
        if same == tokens == found["tokens"]
        else f"the first {same} of {tokens} tokens are the same, then rounding led elsewhere"
    )
    typer.echo(
        f"plain PyTorch (reference): prefill {_number(found['prefill_tokens_per_second'])}, decode "
        f"{_number(found['tokens_per_second'])} tokens/s. So decode ran {found['speedup']:.3g} "
        f"times, prefill {found['prefill_speedup']:.3g} times as fast; {agree}",
        err=True,
    )
