"""How checkpoints hold the experts of a layer, and making `ExpertWeights` of it.

Each expert's projections in tensors of their own or all in one; gate and up apart, one after the
other, or row by row in turns; matrices as [O, I] or the other way around; with biases or without.
A family declares its layouts; what comes out is always the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ktcore import ops
from ktcore.formats import Format, get_format
from ktcore.models.decoder import one_torch_thread
from ktcore.weights import CheckpointError, ExpertWeights, GgufFile, QuantTensor
from ktcore.weights.gguf_header import GgufTensorInfo
from ktcore.weights.quantization import QuantInfo, stack
from ktcore.weights.safetensors_file import TensorInfo

Shape = tuple[int, ...]
PLAIN = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
Info = TensorInfo | QuantInfo | GgufTensorInfo

# Weights of a stack that are quantised anew at a time (one expert's at least), so that their
# float32 form, and what is computed on the way to it, stays small.
WEIGHTS_AT_ONCE = 1 << 22


class Files(Protocol):
    """What tensors are read from: `Checkpoint`, `QuantizedCheckpoint` or `GgufFile`."""

    path: Path

    def __contains__(self, name: str) -> bool: ...
    def info(self, name: str) -> Info: ...
    def tensor(self, name: str) -> Tensor | QuantTensor: ...


@dataclass(frozen=True)
class ExpertLayout:
    """The names of the tensors, with `{layer}` and, where each expert has its own, `{expert}`.

    Attributes:
        down: [H, I] of an expert, or [E, H, I] of all.
        gate, up: [I, H], or [E, I, H].
        gate_up: both in one tensor, [2I, H] or [E, 2I, H], in place of `gate` and `up`.
        interleaved: the rows of `gate_up` are gate, up, gate, up, ..., else all of gate come first.
        transposed: floating-point matrices are stored the other way around, [E, H, 2I] and
            [E, I, H]; quantised ones are not.
        down_bias, gate_bias, up_bias, gate_up_bias: [O] of an expert or [E, O] of all.
    """

    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    interleaved: bool = False
    transposed: bool = False
    down_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    gate_up_bias: str | None = None

    def halves(self, whole: Tensor | QuantTensor) -> tuple:
        """Gate and up of what has both: [E, 2I, H], or biases [E, 2I].

        Raises:
            ValueError: a format that does not have every row for itself.
        """
        middle = whole.shape[1] // 2
        rows = (slice(0, middle), slice(middle, None))
        if self.interleaved:
            rows = (slice(0, None, 2), slice(1, None, 2))
        if isinstance(whole, Tensor):
            return tuple(whole[:, some] for some in rows)
        if not whole.format.by_rows:
            raise ValueError(
                f"gate and up are one tensor in {whole.format.name}, whose rows cannot be parted"
            )
        shape, parts = (whole.shape[0], middle, *whole.shape[2:]), whole.parts.items()
        return tuple(
            QuantTensor(whole.format, shape, {name: p[:, some].contiguous() for name, p in parts})
            for some in rows
        )


_HF = "model.layers.{layer}.mlp.experts"

# Most Hugging Face checkpoints; and what transformers 5 holds, and may save, of them.
PER_EXPERT = ExpertLayout(
    gate=f"{_HF}.{{expert}}.gate_proj.weight",
    up=f"{_HF}.{{expert}}.up_proj.weight",
    down=f"{_HF}.{{expert}}.down_proj.weight",
)
FUSED = ExpertLayout(gate_up=f"{_HF}.gate_up_proj", down=f"{_HF}.down_proj")
# gpt-oss, in mxfp4 as published or in floating point.
GPT_OSS = ExpertLayout(
    gate_up=f"{_HF}.gate_up_proj",
    gate_up_bias=f"{_HF}.gate_up_proj_bias",
    down=f"{_HF}.down_proj",
    down_bias=f"{_HF}.down_proj_bias",
    interleaved=True,
    transposed=True,
)
LLAMA4 = ExpertLayout(
    gate_up="model.layers.{layer}.feed_forward.experts.gate_up_proj",
    down="model.layers.{layer}.feed_forward.experts.down_proj",
    transposed=True,
)
# GGUF files, and those of gpt-oss.
GGUF = ExpertLayout(
    gate="blk.{layer}.ffn_gate_exps.weight",
    up="blk.{layer}.ffn_up_exps.weight",
    down="blk.{layer}.ffn_down_exps.weight",
)
GGUF_BIASES = ExpertLayout(
    gate=GGUF.gate,
    gate_bias="blk.{layer}.ffn_gate_exps.bias",
    up=GGUF.up,
    up_bias="blk.{layer}.ffn_up_exps.bias",
    down=GGUF.down,
    down_bias="blk.{layer}.ffn_down_exps.bias",
)


class ExpertReader:
    """Reads the experts of layers.

    Args:
        files: where the tensors are.
        layouts: those that the family may have; the first whose down projection is there counts,
            and if none is, the last.
        layer: one that has experts, to find that out.
        num_experts, intermediate_size, hidden_size: E, I, H.
        format: to quantise the experts to, None: as stored.
    """

    def __init__(
        self,
        files: Files,
        layouts: tuple[ExpertLayout, ...],
        layer: int,
        num_experts: int,
        intermediate_size: int,
        hidden_size: int,
        format: Format | None,
    ):
        self.files, self.format = files, format
        self.num_experts = num_experts
        self.intermediate_size, self.hidden_size = intermediate_size, hidden_size
        there = (lay for lay in layouts if lay.down.format(layer=layer, expert=0) in files)
        self.layout = next(there, layouts[-1])

    # -------------------------------------------------------------------------- what there is

    def _names(self, role: str, layer: int) -> list[str]:
        """One name, or one for each expert; none where the layout has no such tensor."""
        name = getattr(self.layout, role)
        if name is None:
            return []
        count = self.num_experts if "{expert}" in name else 1
        return [name.format(layer=layer, expert=e) for e in range(count)]

    def expected(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each tensor of a layer's experts."""
        inner, hidden = self.intermediate_size, self.hidden_size
        for role, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("gate_up", 2 * inner, hidden),
            ("down", hidden, inner),
        ):
            for name in self._names(role, layer):
                matrix = (columns, rows) if self._is_transposed(name) else (rows, columns)
                yield name, self._stacked(role) + matrix
            for name in self._names(f"{role}_bias", layer):
                yield name, (*self._stacked(f"{role}_bias"), rows)

    def _stacked(self, role: str) -> Shape:
        return () if "{expert}" in getattr(self.layout, role) else (self.num_experts,)

    def _is_transposed(self, name: str) -> bool:
        return (
            self.layout.transposed
            and name in self.files
            and not isinstance(self.files.info(name), QuantInfo)
        )

    # -------------------------------------------------------------------------------- reading

    def read(self, layer: int) -> ExpertWeights:
        """The experts of a layer.

        Raises:
            CheckpointError: they are stored unlike each other, and no format is wanted.
        """
        try:
            # (Of gate and up as read, nothing is held any more when down is.)
            gate, up = self._gate_and_up(layer)
            return ExpertWeights(gate, up, self._projection("down", layer), **self.biases(layer))
        except CheckpointError:
            raise
        except ValueError as error:  # unlike each other
            raise CheckpointError(
                self.files.path,
                f"experts of layer {layer}: {error}; format= (ktcore run --format) quantises them "
                "anew",
            ) from error

    def _gate_and_up(self, layer: int) -> tuple[QuantTensor, QuantTensor]:
        if self.layout.gate_up is None:
            self._check_alike(layer)
            return self._projection("gate", layer), self._projection("up", layer)
        whole = self._whole("gate_up", layer)
        if isinstance(whole, QuantTensor) and self.format not in (None, whole.format):
            return self._half_anew(whole, 0), self._half_anew(whole, 1)
        gate, up = self.layout.halves(whole)
        return self._store(gate), self._store(up)

    def _half_anew(self, whole: QuantTensor, which: int) -> QuantTensor:
        """Gate (0) or up (1) of a quantised [E, 2I, H], in the wanted format."""
        experts, rows, columns = whole.shape
        return self._anew(
            (experts, rows // 2, columns),
            lambda some: self.layout.halves(whole[some].dequantize(torch.float32))[which],
        )

    def _check_alike(self, layer: int) -> None:
        """Raises CheckpointError, before anything is read, if stacks are of unlike types."""
        if self.format is not None or not self._stacked("gate"):
            return
        for gate, up in zip(self._names("gate", layer), self._names("up", layer), strict=True):
            types = [_type(self.files.info(name)) for name in (gate, up)]
            if types[0] != types[1]:
                raise CheckpointError(
                    self.files.path,
                    f"tensor {gate!r} is {types[0]}, but {up!r} is {types[1]}: gate and up must be "
                    "stored alike; format= (ktcore run --format) quantises them anew",
                )

    def _projection(self, role: str, layer: int) -> QuantTensor:
        """[E, O, I], in the wanted format."""
        names, files = self._names(role, layer), self.files
        if len(names) > 1 and self.format is not None and self._any_quantised(names):
            # Each by itself: they need not be stored alike.
            return stack((self._store(files.tensor(name)) for name in names), len(names))
        if self._stacked(role) and self.format is not None and isinstance(files, GgufFile):
            info = files.info(names[0])
            if info.type.format != self.format.name:
                return self._anew(info.shape, lambda some: files.tensor(names[0], rows=some))
        return self._store(self._whole(role, layer))

    def _any_quantised(self, names: list[str]) -> bool:
        return any(isinstance(self.files.info(name), QuantInfo) for name in names)

    def _whole(self, role: str, layer: int) -> Tensor | QuantTensor:
        """All experts' [E, O, I], as stored."""
        names = self._names(role, layer)
        if self._stacked(role):
            whole = self.files.tensor(names[0])
        elif self._any_quantised(names):
            return stack((self._as_quantised(name) for name in names), len(names))
        else:
            whole = self._gathered(names)
        return whole.mT if self._is_transposed(names[0]) else whole

    def _as_quantised(self, name: str) -> QuantTensor:
        weight = self.files.tensor(name)
        return weight if isinstance(weight, QuantTensor) else self._store(weight)

    def _gathered(self, names: list[str]) -> Tensor:
        whole = None
        for e, name in enumerate(names):
            tensor = self.files.tensor(name)
            if whole is None:
                whole = torch.empty((len(names), *tensor.shape), dtype=tensor.dtype)
            with one_torch_thread(True):  # more only wait for each other over a copy
                whole[e] = tensor
        assert whole is not None
        return whole

    def biases(self, layer: int) -> dict[str, Tensor]:
        """By their names as arguments of `ExpertWeights`, float32 [E, O]."""
        found = {}
        for role in ("gate_bias", "up_bias", "gate_up_bias", "down_bias"):
            names = self._names(role, layer)
            if names:
                whole = self.files.tensor(names[0])
                whole = whole if self._stacked(role) else self._gathered(names)
                found[role] = whole.to(torch.float32)
        if "gate_up_bias" in found:
            found["gate_bias"], found["up_bias"] = self.layout.halves(found.pop("gate_up_bias"))
        return found

    # ------------------------------------------------------------------------------- formats

    def _store(self, weight: Tensor | QuantTensor) -> QuantTensor:
        """In the wanted format."""
        format = self.format or self._as_stored(weight)
        if isinstance(weight, QuantTensor) and weight.format is format:
            return weight
        if len(weight.shape) == 2 or (isinstance(weight, Tensor) and format.name in PLAIN.values()):
            return _quantized(weight, format)
        return self._anew(tuple(weight.shape), weight.__getitem__)

    def _anew(self, shape: Shape, some: Callable[[slice], Tensor | QuantTensor]) -> QuantTensor:
        """A stack [E, O, I] in the wanted format, a few experts at a time; `some` reads them."""
        assert self.format is not None
        parts = {
            part: torch.empty(size, dtype=dtype)
            for part, (size, dtype) in self.format.part_specs(shape).items()
        }
        step = max(1, WEIGHTS_AT_ONCE // math.prod(shape[1:]))
        for begin in range(0, shape[0], step):
            rows = slice(begin, begin + step)
            for part, stored in _quantized(some(rows), self.format).parts.items():
                parts[part][rows] = stored
        return QuantTensor(self.format, shape, parts)

    def _as_stored(self, weight: Tensor | QuantTensor) -> Format:
        """What it is in; but floating-point tensors of safetensors files become bf16."""
        if isinstance(weight, QuantTensor):
            return weight.format
        return get_format(PLAIN[weight.dtype] if isinstance(self.files, GgufFile) else "bf16")


def _quantized(weight: Tensor | QuantTensor, format: Format) -> QuantTensor:
    if isinstance(weight, QuantTensor):
        weight = weight.dequantize(torch.float32)
    if format.name in PLAIN.values():
        return QuantTensor.quantize(weight, format)
    return ops.quantize(weight, format)


def _type(info: Info) -> str:
    """What a tensor is stored in, to be compared and shown."""
    if isinstance(info, GgufTensorInfo):
        return info.type.name
    return info.format.name if isinstance(info, QuantInfo) else "bf16"
