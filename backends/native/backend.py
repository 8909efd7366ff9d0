"""What the registry asks of a CPU backend. The operators are imported once it asks for them."""

from __future__ import annotations

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Backend, Implementation


def cpu_backend(name: str, description: str, rank: int, evidence: dict[str, str]) -> Backend:
    """A backend of the extension, by the name that its instruction sets give there.

    `evidence` says how each of its instruction sets has been verified.
    """

    def missing(machine: Machine) -> list[str]:
        from ktcore.backends.native import operators

        return operators.missing(name, machine)

    def implementations() -> list[Implementation]:
        from ktcore.backends.native import operators

        return operators.operators(name)

    def self_check() -> None:
        from ktcore.backends.native import self_check

        self_check.self_check(name)

    def evidence_on(machine: Machine) -> str:
        from ktcore.backends.native import operators

        return operators.evidence(name, evidence, machine)

    return Backend(name, description, rank, missing, implementations, self_check, evidence_on)
