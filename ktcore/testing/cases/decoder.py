"""Cases of what stands between a decoder's matrices: norms, rotation, attention."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore import _native, ops
from ktcore.ops.attention import PAGE
from ktcore.testing import oracle
from ktcore.testing.cases import inputs
from ktcore.testing.oracle import Outcome

# Relative L2 errors; all of these compute in float32, of which attention adds up the most terms.
TOLERANCE = 1e-6
ATTENTION_TOLERANCE = 4e-6

Tensors = tuple[Tensor, ...]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _close(got: Tensor, want: Tensor, like: Tensor, tolerance: float) -> Outcome:
    if got.dtype != like.dtype or got.shape != want.shape:
        return Outcome(
            problem=f"output is {got.dtype} {tuple(got.shape)}, expected {like.dtype} "
            f"{tuple(want.shape)}"
        )
    rows = (-1, want.shape[-1])
    return oracle.judge(got.reshape(rows), want.reshape(rows), tolerance)


def _any_threads(call: Callable[[], Tensor], got: Tensor) -> Outcome:
    before = _native.get_num_threads()
    try:
        for threads in (1, 2, 5):
            _native.set_num_threads(threads)
            outcome = oracle.same_bits(call(), got, f"with {threads} thread(s)")
            if outcome.problem:
                return outcome
    finally:
        _native.set_num_threads(before)
    return Outcome(0.0, 0.0)


def _of_heads(x: Tensor, heads: int, strided: bool) -> Tensor:
    """[T, heads * N] as [T, heads, N]; strided as the queries are among keys and values."""
    if strided:
        wide = x.new_full((x.shape[0], x.shape[1] + 24), float("nan"))
        wide[:, 8 : 8 + x.shape[1]] = x
        x = wide[:, 8 : 8 + x.shape[1]]
    return x.unflatten(-1, (heads, -1))


# ---------------------------------------------------------------------------------------- rms_norm


@dataclass(frozen=True)
class NormCase:
    """One call, with a residual or without, held against the oracle."""

    name: str
    tokens: int = 17
    heads: int | None = None  # None: x is a matrix
    size: int = 129
    dtype: torch.dtype = F32
    weight: torch.dtype = F32
    eps: float = 1e-6
    x: str = "normal"
    strided: bool = False
    residual: bool = False

    op = "rms_norm"

    def applies(self, format: str | None) -> bool:
        return format is None

    def run(self, format: str | None, backend: str) -> Outcome:
        columns = self.size * (self.heads or 1)

        def values(seed: str) -> Tensor:
            x = inputs.activations(self.x, self.tokens, columns, self.dtype, self.name + seed)
            if self.heads is not None:
                return _of_heads(x, self.heads, self.strided)
            return inputs.lay_out(x, "row_stride" if self.strided else "dense")

        x, rng = values(""), inputs.generator(self.name)
        weight = torch.randn(self.size, generator=rng).to(self.weight)
        if not self.residual:
            got = ops.rms_norm(x, weight, self.eps)
            return _close(got, oracle.rms_norm(x, weight, self.eps), x, TOLERANCE)
        residual = values(" residual")
        got, total = ops.add_rms_norm(x, residual, weight, self.eps)
        exact = x.to(torch.float64) + residual.to(torch.float64)
        outcome = _close(total, exact, x, TOLERANCE)
        if outcome.problem:
            return outcome
        return _close(got, oracle.rms_norm(total, weight, self.eps), x, TOLERANCE)


def _norm_cases() -> list[NormCase]:
    out = [NormCase(f"tokens={t} size={n}", t, size=n) for t in (0, 1, 513) for n in (1, 31, 2048)]
    out += [
        NormCase(f"{_name(d)} weight {_name(w)}", dtype=d, weight=w)
        for d in (F32, F16, BF16)
        for w in (F32, BF16, torch.float64)
    ]
    out += [
        NormCase(f"heads strided={s} {_name(d)}", heads=5, size=40, strided=s, dtype=d)
        for s in (False, True)
        for d in (F32, BF16)
    ]
    out += [
        NormCase(f"residual {_name(d)} strided={s}", dtype=d, residual=True, strided=s)
        for d in (F32, F16, BF16)
        for s in (False, True)
    ]
    out += [NormCase(f"x {kind}", x=kind) for kind in ("zero", "denormal", "huge", "uneven")]
    out += [NormCase("x nan", x="nan"), NormCase("eps 1", eps=1.0), NormCase("eps 0", eps=0.0)]
    return out


# ------------------------------------------------------------------------------------------ rotary


@dataclass(frozen=True)
class RotaryCase:
    """One call, held against the oracle."""

    name: str
    tokens: int = 17
    heads: int = 3
    head_size: int = 40
    rotary_size: int = 40
    dtype: torch.dtype = F32
    interleaved: bool = False
    strided: bool = False

    op = "rotary"

    def applies(self, format: str | None) -> bool:
        return format is None

    def run(self, format: str | None, backend: str) -> Outcome:
        columns = self.heads * self.head_size
        x = inputs.activations("normal", self.tokens, columns, self.dtype, self.name)
        x = _of_heads(x, self.heads, self.strided)
        rng = inputs.generator(self.name)
        positions = torch.randint(0, 50, (self.tokens,), generator=rng)
        angles = torch.outer(torch.arange(50.0), torch.rand(self.rotary_size // 2, generator=rng))
        cos, sin = angles.cos(), angles.sin()
        got = ops.rotary(x, cos, sin, positions, interleaved=self.interleaved)
        return _close(got, oracle.rotary(x, cos, sin, positions, self.interleaved), x, TOLERANCE)


def _rotary_cases() -> list[RotaryCase]:
    out = [RotaryCase(f"tokens={t} interleaved={i}", t, interleaved=i) for t in (0, 1, 513)
           for i in (False, True)]  # fmt: skip
    out += [
        RotaryCase(
            f"{r} of {n} interleaved={i} {_name(d)}", 9, 2, n, r, d, interleaved=i, strided=True
        )
        for n, r in ((2, 2), (128, 128), (72, 64), (130, 2), (192, 66))
        for i in (False, True)
        for d in (F32, BF16)
    ]
    return out


# --------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionCase:
    """Keys and values stored token by token or at once, then one call, held against the oracle on
    what the pages hold. `counts` are the tokens of each sequence, `lengths` its positions."""

    name: str
    lengths: tuple[int, ...] = (70,)
    counts: tuple[int, ...] = (1,)
    kv_heads: int = 2
    group: int = 4
    key_size: int = 64
    value_size: int = 64
    dtype: torch.dtype = F32
    pages: torch.dtype = F32
    scale: float | None = None
    spoiled: str = ""  # a value of the last position that is no number
    threads: bool = False
    alone: bool = False  # also every sequence, and every token, on its own
    op: str = "attention"

    def applies(self, format: str | None) -> bool:
        return format is None

    def run(self, format: str | None, backend: str) -> Outcome:
        query, pages, places = self.inputs()
        got = self.call(query, pages, places)
        want = oracle.attention(query, *self.as_pages(pages), *places, self.factor)
        outcome = _close(got, want, query, ATTENTION_TOLERANCE)
        if outcome.problem:
            return outcome
        if self.threads:
            return _any_threads(lambda: self.call(query, pages, places), got)
        if self.alone and backend != "reference":  # torch's sums depend on the batch
            table, lengths, begin = places
            for s, (first, end) in enumerate(itertools.pairwise(begin.tolist())):
                for t in range(first, end):
                    length = lengths[s : s + 1] - (end - t) + 1
                    one = (table[s : s + 1], length, torch.tensor([0, 1]))
                    alone = self.call(query[t : t + 1], pages, one)
                    same = oracle.same_bits(alone, got[t : t + 1], f"for token {t} alone")
                    if same.problem:
                        return same
        return outcome

    @property
    def factor(self) -> float:
        return self.key_size**-0.5 if self.scale is None else self.scale

    def call(self, query: Tensor, pages: Tensors, places: Tensors) -> Tensor:
        return ops.attention(query, *pages, *places, scale=self.scale)

    def as_pages(self, pages: Tensors) -> Tensors:
        """Keys and values, as `attention` has them."""
        return pages

    def empty(self, total: int) -> Tensors:
        keys = torch.full((total, self.kv_heads, self.key_size, PAGE), math.nan)
        values = torch.full((total, self.kv_heads, PAGE, self.value_size), math.nan)
        return keys.to(self.pages), values.to(self.pages)

    def store(self, key: Tensor, value: Tensor, pages: Tensors, slots: Tensor) -> None:
        ops.store_kv(key, value, *pages, slots)

    def inputs(self) -> tuple[Tensor, Tensors, Tensors]:
        """Queries, pages, which hold NaN where nothing is stored, and where sequences are."""
        rng = inputs.generator(self.name)
        sizes = [-(-n // PAGE) for n in self.lengths]
        total = sum(sizes) + 2
        pages = self.empty(total)
        table = torch.full((len(sizes), max(1, *sizes)), -1, dtype=torch.int32)
        order = torch.randperm(total, generator=rng).to(torch.int32)
        for s, (n, length) in enumerate(zip(sizes, self.lengths, strict=True)):
            table[s, :n], order = order[:n], order[n:]
            key = torch.randn(length, self.kv_heads, self.key_size, generator=rng).to(self.dtype)
            value = torch.randn(length, self.kv_heads, self.value_size, generator=rng)
            value = value.to(self.dtype)
            if self.spoiled and length:
                value[-1, 0, 0] = key[-1, 0, 0] = float(self.spoiled)
            positions = torch.arange(length)
            slots = table[s, positions // PAGE].to(torch.int64) * PAGE + positions % PAGE
            for part in (slice(0, length // 2), slice(length // 2, length)):
                self.store(key[part], value[part], pages, slots[part])
        begin = torch.tensor([0, *self.counts]).cumsum(0)
        columns = self.kv_heads * self.group * self.key_size
        query = torch.randn(int(begin[-1]), columns, generator=rng).to(self.dtype)
        query = _of_heads(query, self.kv_heads * self.group, True)
        return query, pages, (table, torch.tensor(self.lengths), begin)


@dataclass(frozen=True)
class LatentCase(AttentionCase):
    """The same for `mla_attention`."""

    kv_heads: int = 1
    group: int = 16
    key_size: int = 72
    op: str = "mla_attention"

    def call(self, query: Tensor, pages: Tensors, places: Tensors) -> Tensor:
        return ops.mla_attention(
            query, *pages, *places, value_size=self.value_size, scale=self.factor
        )

    def as_pages(self, pages: Tensors) -> Tensors:
        (latents,) = pages
        return latents.transpose(1, 2)[:, None], latents[:, None, :, : self.value_size]

    def empty(self, total: int) -> Tensors:
        return (torch.full((total, PAGE, self.key_size), math.nan).to(self.pages),)

    def store(self, key: Tensor, value: Tensor, pages: Tensors, slots: Tensor) -> None:
        ops.store_latent(key[:, 0], *pages, slots)


def _latent_cases() -> list[LatentCase]:
    case = LatentCase
    return [
        *(case(f"{n} positions, {t} tokens", (n,), (t,)) for n, t in ((1, 1), (33, 33), (700, 1))),
        case("DeepSeek-V3", (70,), (3,), group=128, key_size=576, value_size=512, pages=BF16),
        *(
            case(f"sizes {k} {v}", (45,), (5,), group=3, key_size=k, value_size=v)
            for k, v in ((1, 1), (40, 33), (65, 65), (100, 64))
        ),
        *(case(f"pages {_name(p)}", (90,), (9,), dtype=BF16, pages=p) for p in (F32, F16, BF16)),
        case("sequences", (5, 600, 0, 64), (5, 1, 0, 0)),
        case("a latent is nan", (70,), (5,), spoiled="nan", alone=True),
        case("bits alike with 1, 2, 5 threads", (1100, 33), (1, 1), threads=True),
        case("bits alike in any batch", (600, 40), (20, 40), pages=F16, alone=True),
    ]


def _attention_cases() -> list[AttentionCase]:
    case = AttentionCase
    out = [
        case(f"{n} positions, {t} tokens", (n,), (t,))
        for n, t in ((1, 1), (32, 1), (33, 33), (513, 1), (513, 513), (1600, 70), (1025, 3))
    ]
    out += [
        case(f"heads {h}x{g} sizes {k} {v}", (70,), (5,), h, g, k, v)
        for h, g, k, v in (
            (1, 1, 1, 1), (3, 1, 40, 33), (1, 16, 576, 512), (4, 8, 128, 128), (2, 7, 80, 96),
            (1, 100, 24, 70),
        )
    ]  # fmt: skip
    out += [
        case(f"{_name(d)} on pages {_name(p)}", (600,), (9,), dtype=d, pages=p)
        for d in (F32, F16, BF16)
        for p in (F32, F16, BF16)
    ]
    out += [
        case("no tokens", (40, 0), (0, 0)),
        case("sequences", (5, 600, 64, 0, 1100), (5, 1, 0, 0, 40)),
        case("scale", (70,), (5,), scale=0.02),
        case("a value is nan", (70,), (5,), spoiled="nan", alone=True),
        case("a value is inf", (40,), (9,), spoiled="inf", alone=True),
        case("a value is nan, float16", (600,), (40,), pages=F16, spoiled="nan", alone=True),
        case("a value is nan, bfloat16", (70,), (5,), pages=BF16, spoiled="nan", alone=True),
        case("a value is inf, bfloat16", (40,), (9,), pages=BF16, spoiled="inf", alone=True),
        case("bits alike with 1, 2, 5 threads", (1700, 33), (1, 1), threads=True),
        case("bits alike with 1, 2, 5 threads, many tokens", (700, 90), (80, 90), threads=True),
        case("bits alike in any batch", (1100, 40, 33), (20, 40, 1), pages=F16, alone=True),
    ]
    return out


@dataclass(frozen=True)
class StoreCase:
    """What pages hold after tokens were stored: those, as the pages' type rounds them, no more."""

    name: str
    tokens: int = 17
    dtype: torch.dtype = F32
    pages: torch.dtype = F32
    x: str = "normal"
    op: str = "store_kv"

    def applies(self, format: str | None) -> bool:
        return format is None

    def run(self, format: str | None, backend: str) -> Outcome:
        heads, key_size, value_size, total = 2, 40, 33, 9
        rng = inputs.generator(self.name)

        def tokens(size: int, seed: str) -> Tensor:
            x = inputs.activations(self.x, self.tokens, heads * size, self.dtype, self.name + seed)
            return _of_heads(x, heads, True)

        key, value = tokens(key_size, "k"), tokens(value_size, "v")
        slots = torch.randperm(total * PAGE, generator=rng)[: self.tokens]
        slots[3::5] = -1
        pages = [
            torch.full((total, heads, key_size, PAGE), 7.0).to(self.pages),
            torch.full((total, heads, PAGE, value_size), 7.0).to(self.pages),
        ]
        wanted = [part.clone() for part in pages]
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[0][slot // PAGE, :, :, slot % PAGE] = self._rounded(key[t])
                wanted[1][slot // PAGE, :, slot % PAGE] = self._rounded(value[t])
        if self.op == "store_latent":
            pages, wanted = pages[:1], wanted[:1]
            latents = pages[0][:, 0].transpose(1, 2).contiguous()
            ops.store_latent(key[:, 0], latents, slots)
            pages[0][:, 0] = latents.transpose(1, 2)
            wanted[0][:, 1:] = pages[0][:, 1:]
        else:
            ops.store_kv(key, value, *pages, slots)
        for got, want in zip(pages, wanted, strict=True):
            outcome = oracle.same_bits(got, want, "in the pages")
            if outcome.problem:
                return outcome
        return outcome

    def _rounded(self, x: Tensor) -> Tensor:
        if self.pages is not F16:
            return x.to(self.pages)
        clamped = x.to(F32).clamp(-65504, 65504).to(F16)
        return torch.where(x.isfinite(), clamped, torch.full_like(clamped, math.nan))


NORM = tuple(_norm_cases())
ROTARY = tuple(_rotary_cases())
ATTENTION = tuple(_attention_cases())
LATENT = tuple(_latent_cases())
STORE = tuple(
    [StoreCase(f"tokens={t}", t) for t in (0, 1, 200)]
    + [
        StoreCase(f"{_name(d)} in {_name(p)}", dtype=d, pages=p)
        for d in (F32, F16, BF16)
        for p in (F32, F16, BF16)
    ]
    + [StoreCase(f"{kind} in float16", pages=F16, x=kind) for kind in ("huge", "nan", "inf")]
)
STORE_LATENT = tuple(dataclasses.replace(case, op="store_latent") for case in STORE)
