"""Cases of `linear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore import _native, ops
from ktcore.formats import get_format
from ktcore.testing import oracle
from ktcore.testing.cases import inputs
from ktcore.testing.cases.moe import BF16, F16, F32, _name, same_in_batch
from ktcore.testing.oracle import Outcome


@dataclass(frozen=True)
class LinearCase:
    """One call, held against the oracle; `compare` is a further look at the result.

    Columns are rounded up to whole blocks of the format. `brief` cases are for every format.
    """

    name: str
    shape: tuple[int, int] = (48, 65)  # of the weight: [O, I]
    leading: tuple[int, ...] = (17,)  # of x, before I
    dtype: torch.dtype = F32
    bias: torch.dtype | None = None
    exact: bool = False
    x: str = "normal"
    layout: str = "dense"
    stored: str = "quantised"
    compare: Callable[[Call, Tensor, str], Outcome] | None = None
    brief: bool = False

    op = "linear"

    def applies(self, format: str | None) -> bool:
        return (
            format is not None
            and inputs.applies(self.stored, format)
            and (self.brief or inputs.thorough(format))
        )

    def run(self, format: str | None, backend: str) -> Outcome:
        assert format is not None
        call = Call(self, format)
        got = call()
        shape = (*self.leading, self.shape[0])
        if got.dtype != self.dtype or got.shape != shape:
            return Outcome(
                problem=f"output is {got.dtype} {tuple(got.shape)}, expected {self.dtype} {shape}"
            )
        limits = get_format(format)
        tolerance = limits.exact_tolerance if self.exact else limits.tolerance
        want, magnitude = oracle.linear(call.x, call.weight, call.bias)
        rows = (-1, self.shape[0])
        outcome = oracle.judge(
            got.reshape(rows), want.reshape(rows), tolerance, magnitude.reshape(-1)
        )
        if outcome.problem or self.compare is None:
            return outcome
        return self.compare(call, got, backend)


class Call:
    """A case's arguments; calling it calls the operator, with another x if one is given."""

    def __init__(self, case: LinearCase, format: str):
        self.case = case
        rows, columns = case.shape[0], inputs.whole_blocks(format, case.shape[1])
        self.weight = inputs.matrix(format, rows, columns, case.stored)
        tokens = torch.Size(case.leading).numel()
        x = inputs.activations(case.x, tokens, columns, case.dtype, case.name)
        x = inputs.lay_out(x, case.layout)
        self.x = x if case.leading == (tokens,) else x.reshape(*case.leading, columns)
        rng = inputs.generator(case.name + " bias")
        self.bias = None if case.bias is None else torch.randn(rows, generator=rng).to(case.bias)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        return ops.linear(self.x if x is None else x, self.weight, self.bias, exact=self.case.exact)


def others_untouched(call: Call, got: Tensor, backend: str) -> Outcome:
    """What spoils a token stays in it."""
    spoiled = inputs.SPOILED[call.case.x]
    clean = call.x.clone()
    clean[spoiled] = 0
    others = [t for t in range(call.x.shape[0]) if t not in spoiled]
    return oracle.same_bits(got[others], call(clean)[others], "where other tokens were spoiled")


def any_batch(call: Call, got: Tensor, backend: str) -> Outcome:
    tokens = call.x.shape[0]
    everything = torch.arange(tokens)
    for part in (everything[-1:], everything[1::2], everything.flip(0)):
        what = f"in a batch of {len(part)}"
        outcome = same_in_batch(call(call.x[part]), got[part], backend, what)
        if outcome.problem:
            return outcome
    return outcome


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


SHAPES = ((33, 40), (48, 65), (100, 129), (160, 200), (256, 256))
TOKENS = (0, 1, 2, 3, 8, 17, 64, 513)


def _cases() -> list[LinearCase]:
    out = [
        LinearCase(f"{o}x{i} tokens={t}", (o, i), (t,), brief=(o, t) in ((33, 1), (160, 64)))
        for o, i in SHAPES
        for t in TOKENS
    ]
    out += [
        LinearCase(
            f"{_name(dtype)} tokens={t}" + (" exact" if exact else ""),
            (100, 129),
            (t,),
            dtype,
            exact=exact,
            brief=dtype == BF16,
        )
        for dtype in (F32, F16, BF16)
        for t in (1, 17)
        for exact in (False, True)
    ]
    out += [
        LinearCase(f"bias {_name(bias)}", dtype=dtype, bias=bias)
        for dtype, bias in ((F32, F32), (BF16, BF16), (F16, F16), (BF16, torch.float64))
    ]
    out += [
        LinearCase("one vector", leading=()),
        LinearCase("one vector bias", leading=(), bias=F32),
        LinearCase("x [2, 3, I]", leading=(2, 3)),
        LinearCase("x [2, 0, I]", leading=(2, 0)),
        LinearCase("smallest 1x1", (1, 1)),
        LinearCase("one row of weights", (1, 129), bias=F32, brief=True),
        LinearCase("one column of weights", (129, 1)),
        # (So many results that an error is near its mean.)
        LinearCase("long rows", (37, 4099), (3,), brief=True),
    ]
    # ------------------------------------------------- rows long enough for activations of 8 bits
    out += [
        LinearCase(f"{o}x{i} tokens={t}", (o, i), (t,), brief=(o, t) == (257, 17))
        for o, i in ((256, 512), (270, 528), (257, 545))
        for t in (1, 2, 3, 5, 7, 8, 13, 17, 64, 513)
    ]
    out += [
        LinearCase(f"1568 columns tokens={t}", (256, 1568), (t,), brief=True) for t in (1, 5, 20)
    ]
    out += [
        LinearCase(f"545 columns {name}", (270, 545), **case)
        for name, case in {
            **inputs.LONG_ROWS,
            "x outlier in some, any batch": {"x": "some_outliers", "compare": any_batch},
            "x outlier in some, exact": {"x": "some_outliers", "exact": True},
            "x largest": {"x": "largest"},
            "x largest bfloat16": {"x": "largest", "dtype": BF16},
            "x nan": {"x": "nan", "compare": others_untouched},
            "x inf bfloat16": {"x": "inf", "dtype": BF16, "compare": others_untouched},
            "bias": {"bias": F32},
            "one vector": {"leading": ()},
        }.items()
    ]
    out += [
        LinearCase(f"545 columns stored {s}", (270, 545), stored=s, leading=(9,))
        for s in inputs.STORED[1:]
    ]
    out += [
        LinearCase(f"x {kind} {_name(dtype)}", x=kind, dtype=dtype)
        for kind in ("zero", "denormal", "huge", "outlier", "uneven")
        for dtype in (F32, F16, BF16)
    ]
    out += [LinearCase(f"x largest {_name(d)}", x="largest", dtype=d) for d in (F32, BF16)]
    out += [
        LinearCase(f"x {kind} {_name(dtype)}", x=kind, dtype=dtype, compare=others_untouched)
        for kind in ("nan", "inf")
        for dtype in (F32, BF16)
    ]
    out += [
        LinearCase(f"x {layout} {_name(dtype)}", layout=layout, dtype=dtype)
        for layout in inputs.LAYOUTS[1:]
        for dtype in (F32, F16)
    ]
    out += [
        LinearCase(f"stored {s}", stored=s, leading=(9,), brief=True) for s in inputs.STORED[1:]
    ]
    out += [
        LinearCase("bits alike with 1, 2, 5 threads", (256, 256), (65,), compare=any_threads),
        LinearCase("bits alike in any batch", (100, 129), (19,), compare=any_batch, brief=True),
        LinearCase("545 columns with 1, 2, 5 threads", (270, 545), (65,), compare=any_threads),
        LinearCase("545 columns in any batch", (270, 545), (67,), compare=any_batch, brief=True),
        LinearCase("bits alike in any batch bfloat16", (100, 129), (19,), BF16, compare=any_batch),
    ]
    return out


CASES = tuple(_cases())
