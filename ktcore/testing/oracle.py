"""What is right: float64 arithmetic on the dequantised stored weights, and how a result is judged.

The weights are taken as stored, so an error is the kernel's alone. Nothing here is shared with a
backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore.weights import ExpertWeights, QuantTensor

# Kernels may take a group of activations below 1e-30 for zeros (their reciprocal leaves the range
# of float32). What that can change in an output is below this times any tolerance.
NEGLIGIBLE = 1e-26

# How far a single token may be off, in tolerances of the whole batch: a token has few experts, so
# its error scatters around the batch's, but one wrong token must not hide behind 512 right ones.
TOKEN_SLACK = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a case went. `problem` is empty if all is well; error and tolerance may not apply."""

    error: float | None = None
    tolerance: float | None = None
    problem: str = ""


# ------------------------------------------------------------------------------------- operators


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The input of an expert's down projection."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    assert activation == "gelu_tanh", activation
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def moe(
    x: Tensor, experts: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H] in float64 and, per token, the sum of the norms of its experts' terms [T].

    The norms are the scale that a token's error is held against: terms may cancel each other.
    """
    gate, up, down = (w.dequantize(torch.float64) for w in (experts.gate, experts.up, experts.down))
    x, weights = x.to(torch.float64), topk_weights.to(torch.float64)
    out = torch.zeros_like(x)
    magnitude = torch.zeros(x.shape[0], dtype=torch.float64)

    def bias(name: str, expert: int) -> Tensor | float:
        found = experts.biases.get(name)
        return 0.0 if found is None else found[expert].to(torch.float64)

    for e in range(experts.num_experts):
        tokens, slots = torch.nonzero(topk_ids == e, as_tuple=True)
        if len(tokens) == 0:
            continue
        g, u = x[tokens] @ gate[e].T, x[tokens] @ up[e].T
        h = activate(g + bias("gate_bias", e), u + bias("up_bias", e), activation)
        y = (h @ down[e].T + bias("down_bias", e)) * weights[tokens, slots, None]
        out.index_add_(0, tokens, y)
        magnitude.index_add_(0, tokens, y.norm(dim=-1))
    return out, magnitude


def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x @ weight.T + bias in float64, and per token the norm of all products that it sums.

    Those norms are the scale that a token's error is held against: products may cancel each other.
    """
    x, matrix = x.to(torch.float64), weight.dequantize(torch.float64)
    y = x @ matrix.T
    magnitude = (x.square() @ matrix.square().sum(0)).sqrt()
    return (y if bias is None else y + bias.to(torch.float64)), magnitude


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(torch.float64)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(torch.float64)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Each pair of columns as a complex number, times cos + i sin."""
    out = x.to(torch.float64)
    half = cos.shape[1]
    real = torch.arange(half) * 2 if interleaved else torch.arange(half)
    imaginary = real + (1 if interleaved else half)
    pairs = torch.complex(out[..., real], out[..., imaginary])
    turned = pairs * torch.complex(cos.to(torch.float64), sin.to(torch.float64))[positions, None]
    out[..., real], out[..., imaginary] = turned.real, turned.imag
    return out


def attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    scale: float,
) -> Tensor:
    """Token by token and head by head, over the positions that it sees alone."""
    page, group = key_pages.shape[3], query.shape[1] // key_pages.shape[1]
    out = torch.empty((*query.shape[:2], value_pages.shape[3]), dtype=torch.float64)
    for s, length in enumerate(lengths.tolist()):
        first, end = int(query_begin[s]), int(query_begin[s + 1])
        places = torch.arange(length)
        pages, at = page_table[s, places // page].to(torch.int64), places % page
        keys = key_pages[pages, :, :, at].to(torch.float64)  # [length, kv_heads, key_size]
        values = value_pages[pages, :, at].to(torch.float64)
        for t in range(first, end):
            seen = length - (end - t) + 1
            for h in range(query.shape[1]):
                products = keys[:seen, h // group] @ query[t, h].to(torch.float64) * scale
                out[t, h] = products.softmax(0) @ values[:seen, h // group]
    return out


def scores(logits: Tensor, scoring: str) -> Tensor:
    logits = logits.to(torch.float64)
    if scoring == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    powers = torch.exp(logits - logits.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def route_choice(
    scores: list[float], bias: list[float] | None, n_group: int, topk_group: int
) -> list[float]:
    """What a token's experts are ranked by; experts of groups that it may not use are NaN.

    An expert whose score is NaN ranks as -inf: last, but selectable.
    """
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    choice = [-math.inf if math.isnan(c) else c for c in choice]
    if n_group == 1:
        return choice
    size = len(choice) // n_group
    counted = 1 if bias is None else min(2, size)
    strength = [
        sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:counted])
        for g in range(n_group)
    ]
    kept = sorted(range(n_group), key=lambda g: (-strength[g], g))[:topk_group]
    return [c if i // size in kept else math.nan for i, c in enumerate(choice)]


def ranked(choice: list[float]) -> list[int]:
    """Selectable experts, best first, ties to the lower index."""
    selectable = [i for i, c in enumerate(choice) if not math.isnan(c)]
    return sorted(selectable, key=lambda i: (-choice[i], i))


# --------------------------------------------------------------------------------------- judging


def judge(got: Tensor, want: Tensor, tolerance: float, magnitude: Tensor | None = None) -> Outcome:
    """Hold an output [T, N] against the oracle's.

    The error is the relative L2 deviation beyond what rounding to the output's type costs. Where
    the oracle is not finite, or beyond the type's range, the output must not be finite, and only
    there.

    Args:
        got: the output.
        want: float64.
        tolerance: largest relative L2 error.
        magnitude: [T], what a token's deviation is relative to; by default its norm in `want`.
    """
    if got.shape != want.shape:
        return Outcome(problem=f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    info = torch.finfo(got.dtype)
    actual = got.to(torch.float64)
    beyond = ~(want.abs() <= info.max * (1 + TOKEN_SLACK * tolerance))
    within = want.abs() <= info.max * (1 - TOKEN_SLACK * tolerance)
    if (wrong := beyond & actual.isfinite()).any():
        at = wrong.nonzero()[0].tolist()
        return Outcome(
            problem=f"output{at} is {actual[tuple(at)]:.4g}, where {want[tuple(at)]:.4g} is due"
        )
    if (wrong := within & ~actual.isfinite()).any():
        at = wrong.nonzero()[0].tolist()
        return Outcome(
            problem=f"output{at} is {actual[tuple(at)]}, where {want[tuple(at)]:.4g} is due"
        )
    rounding = (want.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
    deviation = ((actual - want).abs() - rounding).clamp(min=0)
    deviation = torch.where(within, deviation, torch.zeros_like(deviation))
    expected = torch.where(within, want, torch.zeros_like(want))
    error = (deviation.norm() / expected.norm().clamp(min=NEGLIGIBLE)).item()
    if not error <= tolerance:
        return Outcome(error, tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}")
    scale = expected.norm(dim=-1) if magnitude is None else magnitude.nan_to_num(nan=math.inf)
    per_token = deviation.norm(dim=-1) / scale.clamp(min=NEGLIGIBLE)
    worst = per_token.max().item() if len(per_token) else 0.0
    if not worst <= TOKEN_SLACK * tolerance:
        return Outcome(
            worst,
            TOKEN_SLACK * tolerance,
            f"token {int(per_token.argmax())} is off by {worst:.3g}, allowed "
            f"{TOKEN_SLACK * tolerance:.3g}",
        )
    return Outcome(error, tolerance)


def same_bits(got: Tensor, want: Tensor, what: str) -> Outcome:
    """Both must be equal bit for bit (NaNs may differ in their payload)."""
    equal = (got == want) | (got.isnan() & want.isnan())
    if got.shape == want.shape and got.dtype == want.dtype and equal.all():
        return Outcome(0.0, 0.0)
    off = int((~equal).sum())
    return Outcome(None, 0.0, f"{off} of {equal.numel()} values differ {what}")


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> Outcome:
    """Equal within a relative L2 tolerance."""
    got, want = got.to(torch.float64), want.to(torch.float64)
    error = ((got - want).norm() / want.norm().clamp(min=NEGLIGIBLE)).item()
    problem = "" if error <= tolerance else f"differs by {error:.3g} {what}"
    return Outcome(error, tolerance, problem)
