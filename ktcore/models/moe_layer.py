"""The Mixture-of-Experts block of a decoder layer, as calls to `ktcore.ops`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ktcore import ops
from ktcore.dispatch import Request
from ktcore.models.projection import Projection
from ktcore.weights import ExpertWeights


class MoeLayer:
    """Router, choice of experts, experts.

    Args:
        router: hidden_size to num_experts.
        experts: `ExpertWeights` in any format.
        top_k, renormalize, scoring: see `ktcore.ops.route`.
        activation: see `ktcore.ops.moe`.
    """

    def __init__(
        self,
        router: Projection,
        experts: ExpertWeights,
        top_k: int,
        *,
        renormalize: bool,
        scoring: str = "softmax",
        activation: str = "silu",
    ):
        self.router, self.experts = router, experts
        self.top_k, self.renormalize = top_k, renormalize
        self.scoring, self.activation = scoring, activation

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] to [T, H]."""
        topk_ids, topk_weights = self.choose(x)
        return ops.moe(x, self.experts, topk_ids, topk_weights, activation=self.activation)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts tokens x [T, H] go to, and with what weights: both [T, top_k]."""
        return ops.route(
            self.router(x), self.top_k, scoring=self.scoring, renormalize=self.renormalize
        )

    def projections(self) -> dict[str, Projection]:
        """Its dense weights, by what they are for."""
        return {"router": self.router}

    def prepare(self, release: bool) -> None:
        """Have the backend pack the experts now; with `release`, keep only what it packed."""
        self(torch.zeros(1, self.experts.hidden_size))
        if release and self.experts.packed:
            self.experts.release()

    def packed_weights(self, name: str) -> Iterator[tuple[str, Request, ExpertWeights]]:
        """The experts, which a backend may have packed, with the operator call that reads them."""
        for purpose, request in self.requests(1):
            if request.op == "moe":
                yield f"{name}.{purpose}", request, self.experts

    def requests(self, tokens: int) -> list[tuple[str, Request]]:
        """The operator calls for so many tokens, beside the router's, with what they are for."""
        sizes = {
            "tokens": tokens,
            "num_experts": self.experts.num_experts,
            "top_k": self.top_k,
            "dtype": "float32",
        }
        moe = Request(
            op="moe",
            format=self.experts.format.name,
            down_format=(
                None
                if self.experts.down_format is self.experts.format
                else self.experts.down_format.name
            ),
            hidden_size=self.experts.hidden_size,
            intermediate_size=self.experts.intermediate_size,
            **sizes,
        )
        return [("choice of experts", Request(op="route", **sizes)), ("experts", moe)]
