"""`QuantTensor` and `ExpertWeights`: what they check, share, pack and release."""

from __future__ import annotations

import gc

import pytest
import torch

import ktcore
from ktcore import ExpertWeights, QuantTensor, ops
from ktcore.dispatch import registry
from ktcore.weights.quant_tensor import resolve

# Of odd shapes; the families of other formats have test files of their own.
FORMATS = ["bf16", "int8", "int4_g32"]
NATIVE = [n for n in ("avx512", "avx2") if registry.why_not(n) is None]
needs_native = pytest.mark.skipif(not NATIVE, reason="no native backend runs here")


def _experts(format="int8", experts=3, hidden=40, intermediate=33) -> ExpertWeights:
    rng = torch.Generator().manual_seed(1)
    shape = (experts, intermediate, hidden)
    return ExpertWeights.from_dense(
        torch.randn(shape, generator=rng), torch.randn(shape, generator=rng),
        torch.randn(experts, hidden, intermediate, generator=rng), format,
    )  # fmt: skip


def _moe(experts, tokens=3):
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, experts.hidden_size, generator=rng)
    ids = torch.arange(tokens).reshape(-1, 1) % experts.num_experts
    return ops.moe(x, experts, ids, torch.ones(tokens, 1))


# ------------------------------------------------------------------------------- QuantTensor


def test_shape_must_be_a_matrix_or_a_stack():
    for shape in ((4,), (), (2, -1)):
        with pytest.raises(ValueError, match="shape"):
            QuantTensor("bf16", shape, {"data": torch.zeros(1, dtype=torch.bfloat16)})


def test_parts_must_fit():
    good = QuantTensor.quantize(torch.randn(4, 33), "int4").parts
    with pytest.raises(ValueError, match=r"stored as \['data', 'scales'\], got \['data'\]"):
        QuantTensor("int4", (4, 33), {"data": good["data"]})
    with pytest.raises(ValueError, match=r"parts\['data'\]: expected shape \(4, 48\)"):
        QuantTensor("int4", (4, 65), good)
    with pytest.raises(TypeError, match=r"parts\['scales'\]: expected torch.bfloat16"):
        QuantTensor("int4", (4, 33), {**good, "scales": good["scales"].float()})
    with pytest.raises(ValueError, match="one device"):
        QuantTensor("int4", (4, 33), {**good, "scales": good["scales"].to("meta")})


def test_only_floats_are_quantised():
    with pytest.raises(TypeError, match="floating-point"):
        QuantTensor.quantize(torch.zeros(2, 2, dtype=torch.int32), "int8")


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_of_a_stack_shares_its_memory(format, rng):
    stack = QuantTensor.quantize(torch.randn(5, 4, 33, generator=rng), format)
    dense = stack.dequantize()
    assert torch.equal(stack[3].dequantize(), dense[3])
    assert torch.equal(stack[-1].dequantize(), dense[-1])
    assert torch.equal(stack[1:4].dequantize(), dense[1:4])
    assert stack[4:].shape == (1, 4, 33)
    stack[2].parts["data"].zero_()
    assert not torch.equal(stack.dequantize()[2], dense[2])
    with pytest.raises(IndexError):
        stack[5]
    with pytest.raises(IndexError, match="no stack"):
        stack[0][0]


@pytest.mark.parametrize("format", FORMATS)
def test_sizes(format):
    weight = QuantTensor.quantize(torch.zeros(4, 33), format)
    assert weight.numel() == 132
    assert weight.nbytes == sum(p.numel() * p.element_size() for p in weight.parts.values())
    assert format in repr(weight)


# ----------------------------------------------------------------------------- ExpertWeights


def test_projections_must_fit_each_other():
    good = _experts()
    gate, up, down = good.gate, good.up, good.down
    with pytest.raises(TypeError, match="up: expected a QuantTensor, got Tensor"):
        ExpertWeights(gate, up.dequantize(), down)
    with pytest.raises(ValueError, match="up: expected the format of gate, int8, got bf16"):
        ExpertWeights(gate, _experts("bf16").up, down)
    with pytest.raises(ValueError, match=r"up: expected the shape of gate"):
        ExpertWeights(gate, down, down)
    with pytest.raises(ValueError, match=r"down: expected shape \(3, 40, 33\)"):
        ExpertWeights(gate, up, up)
    with pytest.raises(ValueError, match=r"gate: expected shape \[num_experts"):
        ExpertWeights(gate[0], up[0], down[0])
    meta = QuantTensor("int8", down.shape, {n: p.to("meta") for n, p in down.parts.items()})
    with pytest.raises(ValueError, match="down: expected the device of gate, cpu, got meta"):
        ExpertWeights(gate, up, meta)


def test_biases():
    e = _experts()
    ones = torch.ones(3, 33, dtype=torch.bfloat16)
    with_biases = ExpertWeights(e.gate, e.up, e.down, up_bias=ones.T.contiguous().T)
    assert with_biases.up_bias.dtype == torch.float32 and with_biases.up_bias.is_contiguous()
    assert with_biases.biases.keys() == {"up_bias"} and e.biases == {}
    assert with_biases.nbytes == e.nbytes + 4 * ones.numel()
    assert "with biases" in repr(with_biases) and "biases" not in repr(e)
    for wrong, error, what in (
        ({"gate_bias": torch.ones(3, 40)}, ValueError, r"gate_bias: expected shape \(3, 33\)"),
        ({"up_bias": torch.ones(33)}, ValueError, "up_bias: expected shape"),
        ({"down_bias": ones}, ValueError, r"down_bias: expected shape \(3, 40\)"),
        ({"up_bias": ones.int()}, TypeError, "up_bias: expected a floating-point tensor"),
        ({"up_bias": 1.0}, TypeError, "up_bias: expected a floating-point tensor, got float"),
        ({"up_bias": ones.to("meta")}, ValueError, "up_bias: expected the device of gate"),
    ):
        with pytest.raises(error, match=what):
            ExpertWeights(e.gate, e.up, e.down, **wrong)


def test_there_must_be_experts():
    with pytest.raises(ValueError, match=r"gate: .*each at least 1"):
        _experts(experts=0)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_of_experts(format):
    e = _experts(format)
    assert (e.num_experts, e.hidden_size, e.intermediate_size) == (3, 40, 33)
    assert e.nbytes == e.gate.nbytes + e.up.nbytes + e.down.nbytes
    assert format in repr(e)


# ------------------------------------------------------------------------ packing and release


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_released_weights_compute_on_packed(format):
    e = _experts(format)
    with ktcore.use(NATIVE[0]):
        want = _moe(e)
        nbytes = e.nbytes
        e.release()
        assert torch.equal(_moe(e), want)
    assert e.nbytes == nbytes
    with ktcore.use("reference"), pytest.raises(RuntimeError, match="released"):
        _moe(e)
    with pytest.raises(RuntimeError, match=r"released.*load it again"):
        ops.dequantize(e.gate)


@needs_native
def test_released_matrix():
    w = QuantTensor.quantize(torch.randn(4, 33), "int8")
    x = torch.randn(2, 33)
    with ktcore.use(NATIVE[0]):
        want = ops.linear(x, w)
        w.release()
        assert torch.equal(ops.linear(x, w), want)
    for use in (w.dequantize, lambda: ops.dequantize(w), w.require_parts):
        with pytest.raises(RuntimeError, match=r"released.*native"):
            use()
    with ktcore.use("reference"), pytest.raises(RuntimeError, match="released"):
        ops.linear(x, w)


def test_nothing_is_released_that_is_not_packed():
    e, w = _experts(), QuantTensor.quantize(torch.randn(4, 33), "int8")
    for weights in (e, w):
        with pytest.raises(RuntimeError, match="no packed form"):
            weights.release()
    assert w.parts and e.gate.parts


@needs_native
def test_weights_are_packed_once():
    e = _experts()
    with ktcore.use(NATIVE[0]):
        _moe(e)
        first = dict(e.packed)
        _moe(e, tokens=64)
    assert {n: id(p) for n, p in e.packed.items()} == {n: id(p) for n, p in first.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_strided_parts(variant, format, rng):
    """Parts that are views, as a reader or a sharded load may give, compute the same."""
    e = _experts(format)

    def strided(w: QuantTensor) -> QuantTensor:
        parts = {}
        for name, part in w.parts.items():
            wide = part.new_zeros(*part.shape[:-1], 2 * part.shape[-1])
            wide[..., ::2] = part
            parts[name] = wide[..., ::2]
        return QuantTensor(w.format, w.shape, parts)

    views = ExpertWeights(strided(e.gate), strided(e.up), strided(e.down))
    assert torch.equal(_moe(views), _moe(e))
    x = torch.randn(3, 40, generator=rng)
    assert torch.equal(ops.linear(x, views.gate[1]), ops.linear(x, e.gate[1]))
    assert torch.equal(ops.dequantize(views.down), ops.dequantize(e.down))


# ---------------------------------------------------------------------------------- handles


def test_handles_are_distinct_and_do_not_keep_weights_alive():
    a, b = _experts(), _experts()
    handles = {w.handle for w in (a, b, a.gate, a.up, a.down)}
    assert len(handles) == 5
    assert resolve(a.handle) is a
    freed = b.handle
    del b
    gc.collect()
    with pytest.raises(RuntimeError, match=f"handle {freed} no longer exist"):
        resolve(freed)


def test_operators_on_freed_handles():
    x, ids, one = torch.randn(1, 40), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="no longer exist"):
        torch.ops.ktcore.moe(x, 10**9, ids, one, "silu", False)
    with pytest.raises(RuntimeError, match="no longer exist"):
        torch.ops.ktcore.linear(x, 10**9, None, False)
