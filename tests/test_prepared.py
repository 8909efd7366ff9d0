"""Prepared calls: the same bits as the long way, and only where nothing else has to see them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ktcore
from ktcore import _native, ops
from ktcore.dispatch import registry
from ktcore.ops import _prepared, recording
from ktcore.testing.cases import inputs

pytestmark = pytest.mark.skipif(
    _native.ext is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="there is no extension, or this torch does not let it look into tensors",
)

E, H, N = 5, 70, 48


class Served:
    """How many calls were served by what was prepared."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("moe", "linear"):
            monkeypatch.setattr(_prepared, name, self._counting(getattr(_prepared, name)))

    def _counting(self, call):
        def counting(*args):
            out = call(*args)
            self.count += out is not None
            return out

        return counting

    def by(self, call):
        """The result, and whether it was served so."""
        before = self.count
        return call(), self.count > before


@pytest.fixture
def served(monkeypatch) -> Served:
    return Served(monkeypatch)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def moe_inputs(rng, tokens=2, dtype=torch.bfloat16):
    x = torch.randn(tokens, H, generator=rng).to(dtype)
    ids = torch.stack([torch.randperm(E, generator=rng)[:3] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, 3, generator=rng)


def linear_weight(rng, format="int4_g32"):
    return ktcore.QuantTensor.quantize(torch.randn(N, H, generator=rng), format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"activation": "gelu_tanh"}], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("format", ["bf16", "int4_g32", "q6_k"])
def test_moe_gives_the_same_bits(served, rng, format, tokens, options, dtype):
    experts = inputs.experts(format, E, 256 if format == "q6_k" else H, 256)
    x, ids, weights = moe_inputs(rng, tokens)
    x = torch.randn(tokens, experts.hidden_size, generator=rng).to(dtype)
    ids[0, 1] = -1
    first, early = served.by(lambda: ops.moe(x, experts, ids, weights, **options))
    again, late = served.by(lambda: ops.moe(x, experts, ids, weights, **options))
    other, _ = served.by(lambda: ops.moe(2 * x, experts, ids, weights, **options))
    assert (early, late) == (False, True)
    assert torch.equal(first, again) and again.dtype == dtype and not torch.equal(again, other)


def test_moe_with_biases(served, rng):
    biases = {n: torch.randn(E, H if n == "down_bias" else N, generator=rng)
              for n in ("gate_bias", "up_bias", "down_bias")}  # fmt: skip
    plain = inputs.experts("int8", E, H, N)
    experts = ktcore.ExpertWeights(plain.gate, plain.up, plain.down, **biases)
    args = moe_inputs(rng)
    call = lambda e: ops.moe(args[0], e, *args[1:])  # noqa: E731
    first = call(experts)
    again, late = served.by(lambda: call(experts))
    assert late and torch.equal(first, again) and not torch.equal(again, call(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (), (2, 3), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_gives_the_same_bits(served, rng, shape, biased, dtype):
    weight = linear_weight(rng)
    x = torch.randn(*shape, H, generator=rng).to(dtype)
    bias = torch.randn(N, generator=rng) if biased else None
    first, early = served.by(lambda: ops.linear(x, weight, bias))
    again, late = served.by(lambda: ops.linear(x, weight, bias))
    assert (early, late) == (False, True)
    assert torch.equal(first, again) and again.shape == (*shape, N) and again.dtype == dtype
    # A bias is no part of what was prepared.
    other = torch.randn(N, generator=rng)
    got, late = served.by(lambda: ops.linear(x, weight, other))
    registry.forget_choices()
    want, sooner = served.by(lambda: ops.linear(x, weight, other))
    assert late and not sooner and torch.equal(got, want)


def test_rows_may_be_strided(served, rng):
    experts = inputs.experts("int4_g32", E, H, N)
    x, ids, weights = moe_inputs(rng, 4)
    wide = torch.full((4, 3 * H), float("nan"), dtype=x.dtype)
    wide[:, H : 2 * H] = x
    want = ops.moe(x, experts, ids, weights)
    got, late = served.by(lambda: ops.moe(wide[:, H : 2 * H], experts, ids, weights))
    assert late and torch.equal(got, want) and got.is_contiguous()
    weight = linear_weight(rng)
    want = ops.linear(x, weight)
    got, late = served.by(lambda: ops.linear(wide[:, H : 2 * H], weight))
    assert late and torch.equal(got, want)


def test_other_types_of_routing(served, rng):
    """What SGLang and transformers pass: experts as int32, weights in the activations' type."""
    experts = inputs.experts("int4_g32", E, H, N)
    x, ids, weights = moe_inputs(rng)
    ids[1, 0] = -1
    weights = weights.bfloat16()
    request = registry.Request("moe", "int4_g32", len(x), H, N, E, ids.shape[1])
    with ktcore.use(**{"moe": registry.select(request).backend}):
        want, sooner = served.by(lambda: ops.moe(x, experts, ids, weights))
    assert not sooner
    ops.moe(x, experts, ids, weights)
    for a, b in [(ids.int(), weights), (ids, weights.float()), (ids.int(), weights.float())]:
        got, sooner = served.by(lambda a=a, b=b: ops.moe(x, experts, a, b))
        assert sooner and torch.equal(got, want)
    bad = ids.int()
    bad[0, 1] = E
    with pytest.raises(IndexError, match=r"topk_ids\[0, 1\] is 5"):
        ops.moe(x, experts, bad, weights)


def test_what_it_was_not_prepared_for_goes_the_long_way(served, rng):
    experts = inputs.experts("int4_g32", E, H, N)
    x, ids, weights = moe_inputs(rng)
    want = ops.moe(x, experts, ids, weights)
    others = {
        "weights of another type": (x, ids, weights.double()),
        "a column's stride": (x.T.contiguous().T, ids, weights),
        "turned ids": (x, ids.T.contiguous().T, weights),
        "a parameter": (torch.nn.Parameter(x, requires_grad=False), ids, weights),
    }
    for what, (a, b, c) in others.items():
        ops.moe(x, experts, ids, weights)
        got, sooner = served.by(lambda a=a, b=b, c=c: ops.moe(a, experts, b, c))
        assert not sooner and torch.equal(got, want), what
    for a, b, c, options in [
        (x[:1], ids[:1], weights[:1], {}),  # fewer tokens
        (x.float(), ids, weights, {}),
        (x, ids, weights, {"activation": "gelu_tanh"}),
        (x, ids, weights, {"exact": True}),
    ]:
        ops.moe(x, experts, ids, weights)
        _, sooner = served.by(lambda a=a, b=b, c=c, o=options: ops.moe(a, experts, b, c, **o))
        assert not sooner
    many = moe_inputs(rng, _prepared.MOST_TOKENS + 1)
    for _ in range(2):
        _, sooner = served.by(lambda: ops.moe(many[0], experts, *many[1:]))
        assert not sooner
    none = x[:0], ids[:0], weights[:0]
    for _ in range(2):
        assert ops.moe(none[0], experts, *none[1:]).shape == (0, H)


def test_wrong_arguments_are_named_as_ever(rng):
    experts, weight = inputs.experts("int4_g32", E, H, N), linear_weight(rng)
    x, ids, weights = moe_inputs(rng)
    good = {"hidden_states": x, "experts": experts, "topk_ids": ids, "topk_weights": weights}
    ops.moe(**good)
    ops.linear(x, weight)
    bad = ids.clone()
    bad[1, 2] = E
    for change, error in [
        ({"topk_ids": bad}, IndexError),
        ({"topk_ids": ids[:1]}, ValueError),
        ({"topk_ids": ids.float()}, TypeError),
        ({"topk_weights": weights[:1]}, ValueError),
        ({"topk_weights": weights[0]}, ValueError),
        ({"topk_weights": 0.5}, TypeError),
        ({"hidden_states": x[:, 1:]}, ValueError),
        ({"hidden_states": x.int()}, TypeError),
        ({"hidden_states": x[0]}, ValueError),
        ({"hidden_states": x.to("meta")}, ValueError),
        ({"hidden_states": None}, TypeError),
        ({"experts": weight}, TypeError),
        ({"activation": "relu"}, ValueError),
    ]:
        with pytest.raises(error, match=rf"^{next(iter(change))}\b"):
            ops.moe(**{**good, **change})
        assert ops.moe(**good).isfinite().all()
    for args, name in [((x[:, 1:], weight), "x"), ((x, experts), "weight"),
                       ((x, weight, torch.zeros(N + 1)), "bias"),
                       ((x, weight, 1.0), "bias")]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            ops.linear(*args)
        assert ops.linear(x, weight).isfinite().all()


class _Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_torch_sees_what_it_has_to(served, rng):
    weight = linear_weight(rng)
    x = torch.randn(2, H, generator=rng)
    want = ops.linear(x, weight)
    assert served.by(lambda: ops.linear(x, weight))[1]
    with _Counts() as mode:
        got, sooner = served.by(lambda: ops.linear(x, weight))
    assert not sooner and "ktcore.linear.default" in mode.seen and torch.equal(got, want)
    with torch.enable_grad():
        got, sooner = served.by(lambda: ops.linear(x, weight))
        assert not sooner and torch.equal(got, want)
        assert ops.linear(x.clone().requires_grad_(), weight).requires_grad
    traced = torch.jit.trace(lambda a: ops.linear(a, weight), x, check_trace=False)
    assert torch.equal(traced(2 * x), ops.linear(2 * x, weight))
    ops.linear(x, weight)
    _, sooner = served.by(lambda: torch.func.vmap(lambda a: ops.linear(a, weight))(x[None]))
    assert not sooner


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(rng, context):
    weight, x = linear_weight(rng), torch.randn(3, 2, H, generator=rng)
    with context():
        want = ops.linear(x, weight)
        assert torch.equal(torch.func.vmap(lambda a: ops.linear(a, weight))(x), want)


def test_choices_hold(served, rng):
    weight = linear_weight(rng)
    x = torch.randn(2, H, generator=rng)
    call = lambda: ops.linear(x, weight)  # noqa: E731
    chosen: list[str] = []

    def backend():
        """Of the next call, by the long way's choice."""
        with registry.watch_choices(lambda i: chosen.append(i.backend)):
            assert not served.by(call)[1]
        return chosen[-1]

    call()
    usual = backend()
    call()
    assert served.by(call)[1]
    with ktcore.use("reference"):
        for _ in range(2):
            assert not served.by(call)[1]
        assert backend() == "reference"
    assert not served.by(call)[1]
    assert served.by(call)[1]
    setting = ktcore.use("reference")
    for _ in range(2):
        assert not served.by(call)[1]
    assert backend() == "reference"
    del setting
    ktcore.use()
    assert backend() == usual
    call()
    assert served.by(call)[1]


def test_a_block_of_another_thread_is_its_own(served, rng):
    weight = linear_weight(rng)
    x = torch.randn(2, H, generator=rng)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with torch.no_grad(), ktcore.use("reference"):
            ops.linear(x, weight)
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    ops.linear(x, weight)
    late = served.by(lambda: ops.linear(x, weight))[1]
    leave.set()
    thread.join()
    assert late


def test_recordings_see_the_calls(served, rng):
    experts = inputs.experts("int4_g32", E, H, N)
    x, ids, weights = moe_inputs(rng)
    want = ops.moe(x, experts, ids, weights)
    assert served.by(lambda: ops.moe(x, experts, ids, weights))[1]
    with torch.inference_mode():
        out, calls = recording.record(lambda: ops.moe(x, experts, ids, weights))
    assert len(calls) == 1 and calls.why_not is None and torch.equal(out, want)


def test_threads_and_their_number(rng):
    experts = inputs.experts("q6_k", E, 256, 256)
    _, ids, weights = moe_inputs(rng)
    x = torch.randn(2, 256, generator=rng)
    want = ops.moe(x, experts, ids, weights)
    wrong = []

    def calls():
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(ops.moe(x, experts, ids, weights), want):
                    wrong.append(1)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(30):
        ktcore.set_num_threads(1 + i % 5)
        registry.forget_choices()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_go_when_nobody_wants_them(rng):
    weight = linear_weight(rng)
    for _ in range(2):
        ops.linear(torch.randn(2, H, generator=rng), weight)
    assert weight.prepared is not None
    references = sys.getrefcount(packed := weight.packed["native"])
    del weight
    gc.collect()
    assert sys.getrefcount(packed) == references - 2  # of the weight, and of what was prepared


def test_a_graph_is_whole():
    """In a compiled function the operator is called, not what was prepared."""
    program = (
        "import torch, ktcore\n"
        "from ktcore import ops\n"
        "w = ktcore.QuantTensor.quantize(torch.randn(48, 70), 'int8')\n"
        "x = torch.randn(2, 70)\n"
        "with torch.no_grad():\n"
        "    want = [ops.linear(x, w) for _ in range(3)][-1]\n"
        "    f = torch.compile(lambda a: ops.linear(a, w), backend='eager', fullgraph=True)\n"
        "    assert torch.equal(f(x), want) and torch.equal(f(x), want)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
