"""Writing GGUF files for tests, with llama.cpp's own package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktcore.models.loading import EMBEDDED
from ktcore.weights import Checkpoint

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}


def package():
    return pytest.importorskip("gguf", reason="writing GGUF files needs the package gguf")


def embedded_tensors() -> dict[str, torch.Tensor]:
    """The embedded model's tensors in float32, by llama.cpp's names."""
    checkpoint = Checkpoint(EMBEDDED)
    config = json.loads((EMBEDDED / "config.json").read_text())
    out = {
        "token_embd.weight": checkpoint.tensor("model.embed_tokens.weight"),
        "output_norm.weight": checkpoint.tensor("model.norm.weight"),
    }
    for i in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{i}.", f"blk.{i}."
        for theirs, ours in LAYER_NAMES.items():
            out[f"{target}{ours}.weight"] = checkpoint.tensor(f"{source}{theirs}.weight")
        for theirs, ours in EXPERT_NAMES.items():
            out[f"{target}{ours}.weight"] = torch.stack(
                [
                    checkpoint.tensor(f"{source}mlp.experts.{e}.{theirs}.weight")
                    for e in range(config["num_experts"])
                ]
            )
    return {name: tensor.float() for name, tensor in out.items()}


def embedded_metadata() -> dict[str, Any]:
    """The embedded model's keys, as llama.cpp's converter would write them."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {t["content"] for t in tokenizer["added_tokens"]}
    merges = tokenizer["model"]["merges"]
    return {
        "general.architecture": "qwen3moe",
        "general.name": "kjv-moe",
        "qwen3moe.block_count": config["num_hidden_layers"],
        "qwen3moe.context_length": config["max_position_embeddings"],
        "qwen3moe.embedding_length": config["hidden_size"],
        "qwen3moe.feed_forward_length": config["intermediate_size"],
        "qwen3moe.attention.head_count": config["num_attention_heads"],
        "qwen3moe.attention.head_count_kv": config["num_key_value_heads"],
        "qwen3moe.attention.key_length": config["head_dim"],
        "qwen3moe.attention.value_length": config["head_dim"],
        "qwen3moe.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen3moe.rope.freq_base": config["rope_theta"],
        "qwen3moe.expert_count": config["num_experts"],
        "qwen3moe.expert_used_count": config["num_experts_per_tok"],
        "qwen3moe.expert_feed_forward_length": config["moe_intermediate_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer has written it
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def stored_type(name: str, tensor: torch.Tensor, wanted: str) -> str:
    """As llama.cpp does it: norms and the router stay float32."""
    return "F32" if tensor.dim() == 1 or "ffn_gate_inp" in name else wanted


def quantized(tensor: torch.Tensor, kind: str) -> np.ndarray:
    gguf = package()
    return gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])


def dequantized(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """What storing a tensor in a type makes of it, by llama.cpp's package."""
    gguf = package()
    stored = quantized(tensor, kind)
    return torch.from_numpy(
        np.ascontiguousarray(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]))
    )


def write_gguf(
    path: Path,
    kind: str = "BF16",
    *,
    kinds: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write the embedded model, or other tensors and metadata, in a type.

    kinds: types of tensors whose names contain the key, in place of `kind`.
    """
    gguf = package()
    metadata = embedded_metadata() if metadata is None else metadata
    writer = gguf.GGUFWriter(
        str(path), metadata["general.architecture"], split_max_tensors=split_max_tensors
    )
    add_metadata(writer, metadata)
    for name, tensor in (embedded_tensors() if tensors is None else tensors).items():
        wanted = next((k for part, k in (kinds or {}).items() if part in name), kind)
        wanted = stored_type(name, tensor, wanted)
        writer.add_tensor(
            name, quantized(tensor, wanted), raw_dtype=gguf.GGMLQuantizationType[wanted]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------- byte by byte, unsound


SCALARS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7,
           "u64": 10, "i64": 11, "f64": 12}  # fmt: skip
CODES = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f",
         "bool": "B", "u64": "Q", "i64": "q", "f64": "d"}  # fmt: skip


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key: str | bytes, kind: str | int, value: Any) -> bytes:
    """A key and its value: a scalar, "str", or raw bytes after a type's number."""
    if kind == "str":
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(kind, int):
        return text(key) + struct.pack("<I", kind) + value
    return text(key) + struct.pack(f"<I{CODES[kind]}", SCALARS[kind], value)


def tensor(
    name: str | bytes = "a",
    sizes: tuple[int, ...] = (4, 2),
    kind: int = 0,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    """A tensor's entry; sizes as the file has them, the innermost first."""
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def raw_gguf(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: int | None = None,
    count: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if count is None else count,
        len(entries) if keys is None else keys,
    )
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
