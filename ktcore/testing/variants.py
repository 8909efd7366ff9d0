"""The implementations to try: every backend, and each of its instruction sets that can run here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ktcore import _native
from ktcore.backends.native.operators import held_to
from ktcore.dispatch import probe, registry


@dataclass(frozen=True)
class Variant:
    """A backend held to one instruction set.

    Attributes:
        backend: its name.
        name: the instruction set's, else the backend's.
        hidden: CPU features to hide, so that no more capable instruction set is chosen.
        why_not: why it cannot run here; None if it can.
    """

    backend: str
    name: str
    hidden: tuple[str, ...] = ()
    why_not: str | None = None

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Within the block every operator goes to this variant."""
        with contextlib.ExitStack() as stack:
            if self.hidden:
                stack.enter_context(probe.override(disable=self.hidden))
            if self.name != self.backend or self.hidden:
                stack.enter_context(held_to(self.name))
            stack.enter_context(registry.use(self.backend))
            yield


def variants(backend: str) -> list[Variant]:
    """A backend's variants, the most capable last; one entry if it has no instruction sets."""
    reason = registry.why_not(backend)
    isas = [i for i in _native.ext.isas() if i["backend"] == backend] if _native.ext else []
    if not isas:
        return [Variant(backend, backend, (), reason)]
    out = []
    cpu = probe.machine().cpu
    for i, isa in enumerate(isas):
        beyond = {f for later in isas[i + 1 :] for f in later["requires"]} - set(isa["requires"])
        hidden = tuple(sorted(f for f in beyond if cpu.has(f)))
        missing = cpu.missing(*isa["requires"])
        lacks = f"this machine lacks {', '.join(missing)}" if missing else None
        out.append(Variant(backend, isa["name"], hidden, lacks or reason))
    return out


def all_variants() -> list[Variant]:
    """Those of every backend that could be imported."""
    return [v for backend in registry.backends() for v in variants(backend)]
