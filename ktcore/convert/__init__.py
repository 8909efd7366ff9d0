"""Converting models from one stored form to another: see `convert`."""

from ktcore.convert.conversion import convert
from ktcore.convert.errors import ConversionError
from ktcore.convert.importance import Importance, measure, read_imatrix, write_imatrix
from ktcore.convert.targets import TARGETS

__all__ = [
    "TARGETS",
    "ConversionError",
    "Importance",
    "convert",
    "measure",
    "read_imatrix",
    "write_imatrix",
]
