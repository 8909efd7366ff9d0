"""How much the columns of each weight matter: the mean squared activations that meet them.

A weight's error reaches the output multiplied by the activation of its column, so a quantiser that
weighs squared errors by squared activations loses less where it matters. llama.cpp calls a file of
such means an importance matrix ("imatrix"); its GGUF form is read and written here, its older
binary form read (llama.cpp, tools/imatrix/imatrix.cpp).
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ktcore.backends.reference.operators import ACTIVATIONS
from ktcore.convert.errors import ConversionError
from ktcore.convert.files import Out, Writer, gguf_layout
from ktcore.convert.weights import EXPERTS, Weight, name_of, place_of
from ktcore.models import Model
from ktcore.models.decoder import PARALLEL_WORK, one_torch_thread
from ktcore.models.family import GGUF_NAMES, TensorNames
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.projection import Projection, SideBySide
from ktcore.weights import CheckpointError, GgufFile
from ktcore.weights.gguf_header import is_gguf

WINDOW = 512  # tokens that are read at a time, as llama.cpp's tool does by default
F32 = 0  # ggml's number of the type
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_ENTRIES, MAX_NAME, MAX_VALUES = 1 << 20, 1 << 10, 1 << 28

Key = tuple[str, "int | None"]  # a weight's role and layer

# What meets the input of the attributes of `Attention` and `Mlp`.
READS = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("mlp_gate", "mlp_up"),
    "down": ("mlp_down",),
}


class Importance:
    """Sums of squared activations, and of how many tokens.

    Attributes:
        sums: float64 [num_experts, columns] by role and layer; one row for what is no expert.
        counts: float64 [num_experts], the tokens that they are of. (Files of llama.cpp's older kind
            have one count, and so one row, for all experts.)
    """

    def __init__(self) -> None:
        self.sums: dict[Key, Tensor] = {}
        self.counts: dict[Key, Tensor] = {}

    def add(self, key: Key, x: Tensor, expert: int = 0, experts: int = 1) -> None:
        """Activations x [T, columns] that met a weight, or one of so many experts."""
        if key not in self.sums:
            self.sums[key] = torch.zeros(experts, x.shape[-1], dtype=torch.float64)
            self.counts[key] = torch.zeros(experts, dtype=torch.float64)
        self.sums[key][expert] += x.to(torch.float64).square().sum(0)
        self.counts[key][expert] += len(x)

    def of(self, weight: Weight) -> Tensor | None:
        """For a weight [..., O, I] its columns' importance [..., I]; None if nothing is known.

        An expert that no token went to has all columns alike.

        Raises:
            ConversionError: it was made for a weight of another size.
        """
        key = (weight.role, weight.layer)
        if key not in self.sums or len(weight.shape) < 2:
            return None
        sums, counts = self.sums[key], self.counts[key]
        expected = (*weight.shape[:-2], weight.shape[-1])
        if sums.numel() != math.prod(expected):
            raise ConversionError(
                f"imatrix: for {weight.key} it has {sums.numel()} numbers, expected "
                f"{list(expected)}: it was made for another model"
            )
        mean = torch.where(
            counts[:, None] > 0, sums / counts[:, None].clamp(min=1), torch.ones_like(sums)
        )
        return mean.reshape(expected)


# -------------------------------------------------------------------------------------- measuring


class _Watched:
    """A part of a model that tells what it is given."""

    def __init__(self, inner: Any, see: Callable[[Tensor], None]):
        self._inner, self._see = inner, see

    def __call__(self, x: Tensor) -> Tensor:
        self._see(x)
        return self._inner(x)

    def split(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        self._see(x)
        return self._inner.split(x, sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def measure(
    model: Model,
    text: str,
    window: int = WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Importance, int]:
    """Run a model over a text, on whatever backend serves it; also, in how many windows.

    The experts' stored weights must not have been released: what lies between an expert's two
    matrices no backend gives out, and is computed from them.

    Raises:
        ValueError: the text is empty.
    """
    found = Importance()
    ids = torch.tensor(model.tokenizer.encode(text), dtype=torch.int64)
    if len(ids) == 0:
        raise ValueError("text: expected some tokens, got none")
    pieces = ids.split(min(window, model.config.context_length))
    with torch.inference_mode(), _watched(model, found):
        for i, piece in enumerate(pieces):
            if progress:
                progress(i, len(pieces))
            model(piece)
    if progress:
        progress(len(pieces), len(pieces))
    return found, len(pieces)


@contextlib.contextmanager
def _watched(model: Model, found: Importance) -> Iterator[None]:
    """Within the block a model's parts tell `found` what they are given."""
    undo: list[tuple[Any, str, Any]] = []

    def watch(owner: Any, name: str, see: Callable[[Tensor], None]) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, _Watched(getattr(owner, name), see))

    def dense(roles: tuple[str, ...], layer: int | None) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            for role in roles:
                found.add((role, layer), x)

        return see

    try:
        for i, layer in enumerate(model.decoder.layers):
            for owner in (layer.attention, layer.mlp):
                for name, value in list(vars(owner).items()):
                    if name in READS and isinstance(value, (Projection, SideBySide)):
                        watch(owner, name, dense(READS[name], i))
            if isinstance(layer.mlp, MoeLayer):
                watch(layer, "mlp", _see_experts(layer.mlp, i, found))
        watch(model.decoder, "head", dense(("head",), None))
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _see_experts(mlp: MoeLayer, layer: int, found: Importance) -> Callable[[Tensor], None]:
    experts, act = mlp.experts, ACTIVATIONS[mlp.activation]

    def see(x: Tensor) -> None:
        ids, _ = mlp.choose(x)
        size = experts.hidden_size * experts.intermediate_size
        with one_torch_thread(len(x) * size < PARALLEL_WORK * experts.num_experts):
            for e in ids.unique().tolist():
                mine = x[(ids == e).any(-1)]
                gate, up = experts.gate[e].dequantize(), experts.up[e].dequantize()
                inner = act(mine @ gate.T, mine @ up.T)
                for role in EXPERTS:
                    given = inner if role == "expert_down" else mine
                    found.add((role, layer), given, e, experts.num_experts)

    return see


# ------------------------------------------------------------------------------------------ files


def _names(key: Key) -> str:
    role, layer = key
    name = name_of(GGUF_NAMES, role, layer)
    return name if name.endswith(".weight") else f"{name}.weight"


def write_imatrix(path: Path, found: Importance, dataset: str, windows: int) -> None:
    """As llama.cpp's tool writes it, in GGUF."""
    tensors: list[Out] = []
    data: list[tuple[str, int, Tensor]] = []
    for key in sorted(found.sums, key=_names):
        sums, counts = found.sums[key].to(torch.float32), found.counts[key].to(torch.float32)
        experts, columns = sums.shape
        for suffix, values, size in ((SUMS, sums, columns), (COUNTS, counts, 1)):
            shape = (experts, size) if experts > 1 else (size,)
            name = _names(key) + suffix
            tensors.append(Out(name, F32, shape, 4 * experts * size))
            data.append((name, 0, values))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [dataset],
        "imatrix.chunk_count": windows,
        "imatrix.chunk_size": WINDOW,
    }
    layout = gguf_layout(path.name, metadata, {}, tensors)
    writer = Writer(path.parent, layout)
    try:
        writer.create()
        writer.write(data)
        writer.finish(tensors)
    finally:
        writer.close()


def read_imatrix(path: Path, names: TensorNames = GGUF_NAMES) -> tuple[Importance, str]:
    """An importance matrix, in either of llama.cpp's forms, and the name of the text it is from.

    Raises:
        CheckpointError: the file is missing, or no sound importance matrix.
    """
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    found, dataset = _read_gguf(path, names) if is_gguf(path) else _read_old(path, names)
    if not found.sums:
        raise CheckpointError(path, "holds nothing about any weight of this kind of model")
    return found, dataset


def _read_gguf(path: Path, names: TensorNames) -> tuple[Importance, str]:
    file, found = GgufFile(path), Importance()
    if file.metadata.get("general.type") != "imatrix":
        raise CheckpointError(path, "is no importance matrix: its general.type is not 'imatrix'")
    for name in file.names():
        base = name.removesuffix(SUMS)
        if base == name:
            continue
        key = _key(names, base)
        sums, counts = (_numbers(file, base + suffix) for suffix in (SUMS, COUNTS))
        if key is None:
            continue
        count = counts.numel()
        if sums.numel() % count:
            raise CheckpointError(path, f"{base!r}: {sums.numel()} sums for {count} counts")
        found.sums[key], found.counts[key] = sums.reshape(count, -1), counts.flatten()
    datasets = file.metadata.get("imatrix.datasets")
    names_of = datasets if isinstance(datasets, list) else []
    return found, ", ".join(str(d) for d in names_of)


def _numbers(file: GgufFile, name: str) -> Tensor:
    if file.info(name).dtype != torch.float32:
        raise CheckpointError(file.path, f"tensor {name!r}: expected F32")
    values = file.tensor(name)
    assert isinstance(values, Tensor)
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise CheckpointError(file.path, f"tensor {name!r}: expected finite numbers from 0")
    return values.to(torch.float64)


def _key(names: TensorNames, name: str) -> Key | None:
    place = place_of(names, name)
    return place and (place.role, place.layer)


def _read_old(path: Path, names: TensorNames) -> tuple[Importance, str]:
    """Entries of (name, calls, sums); how many tokens an expert had it does not say: the sums are
    as if all had had as many."""
    found = Importance()
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(_count(path, file, MAX_ENTRIES, "entries")):
            raw = file.read(_count(path, file, MAX_NAME, "characters"))
            calls = _count(path, file, 1 << 31, "calls")
            length = _count(path, file, min(MAX_VALUES, size // 4), "values")
            data = bytearray(file.read(4 * length))
            if len(data) != 4 * length:
                raise CheckpointError(path, "is cut short, or no importance matrix")
            values = torch.frombuffer(data, dtype=torch.float32).to(torch.float64)
            if not bool((values.isfinite() & (values >= 0)).all()):
                raise CheckpointError(path, f"{raw!r:.80}: expected finite numbers from 0")
            key = _key(names, raw.decode("utf-8", "replace"))
            if key is not None:
                found.sums[key] = values[None]
                found.counts[key] = torch.full((1,), float(max(1, calls)), dtype=torch.float64)
        file.read(4)  # how many calls there were
        rest = file.read(4 + MAX_NAME)
    return found, rest[4:].decode("utf-8", "replace")


def _count(path: Path, file: BinaryIO, most: int, what: str) -> int:
    data = file.read(4)
    value = struct.unpack("<i", data)[0] if len(data) == 4 else -1
    if not 1 <= value <= most:
        raise CheckpointError(path, f"is cut short, or no importance matrix ({value} {what})")
    return value
