"""What can go wrong beside unreadable models."""

from __future__ import annotations


class ConversionError(RuntimeError):
    """A conversion cannot be done; the message names the file or option, and what to do."""
