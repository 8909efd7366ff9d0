"""Errors that are the user's to mend: printed as one line, without a traceback."""

from __future__ import annotations

from ktcore._settings import SettingError
from ktcore.dispatch import BackendUnavailable
from ktcore.weights import CheckpointError

USER_ERRORS: tuple[type[Exception], ...] = (BackendUnavailable, CheckpointError, SettingError)
