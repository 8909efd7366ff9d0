"""`ktcore inspect`: what is in a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli._options import json_option

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_VALUE = 200  # characters of a setting that are shown


def command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help="A .gguf or .safetensors file, or a folder as downloaded from Hugging Face.",
            show_default=False,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Show what is in a model's files, and what would become of it here.

    Architecture, weights by type and by purpose, experts, which backend would
    serve them and why, whether they fit this machine's memory, all settings.
    Only headers are read, so it takes a moment whatever the size.

    Examples:
      ktcore inspect Qwen3-30B-A3B-Q4_K_M.gguf
      ktcore inspect ./Qwen3-30B-A3B --tensors
      ktcore inspect model.gguf --json > model.json

    Exit status: 0 done, 1 it cannot be read, 2 the command line is wrong.
    """
    from ktcore.cli import _inspect

    data = _inspect.inspect(path, tensors)
    if as_json:
        import json

        print(json.dumps(data, indent=2, allow_nan=False))
        return
    from ktcore.cli._render import console

    _render(console(), data)


def _clean(text: object) -> str:
    """A text from a file without what a terminal might obey."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def _render(out: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from ktcore.cli._render import BAD, GOOD, TITLE, WEAK, _grid, _section
    from ktcore.cli._report import size

    out.print(Text(_clean(data["path"]), TITLE))
    files = data["files"]
    on_disk = size(sum(f["bytes"] for f in files))
    sizes = data["sizes"]
    rows: list[tuple[str | Text, ...]] = [
        ("files", f"{data['kind']}, {_count(len(files), 'file')}, {on_disk}"),
        ("architecture", _architecture(data)),
        ("weights", _weights(data)),
    ]
    if data["experts"]:
        rows.append(("experts", _experts(data["experts"])))
    if "context_length" in sizes:
        rows.append(("context", f"{sizes['context_length']:,} tokens"))
    tokenizer = data["tokenizer"]
    named = "none"
    if tokenizer:
        tokens = tokenizer["tokens"]
        named = _clean(tokenizer["kind"]) + (f", {tokens:,} tokens" if tokens else "")
    template = "with a chat template" if data["chat_template"] else "no chat template"
    rows.append(("tokenizer", f"{named}; {template}"))
    memory = data["memory"]
    verdict = "fits" if memory["fits"] else "does not fit"
    rows.append(
        (
            "memory",
            Text(verdict, GOOD if memory["fits"] else BAD).append(
                f": about {size(memory['needed_bytes'])} of weights, "
                f"{size(memory['available_bytes'])} available",
                "not bold default",
            ),
        )
    )
    reason = data["loads"]["reason"]
    rows.append(
        (
            "ktcore run",
            Text("loads it", GOOD) if reason is None else Text(f"cannot: {_clean(reason)}", BAD),
        )
    )
    out.print(_grid(rows))

    _section(out, "Stored as")
    out.print(_totals(data["types"], "type"))
    _section(out, "For")
    out.print(_totals(data["kinds"], "kind"))
    if data["backends"]:
        _section(out, "Who would serve the experts, and why")
        out.print(_grid(_served(data["backends"])))
    if "tensor_list" in data:
        _section(out, "Tensors")
        out.print(
            _grid(
                (
                    t["type"],
                    size(t["bytes"]),
                    Text(_clean(t["name"])).append(f" {t['shape']}", WEAK),
                )
                for t in data["tensor_list"]
            )
        )
    if data["metadata"]:
        _section(out, "Settings")
        for key, value in data["metadata"].items():
            out.print(Text("  ").append(_clean(key), WEAK).append(f"  {_value(value)}"))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _value(value: Any) -> str:
    text = _clean(value)
    return text if len(text) <= WIDTH_OF_VALUE else f"{text[:WIDTH_OF_VALUE]}..."


def _architecture(data: dict[str, Any]) -> str:
    names = [n for n in (data["architecture"], data["model_type"]) if n is not None]
    text = _clean(", ".join(dict.fromkeys(names))) if names else "not said"
    scheme = data["quantization"]
    return f"{text}; quantised: {_clean(scheme)}" if scheme else text


def _weights(data: dict[str, Any]) -> str:
    from ktcore.cli._report import size

    stored = f"{_count(data['tensors'], 'tensor')}, {size(data['bytes'])}"
    parameters = data["parameters"]
    if parameters is None:
        return stored
    bits = f", {8 * data['bytes'] / parameters:.2f} bits each" if parameters else ""
    return f"{_amount(parameters)} in {stored}{bits}"


def _amount(n: int) -> str:
    """A number of weights for people."""
    for scale, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return str(n)


def _experts(experts: dict[str, Any]) -> str:
    from ktcore.cli._report import size

    count, top_k = experts["num_experts"], experts["top_k"]
    text = f"{count} a layer" if count else "some"
    text += f", {top_k} used by a token" if top_k else ""
    return f"{text}; {_count(experts['layers'], 'layer')} of {size(experts['bytes_per_layer'])}"


def _totals(totals: list[dict[str, Any]], by: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ktcore.cli._render import WEAK
    from ktcore.cli._report import size

    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    for _ in range(4):
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(t, WEAK) for t in ("", "tensors", "weights", "bytes", "share")))
    every = sum(total["bytes"] for total in totals) or 1
    for total in totals:
        table.add_row(
            f"  {total[by]}",
            f"{total['tensors']:,}",
            _amount(total["parameters"]),
            size(total["bytes"]),
            f"{100 * total['bytes'] / every:.1f} %",
        )
    return table


def _served(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """For each way of storing experts, who serves which phase, phases that agree as one."""
    from rich.text import Text

    from ktcore.cli._render import BAD, GOOD
    from ktcore.cli._report import PHASES

    out: list[tuple[str, Any]] = []
    for row in rows:
        names = list(dict.fromkeys(filter(None, (row["format"], row["down_format"]))))
        what = f"{' + '.join(names) or 'unknown'} ({_count(row['layers'], 'layer')})"
        if row["format"] is None or row["down_format"] is None:
            out.append((what, Text("ktcore has no format for them", BAD)))
            continue
        choices: dict[tuple[str | None, str], list[str]] = {}
        for phase in PHASES:
            choices.setdefault(_choice(row[phase]), []).append(phase)
        for (chosen, why), phases in choices.items():
            text = Text(f"{' and '.join(phases)}: ")
            text.append(chosen or "nobody", GOOD if chosen else BAD).append(f" ({why})")
            out.append((what, text))
            what = ""
    return out


def _choice(found: dict[str, Any]) -> tuple[str | None, str]:
    """The backend, and the reasons for it and against the others."""
    candidates = found["candidates"]
    mine = [c["reason"].removeprefix("chosen: ") for c in candidates if c["accepted"]][:1]
    others = [
        f"{c['backend']}: {c['reason']}" for c in candidates if c["backend"] != found["chosen"]
    ]
    return found["chosen"], "; ".join([*mine, *others])
