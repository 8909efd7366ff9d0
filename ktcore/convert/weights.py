"""A model's weights by what they are for, whatever its files call them and however they hold them.

Experts are one `Weight` for each projection of a layer, [num_experts, O, I], whether the files have
a tensor for each expert, one for all of them, or gate and up in one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ktcore.models.family import TensorNames
from ktcore.models.loading import needed_tensors
from ktcore.models.source import Source
from ktcore.weights import Checkpoint, GgufFile, QuantTensor
from ktcore.weights.quantization import QuantizedCheckpoint, stack

Stored = Tensor | QuantTensor

EXPERTS = ("expert_gate", "expert_up", "expert_down")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Place:
    """What a tensor is, by its name.

    Attributes:
        role: a field of `TensorNames`.
        layer: None for what is no layer's.
        expert: None for what is no single expert's.
        part: "weight" or "bias" where the field gives the module's name only, else "".
    """

    role: str
    layer: int | None
    expert: int | None
    part: str


@functools.lru_cache(maxsize=8)
def _patterns(names: TensorNames) -> tuple[tuple[str, re.Pattern], ...]:
    out = []
    for field in dataclasses.fields(names):
        template = getattr(names, field.name)
        if isinstance(template, str):
            pattern = re.escape(template)
            for variable in ("layer", "expert"):
                pattern = pattern.replace(re.escape(f"{{{variable}}}"), rf"(?P<{variable}>\d+)")
            out.append((field.name, re.compile(rf"{pattern}(?:\.(?P<part>weight|bias))?")))
    return tuple(out)


def place_of(names: TensorNames, name: str) -> Place | None:
    """What a tensor is; None if these are not names of its model."""
    for role, pattern in _patterns(names):
        found = pattern.fullmatch(name)
        if found is not None:
            numbers = {k: int(v) for k, v in found.groupdict().items() if k != "part" and v}
            return Place(role, numbers.get("layer"), numbers.get("expert"), found["part"] or "")
    return None


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        role: a field of `TensorNames`; of experts one of `EXPERTS`.
        layer: None for what is no layer's.
        part: see `Place`.
        shape: logical shape; [num_experts, O, I] for experts.
        formats: names of the formats that it is stored in, usually one.
        nbytes: of its stored form.
        read: begin and end of a range of the first dimension to its stored numbers.
    """

    role: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    formats: tuple[str, ...]
    nbytes: int
    read: Callable[[int, int], Stored]

    @property
    def experts(self) -> bool:
        return self.role in EXPERTS

    @property
    def small(self) -> bool:
        """Norms, biases and routers: a millionth of the bytes, and much hangs on them."""
        return len(self.shape) == 1 or self.role == "router"

    @property
    def linear(self) -> bool:
        """Whether it is a matrix that tokens are multiplied with: what is quantised."""
        return not self.small and self.role not in ("embedding", "head")

    @property
    def key(self) -> str:
        """What it is, in one word: "layer 3 expert_gate"."""
        text = self.role if self.layer is None else f"layer {self.layer} {self.role}"
        return text if self.part in ("", "weight") else f"{text} {self.part}"

    def name(self, names: TensorNames, expert: int | None = None) -> str:
        """What its tensor is called there; of experts one's, or without a number the stack's."""
        role = self.role
        if self.experts and expert is None:
            role = role.replace("expert_", "stacked_")
        text = getattr(names, role).format(layer=self.layer, expert=expert)
        return f"{text}.{self.part}" if self.part else text


def _format_name(info: object) -> str:
    """What `ktcore.formats` calls the way in which a tensor is stored."""
    dtype = getattr(info, "dtype", None)
    if dtype is not None:
        return DTYPE_NAMES.get(dtype, str(dtype))
    kind = getattr(info, "type", None)
    return info.format.name if kind is None else kind.format  # type: ignore[attr-defined]


class _Whole:
    """Ranges of a checkpoint's tensors; the last that was read is kept, for its other ranges."""

    def __init__(self, checkpoint: Checkpoint | QuantizedCheckpoint | GgufFile):
        self.checkpoint = checkpoint
        self._last: tuple[str, Stored] | None = None

    def rows(self, name: str, begin: int, end: int) -> Stored:
        if isinstance(self.checkpoint, GgufFile):
            return self.checkpoint.tensor(name, rows=slice(begin, end))
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is read
            self._last = (name, self.checkpoint.tensor(name))
        whole = self._last[1]
        if isinstance(whole, Tensor):
            return whole[begin:end]
        if (begin, end) == (0, whole.shape[0]):
            return whole
        if len(whole.shape) > 2:
            return whole[begin:end]
        return whole.dequantize()[begin:end]

    def each(self, names: list[str], begin: int, end: int) -> Stored:
        """Some of so many matrices that are tensors of their own, as one stack."""
        found = [self.checkpoint.tensor(name) for name in names[begin:end]]
        quantised = [t for t in found if isinstance(t, QuantTensor)]
        if not quantised:
            return torch.stack(found)
        if len(quantised) == len(found) and len({t.format.name for t in quantised}) == 1:
            return stack(quantised, len(found))
        return torch.stack([floats(t) for t in found])

    def halves(self, name: str, second: bool, rows: int, begin: int, end: int) -> Stored:
        """Gate or up of a stack that holds both, [num_experts, 2 * rows, I]."""
        both = floats(self.rows(name, begin, end))
        return both[:, rows:] if second else both[:, :rows]


def floats(weight: Stored) -> Tensor:
    """A plain tensor as it is, a quantised one as float32."""
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight


def read_weights(source: Source) -> list[Weight]:
    """All weights of a model: what is before the layers, each layer's, what is behind them.

    Raises:
        CheckpointError: `ktcore.models.load_model` would refuse the model.
    """
    whole = _Whole(source.checkpoint)
    stacks: dict[tuple[int | None, str], list[str]] = {}
    out: list[Weight] = []
    shapes = dict(needed_tensors(source))
    for name in shapes:
        place = place_of(source.names, name)
        assert place is not None, name
        if place.expert is not None:
            stacks.setdefault((place.layer, place.role), []).append(name)
        else:
            out += _of_tensor(source, whole, name, place, shapes[name])
    for (layer, role), names in stacks.items():
        infos = [source.checkpoint.info(name) for name in names]
        out.append(
            Weight(
                role,
                layer,
                "",
                (len(names), *shapes[names[0]]),
                tuple(dict.fromkeys(map(_format_name, infos))),
                sum(info.end - info.begin for info in infos),
                functools.partial(whole.each, names),
            )
        )
    last = source.config.num_hidden_layers
    # (Stable: within a layer the order stays, experts after what precedes them.)
    return sorted(out, key=lambda w: last if w.role in ("final_norm", "head") else _first(w))


def _first(weight: Weight) -> int:
    return -1 if weight.layer is None else weight.layer


def _of_tensor(
    source: Source, whole: _Whole, name: str, place: Place, shape: tuple[int, ...]
) -> Iterator[Weight]:
    info = source.checkpoint.info(name)
    formats, nbytes = (_format_name(info),), info.end - info.begin
    if place.role == "stacked_gate_up":
        experts, rows, columns = shape[0], shape[1] // 2, shape[2]
        for second, role in enumerate(EXPERTS[:2]):
            read = functools.partial(whole.halves, name, bool(second), rows)
            yield Weight(
                role, place.layer, "", (experts, rows, columns), formats, nbytes // 2, read
            )
        return
    role = place.role.replace("stacked_", "expert_")
    read = functools.partial(whole.rows, name)
    yield Weight(role, place.layer, place.part, shape, formats, nbytes, read)


def left_over(source: Source) -> list[str]:
    """Tensors of the files that no part of the model is made of, as far as that can be told."""
    if isinstance(source.checkpoint, QuantizedCheckpoint):
        return []
    needed = {name for name, _ in needed_tensors(source)}
    return [name for name in source.checkpoint.names() if name not in needed]


def source_files(source: Source) -> list[Path]:
    """The files that hold a model's tensors."""
    checkpoint = source.checkpoint
    if isinstance(checkpoint, GgufFile):
        return checkpoint.files
    if isinstance(checkpoint, QuantizedCheckpoint):
        checkpoint = checkpoint.checkpoint
    return checkpoint.files()
