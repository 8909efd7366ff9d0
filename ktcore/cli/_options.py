"""Options that several commands have, so that they are called and explained alike."""

from __future__ import annotations

from typing import Any

import typer

_SIZES = {
    "--hidden-size": "Hidden size",
    "--intermediate-size": "An expert's intermediate size",
    "--num-experts": "Experts of the layer",
    "--top-k": "Experts of a token",
}


def json_option(panel: str | None = None) -> Any:
    return typer.Option(
        "--json", help="Print one JSON object, nothing else.", rich_help_panel=panel
    )


def size_option(flag: str, panel: str, default: int | None = None) -> Any:
    """One of a layer's sizes; `default` is only told."""
    told = "" if default is None else f" ({default})"
    return typer.Option(
        flag, metavar="N", min=1, help=f"{_SIZES[flag]}{told}.", rich_help_panel=panel
    )
