"""Cases of `moe`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore import _native, ops
from ktcore.formats import Format, get_format
from ktcore.testing import oracle
from ktcore.testing.cases import inputs
from ktcore.testing.oracle import Outcome
from ktcore.weights import ExpertWeights

# torch's matrix products sum in an order that depends on the shape, so the reference's last bits
# depend on which tokens share a batch. Every other backend promises that they do not.
ROUNDS_BY_BATCH = ("reference",)
BATCH_ROUNDING = 1e-5


@dataclass(frozen=True)
class MoeCase:
    """One call, held against the oracle; `compare` is a further look at the result.

    Sizes are rounded up to whole blocks of the format. `brief` cases are for every format.
    """

    name: str
    hidden_size: int = 65
    intermediate_size: int = 48
    num_experts: int = 5
    tokens: int = 17
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    ids: str = "random"
    ids_dtype: torch.dtype = torch.int64
    weights: str = "random"
    weights_dtype: torch.dtype = torch.float32
    activation: str = "silu"
    exact: bool = False
    x: str = "normal"
    layout: str = "dense"
    stored: str = "quantised"
    biases: tuple[str, ...] = ()
    compare: Callable[[Call, Tensor, str], Outcome] | None = None
    brief: bool = False

    op = "moe"

    def applies(self, format: str | None) -> bool:
        return (
            format is not None
            and inputs.applies(self.stored, format)
            and (self.brief or inputs.thorough(format))
            and (self.x != "largest" or inputs.can_quantize(format))  # weights of its own
        )

    def run(self, format: str | None, backend: str) -> Outcome:
        assert format is not None
        call = Call(self, format)
        got = call()
        if got.dtype != self.dtype:
            return Outcome(problem=f"output is {got.dtype}, expected {self.dtype}")
        tolerance = self._tolerance(get_format(format), backend)
        want, magnitude = oracle.moe(
            call.x, call.experts, call.topk_ids, call.topk_weights, self.activation
        )
        outcome = oracle.judge(got, want, tolerance, magnitude)
        if outcome.problem or self.compare is None:
            return outcome
        return self.compare(call, got, backend)

    def _tolerance(self, format: Format, backend: str) -> float:
        if self.exact:
            return format.exact_tolerance
        few = self.tokens * self.intermediate_size < 128
        if ("outlier" in self.x or few) and inputs.rounds_to_bf16(backend, format):
            # Errors of many columns add in squares, those of few need not: x and h are up to 2^-9
            # off, and x is in gate and up. (Of an outlier, these are that one column's.)
            return max(format.tolerance, 3 * 2**-9)
        return format.tolerance


class Call:
    """A case's arguments; calling it calls the operator, with some of them replaced."""

    def __init__(self, case: MoeCase, format: str):
        self.case = case
        make = inputs.shut_experts if case.x == "largest" else inputs.experts
        hidden_size = inputs.whole_blocks(format, case.hidden_size)
        sizes = (hidden_size, inputs.whole_blocks(format, case.intermediate_size))
        self.experts: ExpertWeights = (
            make(format, *sizes)
            if case.x == "largest"
            else make(format, case.num_experts, *sizes, case.stored, case.biases)
        )
        x = inputs.activations(case.x, case.tokens, hidden_size, case.dtype, case.name)
        if hidden_size >= 512 and not inputs.can_quantize(format):
            # The weights are of about 1: sums of so many of them are so far from zero that the
            # gate is a step, which a rounded activation may take. Nor is their mean zero: what
            # rounding adds to all outputs alike is much beside a token whose activations happen
            # to add up to nothing.
            x = (x + 0.2) / 32
        self.x = inputs.lay_out(x, case.layout)
        rng = inputs.generator(case.name + " routing")
        self.topk_ids = _ids(case, rng).to(case.ids_dtype)
        weights = torch.rand(case.tokens, case.top_k, generator=rng) + 0.1
        if case.weights == "zero":
            weights = torch.zeros_like(weights)
        elif case.weights == "signed":
            weights = weights - 0.6
        self.topk_weights = weights.to(case.weights_dtype)

    def __call__(self, x: Tensor | None = None, tokens: Tensor | slice = slice(None)) -> Tensor:
        return ops.moe(
            (self.x if x is None else x)[tokens],
            self.experts,
            self.topk_ids[tokens],
            self.topk_weights[tokens],
            activation=self.case.activation,
            exact=self.case.exact,
        )


def _ids(case: MoeCase, rng: torch.Generator) -> Tensor:
    shape = (case.tokens, case.top_k)
    if case.ids == "one_expert":
        return torch.full(shape, case.num_experts - 1)
    if case.ids == "none":
        return torch.full(shape, -1)
    if case.ids == "twice":
        return torch.randint(case.num_experts, (case.tokens, 1), generator=rng).expand(shape)
    order = torch.rand(case.tokens, case.num_experts, generator=rng).argsort(-1)
    ids = order[:, : case.top_k]
    if case.ids == "idle_expert":
        return torch.where(ids == 0, ids.new_tensor(1), ids)
    if case.ids == "some_absent":
        return torch.where(torch.rand(shape, generator=rng) < 0.4, ids.new_tensor(-1), ids)
    assert case.ids == "random", case.ids
    return ids


# ------------------------------------------------------------------------------ further looks


def same_in_batch(got: Tensor, want: Tensor, backend: str, what: str) -> Outcome:
    if backend in ROUNDS_BY_BATCH:
        return oracle.close(got, want, BATCH_ROUNDING + torch.finfo(got.dtype).eps, what)
    return oracle.same_bits(got, want, what)


def others_untouched(call: Call, got: Tensor, backend: str) -> Outcome:
    """What spoils a token stays in it."""
    spoiled = inputs.SPOILED[call.case.x]
    clean = call.x.clone()
    clean[spoiled] = 0
    others = [t for t in range(call.case.tokens) if t not in spoiled]
    return oracle.same_bits(got[others], call(clean)[others], "where other tokens were spoiled")


def any_threads(call: Call, got: Tensor, backend: str) -> Outcome:
    before = _native.get_num_threads()
    try:
        for threads in (1, 2, 5):
            _native.set_num_threads(threads)
            outcome = oracle.same_bits(call(), got, f"with {threads} thread(s)")
            if outcome.problem:
                return outcome
    finally:
        _native.set_num_threads(before)
    return outcome


def any_batch(call: Call, got: Tensor, backend: str) -> Outcome:
    """A token alone, in a part of the batch, and in another order."""
    tokens = call.case.tokens
    parts = [torch.tensor([t]) for t in sorted({0, 1, tokens // 2, tokens - 1})]
    parts += [torch.arange(0, tokens, 3), torch.arange(tokens // 2), torch.arange(tokens).flip(0)]
    for part in parts:
        outcome = same_in_batch(call(tokens=part), got[part], backend, f"in a batch of {len(part)}")
        if outcome.problem:
            return outcome
    return outcome


def any_time(call: Call, got: Tensor, backend: str) -> Outcome:
    for n in range(5):
        outcome = oracle.same_bits(call(), got, f"at call {n + 2}")
        if outcome.problem:
            return outcome
    return outcome


# --------------------------------------------------------------------------------------- the list

# No multiples of a tile (32) or group among them, except where both are.
SHAPES = ((40, 33), (65, 48), (129, 100), (200, 160), (256, 48))
TOKENS = (0, 1, 2, 3, 17, 64, 513)
BIASES = ("gate_bias", "up_bias", "down_bias")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cases() -> list[MoeCase]:
    out = [
        MoeCase(
            f"{h}x{i} tokens={t}",
            hidden_size=h,
            intermediate_size=i,
            tokens=t,
            brief=(h, t) in ((65, 1), (65, 3), (65, 64), (129, 17)),
        )
        for h, i in SHAPES
        for t in TOKENS
    ]
    out += [
        MoeCase(
            f"{_name(dtype)} tokens={t}" + (" exact" if exact else ""),
            hidden_size=129,
            intermediate_size=100,
            tokens=t,
            dtype=dtype,
            exact=exact,
            brief=exact and dtype == BF16,
        )
        for dtype in (F32, F16, BF16)
        for t in (1, 4, 33)
        for exact in (False, True)
    ]
    out += [
        MoeCase(f"gelu_tanh {_name(d)} tokens={t}", tokens=t, dtype=d, activation="gelu_tanh")
        for d in (F32, BF16)
        for t in (1, 17)
    ]
    out += [
        MoeCase("gelu_tanh exact", activation="gelu_tanh", exact=True),
        MoeCase("smallest 1x1", hidden_size=1, intermediate_size=1, num_experts=1, top_k=1),
    ]
    # ------------------------------------------------------- biases, gpt-oss's activation
    out += [
        MoeCase(
            f"biases {activation} {_name(dtype)} tokens={t}",
            hidden_size=h,
            intermediate_size=i,
            tokens=t,
            dtype=dtype,
            activation=activation,
            biases=BIASES,
            brief=(activation, dtype, t) == ("swiglu_oai", F32, 17),
        )
        for activation in ("silu", "gelu_tanh", "swiglu_oai")
        for dtype, t, h, i in (
            (F32, 1, 65, 48),
            (F32, 17, 129, 100),
            (F32, 64, 256, 48),
            (BF16, 3, 40, 33),
        )
    ]
    out += [MoeCase(f"{name} alone", biases=(name,), tokens=t) for name in BIASES for t in (1, 9)]
    out += [
        MoeCase("swiglu_oai without biases", activation="swiglu_oai"),
        MoeCase("swiglu_oai without biases bfloat16", activation="swiglu_oai", dtype=BF16),
        MoeCase("swiglu_oai exact", activation="swiglu_oai", biases=BIASES, exact=True),
        # (Exact: far from zero the limits make a step of it, which a rounded activation may take.)
        *(
            MoeCase(
                f"swiglu_oai x huge {_name(dtype)}",
                activation="swiglu_oai",
                x="huge",
                dtype=dtype,
                biases=BIASES,
                exact=True,
            )
            for dtype in (F32, F16)
        ),
        # (An infinite activation is none of these: whether the limits make it finite again depends
        # on how activations are encoded.)
        MoeCase(
            "swiglu_oai x nan",
            activation="swiglu_oai",
            x="nan",
            biases=BIASES,
            compare=others_untouched,
        ),
        MoeCase("biases x zero", x="zero", biases=BIASES),
        MoeCase("biases some ids -1", ids="some_absent", tokens=64, biases=BIASES),
        MoeCase("biases all ids -1", ids="none", biases=BIASES),
        MoeCase("biases the same expert twice in a token", ids="twice", biases=BIASES),
        MoeCase("biases topk_weights signed", weights="signed", biases=BIASES),
        MoeCase("biases smallest 1x1", 1, 1, num_experts=1, top_k=1, biases=BIASES),
    ]
    # ------------------------------------------------------------------------------ routing
    out += [
        MoeCase("one expert of one", num_experts=1, top_k=1),
        MoeCase("128 experts top_k=8", 40, 33, num_experts=128, top_k=8),
        MoeCase("300 experts top_k=1", 33, 32, num_experts=300, top_k=1),
        MoeCase("8 experts top_k=8", num_experts=8, top_k=8),
        MoeCase("8 experts top_k=8 tokens=1", num_experts=8, top_k=8, tokens=1),
        MoeCase("every token to one expert", ids="one_expert", top_k=1, tokens=64),
        MoeCase("every slot to one expert", ids="one_expert", tokens=64),
        MoeCase("an expert without tokens", ids="idle_expert"),
        MoeCase("the same expert twice in a token", ids="twice"),
        MoeCase("the same expert eight times", ids="twice", top_k=8, tokens=3),
        MoeCase("some ids -1", ids="some_absent", tokens=64, brief=True),
        MoeCase("some ids -1, one token", ids="some_absent", tokens=1, num_experts=8, top_k=8),
        MoeCase("all ids -1", ids="none"),
        MoeCase("all ids -1, one token", ids="none", tokens=1),
        MoeCase("int32 ids", ids_dtype=torch.int32),
        MoeCase("topk_weights zero", weights="zero"),
        MoeCase("topk_weights signed", weights="signed"),
        MoeCase("topk_weights bfloat16", weights_dtype=BF16),
        MoeCase("topk_weights float64", weights_dtype=torch.float64),
    ]
    # ------------------------------------------------------------------------------- values
    out += [
        MoeCase(f"x {kind} {_name(dtype)}", x=kind, dtype=dtype)
        for kind in ("zero", "denormal", "huge", "outlier", "uneven")
        for dtype in (F32, F16, BF16)
        if not (kind == "uneven" and dtype == F16)  # its product leaves float16 behind
    ]
    out += [
        MoeCase("x huge gelu_tanh", x="huge", activation="gelu_tanh"),
        MoeCase("x beyond range where experts are shut", x="largest", num_experts=2),
        *(
            MoeCase(
                f"x {kind} {_name(dtype)}",
                x=kind,
                dtype=dtype,
                compare=others_untouched,
                brief=(kind, dtype) == ("nan", BF16),
            )
            for kind in ("nan", "inf")
            for dtype in (F32, F16, BF16)
        ),
        MoeCase("x nan exact", x="nan", exact=True, compare=others_untouched),
        MoeCase("x inf gelu_tanh", x="inf", activation="gelu_tanh", compare=others_untouched),
        MoeCase("x nan, all ids -1", x="nan", ids="none", compare=others_untouched),
        MoeCase(
            "x nan, 64 tokens to one expert",
            x="nan",
            ids="one_expert",
            top_k=1,
            tokens=64,
            compare=others_untouched,
        ),
    ]
    # ------------------------------------------------- rows long enough for activations of 8 bits
    out += [
        MoeCase(
            f"{h}x{i} tokens={t}",
            hidden_size=h,
            intermediate_size=i,
            tokens=t,
            brief=(h, t) == (545, 17),
        )
        for h, i in ((512, 256), (528, 288), (545, 257), (2049, 260))
        for t in (1, 7, 17, 64)
    ]
    out += [
        MoeCase(f"545 columns {name}", hidden_size=545, intermediate_size=257, **case)
        for name, case in {
            **inputs.LONG_ROWS,
            "x outlier in some, any batch": {"x": "some_outliers", "compare": any_batch},
            "x uneven bfloat16": {"x": "uneven", "dtype": BF16},
            "x nan": {"x": "nan", "compare": others_untouched},
            "x inf float16": {"x": "inf", "dtype": F16, "compare": others_untouched},
            "float16": {"dtype": F16},
            "some ids -1": {"ids": "some_absent", "tokens": 64},
            "biases swiglu_oai": {"activation": "swiglu_oai", "biases": BIASES},
            "gelu_tanh": {"activation": "gelu_tanh"},
            "64 tokens to one expert": {"ids": "one_expert", "top_k": 1, "tokens": 64},
            "bits alike with 1, 2, 5 threads": {"compare": any_threads},
            "bits alike in any batch": {"compare": any_batch, "brief": True},
            "bits alike in any batch bfloat16": {"compare": any_batch, "dtype": BF16},
            "bits alike at every call": {"compare": any_time},
        }.items()
    ]
    # ------------------------------------------------------------------------------ layouts
    out += [
        MoeCase(f"x {layout} {_name(dtype)}", layout=layout, dtype=dtype)
        for layout in inputs.LAYOUTS[1:]
        for dtype in (F32, BF16)
    ]
    out += [MoeCase(f"stored {s}", stored=s, tokens=9, brief=True) for s in inputs.STORED[1:]]
    out += [MoeCase(f"stored {s} tokens=1", stored=s, tokens=1) for s in inputs.STORED[1:]]
    # ---------------------------------------------------------------------------- invariance
    out += [
        MoeCase(
            f"bits alike {what} tokens={t}" + (f" {activation} biases" if biases else ""),
            tokens=t,
            compare=compare,
            hidden_size=200,
            intermediate_size=160,
            ids="some_absent",
            activation=activation,
            biases=biases,
        )
        for what, compare in (
            ("with 1, 2, 5 threads", any_threads),
            ("in any batch", any_batch),
            ("at every call", any_time),
        )
        for t in (3, 64)
        for activation, biases in (("silu", ()), ("swiglu_oai", BIASES))
    ]
    out += [
        MoeCase(
            f"bits alike in any batch {_name(dtype)}" + (" exact" if exact else ""),
            dtype=dtype,
            exact=exact,
            compare=any_batch,
            brief=dtype == BF16 and not exact,
        )
        for dtype, exact in ((BF16, False), (BF16, True), (F16, False), (F32, True))
    ]
    return out


CASES = tuple(_cases())
