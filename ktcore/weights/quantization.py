"""Checkpoints that are quantised already: from config.json's `quantization_config` and the tensors
that belong to a linear layer to a `QuantTensor` of the format that they are stored in.

A layer that has a plain floating-point `weight` is taken as it is, whether or not the configuration
lists it as left out: many do not list their routers.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ktcore.formats import Format, Parts, get_format
from ktcore.formats.awq import awq
from ktcore.formats.compressed import int8_group, packed_integer
from ktcore.formats.fp8 import fp8_block
from ktcore.formats.gptq import add_one_by_words, gptq
from ktcore.formats.mx import e8m0
from ktcore.weights.quant_tensor import QuantTensor
from ktcore.weights.safetensors_file import Checkpoint, CheckpointError, TensorInfo

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
LARGEST_GROUP = 1 << 20


class Settings(Protocol):
    """An object of a JSON file, as `ktcore.models.config.Fields`; errors are CheckpointErrors."""

    path: Path
    fields: dict

    def get(self, name: str, default: object = None) -> object: ...
    def inner(self, name: str) -> Settings | None: ...
    def error(self, name: str, what: str) -> CheckpointError: ...
    def integer(self, name: str, default: object = ..., least: int = 1, most: int = ...) -> int: ...
    def flag(self, name: str, default: bool) -> bool: ...
    def text(self, name: str, default: object = ...) -> str: ...
    def integers(self, name: str) -> list[int]: ...


@dataclass(frozen=True)
class Stored:
    """How a weight is stored.

    Attributes:
        format: its format, if what only the tensors' content can tell is as usual.
        shape: logical shape, [O, I] or [num_experts, O, I].
        tensors: names in the checkpoint, by what `make` calls them.
        make: the stored tensors to a format and its parts.
    """

    format: Format
    shape: tuple[int, ...]
    tensors: dict[str, str]
    make: Callable[[dict[str, Tensor]], tuple[Format, Parts]]


@dataclass(frozen=True)
class QuantInfo:
    """What `Checkpoint.info` says of a tensor, for a quantised one: `end - begin` is its bytes."""

    format: Format
    shape: tuple[int, ...]
    end: int
    begin: int = 0
    dtype: None = None


class _Linear:
    """The tensors of one linear layer, checked as they are asked for."""

    def __init__(self, checkpoint: Checkpoint, base: str, scheme: str, separator: str = "."):
        self.checkpoint, self.base, self.scheme = checkpoint, base, scheme
        self.separator = separator
        self.tensors: dict[str, str] = {}

    def name(self, suffix: str) -> str:
        return f"{self.base}{self.separator}{suffix}"

    def has(self, suffix: str) -> bool:
        return self.name(suffix) in self.checkpoint

    def error(self, suffix: str, what: str) -> CheckpointError:
        return CheckpointError(
            self.checkpoint.path, f"tensor {self.name(suffix)!r} ({self.scheme}): {what}"
        )

    def take(self, suffix: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]):
        """Info of a tensor that must have one of the types and shapes (any, if none is given)."""
        if not self.has(suffix):
            raise CheckpointError(
                self.checkpoint.path,
                f"lacks the tensor {self.name(suffix)!r}, of a layer quantised as {self.scheme}",
            )
        info = self.checkpoint.info(self.name(suffix))
        if info.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise self.error(suffix, f"expected {expected}, got {info.dtype}")
        if shapes and info.shape not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise self.error(suffix, f"expected shape {expected}, got {list(info.shape)}")
        self.tensors[suffix] = self.name(suffix)
        return info

    def matrix(self, suffix: str, dtype: torch.dtype, dimensions: int = 2) -> tuple[int, ...]:
        """The shape of a tensor of so many dimensions."""
        shape = self.take(suffix, (dtype,)).shape
        if len(shape) != dimensions or 0 in shape:
            raise self.error(suffix, f"expected {dimensions} dimensions, got {list(shape)}")
        return shape

    def take_parts(self, format: Format, shape: tuple[int, ...], but: tuple[str, ...] = ()) -> None:
        """All parts of a format that stores them under the file's own names."""
        for part, (size, dtype) in format.part_specs(shape).items():
            if part not in but:
                self.take(part, (dtype,), size)

    def stored(
        self,
        format: Format,
        shape: tuple[int, ...],
        make: Callable[[dict[str, Tensor]], Parts] = dict,
    ) -> Stored:
        return Stored(format, shape, dict(self.tensors), lambda t: (format, make(t)))


# ------------------------------------------------------------------------ one function a scheme


def _group_size(settings: Settings, name: str, default: object) -> int | None:
    """None where a whole row is a group: -1, or nothing where the default is None."""
    if default is None and settings.get(name) is None:
        return None
    size = settings.integer(name, default, least=-1, most=LARGEST_GROUP)
    if size == 0:
        raise settings.error(name, "expected -1 or a number from 1, got 0")
    return None if size == -1 else size


def _fp8(linear: _Linear, block: list[int]) -> Stored:
    """e4m3 with a scale per block, per output channel or for the whole tensor.

    Scales per block may be e8m0, of which every number is a float32's.
    """
    shape = linear.matrix("weight", E4M3)
    scale = "weight_scale_inv" if linear.has("weight_scale_inv") else "weight_scale"
    if block:
        format = fp8_block(*block)
        linear.take(scale, (*FLOATS, torch.uint8), format.part_specs(shape)["scales"][0])
    else:
        format = get_format("fp8_e4m3")
        linear.take(scale, FLOATS, (), (1,), shape[:1], (shape[0], 1))

    def make(t: dict[str, Tensor]) -> Parts:
        scales = t[scale]
        exponents = scales.dtype == torch.uint8
        scales = e8m0(scales, torch.float32) if exponents else scales.to(torch.float32)
        if not block:
            scales = scales.reshape(-1).expand(shape[0]).contiguous()
        return {"data": t["weight"], "scales": scales}

    return linear.stored(format, shape, make)


def _block(settings: Settings, name: str) -> list[int]:
    """Rows and columns of a block, or nothing."""
    block = settings.integers(name)
    if block and (len(block) != 2 or not all(1 <= n <= LARGEST_GROUP for n in block)):
        raise settings.error(name, f"expected two numbers from 1, got {block!r:.80}")
    return block


def _fp8_of(linear: _Linear, settings: Settings) -> Stored:
    return _fp8(linear, _block(settings, "weight_block_size"))


def _made_by(settings: Settings, tool: str) -> bool:
    """Whether `meta.quantizer`, one "name:version" or several, names a tool."""
    meta = settings.get("meta")
    names = meta.get("quantizer", []) if isinstance(meta, dict) else []
    names = names if isinstance(names, list) else [names]
    return any(f"{tool}:" in name.lower() for name in names if isinstance(name, str))


def _gptq(linear: _Linear, settings: Settings) -> Stored:
    bits = settings.integer("bits", least=2, most=8)
    if bits not in (2, 3, 4, 8):
        raise settings.error("bits", f"GPTQ with {bits} bits is not supported, only 2, 3, 4 and 8")
    group_size = _group_size(settings, "group_size", -1)
    stated = settings.text("checkpoint_format", "gptq")
    if stated not in ("gptq", "gptq_v2"):
        raise settings.error("checkpoint_format", f"{stated[:80]!r} is not supported")
    version = 2 if stated == "gptq_v2" else 1
    symmetric, act_order = settings.flag("sym", True), settings.flag("desc_act", False)
    by_words = version == 1 and not symmetric and bits != 3 and _made_by(settings, "gptqmodel")
    if by_words:
        version = 2  # what its qzeros are made below
    packed, rows = linear.matrix("qweight", torch.int32)
    columns = linear.take("g_idx", (torch.int32,)).shape if linear.has("g_idx") else ()
    shape = (rows, columns[0] if len(columns) == 1 else packed * 32 // bits)
    dtype = linear.take("scales", HALVES).dtype
    as_stored = gptq(bits, group_size, act_order=True, version=version, scale_dtype=dtype)
    linear.take_parts(as_stored, shape, () if act_order or linear.has("g_idx") else ("g_idx",))
    half = 1 << (bits - 1)

    def kind(in_order: bool) -> Format:
        return gptq(bits, group_size, symmetric, not in_order, 1 if symmetric else version, dtype)

    def make(t: dict[str, Tensor]) -> tuple[Format, Parts]:
        in_order, parts = not act_order, dict(t)
        if "g_idx" in parts:
            place = torch.arange(shape[1], dtype=torch.int32) // (group_size or shape[1])
            in_order &= torch.equal(parts["g_idx"], place)
            groups = as_stored.group_count(shape[1])
            if not bool(((parts["g_idx"] >= 0) & (parts["g_idx"] < groups)).all()):
                raise linear.error("g_idx", f"expected groups 0 to {groups - 1}")
        if in_order:
            parts.pop("g_idx", None)
        if by_words:
            parts["qzeros"] = add_one_by_words(parts["qzeros"], bits)
        if symmetric and bool((as_stored.zeros(parts.pop("qzeros"), rows) != half).any()):
            raise linear.error(
                "qzeros", f"quantization_config says sym, but not all zero points are {half}"
            )
        return kind(in_order), parts

    return Stored(kind(not act_order), shape, dict(linear.tensors), make)


def _awq(linear: _Linear, settings: Settings) -> Stored:
    version = settings.text("version", "gemm").lower()
    if version != "gemm":
        raise settings.error("version", f"AWQ {version[:80]!r} is not supported, only 'gemm'")
    if settings.integer("bits", 4) != 4:
        raise settings.error("bits", "AWQ is supported with 4 bits only")
    columns, _ = linear.matrix("qweight", torch.int32)
    scales = linear.take("scales", HALVES)
    group_size = _group_size(settings, "group_size", 128)
    if len(scales.shape) != 2:
        raise linear.error("scales", f"expected two dimensions, got {list(scales.shape)}")
    format, shape = awq(group_size, scales.dtype), (scales.shape[1], columns)
    linear.take_parts(format, shape)
    return linear.stored(format, shape)


def _nvfp4(linear: _Linear, compressed: bool) -> Stored:
    """ModelOpt multiplies by its second scale, compressed-tensors divides by its global one."""
    packed, second = (
        ("weight_packed", "weight_global_scale") if compressed else ("weight", "weight_scale_2")
    )
    rows, half = linear.matrix(packed, torch.uint8)
    if half % 8:
        raise linear.error(packed, f"expected whole groups of 16 columns, got rows of {2 * half}")
    format, shape = get_format("nvfp4_ct" if compressed else "nvfp4"), (rows, 2 * half)
    linear.take("weight_scale", (E4M3,), (rows, half // 8))
    linear.take(second, (torch.float32,), (), (1,))
    return linear.stored(
        format,
        shape,
        lambda t: {
            "data": t[packed],
            "scales": t["weight_scale"],
            "global_scale": t[second].reshape(1),
        },
    )


def _mxfp4_packed(linear: _Linear) -> Stored:
    rows, half = linear.matrix("weight_packed", torch.uint8)
    if half % 16:
        raise linear.error("weight_packed", f"expected groups of 32 columns, got {2 * half}")
    linear.take("weight_scale", (torch.uint8,), (rows, half // 16))
    return linear.stored(
        get_format("mxfp4"),
        (rows, 2 * half),
        lambda t: {
            "blocks": t["weight_packed"].reshape(rows, half // 16, 16),
            "scales": t["weight_scale"],
        },
    )


def _mxfp4_blocks(linear: _Linear, settings: Settings) -> Stored:
    """A stack of experts, or a matrix, as gpt-oss has it."""
    dimensions = len(linear.take("blocks", (torch.uint8,)).shape)
    *lead, groups, size = linear.matrix("blocks", torch.uint8, 3 if dimensions == 3 else 4)
    if size != 16:
        raise linear.error("blocks", f"expected 16 bytes a group, got {size}")
    linear.take("scales", (torch.uint8,), (*lead, groups))
    return linear.stored(get_format("mxfp4"), (*lead, 32 * groups))


def _mxfp8(linear: _Linear) -> Stored:
    shape = linear.matrix("weight", E4M3)
    format = get_format("mxfp8")
    linear.take("weight_scale", (torch.uint8,), format.part_specs(shape)["scales"][0])
    return linear.stored(
        format, shape, lambda t: {"data": t["weight"], "scales": t["weight_scale"]}
    )


def _int8(linear: _Linear, group_size: int | None, symmetric: bool) -> Stored:
    shape = linear.matrix("weight", torch.int8)
    if group_size is None and symmetric:
        linear.take("weight_scale", FLOATS, (), (1,), shape[:1], (shape[0], 1))

        def channel(t: dict[str, Tensor]) -> Parts:
            scales = t["weight_scale"].to(torch.float32).reshape(-1)
            return {"data": t["weight"], "scales": scales.expand(shape[0]).contiguous()}

        return linear.stored(get_format("int8"), shape, channel)
    dtype = linear.take("weight_scale", FLOATS if symmetric else HALVES).dtype
    format = int8_group(group_size, symmetric, dtype)
    names = {"data": "weight", "scales": "weight_scale", "zero_points": "weight_zero_point"}
    specs = format.part_specs(shape)
    for part, (size, part_dtype) in specs.items():
        linear.take(names[part], (part_dtype,), size)
    return linear.stored(format, shape, lambda t: {part: t[names[part]] for part in specs})


def _packed(linear: _Linear, bits: int, group_size: int | None, symmetric: bool) -> Stored:
    rows, count = linear.matrix("weight_packed", torch.int32)
    shape = (rows, count * 32 // bits)
    dtype = linear.take("weight_scale", FLOATS if symmetric else HALVES).dtype
    act_order = linear.has("weight_g_idx")
    format = packed_integer(bits, group_size, symmetric, act_order, dtype)
    linear.take_parts(format, shape)
    if linear.has("weight_shape"):
        linear.take("weight_shape", (torch.int64, torch.int32), (2,))
    # What ktcore has formats of its own for: the same bytes, and int8 but for the sign.
    own = None
    if format is packed_integer(4, 32) and shape[1] % 32 == 0:
        own = get_format("int4_g32")
    elif bits == 8 and group_size is None and symmetric and not act_order:
        own = get_format("int8")

    def make(t: dict[str, Tensor]) -> Parts:
        parts = dict(t)
        said = parts.pop("weight_shape", None)
        if said is not None and said.tolist() != list(shape):
            raise linear.error("weight_shape", f"expected {list(shape)}, got {said.tolist()}")
        if act_order:
            g_idx, groups = parts["weight_g_idx"], format.group_count(shape[1])
            if not bool(((g_idx >= 0) & (g_idx < groups)).all()):
                raise linear.error("weight_g_idx", f"expected groups 0 to {groups - 1}")
        if own is None:
            return parts
        data, scales = parts["weight_packed"].view(torch.uint8), parts["weight_scale"]
        if own.name == "int8":
            data, scales = (data ^ 128).view(torch.int8), scales.to(torch.float32).flatten()
        return {"data": data, "scales": scales}

    return linear.stored(own or format, shape, make)


def _compressed(linear: _Linear, settings: Settings) -> Stored:
    group = _config_group(linear, settings)
    weights = group.inner("weights")
    if weights is None:
        raise group.error("weights", f"missing, but {linear.base!r} is quantised")
    layout = group.text("format", settings.text("format", "dense"))
    if layout == "nvfp4-pack-quantized":
        return _nvfp4(linear, compressed=True)
    if layout == "mxfp4-pack-quantized":
        return _mxfp4_packed(linear)
    if layout == "mxfp8-quantized":
        return _mxfp8(linear)
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    strategy = weights.text("strategy", "tensor" if weights.get("group_size") is None else "group")
    symmetric = weights.flag("symmetric", True)
    grouped = strategy == "group"
    group_size = _group_size(weights, "group_size", None) if grouped else None
    if layout == "pack-quantized" and kind == "int" and bits in (4, 8):
        if strategy in ("group", "channel"):
            return _packed(linear, bits, group_size, symmetric)
    elif layout in ("int-quantized", "naive-quantized") and kind == "int" and bits == 8:
        if grouped or strategy in ("channel", "tensor"):
            return _int8(linear, group_size, symmetric)
    elif layout in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8:
        if strategy == "block":
            return _fp8(linear, _block(weights, "block_structure"))
        if strategy in ("channel", "tensor"):
            return _fp8(linear, [])
    raise weights.error(
        "strategy",
        f"compressed-tensors {layout[:40]!r} with {bits}-bit {kind[:20]!r} weights per "
        f"{strategy[:20]!r} is not supported (of {linear.base!r})",
    )


def _config_group(linear: _Linear, settings: Settings) -> Settings:
    """The group of compressed-tensors' config_groups that is for a layer."""
    groups = settings.inner("config_groups")
    if groups is None:
        raise settings.error("config_groups", "missing")
    found = None
    for name in groups.fields:
        group = groups.inner(name)
        if group is None:
            continue
        targets = _texts(group, "targets")
        if any(_matches(target, linear.base, group, "targets") for target in targets):
            return group  # by its own name, which goes before its class
        if "Linear" in targets and found is None:
            found = group
    if found is None:
        raise groups.error("targets", f"none is for {linear.base!r}, which is quantised")
    return found


def _modelopt(linear: _Linear, settings: Settings) -> Stored:
    algorithm = settings.text("quant_algo").upper()
    if algorithm == "NVFP4":
        if settings.integer("group_size", 16) != 16:
            raise settings.error("group_size", "NVFP4 is supported in groups of 16 only")
        return _nvfp4(linear, compressed=False)
    if algorithm == "FP8":
        return _fp8(linear, [])
    if algorithm == "MXFP8":
        return _mxfp8(linear)
    raise settings.error(
        "quant_algo", f"{algorithm[:80]!r} is not supported: NVFP4, FP8, MXFP8 are"
    )


SCHEMES: dict[str, Callable[[_Linear, Settings], Stored]] = {
    "fp8": _fp8_of,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4_blocks,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


# --------------------------------------------------------------------------------------- names


def _texts(settings: Settings, name: str) -> list[str]:
    value = settings.get(name, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise settings.error(name, f"expected a list of strings, got {value!r:.80}")
    return value


# Of patterns that are matched with names of layers, which have some 50 characters.
_LONGEST_PATTERN, _NAME_LENGTH, _MOST_STEPS = 1000, 50, 10**8
_PATTERN_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\??|\)[*+{]?|.", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    """A regular expression that does not take for ever, as far as its text tells.

    Python's matcher tries all ways to match: a repeat may end anywhere, an alternative be any of
    its group's, and a repeat of a group can multiply without bound. An honest pattern has two or
    three of them.

    Raises:
        re.error: it is none, or one of those.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise re.error(f"it has {len(pattern)} characters, more than {_LONGEST_PATTERN}")
    steps, branches = 1, [1]
    for part in _PATTERN_PART.findall(pattern):
        if part in (")*", ")+", "){"):
            raise re.error("a group that is repeated may take for ever")
        if part in ("(", "(?"):
            branches.append(1)
        elif part == "|":
            branches[-1] += 1
        elif part == ")" and len(branches) > 1:
            steps *= branches.pop()
        elif part in ("*", "+", "{", "?"):
            steps *= 2 if part == "?" else _NAME_LENGTH
    if steps * branches[0] > _MOST_STEPS:
        raise re.error("so many repeats and alternatives may take for ever")
    return re.compile(pattern)


def _matches(entry: str, base: str, settings: Settings, field: str) -> bool:
    """Whether an entry of a list of modules means a layer: by a regular expression ("re:..."), with
    wildcards, or by some of its name's parts."""
    if entry.startswith("re:"):
        try:
            return _compiled(entry[3:]).match(base) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise settings.error(
                field, f"{entry[:80]!r} is no usable regular expression: {error}"
            ) from None
    if "*" in entry:
        return fnmatch.fnmatchcase(base, entry)
    return f".{entry}." in f".{base}."


class QuantizedCheckpoint:
    """A `Checkpoint` whose quantised weights are read as `QuantTensor`.

    The weight of a layer `name` is asked for as ``name.weight``, however it is stored; a stack of
    experts by the name that it would have unquantised.

    Args:
        checkpoint: the files.
        settings: the `quantization_config` of config.json.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings):
        """Raises CheckpointError if the configuration is malformed or names an unknown method."""
        self.checkpoint, self.path, self.settings = checkpoint, checkpoint.path, settings
        # ModelOpt's older files do not name the method.
        usual = "modelopt" if settings.get("quant_algo") is not None else None
        self.method = settings.text("quant_method", *([usual] if usual else []))
        if self.method not in SCHEMES:
            raise settings.error(
                "quant_method",
                f"{self.method[:80]!r} is not supported; supported: {', '.join(sorted(SCHEMES))}",
            )
        self._left_out = [(field, e) for field in LEFT_OUT for e in _texts(settings, field)]
        self._stored = functools.lru_cache(maxsize=1)(self._find)

    @property
    def keep_cached(self) -> bool:
        """See `Checkpoint`."""
        return self.checkpoint.keep_cached

    @keep_cached.setter
    def keep_cached(self, value: bool) -> None:
        self.checkpoint.keep_cached = value

    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return self.checkpoint.names()

    def __contains__(self, name: str) -> bool:
        if name in self.checkpoint or f"{name}_blocks" in self.checkpoint:
            return True
        return name.endswith(".weight") and any(
            name.removesuffix("weight") + stored in self.checkpoint
            for stored in ("weight_packed", "qweight")
        )

    def info(self, name: str) -> TensorInfo | QuantInfo:
        """Raises CheckpointError if there is no such weight, or if it is not stored as stated."""
        stored = self._stored(name)
        if stored is None:
            return self.checkpoint.info(name)
        infos = [self.checkpoint.info(tensor) for tensor in stored.tensors.values()]
        return QuantInfo(stored.format, stored.shape, sum(i.end - i.begin for i in infos))

    def tensor(self, name: str) -> Tensor | QuantTensor:
        """Raises CheckpointError as `info` does, or if the stored tensors contradict each other."""
        stored = self._stored(name)
        if stored is None:
            return self.checkpoint.tensor(name)
        tensors = {as_: self.checkpoint.tensor(tensor) for as_, tensor in stored.tensors.items()}
        format, parts = stored.make(tensors)
        return QuantTensor(format, stored.shape, parts)

    def _find(self, name: str) -> Stored | None:
        """How a weight is stored; None: as a plain tensor, or not at all."""
        plain = name in self.checkpoint and self.checkpoint.info(name).dtype in FLOATS
        if plain or name not in self:
            return None
        whole = f"{name}_blocks" in self.checkpoint
        base = name if whole else name.removesuffix(".weight")
        for field, entry in self._left_out:
            if _matches(entry, base, self.settings, field):
                raise CheckpointError(
                    self.path,
                    f"tensor {name!r} is not stored as floating-point numbers, although {field} of "
                    f"quantization_config lists {entry[:80]!r}",
                )
        linear = _Linear(self.checkpoint, base, self.method, "_" if whole else ".")
        return SCHEMES[self.method](linear, self.settings)


def stack(weights: Iterable[QuantTensor], count: int) -> QuantTensor:
    """So many matrices [O, I], all stored alike, as one [count, O, I].

    Raises:
        ValueError: they are of different formats or shapes.
    """
    first, parts = None, {}
    for e, weight in enumerate(weights):
        if first is None:
            first = weight
            parts = {name: p.new_empty((count, *p.shape)) for name, p in weight.parts.items()}
        elif weight.format is not first.format or weight.shape != first.shape:
            raise ValueError(
                f"expert {e} is {list(weight.shape)} in {weight.format.name}, others are "
                f"{list(first.shape)} in {first.format.name}"
            )
        for name, part in weight.parts.items():
            parts[name][e] = part
    if first is None:
        raise ValueError("weights: expected at least one, got none")
    return QuantTensor(first.format, (count, *first.shape), parts)
