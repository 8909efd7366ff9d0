"""The operators in plain torch: weights dequantised by their format, float32 arithmetic.

Written to be read. Formats are asked only for `dequantize` and `quantize`, so a new format works
here at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Implementation, Request
from ktcore.formats import format_names
from ktcore.weights import ExpertWeights, QuantTensor


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# Gate and up to the input of the down projection.
ACTIVATIONS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swiglu_oai": _swiglu_oai,
}

# For ranking only. Plain torch pays for each of the small operators that it is made of, and reads
# and writes a dequantised copy of each weight that it touches.
SECONDS_PER_STEP = 50e-6
SECONDS_PER_WEIGHT = 4e-9
SECONDS_PER_OPERATION = 4e-11


def check_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raises IndexError if an id is neither -1 nor an expert."""
    bad = (topk_ids < -1) | (topk_ids >= num_experts)
    if bad.any():
        t, k = (int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"topk_ids[{t}, {k}] is {int(topk_ids[t, k])}; expected -1 (not computed here) or 0 to "
            f"{num_experts - 1}"
        )


def moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str,
    exact: bool,
) -> Tensor:
    check_ids(topk_ids, experts.num_experts)
    act = ACTIVATIONS[activation]
    x = hidden_states.to(torch.float32)
    out = torch.zeros_like(x)
    for e in topk_ids.unique().tolist():
        if e < 0:
            continue
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        gate, up, down = (
            w[e].dequantize(torch.float32) for w in (experts.gate, experts.up, experts.down)
        )
        bias = {name: b[e] for name, b in experts.biases.items()}
        h = act(
            F.linear(x[token], gate, bias.get("gate_bias")),
            F.linear(x[token], up, bias.get("up_bias")),
        )
        y = F.linear(h, down, bias.get("down_bias")) * topk_weights[token, slot, None]
        out.index_add_(0, token, y)
    return out.to(hidden_states.dtype)


def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None, *, exact: bool) -> Tensor:
    y = F.linear(x.to(torch.float32), weight.dequantize(torch.float32))
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def dequantize(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype)


def quantize(tensor: Tensor, format_name: str) -> QuantTensor:
    return QuantTensor.quantize(tensor, format_name)


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str,
    correction_bias: Tensor | None,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.float32)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.to(torch.float32)
    # A NaN is chosen last, not first.
    choice = choice.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        # A group counts its two best experts where a bias steers the choice, else its best one.
        counted = 2 if correction_bias is not None and grouped.shape[-1] > 1 else 1
        strength = grouped.topk(counted, dim=-1).values.sum(-1)
        kept = strength.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        allowed = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, kept, True)
        grouped = grouped.masked_fill(~allowed[..., None], -torch.inf)
        # Among what is left, even an expert of score -inf in an allowed group comes before others.
        order = grouped.flatten(1).sort(dim=-1, descending=True, stable=True).indices
        barred = (~allowed)[..., None].expand_as(grouped).flatten(1).gather(1, order)
        order = order.gather(1, barred.to(torch.uint8).sort(dim=-1, stable=True).indices)
    else:
        order = choice.sort(dim=-1, descending=True, stable=True).indices
    ids = order[:, :top_k].contiguous()
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    total = None if residual is None else x + residual
    rows = (x if total is None else total).to(torch.float32)
    # As rows over hypot(|row|, sqrt(N eps)), times sqrt(N): fewer operators than the plain form.
    size = x.shape[-1]
    floor = torch.tensor((size * eps) ** 0.5, device=x.device)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).hypot_(floor)
    return (rows / norm).mul_(size**0.5 * weight).to(x.dtype), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    check_index("positions", positions, cos.shape[0])
    cos, sin = cos[positions, None], sin[positions, None]  # [T, 1, R / 2]
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].to(torch.float32), x[..., size:]
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def check_index(name: str, values: Tensor, end: int, least: int = 0) -> None:
    """Raises IndexError unless all [T] values are from `least` to end - 1."""
    if len(values) == 0:
        return
    low, high = torch.aminmax(values)
    if low < least or high >= end:
        i = int(((values < least) | (values >= end)).nonzero()[0])
        raise IndexError(f"{name}[{i}] is {int(values[i])}; expected {least} to {end - 1}")


def _as_stored(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the type of pages: what float16 cannot hold becomes its largest number."""
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        tokens = tokens.clamp(-most, most) + (tokens - tokens)  # what is not finite stays so
    return tokens.to(dtype)


def store_kv(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> None:
    size = key_pages.shape[3]
    check_index("slots", slots, size * key_pages.shape[0], -1)
    stored = slots >= 0
    page, at = slots[stored] // size, slots[stored] % size
    for pages, tokens, place in (
        (key_pages, key, (page, slice(None), slice(None), at)),
        (value_pages, value, (page, slice(None), at)),
    ):
        pages[place] = _as_stored(tokens[stored], pages.dtype)


def attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    scale: float,
) -> Tensor:
    tokens, heads, _ = query.shape
    pages, kv_heads, key_size, page = key_pages.shape
    begins = query_begin.tolist()
    out = query.new_empty(tokens, heads, value_pages.shape[3])
    if begins[0] != 0 or begins[-1] != tokens:
        raise IndexError(f"query_begin: expected 0 first and {tokens} last, got {begins}")
    for s, length in enumerate(lengths.tolist()):
        count = begins[s + 1] - begins[s]
        most = page_table.shape[1] * page
        if count < 0:
            raise IndexError(
                f"query_begin[{s + 1}] is {begins[s + 1]}; expected no less than before"
            )
        if not count <= length <= most:
            raise IndexError(f"lengths[{s}] is {length}; expected {count} to {most}")
        if count == 0:
            continue
        table = page_table[s, : -(-length // page)]
        check_index("page_table", table, pages)
        keys = key_pages[table].permute(1, 0, 3, 2).reshape(kv_heads, -1, key_size)
        values = value_pages[table].transpose(0, 1).flatten(1, 2)
        q = query[begins[s] : begins[s + 1]].to(torch.float32).transpose(0, 1)

        def attend(first: int, end: int, positions: int, q=q, keys=keys, values=values) -> Tensor:
            n = end - first
            seen = torch.ones(n, positions, dtype=torch.bool, device=q.device)
            return F.scaled_dot_product_attention(
                q[None, :, first:end],
                keys[None, :, :positions].to(torch.float32),
                values[None, :, :positions].to(torch.float32),
                attn_mask=None if n == 1 else seen.tril_(positions - n),
                scale=scale,
                enable_gqa=heads != kv_heads,
            )[0]

        if count > 1 and not values[:, :length].isfinite().all():
            # What a token does not see must not spoil it by being no number.
            each = [attend(t, t + 1, length - count + t + 1) for t in range(count)]
            mixed = torch.cat(each, 1)
        else:
            mixed = attend(0, count, length)
        out[begins[s] : begins[s + 1]] = mixed.transpose(0, 1).to(out.dtype)
    return out


def store_latent(latent: Tensor, latent_pages: Tensor, slots: Tensor) -> None:
    pages, page, size = latent_pages.shape
    check_index("slots", slots, page * pages, -1)
    stored = slots >= 0
    rows = latent_pages.view(-1, size)
    rows[slots[stored]] = _as_stored(latent[stored], latent_pages.dtype)


def mla_attention(
    query: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    value_size: int,
    scale: float,
) -> Tensor:
    keys, values = latent_pages.transpose(1, 2), latent_pages[..., :value_size]
    return attention(query, keys[:, None], values[:, None], page_table, lengths, query_begin, scale)


def _moe_cost(request: Request, machine: Machine) -> float:
    per_expert = 3 * request.hidden_size * request.intermediate_size
    pairs = request.tokens * request.top_k
    active = min(max(1, request.num_experts), pairs)
    return (
        SECONDS_PER_STEP * (4 + 10 * active)
        + SECONDS_PER_WEIGHT * active * per_expert
        + SECONDS_PER_OPERATION * 2 * per_expert * pairs
    )


def _linear_cost(request: Request, machine: Machine) -> float:
    size = request.hidden_size * request.intermediate_size
    return (
        3 * SECONDS_PER_STEP
        + SECONDS_PER_WEIGHT * size
        + SECONDS_PER_OPERATION * 2 * size * request.tokens
    )


def _flat_cost(request: Request, machine: Machine) -> float:
    return 10 * SECONDS_PER_STEP + 1e-6 * request.tokens


def operators() -> list[Implementation]:
    """The implementations that this backend registers."""
    formats = tuple(format_names())

    def implementation(op, run, cost):
        return Implementation(op, "reference", formats, run, cost, takes=lambda format: True)

    return [
        implementation("moe", moe, _moe_cost),
        implementation("linear", linear, _linear_cost),
        implementation("dequantize", dequantize, _flat_cost),
        implementation("quantize", quantize, _flat_cost),
        *(
            Implementation(op, "reference", (), run, _flat_cost)
            for op, run in (
                ("route", route),
                ("rms_norm", rms_norm),
                ("rotary", rotary),
                ("store_kv", store_kv),
                ("attention", attention),
                ("store_latent", store_latent),
                ("mla_attention", mla_attention),
            )
        ),
    ]
