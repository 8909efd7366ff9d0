"""Which family a GGUF file's model belongs to."""

from __future__ import annotations

from ktcore.models.config import Fields
from ktcore.models.family import Family, GgufArchitecture, families
from ktcore.weights import GgufFile


def keys_of(file: GgufFile, section: str) -> Fields:
    """The keys of a file that begin with "<section>.", without it."""
    prefix = f"{section}."
    found = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    return Fields(file.path, found, prefix)


def gguf_architecture(file: GgufFile) -> tuple[Family, GgufArchitecture, Fields]:
    """The family of a file's model, how it is held there, and its settings.

    Raises:
        CheckpointError: the file does not say what it is, or no family supports it.
    """
    general = keys_of(file, "general")
    name = general.text("architecture")
    known = {f.gguf.name: f for f in families().values() if f.gguf is not None}
    family = known.get(name)
    if family is None or family.gguf is None:
        raise general.error(
            "architecture", f"{name[:80]!r} is not supported; supported: {', '.join(sorted(known))}"
        )
    return family, family.gguf, keys_of(file, name)
