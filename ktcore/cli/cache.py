"""`ktcore cache`: the packed weights that are kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli._options import json_option

if TYPE_CHECKING:
    from rich.console import Console


def command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Where they are.",
            metavar="FOLDER",
            show_default="`packed` in KTCORE_CACHE_DIR or the system's folder for caches",
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of them.")] = False,
    clear_unusable: Annotated[
        bool,
        typer.Option("--clear-unusable", help="Delete those that will not be used any more."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all their bytes, to see whether one is damaged.")
    ] = False,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """List the packed weights that `ktcore run --cache` keeps on disk.

    For each: its model, the format of its experts, its size, when it was made,
    and whether the next start would use it, or why not. Deleting one costs
    nothing but the time to pack the model again.

    Examples:
      ktcore cache
      ktcore cache --clear-unusable
      ktcore cache --verify --json

    Exit status: 0 done, 1 it could not be done, 2 the command line is wrong.
    """
    from ktcore import _native
    from ktcore.models.packing import cache_folder
    from ktcore.weights.packed_cache import cache_files, remove_abandoned

    if verify and _native.ext is None:
        typer.echo(f"error: --verify: {_native.why}", err=True)
        raise typer.Exit(1)
    folder = cache_folder() if folder is None else folder
    files = [_describe(path, verify) for path in cache_files(folder)]
    data: dict[str, Any] = {
        "folder": str(folder.absolute()),
        "files": files,
        "freed_bytes": remove_abandoned(folder),
    }
    for file in files:
        file["deleted"] = clear or (clear_unusable and not file["usable"])
        if file["deleted"]:
            _delete(Path(file["path"]))
            data["freed_bytes"] += file["bytes"]
    if as_json:
        import json

        print(json.dumps(data, indent=2, allow_nan=False))
        return
    from ktcore.cli._render import console

    _render(console(), data)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        typer.echo(f"error: {path}: cannot be deleted: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _describe(path: Path, verify: bool) -> dict[str, Any]:
    """One file, as plain data; `reason` is why it would not be used."""
    from datetime import datetime, timezone

    from ktcore.models.packing import why_stale
    from ktcore.weights.packed_cache import CacheError, CacheFile

    out: dict[str, Any] = dict.fromkeys(("model", "format", "created"))
    out |= {"path": str(path), "bytes": 0, "reason": None}
    try:
        out["bytes"] = path.stat().st_size
        file = CacheFile(path)
        out["created"] = datetime.fromtimestamp(file.created, timezone.utc).isoformat(
            timespec="seconds"
        )
        out |= {"model": file.identity.get("model"), "format": file.identity.get("format")}
        out["reason"] = why_stale(file.identity)
        if verify:
            for entry in file.entries:
                file.memory(entry)
    except CacheError as error:
        out["reason"] = error.what
    except OSError as error:
        out["reason"] = f"cannot be read: {error.strerror or error}"
    out["usable"] = out["reason"] is None
    return out


def _render(out: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from ktcore.cli._render import BAD, GOOD, TITLE, WEAK, _grid, _plural
    from ktcore.cli._report import size
    from ktcore.cli.inspect import _clean

    files, freed = data["files"], data["freed_bytes"]
    total = sum(file["bytes"] for file in files)
    out.print(
        Text(data["folder"], TITLE).append(f"  {_plural(len(files), 'model')}, {size(total)}")
    )
    for file in files:
        verdict = Text("deleted", WEAK)
        if not file["deleted"]:
            verdict = Text("usable", GOOD) if file["usable"] else Text(_clean(file["reason"]), BAD)
        out.print()
        out.print(Text(_clean(Path(file["path"]).name)))
        rows: list[tuple[str | Text, ...]] = [
            ("model", _clean(file["model"] or "unknown")),
            ("experts", _clean(file["format"] or "as stored")),
            ("size", size(file["bytes"])),
            ("made", file["created"] or "unknown"),
            ("state", verdict),
        ]
        out.print(_grid(rows))
    if freed:
        out.print()
        out.print(f"{size(freed)} freed")
