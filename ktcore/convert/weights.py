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

import torch
from torch import Tensor

from ktcore.convert.errors import ConversionError
from ktcore.models.expert_layout import ExpertLayout
from ktcore.models.family import TensorNames
from ktcore.models.loading import expert_layout, needed_tensors
from ktcore.models.source import Source
from ktcore.weights import Checkpoint, GgufFile, QuantTensor
from ktcore.weights.quantization import QuantInfo, QuantizedCheckpoint, stack

Stored = Tensor | QuantTensor

EXPERTS = ("expert_gate", "expert_up", "expert_down")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Place:
    """What a tensor is, by its name.

    Attributes:
        role: a field of `TensorNames`; of experts "expert_" and a field of `ExpertLayout`.
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
    templates = [*_templates(names, "")]
    for layout in names.experts:
        templates += _templates(layout, "expert_")
    out = []
    for role, template in templates:
        pattern = re.escape(template)
        for variable in ("layer", "expert"):
            pattern = pattern.replace(re.escape(f"{{{variable}}}"), rf"(?P<{variable}>\d+)")
        out.append((role, re.compile(rf"{pattern}(?:\.(?P<part>weight|bias))?")))
    return tuple(out)


def _templates(names: TensorNames | ExpertLayout, prefix: str) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(names):
        template = getattr(names, field.name)
        if isinstance(template, str):
            yield prefix + field.name, template


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
        text = name_of(names, self.role, self.layer, expert)
        return f"{text}.{self.part}" if self.part else text


def name_of(
    names: TensorNames, role: str, layer: int | None = None, expert: int | None = None
) -> str:
    """What the tensor, or module, of a role is called; of experts as in `Weight.name`."""
    template = getattr(names, role, None)
    if role in EXPERTS:
        there = (getattr(layout, role.removeprefix("expert_")) for layout in names.experts)
        template = next(t for t in there if t and ("{expert}" in t) == (expert is not None))
    assert template is not None, role
    return template.format(layer=layer, expert=expert)


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


def floats(weight: Stored) -> Tensor:
    """A plain tensor as it is, a quantised one as float32."""
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight


def read_weights(source: Source) -> list[Weight]:
    """All weights of a model: what is before the layers, each layer's, what is behind them.

    Raises:
        CheckpointError: `ktcore.models.load_model` would refuse the model.
        ConversionError: its experts have biases, for which no target has a place.
    """
    whole = _Whole(source.checkpoint)
    layout = expert_layout(source)
    if any(name.endswith("_bias") for name, _ in _templates(layout, "")):
        raise ConversionError(f"{source.path}: experts with biases cannot be converted yet")
    names_there = dataclasses.replace(source.names, experts=(layout,))
    stacks: dict[tuple[int | None, str], list[str]] = {}
    out: list[Weight] = []
    shapes = dict(needed_tensors(source))
    for name in shapes:
        place = place_of(names_there, name)
        assert place is not None, name
        if place.role.startswith("expert_"):
            stacks.setdefault((place.layer, place.role), []).append(name)
            continue
        info = source.checkpoint.info(name)
        formats, nbytes = (_format_name(info),), info.end - info.begin
        read = functools.partial(whole.rows, name)
        out.append(Weight(place.role, place.layer, place.part, shapes[name], formats, nbytes, read))
    for (layer, role), names in stacks.items():
        out += _of_experts(source, whole, layout, role, layer, names, shapes[names[0]])
    last = source.config.num_hidden_layers
    # (Stable: within a layer the order stays, experts after what precedes them.)
    return sorted(out, key=lambda w: last if w.role in ("final_norm", "head") else _first(w))


def _first(weight: Weight) -> int:
    return -1 if weight.layer is None else weight.layer


def _of_experts(
    source: Source,
    whole: _Whole,
    layout: ExpertLayout,
    role: str,
    layer: int | None,
    names: list[str],
    shape: tuple[int, ...],
) -> Iterator[Weight]:
    """What the tensors of a role in a layer are; `shape` is that of each."""
    infos = [source.checkpoint.info(name) for name in names]
    formats = tuple(dict.fromkeys(map(_format_name, infos)))
    nbytes = sum(info.end - info.begin for info in infos)
    read: Callable[[int, int], Stored] = functools.partial(whole.each, names)
    if len(shape) == 3:
        read = functools.partial(whole.rows, names[0])
    rows, columns = shape[-2:]
    if layout.transposed and not isinstance(infos[0], QuantInfo):
        rows, columns = columns, rows
        read = functools.partial(_transposed, read)
    experts = source.config.num_experts
    if role != "expert_gate_up":
        yield Weight(role, layer, "", (experts, rows, columns), formats, nbytes, read)
        return
    for which, half in enumerate(EXPERTS[:2]):
        half_read = functools.partial(_half, layout, read, which)
        shape = (experts, rows // 2, columns)
        yield Weight(half, layer, "", shape, formats, nbytes // 2, half_read)


def _transposed(read: Callable[[int, int], Stored], begin: int, end: int) -> Stored:
    return floats(read(begin, end)).mT


def _half(
    layout: ExpertLayout, read: Callable[[int, int], Stored], which: int, begin: int, end: int
) -> Stored:
    """Gate (0) or up (1) of what holds both."""
    return layout.halves(floats(read(begin, end)))[which]


def left_over(source: Source) -> list[str]:
    """Tensors of the files that no part of the model is made of, as far as that can be told."""
    if isinstance(source.checkpoint, QuantizedCheckpoint):
        return []
    needed = {name for name, _ in needed_tensors(source)}
    return [name for name in source.checkpoint.names() if name not in needed]
