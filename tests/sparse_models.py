"""Models of any size in no time: Qwen3-MoE with weights that are all zero, which take no disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
}


def config(layers: int, hidden: int, inner: int, experts: int) -> dict:
    return CONFIG | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "intermediate_size": inner,
        "num_experts": experts,
    }


def dense_tensors(c: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape, of all but the experts."""
    h, d = c["hidden_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    out = {
        "model.embed_tokens.weight": (c["vocab_size"], h),
        "lm_head.weight": (c["vocab_size"], h),
        "model.norm.weight": (h,),
    }
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        out |= {
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.post_attention_layernorm.weight": (h,),
            f"{at}.self_attn.q_norm.weight": (d,),
            f"{at}.self_attn.k_norm.weight": (d,),
            f"{at}.self_attn.q_proj.weight": (queries, h),
            f"{at}.self_attn.k_proj.weight": (keys, h),
            f"{at}.self_attn.v_proj.weight": (keys, h),
            f"{at}.self_attn.o_proj.weight": (h, queries),
            f"{at}.mlp.gate.weight": (c["num_experts"], h),
        }
    return out


def write_folder(folder: Path, c: dict, stacked: bool = False) -> Path:
    """A folder with bf16 safetensors; `stacked`: a layer's experts in two tensors."""
    shapes = dense_tensors(c)
    h, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp.experts"
        if stacked:
            shapes[f"{at}.gate_up_proj"] = (experts, 2 * inner, h)
            shapes[f"{at}.down_proj"] = (experts, h, inner)
            continue
        for e in range(experts):
            shapes[f"{at}.{e}.gate_proj.weight"] = (inner, h)
            shapes[f"{at}.{e}.up_proj.weight"] = (inner, h)
            shapes[f"{at}.{e}.down_proj.weight"] = (h, inner)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(c))
    return folder


def write_gguf(path: Path, c: dict, type: str) -> Path:
    """A GGUF file with its experts, attention and embeddings in a type."""
    kind, f32 = GGMLQuantizationType[type], GGMLQuantizationType.F32
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    h, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    heads, keys, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (c["vocab_size"], h),
        "output.weight": (c["vocab_size"], h),
        "output_norm.weight": (h,),
    }
    for i in range(c["num_hidden_layers"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (h,),
            f"blk.{i}.ffn_norm.weight": (h,),
            f"blk.{i}.attn_q_norm.weight": (d,),
            f"blk.{i}.attn_k_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (heads * d, h),
            f"blk.{i}.attn_k.weight": (keys * d, h),
            f"blk.{i}.attn_v.weight": (keys * d, h),
            f"blk.{i}.attn_output.weight": (h, heads * d),
            f"blk.{i}.ffn_gate_inp.weight": (experts, h),
            f"blk.{i}.ffn_gate_exps.weight": (experts, inner, h),
            f"blk.{i}.ffn_up_exps.weight": (experts, inner, h),
            f"blk.{i}.ffn_down_exps.weight": (experts, h, inner),
        }
    writer = GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": h,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": keys,
        "attention.key_length": d,
        "attention.value_length": d,
        "expert_count": experts,
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": inner,
    }.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    end = 0
    for name, shape in shapes.items():
        quantised = len(shape) > 1 and "gate_inp" not in name
        count = math.prod(shape)
        size = count // block * nbytes if quantised else 4 * count
        row = (*shape[:-1], shape[-1] // block * nbytes) if quantised else shape
        writer.add_tensor_info(
            name, row, np.dtype("uint8" if quantised else "float32"), size,
            raw_dtype=kind if quantised else f32,
        )  # fmt: skip
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    begin = -(-file.tell() // 32) * 32
    file.truncate(begin + end)
    writer.close()
    return path
