"""What a model family is, and finding the one that a config.json asks for.

A family is a module of this package with a `FAMILY`; adding one is adding a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktcore.models.config import DecoderConfig, Fields, JsonFile
from ktcore.models.expert_layout import FUSED, GGUF, PER_EXPERT, ExpertLayout
from ktcore.weights import GgufFile

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorNames:
    """What a checkpoint calls its tensors; `{layer}` is filled in.

    The defaults are those of most Hugging Face decoders. Of `experts`, the layouts that a
    checkpoint may have, the first that it does have counts.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    attention_norm: str = "model.layers.{layer}.input_layernorm.weight"
    mlp_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj"
    k: str = "model.layers.{layer}.self_attn.k_proj"
    v: str = "model.layers.{layer}.self_attn.v_proj"
    o: str = "model.layers.{layer}.self_attn.o_proj"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    router: str = "model.layers.{layer}.mlp.gate"
    mlp_gate: str = "model.layers.{layer}.mlp.gate_proj"
    mlp_up: str = "model.layers.{layer}.mlp.up_proj"
    mlp_down: str = "model.layers.{layer}.mlp.down_proj"
    experts: tuple[ExpertLayout, ...] = (FUSED, PER_EXPERT)


# What llama.cpp calls them in GGUF files.
GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    head="output.weight",
    attention_norm="blk.{layer}.attn_norm.weight",
    mlp_norm="blk.{layer}.ffn_norm.weight",
    q="blk.{layer}.attn_q",
    k="blk.{layer}.attn_k",
    v="blk.{layer}.attn_v",
    o="blk.{layer}.attn_output",
    q_norm="blk.{layer}.attn_q_norm.weight",
    k_norm="blk.{layer}.attn_k_norm.weight",
    router="blk.{layer}.ffn_gate_inp",
    mlp_gate="blk.{layer}.ffn_gate",
    mlp_up="blk.{layer}.ffn_up",
    mlp_down="blk.{layer}.ffn_down",
    experts=(GGUF,),
)


@dataclass(frozen=True)
class GgufArchitecture:
    """How GGUF files hold models of a family.

    Attributes:
        name: value of `general.architecture`, and what the keys of its settings begin with.
        read_config: those settings, and the file, to `DecoderConfig`; raises CheckpointError for
            what is malformed or not supported, naming the key.
        names: what the tensors are called.
        write_keys: the inverse of `read_config`: the settings without what their keys begin with;
            None if such files cannot be written.
    """

    name: str
    read_config: Callable[[Fields, GgufFile], DecoderConfig]
    names: TensorNames = GGUF_NAMES
    write_keys: Callable[[DecoderConfig], dict[str, object]] | None = None


@dataclass(frozen=True)
class Family:
    """Checkpoints that one reader understands.

    Attributes:
        model_types: values of `model_type` in config.json.
        read_config: config.json to `DecoderConfig`; raises CheckpointError for what is malformed
            or not supported, naming the field.
        names: what the tensors are called.
        gguf: the same for GGUF files, None if there are none.
        write_config: the inverse of `read_config`: the fields of a config.json; None if it cannot
            be written.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[JsonFile], DecoderConfig]
    names: TensorNames = TensorNames()
    gguf: GgufArchitecture | None = None
    write_config: Callable[[DecoderConfig], dict[str, object]] | None = None


def _families() -> Iterator[Family]:
    import ktcore.models

    for module in pkgutil.iter_modules(ktcore.models.__path__):
        path = f"{ktcore.models.__name__}.{module.name}"
        family = getattr(importlib.import_module(path), "FAMILY", None)
        if isinstance(family, Family):
            yield family


@functools.lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """All families by the `model_type` that they serve."""
    return {name: family for family in _families() for name in family.model_types}


def find_family(config: JsonFile) -> Family:
    """The family of a config.json. Raises CheckpointError if there is none."""
    model_type = config.text("model_type")
    family = families().get(model_type)
    if family is None:
        known = ", ".join(sorted(families()))
        raise config.error(
            "model_type", f"{model_type[:80]!r} is not supported; supported: {known}"
        )
    return family
