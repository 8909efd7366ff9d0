"""Environment variables that say something ktcore cannot follow."""

from __future__ import annotations


class SettingError(ValueError):
    """A variable of the environment has a value that is not understood; the message names it."""
