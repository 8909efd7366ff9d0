"""route: which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.ops import _check
from ktcore.ops._direct import direct

SCORING = ("softmax", "sigmoid")


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts.

    Args:
        logits: [T, E], float32, float16 or bfloat16.
        top_k: experts per token.
        scoring: "softmax" over all experts (Mixtral, Qwen3-MoE) or "sigmoid" (DeepSeek-V3).
        correction_bias: [E], added to the scores when choosing, not to the weights
            (DeepSeek-V3, arXiv 2412.19437).
        n_group, topk_group: experts stand in `n_group` equal groups, of which a token may use the
            `topk_group` best.
        renormalize: divide a token's weights by their sum.
        scale: multiplies the weights at last.

    Returns:
        ids [T, top_k] int64, best first, ties to the lower id; weights [T, top_k] float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check.tensor(logits, "logits", _check.FLOATS, 2)
    num_experts = logits.shape[1]
    _check.positive(top_k, "top_k")
    _check.positive(n_group, "n_group")
    _check.positive(topk_group, "topk_group")
    _check.choice(scoring, "scoring", SCORING)
    _check.number(scale, "scale")
    if num_experts < 1:
        raise ValueError(f"logits: expected at least 1 expert, got shape {tuple(logits.shape)}")
    if num_experts % n_group:
        raise ValueError(f"n_group: expected a divisor of {num_experts} experts, got {n_group}")
    if topk_group > n_group:
        raise ValueError(f"topk_group: expected at most n_group, {n_group}, got {topk_group}")
    selectable = num_experts // n_group * topk_group if n_group > 1 else num_experts
    if top_k > selectable:
        raise ValueError(f"top_k: expected at most {selectable} selectable experts, got {top_k}")
    if correction_bias is not None:
        _check.tensor(correction_bias, "correction_bias", (*_check.FLOATS, torch.float64), 1)
        if correction_bias.shape[0] != num_experts:
            raise ValueError(
                f"correction_bias: expected shape [{num_experts}], got "
                f"{tuple(correction_bias.shape)}"
            )
        _check.device(correction_bias, "correction_bias", logits.device, "logits")
    call = _compute if direct(logits) else torch.ops.ktcore.route
    return call(
        logits,
        top_k,
        scoring,
        correction_bias,
        n_group,
        topk_group,
        bool(renormalize),
        float(scale),
    )


def _compute(
    logits: Tensor,
    top_k: int,
    scoring: str,
    correction_bias: Tensor | None,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, num_experts = logits.shape
    chosen = select(
        Request(
            op="route",
            tokens=tokens,
            num_experts=num_experts,
            top_k=top_k,
            dtype=str(logits.dtype).removeprefix("torch."),
            device=logits.device.type,
        )
    )
    return chosen.run(
        logits.detach(),
        top_k,
        scoring=scoring,
        correction_bias=None if correction_bias is None else correction_bias.detach(),
        n_group=n_group,
        topk_group=topk_group,
        renormalize=renormalize,
        scale=scale,
    )


_route = torch.library.custom_op("ktcore::route", _compute, mutates_args=())


@_route.register_fake
def _(logits, top_k, scoring, correction_bias, n_group, topk_group, renormalize, scale):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)
