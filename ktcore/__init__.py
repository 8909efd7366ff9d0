"""ktcore: kernels that run Mixture-of-Experts language models on whatever hardware there is.

``ktcore.ops`` holds the operators, ``ktcore.explain`` says which backend serves a call and why,
``ktcore.use`` forces one. Names are imported when first used, so that ``import ktcore`` costs
nothing that a program does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it (None: the name is a submodule).
_EXPORTS: dict[str, str | None] = {
    "backends": None,
    "dispatch": None,
    "formats": None,
    "models": None,
    "ops": None,
    "weights": None,
    "BackendUnavailable": "ktcore.dispatch",
    "explain": "ktcore.dispatch",
    "use": "ktcore.dispatch",
    "CheckpointError": "ktcore.weights",
    "ExpertWeights": "ktcore.weights",
    "QuantTensor": "ktcore.weights",
    "get_num_threads": "ktcore._native",
    "set_num_threads": "ktcore._native",
    "load_model": "ktcore.models",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from ktcore import backends, dispatch, formats, models, ops, weights
    from ktcore._native import get_num_threads, set_num_threads
    from ktcore.dispatch import BackendUnavailable, explain, use
    from ktcore.models import load_model
    from ktcore.weights import CheckpointError, ExpertWeights, QuantTensor


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ktcore' has no attribute {name!r}")
    module = _EXPORTS[name]
    if module is None:
        return importlib.import_module(f"ktcore.{name}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
