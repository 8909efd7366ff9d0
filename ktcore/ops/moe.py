"""moe: the routed experts of a Mixture-of-Experts layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ktcore.dispatch import registry
from ktcore.dispatch.registry import Request
from ktcore.ops import _check, _prepared
from ktcore.ops._direct import direct
from ktcore.weights import ExpertWeights
from ktcore.weights.quant_tensor import resolve

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")


def moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    exact: bool = False,
) -> Tensor:
    """Sum of the chosen experts' outputs, each ``down(act(gate(x)) * up(x))``, weighted.

    Each projection adds its bias where the experts have one.

    Args:
        hidden_states: [T, H], float32, float16 or bfloat16; rows may be strided.
        experts: `ExpertWeights` of hidden size H, on the same device.
        topk_ids: [T, K], int64 or int32: the experts of each token. The same expert may stand
            twice; -1 means: not computed here.
        topk_weights: [T, K], floating point.
        activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU) or "swiglu_oai", gpt-oss's: with gate
            cut off above 7 and up beyond +-7, ``gate * sigmoid(1.702 * gate) * (up + 1)``.
        exact: keep the error of activations below 0.05 % where the default rounds them.

    Returns:
        [T, H] in the dtype of `hidden_states`. It does not depend on the number of threads, nor on
        which other tokens are in the batch.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a `topk_ids` entry is neither -1 nor an expert.
        BackendUnavailable: a forced backend cannot run here or does not serve this.

    The layer is that of Switch Transformer and its successors (arXiv 2101.03961), with gated
    experts (arXiv 2002.05202).
    """
    if not is_dynamo_compiling():
        out = _prepared.moe(experts, hidden_states, topk_ids, topk_weights, activation, exact)
        if out is not None:
            return out
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"experts: expected ExpertWeights, got {type(experts).__name__}")
    _check.tensor(hidden_states, "hidden_states", _check.FLOATS, 2)
    _check.tensor(topk_ids, "topk_ids", _check.INTS, 2)
    _check.tensor(topk_weights, "topk_weights", (*_check.FLOATS, torch.float64), 2)
    if hidden_states.shape[1] != experts.hidden_size:
        raise ValueError(
            f"hidden_states: expected shape [tokens, {experts.hidden_size}], the experts' hidden "
            f"size, got {tuple(hidden_states.shape)}"
        )
    if topk_ids.shape[0] != hidden_states.shape[0] or topk_ids.shape[1] < 1:
        raise ValueError(
            f"topk_ids: expected shape [{hidden_states.shape[0]}, top_k] with top_k of at least 1, "
            f"got {tuple(topk_ids.shape)}"
        )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights: expected the shape of topk_ids, {tuple(topk_ids.shape)}, got "
            f"{tuple(topk_weights.shape)}"
        )
    _check.device(hidden_states, "hidden_states", experts.device, "experts")
    _check.device(topk_ids, "topk_ids", experts.device, "experts")
    _check.device(topk_weights, "topk_weights", experts.device, "experts")
    _check.choice(activation, "activation", ACTIVATIONS)
    call = _compute if direct(hidden_states) else torch.ops.ktcore.moe
    return call(hidden_states, experts.handle, topk_ids, topk_weights, activation, bool(exact))


def _compute(
    hidden_states: Tensor,
    experts: int,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    exact: bool,
) -> Tensor:
    weights = resolve(experts)
    assert isinstance(weights, ExpertWeights)
    tokens, top_k = topk_ids.shape
    generation = registry.generation()
    chosen = registry.select(
        Request(
            op="moe",
            format=weights.format.name,
            down_format=None if weights.down_format is weights.format else weights.down_format.name,
            tokens=tokens,
            hidden_size=weights.hidden_size,
            intermediate_size=weights.intermediate_size,
            num_experts=weights.num_experts,
            top_k=top_k,
            dtype=str(hidden_states.dtype).removeprefix("torch."),
            device=hidden_states.device.type,
            exact=exact,
        )
    )
    args = (
        _check.rows_dense(_check.detached(hidden_states)),
        weights,
        _check.as_type(topk_ids, torch.int64),
        _check.as_type(topk_weights, torch.float32),
    )
    out = chosen.run(*args, activation=activation, exact=exact)
    _prepared.prepare(
        generation, chosen, weights, tokens, *args, activation=activation, exact=exact
    )
    return out


_moe = torch.library.custom_op("ktcore::moe", _compute, mutates_args=())


@_moe.register_fake
def _(hidden_states, experts, topk_ids, topk_weights, activation, exact):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
