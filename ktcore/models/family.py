"""What a model family is, and finding the one that a config.json asks for.

A family is a module of this package with a `FAMILY`; adding one is adding a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktcore.models.config import DecoderConfig, JsonFile

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorNames:
    """What a checkpoint calls its tensors; `{layer}` and `{expert}` are filled in.

    The defaults are those of most Hugging Face decoders.
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
    expert_gate: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    expert_up: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    expert_down: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    # All experts in one tensor, [num_experts, 2 * intermediate, hidden] and [num_experts, hidden,
    # intermediate], as transformers 5 holds them.
    stacked_gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    stacked_down: str = "model.layers.{layer}.mlp.experts.down_proj"


@dataclass(frozen=True)
class Family:
    """Checkpoints that one reader understands.

    Attributes:
        model_types: values of `model_type` in config.json.
        read_config: config.json to `DecoderConfig`; raises CheckpointError for what is malformed
            or not supported, naming the field.
        names: what the tensors are called.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[JsonFile], DecoderConfig]
    names: TensorNames = TensorNames()


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
