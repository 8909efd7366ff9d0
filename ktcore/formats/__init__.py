"""Stored weight formats: one file a family, each with a list `FORMATS`, gathered here."""

from __future__ import annotations

import importlib
import pkgutil

from ktcore.formats.base import BlockCodes, Codes, Floats, Format, Parts

__all__ = [
    "BlockCodes",
    "Codes",
    "Floats",
    "Format",
    "Parts",
    "define",
    "format_names",
    "get_format",
]

_FORMATS: dict[str, Format] = {
    format.name: format
    for module in pkgutil.iter_modules(__path__)
    for format in getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMATS", ())
}
_ALIASES = {alias: f.name for f in _FORMATS.values() for alias in f.aliases}


_DEFINED: dict[str, Format] = {}  # by files: of group sizes that no named format has


def format_names() -> list[str]:
    """Canonical names of the formats that can be asked for."""
    return list(_FORMATS)


def define(format: Format) -> None:
    """Make a format that a file defined known to `get_format`."""
    if format.name not in _FORMATS:
        _DEFINED.setdefault(format.name, format)


def get_format(format: str | Format) -> Format:
    """A format by name or alias; a `Format` is returned as it is.

    Raises:
        ValueError: there is no such format.
    """
    if isinstance(format, Format):
        return format
    name = _ALIASES.get(format, format) if isinstance(format, str) else ""
    found = _FORMATS.get(name) or _DEFINED.get(name)
    if found is None:
        known = ", ".join([*_FORMATS, *_ALIASES])
        given = repr(format) if isinstance(format, str) else f"of type {type(format).__name__}"
        raise ValueError(f"format: unknown format {given}; known: {known}")
    return found
