"""The operators as torch operators: opcheck, torch.compile, torch.export."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch

import ktcore
from ktcore import ops
from ktcore.testing.cases import inputs

FORMATS = ["bf16", "int8", "int4_g32"]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def layer(rng):
    experts = inputs.experts("int4_g32", 5, 65, 48)
    router = torch.randn(5, 65, generator=rng)
    x = torch.randn(7, 65, generator=rng)
    return experts, router, x


def _opcheck(op, args):
    torch.library.opcheck(op, args, test_utils=CHECKS)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_moe(format, rng):
    e = inputs.experts(format, 5, 65, 48)
    ids, weights = torch.tensor([[0, 1], [-1, 4], [2, 2]]), torch.rand(3, 2, generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 65, generator=rng).to(dtype)
        _opcheck(torch.ops.ktcore.moe.default, (x, e.handle, ids, weights, "silu", False))
    strided = torch.randn(65, 3, generator=rng).t()
    _opcheck(torch.ops.ktcore.moe.default, (strided, e.handle, ids, weights, "gelu_tanh", True))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_linear(format, rng):
    w = inputs.matrix(format, 48, 65)
    x, bias = torch.randn(2, 3, 65, generator=rng), torch.randn(48, generator=rng)
    _opcheck(torch.ops.ktcore.linear.default, (x, w.handle, bias, False))
    _opcheck(torch.ops.ktcore.linear.default, (x[0, 0].bfloat16(), w.handle, None, True))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_quantize_and_dequantize(format, rng):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 65, generator=rng).to(dtype)
        _opcheck(torch.ops.ktcore.quantize.default, (x, format))
        parts = list(inputs.matrix(format, 48, 65).parts.values())
        _opcheck(torch.ops.ktcore.dequantize.default, (parts, format, [48, 65], dtype))


def test_opcheck_route(rng):
    logits, bias = torch.randn(3, 8, generator=rng), torch.randn(8, generator=rng)
    _opcheck(torch.ops.ktcore.route.default, (logits, 2, "softmax", None, 1, 1, True, 1.0))
    _opcheck(
        torch.ops.ktcore.route.default, (logits.bfloat16(), 2, "sigmoid", bias, 4, 2, True, 2.5)
    )


def test_opcheck_between_the_matrices(rng):
    torch_ops = torch.ops.ktcore
    x, weight = torch.randn(3, 2, 8, generator=rng), torch.randn(8, generator=rng)
    _opcheck(torch_ops.rms_norm.default, (x, weight, 1e-6))
    _opcheck(torch_ops.add_rms_norm.default, (x.bfloat16(), x.bfloat16(), weight, 1e-6))
    cos, sin, positions = torch.ones(9, 4), torch.zeros(9, 4), torch.tensor([0, 8, 3])
    _opcheck(torch_ops.rotary.default, (x, cos, sin, positions, True))
    pages = torch.zeros(2, 2, 8, 32), torch.zeros(2, 2, 32, 8)
    slots = torch.tensor([0, 33, -1])
    _opcheck(torch_ops.store_kv.default, (x, x, *pages, slots))
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    begin = torch.tensor([0, 3])
    query = torch.randn(3, 4, 8, generator=rng)
    latents = torch.zeros(2, 32, 8)
    _opcheck(torch_ops.store_latent.default, (x[:, 0], latents, slots))
    places = (table, torch.tensor([40]), begin)
    _opcheck(torch_ops.mla_attention.default, (query, latents, *places, 6, 0.3))
    _opcheck(torch_ops.attention.default, (query, *pages, table, torch.tensor([40]), begin, 0.3))


def _block(experts, router):
    def block(x):
        ids, weights = ops.route(x @ router.T, 2)
        return x + ops.moe(x, experts, ids, weights)

    return block


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
                ),
            ],
        ),
    ],
)
def test_compile(layer, backend):
    """One graph, the same numbers, also at another number of tokens."""
    experts, router, x = layer
    block = _block(experts, router)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        for tokens in (1, 3, 5):
            torch.testing.assert_close(compiled(x[:tokens]), block(x[:tokens]))


@pytest.mark.parametrize("format", FORMATS)
def test_compile_in_inference_mode(format, rng):
    experts = inputs.experts(format, 5, 65, 48)
    x = torch.randn(3, 65, generator=rng)
    ids, weights = torch.tensor([[1], [2], [0]]), torch.ones(3, 1)

    def f(x):
        return ops.moe(x * 2, experts, ids, weights)

    with torch.inference_mode():
        assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))


def test_compile_linear(rng):
    weight = inputs.matrix("int8", 48, 65)
    x = torch.randn(3, 65, generator=rng)

    def f(x):
        return torch.relu(ops.linear(x, weight)) + 1

    assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(x), f(x))


def test_forcing_a_backend_reaches_a_compiled_graph(layer):
    experts, router, x = layer
    block = _block(experts, router)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    want = compiled(x)
    with ktcore.use("reference"):
        expected = block(x)
        assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(want, expected, rtol=0.01, atol=0.01)


def test_export(layer):
    experts, router, x = layer

    class Block(torch.nn.Module):
        def forward(self, x):
            return _block(experts, router)(x)

    tokens = torch.export.Dim("tokens", min=1, max=1000)
    program = torch.export.export(Block(), (x,), dynamic_shapes=({0: tokens},))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("ktcore.moe" in c for c in called) and any("ktcore.route" in c for c in called)
    for t in (7, 3):
        torch.testing.assert_close(program.module()(x[:t]), _block(experts, router)(x[:t]))


def test_a_compiled_graph_says_that_its_weights_are_gone(rng):
    dense = [torch.randn(2, *s, generator=rng) for s in ((33, 40), (33, 40), (40, 33))]
    experts = ktcore.ExpertWeights.from_dense(*dense, "int8")
    handle = experts.handle
    x, ids, weights = torch.randn(1, 40), torch.tensor([[1]]), torch.ones(1, 1)

    def f(x):
        return torch.ops.ktcore.moe(x, handle, ids, weights, "silu", False)

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    compiled(x)
    del experts
    gc.collect()
    with pytest.raises(RuntimeError, match=r"no longer exist.*keep a reference"):
        compiled(x)


def test_functional_transforms_are_refused_not_wrong(layer):
    """No gradient is defined: asking for one is an error."""
    experts, router, x = layer
    x = x.clone().requires_grad_()
    out = _block(experts, router)(x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        out.sum().backward()
