"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B; arXiv 2505.09388): GQA with RMS-normalised queries
and keys, softmax routing, no shared expert.

Fields as `Qwen3MoeConfig` in Hugging Face transformers 4 and 5 writes them, keys as llama.cpp does.
"""

from __future__ import annotations

from ktcore.models.config import DecoderConfig, Fields, JsonFile
from ktcore.models.family import GGUF_NAMES, Family, GgufArchitecture
from ktcore.models.rope import gguf_rope_keys, read_gguf_rope, read_rope, rope_fields
from ktcore.weights import GgufFile


def read_config(config: JsonFile) -> DecoderConfig:
    activation = config.text("hidden_act", "silu")
    if activation != "silu":
        raise config.error("hidden_act", f"{activation[:80]!r} is not supported, only 'silu'")
    if config.flag("use_sliding_window", False):
        raise config.error("use_sliding_window", "sliding-window attention is not supported")
    layers = config.integer("num_hidden_layers", most=10_000)
    hidden_size = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error(
            "num_key_value_heads",
            f"expected a divisor of num_attention_heads, {heads}, got {kv_heads}",
        )
    head_dim = config.integer("head_dim", max(1, hidden_size // heads))
    if head_dim % 2:
        raise config.error("head_dim", f"expected an even number, got {head_dim}")
    # transformers 5 calls the same field num_local_experts.
    num_experts = config.integer(
        "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    )
    step = config.integer("decoder_sparse_step", 1)
    mlp_only = set(config.integers("mlp_only_layers"))
    moe_size = config.integer("moe_intermediate_size")
    rope = read_rope(config)
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", moe_size),
        moe_intermediate_size=moe_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok", most=num_experts),
        renormalize=config.flag("norm_topk_prob", False),
        dense_layers=frozenset(i for i in range(layers) if i in mlp_only or (i + 1) % step),
        activation=activation,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        yarn=rope.yarn,
        context_length=rope.context_length,
        attention_bias=config.flag("attention_bias", False),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
    )


def read_gguf(keys: Fields, file: GgufFile) -> DecoderConfig:
    hidden_size = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise keys.error(
            "attention.head_count_kv",
            f"expected a divisor of attention.head_count, {heads}, got {kv_heads}",
        )
    head_dim = keys.integer("attention.key_length", max(1, hidden_size // heads))
    if head_dim % 2:
        raise keys.error("attention.key_length", f"expected an even number, got {head_dim}")
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, head_dim) != head_dim:
            raise keys.error(
                name, f"expected attention.key_length, {head_dim}, got {keys.integer(name)}"
            )
    num_experts = keys.integer("expert_count")
    moe_size = keys.integer("expert_feed_forward_length")
    rope = read_gguf_rope(keys)
    return DecoderConfig(
        vocab_size=file.info(GGUF_NAMES.embedding).shape[0],
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length", moe_size),
        moe_intermediate_size=moe_size,
        num_hidden_layers=keys.integer("block_count", most=10_000),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        top_k=keys.integer("expert_used_count", most=num_experts),
        # llama.cpp always does it for this architecture.
        renormalize=keys.flag("expert_weights_norm", True),
        dense_layers=frozenset(),
        activation="silu",
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=rope.theta,
        yarn=rope.yarn,
        context_length=rope.context_length,
        attention_bias=f"{GGUF_NAMES.q}.bias".format(layer=0) in file,
        tie_word_embeddings=GGUF_NAMES.head not in file,
    )


def write_config(c: DecoderConfig) -> dict[str, object]:
    """The fields that transformers 4 and 5 both read."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": c.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(c.dense_layers),
        "hidden_act": c.activation,
        "rms_norm_eps": c.rms_norm_eps,
        **rope_fields(c.rope_theta, c.yarn),
        "max_position_embeddings": c.context_length,
        "attention_bias": c.attention_bias,
        "tie_word_embeddings": c.tie_word_embeddings,
        "use_sliding_window": False,
    }


def write_gguf(c: DecoderConfig) -> dict[str, object]:
    """Raises ValueError for what llama.cpp's architecture lacks."""
    for what, wrong in (
        ("layers without experts (mlp_only_layers, decoder_sparse_step)", bool(c.dense_layers)),
        ("biases of attention (attention_bias)", c.attention_bias),
        ("expert weights that are not divided by their sum (norm_topk_prob)", not c.renormalize),
    ):
        if wrong:
            raise ValueError(f"llama.cpp's qwen3moe has no {what}")
    return {
        "block_count": c.num_hidden_layers,
        "context_length": c.context_length,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        **gguf_rope_keys(c.rope_theta, c.yarn),
        "expert_count": c.num_experts,
        "expert_used_count": c.top_k,
        "expert_feed_forward_length": c.moe_intermediate_size,
    }


FAMILY = Family(
    model_types=("qwen3_moe",),
    read_config=read_config,
    gguf=GgufArchitecture("qwen3moe", read_gguf, write_keys=write_gguf),
    write_config=write_config,
)
