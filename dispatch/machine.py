"""What the probe found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True)
class Feature:
    """A CPU feature: whether the processor has it and whether the operating system allows it."""

    cpu: bool
    os: bool

    @property
    def usable(self) -> bool:
        return self.cpu and self.os


@dataclass(frozen=True)
class Cache:
    level: int
    kind: str  # "data", "instruction" or "unified"
    bytes: int
    shared_by: int  # logical CPUs


@dataclass(frozen=True)
class NumaNode:
    node: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Cpu:
    architecture: str
    features: Mapping[str, Feature]
    logical_cores: int
    physical_cores: int
    affinity: tuple[int, ...]  # CPUs this process may run on
    quota: float | None = None  # container limit, in CPUs
    caches: tuple[Cache, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    disabled: tuple[str, ...] = ()  # features hidden on request

    def has(self, *names: str) -> bool:
        """Whether every named feature can be used."""
        return not self.missing(*names)

    def missing(self, *names: str) -> list[str]:
        """Of the named features, those that cannot be used, each with the reason."""
        out = []
        for name in names:
            feature = self.features.get(name)
            if feature is None or not feature.cpu:
                out.append(name)
            elif not feature.os:
                out.append(f"{name} (not enabled by the operating system)")
            elif name in self.disabled:
                out.append(f"{name} (disabled on request)")
        return out


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None  # container limit


@dataclass(frozen=True)
class Device:
    kind: str  # "cuda", "rocm", "xpu" or "ascend"
    index: int
    name: str
    memory_bytes: int
    detail: str = ""


@dataclass(frozen=True)
class Machine:
    cpu: Cpu
    memory: Memory
    devices: tuple[Device, ...] = ()
    # Per kind of device, why there is none: absent hardware, a missing package, a broken driver.
    absent: Mapping[str, str] = field(default_factory=dict)
    system: str = ""

    def without(self, *features: str) -> Machine:
        """This machine as it would be without some CPU features."""
        disabled = tuple(dict.fromkeys((*self.cpu.disabled, *features)))
        return replace(self, cpu=replace(self.cpu, disabled=disabled))

    def to_dict(self) -> dict:
        return asdict(self)
