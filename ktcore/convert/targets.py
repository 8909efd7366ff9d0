"""What a model can be converted to, and what each of its weights becomes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktcore.convert.weights import DTYPE_NAMES, Weight, floats
from ktcore.formats import Format, get_format
from ktcore.formats.compressed import packed_integer
from ktcore.weights.gguf_header import TENSOR_TYPES

GROUP_SIZES = (32, 64, 128)
PLAIN = tuple(DTYPE_NAMES.values())
GGUF_TYPES = {kind.format: number for number, kind in TENSOR_TYPES.items()}

# What llama.cpp stores in place of a type whose blocks do not fit the rows: of 256 to those of 32.
SMALLER_BLOCKS = {"q4_k": "q5_0", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        group_size: weights that share a scale in int4.
        experts_only: leave everything but the experts as precise as it is.
        pure: no mixture of types: what a GGUF target would store better is stored like the rest.
    """

    group_size: int = 32
    experts_only: bool = False
    pure: bool = False


@dataclass(frozen=True)
class Target:
    """One thing to convert to.

    Attributes:
        name: what users call it.
        file: whether it is one GGUF file; else a folder as Hugging Face lays it out.
        format: a matrix of the model (and, in GGUF, how many layers it has) to its format's name.
        file_type: llama.cpp's number for such files (`enum llama_ftype`).
    """

    name: str
    file: bool
    format: Callable[[Weight, int, Options], Format]
    file_type: int = 0


def _int8(weight: Weight, layers: int, options: Options) -> Format:
    """Packed in words of four, as `FolderTensors` does it, rows must fill them."""
    return get_format("bf16" if weight.shape[-1] % 4 else "int8")


def _int4(weight: Weight, layers: int, options: Options) -> Format:
    size = options.group_size
    if weight.shape[-1] % size:
        return get_format("bf16")
    return get_format("int4") if size == 32 else packed_integer(4, size)


def fitting_group_size(weights: list[Weight], options: Options) -> int:
    """The largest size of groups, of at most that asked for, that divides all rows.

    One for the whole model: what reads such files knows one for all experts. Rows that even the
    smallest does not divide are left aside; they are not quantised.
    """
    smallest = min(GROUP_SIZES)
    columns = [w.shape[-1] for w in weights if quantised(w, options)]
    fitting = [
        size
        for size in GROUP_SIZES
        if size <= options.group_size and not any(n % size for n in columns if n % smallest == 0)
    ]
    return max(fitting, default=smallest)


def quantised(weight: Weight, options: Options) -> bool:
    """Whether a weight is one of those that the target's type is for."""
    return weight.experts if options.experts_only else weight.linear


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that llama.cpp's mixtures store better: the first and last eighth, and every third
    between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _q4_k(weight: Weight, layers: int, options: Options) -> Format:
    """llama.cpp's Q4_K_M: some of the layers' `v` and `down`, and the head, in Q6_K."""
    better = weight.role == "head" or (
        weight.role in ("v", "mlp_down", "expert_down")
        and weight.layer is not None
        and _more_bits(weight.layer, layers)
    )
    return _block_type("q6_k" if better and not options.pure else "q4_k", weight)


def _block_type(name: str, weight: Weight) -> Format:
    """A GGUF type, or what llama.cpp takes where its blocks do not fit the rows."""
    columns = weight.shape[-1]
    while columns % get_format(name).block_size:
        name = SMALLER_BLOCKS.get(name, "f16")
    return get_format(name)


TARGETS = {
    target.name: target
    for target in (
        Target("int8", False, _int8),
        Target("int4", False, _int4),
        Target("bf16", False, lambda weight, layers, options: get_format("bf16")),
        Target("q4_k", True, _q4_k, 15),
        Target("q6_k", True, lambda weight, layers, options: _block_type("q6_k", weight), 18),
        Target("q8_0", True, lambda weight, layers, options: _block_type("q8_0", weight), 7),
    )
}


def get_target(name: str) -> Target:
    """A target by name, in any case. Raises ValueError if there is none."""
    found = TARGETS.get(name.lower())
    if found is None:
        raise ValueError(f"to: unknown target {name!r}; known: {', '.join(TARGETS)}")
    return found


def format_of(target: Target, weight: Weight, layers: int, tied: bool, options: Options) -> Format:
    """The format that a weight is to be stored in.

    Args:
        layers: of the model.
        tied: whether the embedding serves as the head.
    """
    if weight.small:
        return get_format("f32") if target.file else _small(weight)
    whole = target.file and not options.experts_only  # embedding and head, too
    if not (whole or quantised(weight, options)):
        return _unquantised(target, weight)
    if weight.role == "embedding" and tied:
        weight = dataclasses.replace(weight, role="head")
    return target.format(weight, layers, options)


def _small(weight: Weight) -> Format:
    """bf16 where that loses nothing: GGUF files hold such numbers as float32 whatever they were."""
    values = floats(weight.read(0, weight.shape[0]))
    if torch.equal(values.to(torch.bfloat16).to(torch.float64), values.to(torch.float64)):
        return get_format("bf16")
    return get_format(DTYPE_NAMES.get(values.dtype, "f32"))


def _unquantised(target: Target, weight: Weight) -> Format:
    """As stored if the target can hold that, else bf16."""
    stored = weight.formats[0] if len(weight.formats) == 1 else ""
    if stored in (GGUF_TYPES if target.file else PLAIN) and target.name != "bf16":
        return get_format(stored)
    return get_format("bf16")


def quantization_config(target: Target, group_size: int, ignored: list[str]) -> dict | None:
    """What config.json says of the weights, as compressed-tensors has it; None for plain ones.

    int8, too, is `pack-quantized`: it is the one layout of integers alone that transformers reads
    for experts.

    Args:
        ignored: names of the linear modules that are not quantised.
    """
    if target.name == "bf16":
        return None
    grouped = target.name == "int4"
    weights = {
        "num_bits": 4 if grouped else 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head", *(p for p in patterns(ignored) if p != "re:lm_head$")],
        "kv_cache_scheme": None,
    }


def patterns(names: list[str]) -> list[str]:
    """Regular expressions, as compressed-tensors takes them, for modules of all layers and experts.

    Names that differ in their numbers alone become one.
    """
    found = (re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    return [f"re:{pattern}$" for pattern in dict.fromkeys(found)]
