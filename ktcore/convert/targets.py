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


def _int4(weight: Weight, layers: int, options: Options) -> Format:
    """In groups of the size asked for, or the next smaller one that divides the rows."""
    columns = weight.shape[-1]
    for size in sorted(GROUP_SIZES, reverse=True):
        if size <= options.group_size and columns % size == 0:
            return get_format("int4") if size == 32 else packed_integer(4, size)
    return get_format("bf16")


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
        Target("int8", False, lambda weight, layers, options: get_format("int8")),
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
    if not (weight.experts if options.experts_only else weight.linear or target.file):
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


def quantization_config(
    target: Target, named: dict[str, Format], ignored: list[str]
) -> dict | None:
    """What config.json says of the weights, as compressed-tensors has it; None for plain ones.

    Args:
        named: the format of every quantised module, by name.
        ignored: names of the linear modules that are not quantised.
    """
    if target.name == "bf16":
        return None
    by_format: dict[Format, list[str]] = {}
    for name, format in named.items():
        by_format.setdefault(format, []).append(name)
    # The most modules first: that group is for all that no other group names.
    ranked = sorted(by_format.items(), key=lambda item: -len(item[1]))
    groups = {}
    for i, (format, names) in enumerate(ranked):
        size = format.group_size
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if i == 0 else patterns(names),
            "weights": {
                "num_bits": 4 if size else 8,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if size else "channel",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if target.name == "int4" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(p for p in patterns(ignored) if p != "re:lm_head$")],
        "kv_cache_scheme": None,
    }


def patterns(names: list[str]) -> list[str]:
    """Regular expressions, as compressed-tensors takes them, for modules of all layers and experts.

    Names that differ in their numbers alone become one.
    """
    found = (re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    return [f"re:{pattern}$" for pattern in dict.fromkeys(found)]
