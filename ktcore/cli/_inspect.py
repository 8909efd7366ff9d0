"""What `ktcore inspect` says about a model's files, as plain data. Only headers are read.

Names and texts from files are passed on as they are: whoever prints them makes them harmless.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktcore.cli._report import PHASES, header
from ktcore.dispatch import probe, registry
from ktcore.formats import format_names
from ktcore.models.config import JsonFile
from ktcore.models.family import families
from ktcore.models.gguf_tokenizer import CHAT_TEMPLATE, SECTION, chat_template
from ktcore.models.loading import why_not_loadable
from ktcore.models.source import folder_chat_template
from ktcore.weights import Checkpoint, GgufFile
from ktcore.weights.gguf_file import find_gguf
from ktcore.weights.gguf_header import is_gguf

MOST_ELEMENTS, MOST_TEXT = 8, 200  # of a value, before it is shortened

# What a tensor is for, by its name, in any naming that is common; the first that matches counts.
KINDS = (
    ("shared experts", r"shared_expert|_shexp"),
    ("experts", r"\bexperts\b|_exps\b"),
    (
        "routers",
        r"ffn_gate_inp|exp_probs_b|e_score|\brouter\b|mlp\.gate\b|block_sparse_moe\.gate\b",
    ),
    ("norms", r"norm|\bln_"),
    ("attention", r"attn|attention"),
    ("embeddings and head", r"embed|embd|lm_head|^output\.|\bwte\b|\bwpe\b"),
    ("dense MLPs", r"mlp|ffn|feed_forward"),
)
OTHER = "other"
_KINDS = [(kind, re.compile(pattern)) for kind, pattern in KINDS]
_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|h|blocks)\.(\d+)\.")
_DOWN = re.compile(r"down|\bw2\b")

# What configurations call the same number: Hugging Face's names, then llama.cpp's.
SIZES = {
    "num_layers": ("num_hidden_layers", "block_count"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "expert_count"),
    "top_k": ("num_experts_per_tok", "expert_used_count"),
    "hidden_size": ("hidden_size", "embedding_length"),
    "intermediate_size": ("moe_intermediate_size", "expert_feed_forward_length"),
    "context_length": ("max_position_embeddings", "context_length"),
}
SAFETENSORS_FORMATS = {"BF16": "bf16", "F16": "bf16", "F32": "bf16"}  # as they are loaded


@dataclass(frozen=True)
class Stored:
    """A tensor as any reader describes it; `format` is what ktcore would keep it in, if it can."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    format: str | None

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in _KINDS if pattern.search(self.name)), OTHER)

    @property
    def layer(self) -> int | None:
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None


def inspect(path: Path, with_tensors: bool) -> dict[str, Any]:
    """The document. Raises CheckpointError if there are no sound model files at `path`."""
    gguf = _gguf_in(path)
    what = _gguf(gguf) if gguf is not None else _safetensors(path)
    tensors: list[Stored] = what.pop("stored")
    sizes: dict[str, int] = what["sizes"]
    out = header("inspection") | {"path": str(path)} | what
    out["tensors"] = len(tensors)
    out["parameters"] = sum(math.prod(t.shape) for t in tensors) if what["plain"] else None
    out["bytes"] = sum(t.nbytes for t in tensors)
    out["types"] = _totals(tensors, "type")
    out["kinds"] = _totals(tensors, "kind")
    out["experts"] = _experts(tensors, sizes)
    out["backends"] = _backends(out["experts"], sizes)
    out["loads"] = {"reason": (reason := why_not_loadable(gguf or path)), "ok": reason is None}
    out["memory"] = _memory(tensors)
    if with_tensors:
        out["tensor_list"] = [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes}
            for t in tensors
        ]
    return out


# -------------------------------------------------------------------------------------- readers


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means, None where safetensors files are meant."""
    if path.is_dir():
        return None if (path / "config.json").exists() else find_gguf(path)
    return path if is_gguf(path) else None


def _gguf(path: Path) -> dict[str, Any]:
    file = GgufFile(path)
    known = format_names()
    stored = [
        Stored(
            name,
            (info := file.info(name)).type.name,
            info.shape,
            info.end - info.begin,
            info.type.format if info.type.format in known else None,
        )
        for name in file.names()
    ]
    metadata = file.metadata
    name = metadata.get("general.architecture")
    architecture = name if isinstance(name, str) else None
    family = next((f for f in families().values() if f.gguf and f.gguf.name == architecture), None)
    prefix = f"{architecture}."
    settings = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    tokens = metadata.get(f"{SECTION}.tokens")
    tokenizer = None
    if isinstance(tokens, list):
        rule = metadata.get(f"{SECTION}.pre")
        kind = str(metadata.get(f"{SECTION}.model"))
        tokenizer = {"kind": f"{kind}, {rule}" if rule else kind, "tokens": len(tokens)}
    return {
        "kind": f"GGUF version {file.version}",
        "files": _files(file.files),
        "architecture": architecture,
        "model_type": family.model_types[0] if family else None,
        "sizes": _sizes(settings),
        "quantization": None,
        "metadata": {key: _short(value) for key, value in metadata.items() if key != CHAT_TEMPLATE},
        "tokenizer": tokenizer,
        "chat_template": chat_template(file) is not None,
        "plain": True,
        "stored": stored,
    }


def _safetensors(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(path)
    config = JsonFile(path / "config.json").fields if (path / "config.json").is_file() else {}
    text = config.get("text_config")
    settings = config | text if isinstance(text, dict) else config
    quantization = settings.get("quantization_config")
    scheme = None
    if isinstance(quantization, dict):
        scheme = str(quantization.get("quant_method", "of an unnamed kind"))
    stored = []
    for name in checkpoint.names():
        info = checkpoint.info(name)
        kind = _dtype_name(info.dtype)
        format = None if scheme else SAFETENSORS_FORMATS.get(kind)
        stored.append(Stored(name, kind, info.shape, info.end - info.begin, format))
    architectures = settings.get("architectures") or config.get("architectures")
    named = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    model_type = config.get("model_type")
    has_tokenizer = (path / "tokenizer.json").is_file()
    return {
        "kind": "safetensors",
        "files": _files(checkpoint.files()),
        "architecture": architectures[0] if named else None,
        "model_type": model_type if isinstance(model_type, str) else None,
        "sizes": _sizes(settings),
        "quantization": scheme,
        "metadata": {key: _short(value) for key, value in config.items()},
        "tokenizer": {"kind": "tokenizer.json", "tokens": None} if has_tokenizer else None,
        "chat_template": path.is_dir() and folder_chat_template(path) is not None,
        "plain": scheme is None,
        "stored": stored,
    }


def _dtype_name(dtype: object) -> str:
    from ktcore.weights.safetensors_file import DTYPES

    return next(name for name, found in DTYPES.items() if found == dtype)


def _files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [{"name": path.name, "bytes": path.stat().st_size} for path in paths]


def _sizes(settings: dict[str, Any]) -> dict[str, int]:
    """The sizes that are known and make sense."""
    out = {}
    for size, names in SIZES.items():
        found = next((settings[n] for n in names if settings.get(n) is not None), None)
        if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 1 << 31:
            out[size] = found
    return out


def _short(value: Any) -> Any:
    """A value that JSON can hold, long ones shortened."""
    if isinstance(value, list):
        rest = len(value) - MOST_ELEMENTS
        return [*map(_short, value[:MOST_ELEMENTS]), *([f"... {rest:,} more"] if rest > 0 else [])]
    if isinstance(value, dict):
        return {str(key): _short(inner) for key, inner in value.items()}
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"{value[:MOST_TEXT]}... {len(value) - MOST_TEXT:,} more characters"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# ------------------------------------------------------------------------------------- summaries


def _totals(tensors: list[Stored], by: str) -> list[dict[str, Any]]:
    """Per type or kind: tensors, weights and bytes, the most bytes first."""
    found: dict[str, dict[str, Any]] = {}
    for t in tensors:
        total = found.setdefault(
            getattr(t, by), {by: getattr(t, by), "tensors": 0, "parameters": 0, "bytes": 0}
        )
        total["tensors"] += 1
        total["parameters"] += math.prod(t.shape)
        total["bytes"] += t.nbytes
    return sorted(found.values(), key=lambda total: -total["bytes"])


def _experts(tensors: list[Stored], sizes: dict[str, int]) -> dict[str, Any] | None:
    """How many experts there are and what they are stored in; None for a model without."""
    layers: dict[int | None, dict[bool, set[tuple[str, str | None]]]] = {}
    for t in tensors:
        if t.kind == "experts":
            types = layers.setdefault(t.layer, {False: set(), True: set()})
            types[bool(_DOWN.search(t.name))].add((t.type, t.format))
    if not layers:
        return None
    counted: dict[tuple, int] = {}
    for types in layers.values():
        key = (tuple(sorted(types[False], key=str)), tuple(sorted(types[True], key=str)))
        counted[key] = counted.get(key, 0) + 1
    return {
        "layers": len(layers),
        "num_experts": sizes.get("num_experts"),
        "top_k": sizes.get("top_k"),
        "bytes_per_layer": sum(t.nbytes for t in tensors if t.kind == "experts") // len(layers),
        "stored": [
            {
                "layers": count,
                "gate_up": [type for type, _ in gate_up],
                "down": [type for type, _ in down],
                "format": gate_up[0][1] if len(gate_up) == 1 else None,
                "down_format": down[0][1] if len(down) == 1 else None,
            }
            for (gate_up, down), count in counted.items()
        ],
    }


def _backends(experts: dict[str, Any] | None, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """For each way in which layers store their experts, which backend would serve them and why."""
    out = []
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    shape = {name: sizes[name] for name in names if name in sizes}
    for stored in experts["stored"] if experts else []:
        format, down = stored["format"], stored["down_format"]
        row = {"format": format, "down_format": down, "layers": stored["layers"]}
        for phase, tokens in PHASES.items():
            row[phase] = None
            if format is not None and down is not None:
                other = None if down == format else down
                row[phase] = registry.explain(
                    "moe", format=format, down_format=other, tokens=tokens, **shape
                ).to_dict()
        out.append(row)
    return out


def _memory(tensors: list[Stored]) -> dict[str, Any]:
    """Whether the weights, and a layer as it is read, fit into the memory that is free."""
    layers: dict[int, int] = {}
    for t in tensors:
        if t.layer is not None:
            layers[t.layer] = layers.get(t.layer, 0) + t.nbytes
    needed = sum(t.nbytes for t in tensors) + max(layers.values(), default=0)
    memory = probe.machine().memory
    return {
        "needed_bytes": needed,
        "available_bytes": memory.available_bytes,
        "total_bytes": memory.total_bytes,
        "limit_bytes": memory.limit_bytes,
        "fits": needed <= memory.available_bytes,
    }
