"""A checkpoint stored anew in a published quantisation scheme: what its tools would write, with
codes from plain rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ktcore.formats import get_format
from ktcore.formats._grouped import Grouped, GroupedInteger
from ktcore.formats.awq import awq
from ktcore.formats.compressed import int8_group, packed_integer
from ktcore.formats.gptq import gptq
from ktcore.weights import Checkpoint

Tensors = dict[str, torch.Tensor]
Store = Callable[[str, torch.Tensor], Tensors]


def _fp8_block(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("fp8_e4m3_b128").quantize(w)
    return {f"{base}.weight": parts["data"], f"{base}.weight_scale_inv": parts["scales"]}


def _fp8_channel(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("fp8_e4m3").quantize(w)
    scales = parts["scales"][:, None].to(torch.bfloat16)
    return {f"{base}.weight": parts["data"], f"{base}.weight_scale": scales}


def _fp8_tensor(base: str, w: torch.Tensor) -> Tensors:
    scale = w.float().abs().amax() / 448
    data = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{base}.weight": data, f"{base}.weight_scale": scale}


def _int8_channel(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("int8").quantize(w)
    return {f"{base}.weight": parts["data"], f"{base}.weight_scale": parts["scales"][:, None]}


def _int8_group(base: str, w: torch.Tensor) -> Tensors:
    parts = int8_group(32, False, torch.float16).quantize(w)
    return {
        f"{base}.weight": parts["data"],
        f"{base}.weight_scale": parts["scales"],
        f"{base}.weight_zero_point": parts["zero_points"],
    }


def _parts(format: GroupedInteger, base: str, w: torch.Tensor, g_idx=None) -> Tensors:
    return {f"{base}.{n}": p for n, p in format.pack(format.round(w, g_idx)).items()}


def _packed(format: GroupedInteger) -> Store:
    def store(base: str, w: torch.Tensor) -> Tensors:
        return {**_parts(format, base, w), f"{base}.weight_shape": torch.tensor(w.shape)}

    return store


def _shuffled(columns: int, size: int, base: str) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(base) * 1000 + columns)
    return (torch.randperm(columns, generator=rng) // size).to(torch.int32)


def _gptq(format: GroupedInteger, act_order: bool) -> Store:
    """All files have qzeros and g_idx."""

    def store(base: str, w: torch.Tensor) -> Tensors:
        size = format.group_size or w.shape[1]
        in_order = torch.arange(w.shape[1], dtype=torch.int32) // size
        g_idx = _shuffled(w.shape[1], size, base) if act_order else in_order
        found = gptq(format.code_bits, format.group_size, format.symmetric).round(w, g_idx)
        half = torch.full(found.scales.shape, 1 << (format.code_bits - 1), dtype=torch.int16)
        zeros = half if found.zeros is None else found.zeros
        whole = gptq(format.code_bits, format.group_size, False, True, format.version)
        parts = whole.pack(Grouped(found.codes, found.scales, zeros, g_idx))
        return {f"{base}.{n}": p for n, p in parts.items()}

    return store


def _mxfp4(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("mxfp4").quantize(w)
    packed = parts["blocks"].flatten(-2)
    return {f"{base}.weight_packed": packed, f"{base}.weight_scale": parts["scales"]}


def _nvfp4(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("nvfp4").quantize(w)
    return {
        f"{base}.weight": parts["data"],
        f"{base}.weight_scale": parts["scales"],
        f"{base}.weight_scale_2": parts["global_scale"].reshape(()),
        f"{base}.input_scale": torch.tensor(1.0),
    }


def _nvfp4_ct(base: str, w: torch.Tensor) -> Tensors:
    parts = get_format("nvfp4_ct").quantize(w)
    return {
        f"{base}.weight_packed": parts["data"],
        f"{base}.weight_scale": parts["scales"],
        f"{base}.weight_global_scale": parts["global_scale"],
    }


def _compressed(format: str, **weights) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _gptq_config(bits: int, group_size: int, sym: bool, act: bool, **more) -> dict:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym,
        "desc_act": act, **more,
    }  # fmt: skip


# Name: what a layer is stored as, and its quantization_config.
SCHEMES: dict[str, tuple[Store, dict]] = {
    "fp8 block": (
        _fp8_block,
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
    ),
    "fp8 channel": (
        _fp8_channel,
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 tensor": (_fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ct int4 g32": (
        _packed(packed_integer(4, 32)),
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "ct int4 g64 asym": (
        _packed(packed_integer(4, 64, False)),
        _compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=64,
            symmetric=False,
        ),
    ),
    "ct int8 channel": (
        _int8_channel,
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "ct int8 g32 asym": (
        _int8_group,
        _compressed(
            "int-quantized", num_bits=8, type="int", strategy="group", group_size=32,
            symmetric=False,
        ),
    ),
    "gptq4": (_gptq(gptq(4, 32), False), _gptq_config(4, 32, False, False)),
    "gptq4 v2": (
        _gptq(gptq(4, 32, version=2), False),
        _gptq_config(4, 32, False, False, checkpoint_format="gptq_v2"),
    ),
    "gptq4 act": (_gptq(gptq(4, 32, True), True), _gptq_config(4, 32, True, True)),
    "gptq3 g64": (_gptq(gptq(3, 64, True), False), _gptq_config(3, 64, True, False)),
    "gptq4 row": (_gptq(gptq(4, None, True), False), _gptq_config(4, -1, True, False)),
    "awq4": (
        lambda base, w: _parts(awq(32), base, w),
        {
            "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm",
            "modules_to_not_convert": ["gate"],
        },
    ),
    "ct mxfp4": (
        _mxfp4,
        _compressed(
            "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
        ),
    ),
    "nvfp4": (
        _nvfp4,
        {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
            "exclude_modules": ["lm_head", "*.mlp.gate"],
        },
    ),
    "ct nvfp4": (
        _nvfp4_ct,
        _compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
    ),
}  # fmt: skip


def is_linear(name: str) -> bool:
    """Whether tools quantise it: attention and experts, not the router."""
    return name.endswith("_proj.weight")


def requantize(source: Path, folder: Path, store: Store, settings: dict) -> Path:
    """The model of a folder with its linear layers stored by `store`, in a new folder."""
    checkpoint, tensors = Checkpoint(source), {}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if is_linear(name):
            tensors.update(store(name.removesuffix(".weight"), tensor))
        else:
            tensors[name] = tensor
    return write(source, folder, tensors, settings)


def write(source: Path, folder: Path, tensors: Tensors, settings: dict | None) -> Path:
    """Tensors beside a copy of a model's other files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / Checkpoint.SINGLE)
    config = json.loads((source / "config.json").read_text("utf-8"))
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    if (source / "tokenizer.json").is_file():
        shutil.copy(source / "tokenizer.json", folder)
    return folder
