"""transformers' own implementations of a layer's experts, in bf16.

`eager` loops over the experts, `grouped_mm` sorts tokens by expert for `torch._grouped_mm`
(`transformers.integrations.moe`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from ktcore.bench.peers import Peer, Session, Timed, timed
from ktcore.bench.presets import Shape
from ktcore.bench.workload import DTYPE, Call
from ktcore.formats import Format
from ktcore.weights import ExpertWeights


class Experts(Session):
    def __init__(self, shape: Shape, implementation: str):
        from transformers import Qwen3MoeConfig

        self.config = Qwen3MoeConfig(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        self.config._experts_implementation = implementation
        self.layers: list[Any] = []

    def add(self, weights: ExpertWeights) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        with torch.device("meta"):
            experts = Qwen3MoeExperts(self.config)
        gate, up, down = (w.parts["data"] for w in (weights.gate, weights.up, weights.down))
        parameters = {"gate_up_proj": torch.cat((gate, up), dim=1), "down_proj": down}
        experts.load_state_dict(parameters, assign=True)
        self.layers.append(experts.requires_grad_(False))

    def run(self, call: Call) -> Timed:
        x, ids, topk_weights = call.inputs
        weights = topk_weights.to(DTYPE)
        return timed(lambda: self.layers[call.layer](x, ids, weights))


class Transformers(Peer):
    formats = ("bf16",)

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.name = f"hf-{implementation}"

    def missing(self) -> str:
        return "" if importlib.util.find_spec("transformers") else "transformers is not installed"

    def version(self) -> str:
        return importlib.metadata.version("transformers")

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        return Experts(shape, self.implementation)


PEERS = [Transformers("eager"), Transformers("grouped_mm")]
