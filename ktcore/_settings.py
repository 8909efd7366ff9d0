"""Environment variables that say something ktcore cannot follow."""

from __future__ import annotations

import os


class SettingError(ValueError):
    """A variable of the environment has a value that is not understood; the message names it."""


def flag(name: str, default: bool = False) -> bool:
    """Whether a variable of the environment is on. Raises SettingError if it says neither."""
    text = os.environ.get(name, "").strip().lower()
    if not text:
        return default
    if text in ("1", "on", "yes", "true"):
        return True
    if text in ("0", "off", "no", "false"):
        return False
    raise SettingError(f"{name}: expected 1 or 0, got {text!r}")
