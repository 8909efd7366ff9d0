"""Cases of `route`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore import ops
from ktcore.testing import oracle
from ktcore.testing.cases import inputs
from ktcore.testing.oracle import Outcome

# Of a score, which is at most 1; float32 has 6e-8.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class RouteCase:
    """One call, held against the oracle."""

    name: str
    tokens: int = 17
    num_experts: int = 60
    top_k: int = 4
    logits: str = "normal"
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    scoring: str = "softmax"
    bias: torch.dtype | None = None
    n_group: int = 1
    topk_group: int = 1
    renormalize: bool = True
    scale: float = 1.0

    op = "route"

    def applies(self, format: str | None) -> bool:
        return format is None

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Logits and bias."""
        rng = inputs.generator(self.name)
        logits = torch.randn(self.tokens, self.num_experts, generator=rng) * 2
        if self.logits == "ties":
            logits = logits.round()
        elif self.logits == "all_equal":
            logits = torch.zeros_like(logits)
        elif self.logits == "nan":
            logits[1, :: max(2, self.num_experts // 5)] = float("nan")
        elif self.logits == "all_nan":
            logits[:] = float("nan")
        elif self.logits == "inf":
            logits[1, 3] = float("inf")
        elif self.logits == "masked":
            logits[:, ::2] = -float("inf")
        elif self.logits == "wide":
            logits = logits * 50
        else:
            assert self.logits == "normal", self.logits
        bias = None
        if self.bias is not None:
            bias = (torch.randn(self.num_experts, generator=rng) * 0.1).to(self.bias)
        return inputs.lay_out(logits.to(self.dtype), self.layout), bias

    def run(self, format: str | None, backend: str) -> Outcome:
        logits, bias = self.inputs()
        ids, weights = ops.route(
            logits,
            self.top_k,
            scoring=self.scoring,
            correction_bias=bias,
            n_group=self.n_group,
            topk_group=self.topk_group,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        shape = (self.tokens, self.top_k)
        for what, got, dtype in (("ids", ids, torch.int64), ("weights", weights, torch.float32)):
            if got.shape != shape or got.dtype != dtype:
                return Outcome(problem=f"{what}: {got.dtype} {tuple(got.shape)}, expected {shape}")
        scores = oracle.scores(logits, self.scoring)
        worst = 0.0
        for t in range(self.tokens):
            error, problem = self._token(
                scores[t].tolist(),
                None if bias is None else bias.to(torch.float64).tolist(),
                ids[t].tolist(),
                weights[t].tolist(),
            )
            if problem:
                return Outcome(error, TOLERANCE, f"token {t}: {problem}")
            worst = max(worst, error)
        return Outcome(worst, TOLERANCE)

    def _token(
        self, scores: list[float], bias: list[float] | None, ids: list[int], weights: list[float]
    ) -> tuple[float, str]:
        choice = oracle.route_choice(scores, bias, self.n_group, self.topk_group)
        expected = oracle.ranked(choice)
        if len(set(ids)) != len(ids) or not set(ids) <= set(expected):
            return math.inf, f"ids {ids} are not distinct experts of the allowed groups"
        # No later expert may be better than an earlier one by more than float32 can tell, nor
        # exactly as good with a lower index.
        place = {e: n for n, e in enumerate(ids)}
        for n, e in enumerate(ids):
            for other in expected:
                if place.get(other, self.num_experts) > n and (
                    choice[other] > choice[e] + TOLERANCE
                    or (choice[other] == choice[e] and other < e)
                ):
                    return math.inf, f"ids {ids}, expected {expected[: self.top_k]}"
        total = sum(scores[i] for i in ids)
        factor = self.scale / (total + 1e-20) if self.renormalize else self.scale
        worst = 0.0
        for i, got in zip(ids, weights, strict=True):
            want = scores[i] * factor
            if math.isnan(want) != math.isnan(got):
                return math.inf, f"the weight of expert {i} is {got}, expected {want}"
            if not math.isnan(want):
                # Renormalising divides by the total, which can be small.
                worst = max(worst, abs(got - want) / max(1.0, abs(want), abs(factor)))
        return worst, "" if worst <= TOLERANCE else f"weights are off by {worst:.3g}"


def _cases() -> list[RouteCase]:
    deepseek = {"scoring": "sigmoid", "bias": torch.float32}
    out = [RouteCase(f"tokens={t}", t) for t in (0, 1, 2, 17, 513)]
    out += [
        RouteCase(f"{e} experts top_k={k} {scoring}", 9, e, k, scoring=scoring)
        for scoring in ("softmax", "sigmoid")
        for e, k in ((1, 1), (2, 2), (8, 2), (33, 33), (128, 8), (300, 1), (1000, 10))
    ]
    out += [
        RouteCase("softmax as it is", renormalize=False),
        RouteCase("sigmoid as it is", scoring="sigmoid", renormalize=False),
        RouteCase("scale 2.5", scale=2.5),
        RouteCase("correction bias", **deepseek),
        RouteCase("correction bias softmax", bias=torch.float32),
        RouteCase("correction bias bfloat16", scoring="sigmoid", bias=torch.bfloat16),
        RouteCase("DeepSeek-V3", 33, 256, 8, n_group=8, topk_group=4, scale=2.5, **deepseek),
        RouteCase("groups without bias", 33, 64, 6, n_group=8, topk_group=3, renormalize=False),
        RouteCase("groups of one", 9, 8, 3, n_group=8, topk_group=4, **deepseek),
        RouteCase("every group", 9, 60, 6, n_group=5, topk_group=5),
        RouteCase("all of the selectable", 9, 60, 24, n_group=5, topk_group=2, **deepseek),
    ]
    out += [
        RouteCase(
            f"logits {kind} {scoring}{' groups' if n_group > 1 else ''}",
            logits=kind,
            scoring=scoring,
            n_group=n_group,
            topk_group=max(1, n_group // 2),
        )
        for kind in ("ties", "all_equal", "nan", "all_nan", "inf", "masked", "wide")
        for scoring in ("softmax", "sigmoid")
        for n_group in (1, 6)
        if not (kind == "wide" and n_group > 1)  # its groups differ by less than float32 holds
    ]
    out += [
        RouteCase("ties with bias and groups", logits="ties", n_group=6, topk_group=3, **deepseek),
        RouteCase("nan with bias and groups", logits="nan", n_group=6, topk_group=3, **deepseek),
        RouteCase(
            "all_nan with bias and groups", logits="all_nan", n_group=6, topk_group=3, **deepseek
        ),
    ]
    out += [
        RouteCase(f"logits {str(dtype).removeprefix('torch.')}", dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    out += [RouteCase(f"logits {layout}", layout=layout) for layout in inputs.LAYOUTS[1:]]
    return out


CASES = tuple(_cases())
