"""The operators of one CPU backend, as calls into the extension."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ktcore import _native
from ktcore.backends.native.packing import (
    DTYPES,
    is_packable,
    layout,
    packed_experts,
    packed_matrix,
)
from ktcore.dispatch import figures, probe
from ktcore.dispatch.machine import Machine
from ktcore.dispatch.registry import Implementation, Request
from ktcore.formats import format_names, get_format
from ktcore.ops._check import rows_dense
from ktcore.weights import ExpertWeights, QuantTensor

FORMATS = tuple(name for name in format_names() if is_packable(get_format(name)))
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2}
SCORING = {"softmax": 0, "sigmoid": 1}
CONVERTED = ("bf16", "int8", "int4_g32")  # what quantize and dequantize know
MAX_EXPERTS = 4096  # of the route kernel's tables

# The backend whose kernels multiply tiles of bf16, in formats that these are fine enough for.
TILES = "amx"
FINER_THAN_TILES = frozenset({"f16", "f32", "nvfp4", "nvfp4_ct"})
WITHOUT_TILES = "avx512_vnni"  # whose peaks its other kernels have
# What a weight costs there to become bf16, in operations of float32 (ten instructions for 32).
WIDENING_OPERATIONS = 10

# Seconds that a call costs beside its work: crossing into the extension, waking the threads.
CALL_SECONDS = 5e-6


def missing(backend: str, machine: Machine) -> list[str]:
    """What a machine lacks to run any of a backend's instruction sets."""
    if _native.ext is None:
        return [f"the native extension ({_native.why})"]
    least: list[str] | None = None
    for isa in _native.ext.isas():
        if isa["backend"] == backend:
            lacking = machine.cpu.missing(*isa["requires"])
            if least is None or len(lacking) < len(least):
                least = lacking
    return ["kernels for this processor architecture"] if least is None else least


def instruction_set(backend: str, machine: Machine) -> str:
    """The instruction set of a backend that serves calls on a machine: the most capable that it
    runs, or which `held_to` names; without BF16 dot products where these are slow.
    """
    runs = [
        isa["name"]
        for isa in _native.ext.isas()
        if isa["backend"] == backend and not machine.cpu.missing(*isa["requires"])
    ]
    if _held and _held[-1] in runs:
        return _held[-1]
    if "avx512_bf16" in runs[1:] and _slow_bf16(machine):
        runs.remove("avx512_bf16")
    return runs[-1]


def _slow_bf16(machine: Machine) -> bool:
    """Whether BF16 dot products are slower than those of 16-bit integers, which serve bf16 without
    them and are more exact: as measured, else as Intel's are, of which a core starts one in two
    cycles (an Emerald Rapids: 87 Gop/s a core, half of what it does even in float32).
    """
    known, isas = figures.load_cached(machine), ("avx512_bf16", "avx512_vnni")
    if known is None or any(isa not in known.peak_gops for isa in isas):
        return "Intel" in probe.cpu_brand()
    bf16, integers = (figures.dot_peak(known, isa, "bf16", 1) for isa in isas)
    return bf16 < 0.8 * integers


_held: list[str] = []


@contextlib.contextmanager
def held_to(isa: str) -> Iterator[None]:
    """Within the block, this instruction set serves the calls of its backend, if it runs here."""
    _held.append(isa)
    try:
        with probe.override():  # what was remembered for the machine no longer holds
            yield
    finally:
        _held.pop()


def evidence(backend: str, rungs: dict[str, str], machine: Machine) -> str:
    """How that instruction set has been verified which a machine runs; the least, if none."""
    runs = not missing(backend, machine)
    return rungs[instruction_set(backend, machine) if runs else next(iter(rungs))]


def _seconds(
    backend: str, machine: Machine, request: Request, weights: float, bits: float, operations: float
) -> float:
    """Of a call that reads so many weights, of so many bits each."""
    threads = _native.get_num_threads()
    known = figures.load_cached(machine)
    format, kind = request.format, get_format(request.format).dot_kind
    isa = instruction_set(backend, machine)
    if isa == TILES and (request.exact or format in FINER_THAN_TILES):
        isa = WITHOUT_TILES

    def computing(operations: float, kind: str) -> float:
        return operations / (figures.dot_peak(known, isa, kind, threads) * 1e9)

    if isa == TILES:
        widening = 0 if format == "bf16" else WIDENING_OPERATIONS * weights
        seconds = computing(widening, "f32") + computing(operations, "bf16")
    else:
        # Integer formats reach half of what bytes do at best.
        seconds = computing(operations * (1 if kind == "bf16" else 2), kind)
    reading = weights * bits / 8 / (figures.read_bandwidth(known, threads) * 1e9)
    return CALL_SECONDS + max(reading, seconds)


def _moe_cost(backend: str, request: Request, machine: Machine) -> float:
    bits = get_format(request.format).bits * 2 / 3
    bits += get_format(request.down_format or request.format).bits / 3
    per_expert = 3 * request.hidden_size * request.intermediate_size
    experts = max(1, request.num_experts)
    # Experts that at least one token goes to, were they chosen evenly.
    active = experts * (1 - (1 - min(1, request.top_k / experts)) ** request.tokens)
    operations = 2 * per_expert * request.tokens * request.top_k
    return _seconds(backend, machine, request, active * per_expert, bits, operations)


def _linear_cost(backend: str, request: Request, machine: Machine) -> float:
    # hidden_size x intermediate_size is the matrix, whatever the two mean to the caller.
    size = request.hidden_size * request.intermediate_size
    bits = get_format(request.format).bits
    return _seconds(backend, machine, request, size, bits, 2 * size * request.tokens)


def _on_cpu(request: Request, machine: Machine) -> str | None:
    return None if request.device == "cpu" else f"computes on the CPU, not on {request.device}"


def _route_fits(request: Request, machine: Machine) -> str | None:
    if request.num_experts > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, not {request.num_experts}"
    return _on_cpu(request, machine)


def heads_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x [..., N] as [tokens, heads, N], a matrix with one head; and its address and both strides.

    What is returned may be a copy, and must be kept while the address is used.
    """
    if x.dim() != 3:
        x = x.reshape(-1, 1, x.shape[-1]) if x.dim() < 3 else x.reshape(-1, *x.shape[-2:])
    x = rows_dense(x)
    return x, (x.data_ptr(), x.stride(0), x.stride(1))


def pages_of(key_pages: Tensor, value_pages: Tensor) -> tuple[int, ...]:
    """Pages of keys and values, as the extension takes them."""
    pages, heads, key_size, _ = key_pages.shape
    return (
        key_pages.data_ptr(),
        value_pages.data_ptr(),
        DTYPES[key_pages.dtype],
        pages,
        heads,
        key_size,
        value_pages.shape[3],
        key_pages.stride(0),
        value_pages.stride(0),
        False,
    )


def latent_pages_of(latent_pages: Tensor, value_size: int) -> tuple[int, ...]:
    """Pages of latents, likewise: one head, whose values are the first columns of its keys."""
    pages, _, size = latent_pages.shape
    stride, address = latent_pages.stride(0), latent_pages.data_ptr()
    dtype = DTYPES[latent_pages.dtype]
    return address, address, dtype, pages, 1, size, value_size, stride, stride, True


def operators(backend: str) -> list[Implementation]:
    """The implementations that a CPU backend registers."""
    ext = _native.ext
    known: tuple[Machine, str] | None = None

    def isa() -> str:
        # The machine changes only when a test pretends to be on another one.
        nonlocal known
        machine = probe.machine()
        if known is None or known[0] is not machine:
            known = (machine, instruction_set(backend, machine))
        return known[1]

    def moe(
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        activation: str,
        exact: bool,
    ) -> Tensor:
        tokens, hidden_size = hidden_states.shape
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        if tokens:
            ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
            ext.moe(
                isa(),
                packed_experts(experts),
                hidden_states.data_ptr(),
                DTYPES[hidden_states.dtype],
                tokens,
                hidden_states.stride(0),
                ids.data_ptr(),
                weights.data_ptr(),
                ids.shape[1],
                *(
                    0 if bias is None else bias.data_ptr()
                    for bias in (experts.gate_bias, experts.up_bias, experts.down_bias)
                ),
                out.data_ptr(),
                hidden_size,
                ACTIVATIONS[activation],
                exact,
            )
        return out

    def prepare_moe(
        generation: int,
        hidden_states: Tensor,
        experts: ExpertWeights,
        *_routing: Tensor,
        activation: str,
        exact: bool,
    ) -> object:
        biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
        packed, code = packed_experts(experts), ACTIVATIONS[activation]
        return ext.prepare_moe(
            generation, isa(), packed, hidden_states, biases, activation, code, exact
        )

    def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None, *, exact: bool) -> Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, weight.shape[0]), dtype=x.dtype)
        if tokens:
            bias = None if bias is None else bias.to(torch.float32).contiguous()
            ext.linear(
                isa(),
                packed_matrix(weight),
                x.data_ptr(),
                DTYPES[x.dtype],
                tokens,
                x.stride(0),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                weight.shape[0],
                exact,
            )
        return out

    def prepare_linear(
        generation: int, x: Tensor, weight: QuantTensor, bias: Tensor | None, *, exact: bool
    ) -> object:
        return ext.prepare_linear(generation, isa(), packed_matrix(weight), x, exact)

    def dequantize(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(weight.shape, dtype=dtype)
        if out.numel():
            data = weight.parts["data"].contiguous()
            scales = weight.parts.get("scales")
            scales = None if scales is None else scales.contiguous()
            ext.dequantize(
                isa(),
                weight.format.name,
                out.numel() // weight.shape[-1],
                weight.shape[-1],
                data.data_ptr(),
                0 if scales is None else scales.data_ptr(),
                out.data_ptr(),
                DTYPES[dtype],
            )
        return out

    def quantize(tensor: Tensor, format_name: str) -> QuantTensor:
        format = get_format(format_name)
        rows = tensor.reshape(-1, tensor.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        parts = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in format.part_specs(tuple(tensor.shape)).items()
        }
        if rows.numel():
            scales = parts.get("scales")
            ext.quantize(
                isa(),
                format.name,
                rows.data_ptr(),
                DTYPES[rows.dtype],
                rows.shape[0],
                rows.shape[1],
                rows.stride(0),
                parts["data"].data_ptr(),
                0 if scales is None else scales.data_ptr(),
            )
        return QuantTensor(format, tuple(tensor.shape), parts)

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
        tokens, num_experts = logits.shape
        ids = torch.empty((tokens, top_k), dtype=torch.int64)
        weights = torch.empty((tokens, top_k), dtype=torch.float32)
        if tokens:
            logits = logits.to(torch.float32)
            if logits.stride(-1) != 1:
                logits = logits.contiguous()
            bias = None
            if correction_bias is not None:
                bias = correction_bias.to(torch.float32).contiguous()
            ext.route(
                isa(),
                logits.data_ptr(),
                logits.stride(0),
                tokens,
                num_experts,
                top_k,
                SCORING[scoring],
                0 if bias is None else bias.data_ptr(),
                n_group,
                topk_group,
                renormalize,
                scale,
                ids.data_ptr(),
                weights.data_ptr(),
            )
        return ids, weights

    def rms_norm(
        x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = None if residual is None else torch.empty_like(out)
        if x.numel():
            x, x_at = heads_of(x)
            residual_at = (0, 0, 0)
            if residual is not None:
                residual, residual_at = heads_of(residual)
            ext.rms_norm(
                isa(),
                *x_at,
                *residual_at,
                0 if total is None else total.data_ptr(),
                out.data_ptr(),
                DTYPES[x.dtype],
                *x.shape,
                weight.data_ptr(),
                eps,
            )
        return out, total

    def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            x, x_at = heads_of(x)
            ext.rotary(
                isa(),
                *x_at,
                out.data_ptr(),
                DTYPES[x.dtype],
                *x.shape,
                2 * cos.shape[1],
                cos.data_ptr(),
                sin.data_ptr(),
                cos.shape[0],
                positions.data_ptr(),
                interleaved,
            )
        return out

    def store_kv(
        key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
    ) -> None:
        if key.numel():
            key, key_at = heads_of(key)
            value, value_at = heads_of(value)
            ext.store_kv(
                isa(),
                *key_at,
                *value_at,
                DTYPES[key.dtype],
                key.shape[0],
                pages_of(key_pages, value_pages),
                slots.data_ptr(),
            )

    def store_latent(latent: Tensor, latent_pages: Tensor, slots: Tensor) -> None:
        if latent.numel():
            latent, latent_at = heads_of(latent)
            ext.store_kv(
                isa(),
                *latent_at,
                *(0, 0, 0),
                DTYPES[latent.dtype],
                latent.shape[0],
                latent_pages_of(latent_pages, latent_pages.shape[2]),
                slots.data_ptr(),
            )

    def attend(query: Tensor, pages: tuple, value_size: int, *places: Tensor, scale) -> Tensor:
        query, query_at = heads_of(query)
        out = torch.empty((*query.shape[:2], value_size), dtype=query.dtype)
        page_table, lengths, query_begin = places
        ext.attention(
            isa(),
            *query_at,
            out.data_ptr(),
            DTYPES[query.dtype],
            *query.shape[:2],
            pages,
            page_table.data_ptr(),
            page_table.shape[1],
            lengths.data_ptr(),
            query_begin.data_ptr(),
            page_table.shape[0],
            scale,
        )
        return out

    def mla_attention(
        query: Tensor,
        latent_pages: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        query_begin: Tensor,
        value_size: int,
        scale: float,
    ) -> Tensor:
        pages = latent_pages_of(latent_pages, value_size)
        return attend(query, pages, value_size, page_table, lengths, query_begin, scale=scale)

    def attention(
        query: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        query_begin: Tensor,
        scale: float,
    ) -> Tensor:
        pages, value_size = pages_of(key_pages, value_pages), value_pages.shape[3]
        return attend(query, pages, value_size, page_table, lengths, query_begin, scale=scale)

    def flat(request: Request, machine: Machine) -> float:
        return CALL_SECONDS + 1e-8 * request.tokens

    def attention_cost(request: Request, machine: Machine) -> float:
        # Tiles take as long for one row as for all of their own, and each page is converted.
        tokens = request.tokens / 4 + 4 if backend == TILES else request.tokens
        return CALL_SECONDS + 1e-8 * tokens

    def packable(format: str) -> bool:
        return is_packable(get_format(format))

    def implementation(op, formats, run, cost, supports=_on_cpu, **more):
        detail = partial(instruction_set, backend)
        return Implementation(op, backend, formats, run, cost, supports, detail, **more)

    packed = {"takes": packable, "packs": layout(), "recordable": True}
    moe_cost, linear_cost = partial(_moe_cost, backend), partial(_linear_cost, backend)
    return [
        implementation("moe", FORMATS, moe, moe_cost, prepare=prepare_moe, **packed),
        implementation("linear", FORMATS, linear, linear_cost, prepare=prepare_linear, **packed),
        implementation("dequantize", CONVERTED, dequantize, flat),
        implementation("quantize", CONVERTED, quantize, flat),
        implementation("route", (), route, flat, _route_fits, recordable=True),
        implementation("attention", (), attention, attention_cost, recordable=True),
        *(
            implementation(op, (), run, flat, recordable=True)
            for op, run in (
                ("rms_norm", rms_norm),
                ("rotary", rotary),
                ("store_kv", store_kv),
                ("store_latent", store_latent),
                ("mla_attention", mla_attention),
            )
        ),
    ]
