"""How much weight data a benchmark puts in memory.

Enough that calls read from memory and not from a cache, little enough that the machine stays
usable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ktcore.dispatch.machine import Machine
from ktcore.formats import get_format

# Going round through several last-level caches' worth of weights, the longest unused first, finds
# none of them cached.
CACHES = 4
LEAST_ROTATION = 128 << 20
MOST_ROTATION = 1 << 30

# Stored forms that exist while a layer is handed to a peer: a file, copies, what it makes of them.
# (As many again find room in the half of memory that is no budget.)
PEER_PASSING = 2


class DoesNotFit(ValueError):
    """The weights do not fit in memory; the message says what they take."""


@dataclass(frozen=True)
class Storage:
    """In which forms a format's weights stay in memory: as stored, packed by backends, and in how
    many peers' own forms.
    """

    stored: bool
    packed: bool
    peers: int = 0

    @property
    def copies(self) -> int:
        return int(self.stored) + int(self.packed) + self.peers


@dataclass(frozen=True)
class Plan:
    """What is materialised.

    Attributes:
        experts: experts of a layer (moe), or 1 (linear).
        layers: per format, how many layers' weights the calls rotate over.
        nbytes: bytes of all that, every copy counted, at the highest.
        budget: what it had to fit in.
    """

    experts: int
    layers: Mapping[str, int]
    nbytes: int
    budget: int


def rotation_bytes(machine: Machine) -> int:
    """How many bytes of weights calls should rotate over."""
    caches = [c.bytes for c in machine.cpu.caches if c.kind != "instruction"]
    wanted = CACHES * max(caches) if caches else MOST_ROTATION
    return min(MOST_ROTATION, max(LEAST_ROTATION, wanted))


def layer_bytes(op: str, hidden_size: int, intermediate_size: int) -> Callable[[str], int]:
    """By format name, the stored bytes of one expert (moe) or one matrix (linear)."""

    def of(name: str) -> int:
        format = get_format(name)
        up = format.nbytes((1, intermediate_size, hidden_size))
        return up if op == "linear" else 2 * up + format.nbytes((1, hidden_size, intermediate_size))

    return of


def make_plan(
    unit_bytes: Callable[[str], int],
    storage: Mapping[str, Storage],
    *,
    experts: int,
    least_experts: int,
    rotation: int,
    budget: int,
    fixed_experts: bool = False,
) -> Plan:
    """As many layers as the rotation takes; fewer, and then fewer experts, where memory is short.

    Args:
        unit_bytes: stored bytes of one expert in a format.
        storage: the formats, and what is kept of each.
        experts: experts of a layer.
        least_experts: below this a layer cannot be called (its top_k).
        rotation: bytes that a format's layers should amount to.
        budget: bytes that everything must fit in.
        fixed_experts: the number of experts was asked for, so it is not reduced.

    Raises:
        DoesNotFit: not even the least fits.
    """

    def total(count: int, layers: Mapping[str, int]) -> int:
        resident = sum(
            layers[name] * count * unit_bytes(name) * kind.copies for name, kind in storage.items()
        )
        # While a layer is packed or handed over, other forms exist as well.
        passing = [
            unit_bytes(n) * (PEER_PASSING if k.peers else int(not k.stored))
            for n, k in storage.items()
        ]
        return resident + count * max(passing, default=0)

    full = {n: max(1, math.ceil(rotation / (experts * unit_bytes(n)))) for n in storage}
    while total(experts, full) > budget and max(full.values(), default=1) > 1:
        full = {name: max(1, layers // 2) for name, layers in full.items()}
    if total(experts, full) <= budget:
        return Plan(experts, full, total(experts, full), budget)
    fits = budget // total(1, full)
    if fits < least_experts or fixed_experts:
        count = experts if fixed_experts else least_experts
        raise DoesNotFit(
            f"experts: {count} in {', '.join(storage)} take {total(count, full) / 1e9:.1f} GB at "
            f"the same time, {budget / 1e9:.1f} GB may be used (half of what is available): "
            + (f"at most {fits} experts fit" if fits >= least_experts else "choose fewer formats")
        )
    return Plan(fits, full, total(fits, full), budget)
