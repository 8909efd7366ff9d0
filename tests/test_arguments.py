"""Arguments that do not fit: an exception whose message names the argument, in every backend."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ktcore
from ktcore import _native, ops
from ktcore.testing import oracle
from ktcore.testing.cases import inputs

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def _moe(**changes):
    experts = inputs.experts("int8", 5, 65, 48)
    arguments = {
        "hidden_states": torch.ones(3, 65),
        "experts": experts,
        "topk_ids": torch.tensor([[0, 1]] * 3),
        "topk_weights": torch.ones(3, 2),
        **changes,
    }
    return ops.moe(**arguments)


def _linear(**changes):
    return ops.linear(
        **{
            "x": torch.ones(3, 65),
            "weight": inputs.matrix("int8", 48, 65),
            "bias": torch.ones(48),
            **changes,
        }
    )


def _route(**changes):
    return ops.route(**{"logits": torch.zeros(3, 8), "top_k": 2, **changes})


def _quantize(**changes):
    return ops.quantize(**{"tensor": torch.zeros(3, 8), "format": "int8", **changes})


def _dequantize(**changes):
    return ops.dequantize(**{"weight": inputs.matrix("int8", 48, 65), **changes})


def _rms_norm(**changes):
    return ops.rms_norm(**{"x": torch.ones(3, 8), "weight": torch.ones(8), **changes})


def _add_rms_norm(**changes):
    given = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8)}
    return ops.add_rms_norm(**{**given, **changes})


def _rotary(**changes):
    given = {"x": torch.ones(3, 2, 8), "cos": torch.ones(5, 4), "sin": torch.ones(5, 4)}
    return ops.rotary(**{**given, "positions": torch.tensor([0, 4, 2]), **changes})


PAGES = {"key_pages": torch.zeros(4, 2, 8, 32), "value_pages": torch.zeros(4, 2, 32, 6)}


def _store_kv(**changes):
    given = {"key": torch.ones(3, 2, 8), "value": torch.ones(3, 2, 6), **PAGES}
    return ops.store_kv(**{**given, "slots": torch.tensor([0, 127, -1]), **changes})


def _attention(**changes):
    given = {
        "query": torch.ones(3, 4, 8),
        **PAGES,
        "page_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "lengths": torch.tensor([40, 5]),
        "query_begin": torch.tensor([0, 2, 3]),
    }
    return ops.attention(**{**given, **changes})


LATENTS = torch.zeros(4, 32, 8)


def _store_latent(**changes):
    given = {"latent": torch.ones(3, 8), "latent_pages": LATENTS}
    return ops.store_latent(**{**given, "slots": torch.tensor([0, 127, -1]), **changes})


def _mla_attention(**changes):
    given = {
        "query": torch.ones(3, 4, 8),
        "latent_pages": LATENTS,
        "page_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "lengths": torch.tensor([40, 5]),
        "query_begin": torch.tensor([0, 2, 3]),
        "value_size": 6,
        "scale": 0.5,
    }
    return ops.mla_attention(**{**given, **changes})


STACK = inputs.experts("int8", 5, 65, 48).gate

# (operator, argument, a value that does not fit, the exception)
WRONG = [
    # ------------------------------------------------------------------- norms and rotation
    (_rms_norm, "x", [1.0], TypeError),
    (_rms_norm, "x", torch.ones(3, 8, dtype=torch.int32), TypeError),
    (_rms_norm, "x", torch.tensor(1.0), ValueError),
    (_rms_norm, "weight", torch.ones(7), ValueError),
    (_rms_norm, "weight", torch.ones(8, 1), ValueError),
    (_rms_norm, "weight", torch.ones(8, device="meta"), ValueError),
    (_rms_norm, "eps", -1.0, ValueError),
    (_rms_norm, "eps", float("nan"), ValueError),
    (_rms_norm, "eps", "1", TypeError),
    (_add_rms_norm, "residual", torch.ones(8), ValueError),
    (_add_rms_norm, "residual", torch.ones(3, 8, dtype=torch.bfloat16), TypeError),
    (_rotary, "x", torch.ones(3, 16), ValueError),
    (_rotary, "cos", torch.ones(5, 5), ValueError),
    (_rotary, "cos", torch.ones(5, 4, dtype=torch.bfloat16), TypeError),
    (_rotary, "sin", torch.ones(4, 4), ValueError),
    (_rotary, "positions", torch.tensor([0, 1]), ValueError),
    (_rotary, "positions", torch.tensor([0, 1, 2], dtype=torch.int32), TypeError),
    (_rotary, "positions", torch.tensor([0, 5, 2]), IndexError),
    (_rotary, "positions", torch.tensor([0, -1, 2]), IndexError),
    # ------------------------------------------------------------------- keys and values
    (_store_kv, "key", torch.ones(3, 2, 7), ValueError),
    (_store_kv, "key", torch.ones(3, 1, 8), ValueError),
    (_store_kv, "value", torch.ones(2, 2, 6), ValueError),
    (_store_kv, "value", torch.ones(3, 2, 6, dtype=torch.bfloat16), TypeError),
    (_store_kv, "slots", torch.tensor([0, 1]), ValueError),
    (_store_kv, "slots", torch.tensor([0.0, 1.0, 2.0]), TypeError),
    (_store_kv, "slots", torch.tensor([0, 128, 1]), IndexError),
    (_store_kv, "slots", torch.tensor([0, -2, 1]), IndexError),
    (_store_kv, "key_pages", torch.zeros(4, 2, 8, 16), ValueError),
    (_store_kv, "value_pages", torch.zeros(3, 2, 32, 6), ValueError),
    (_store_kv, "value_pages", torch.zeros(4, 2, 32, 6, dtype=torch.float16), TypeError),
    (_attention, "query", torch.ones(3, 8), ValueError),
    (_attention, "query", torch.ones(3, 3, 8), ValueError),
    (_attention, "query", torch.ones(3, 4, 7), ValueError),
    (_attention, "key_pages", torch.zeros(2, 4, 8, 32).transpose(0, 1), ValueError),
    (_attention, "page_table", torch.tensor([[0, 1], [2, 3]]), TypeError),
    (_attention, "page_table", torch.tensor([[0, 4], [2, 3]], dtype=torch.int32), IndexError),
    (_attention, "page_table", torch.tensor([[0, -1], [2, 3]], dtype=torch.int32), IndexError),
    (_attention, "lengths", torch.tensor([40]), ValueError),
    (_attention, "lengths", torch.tensor([65, 5]), IndexError),
    (_attention, "lengths", torch.tensor([1, 5]), IndexError),
    (_attention, "query_begin", torch.tensor([0, 3]), ValueError),
    (_attention, "query_begin", torch.tensor([0, 2, 4]), IndexError),
    (_attention, "query_begin", torch.tensor([1, 2, 3]), IndexError),
    (_attention, "query_begin", torch.tensor([0, 2, 1]), IndexError),
    (_attention, "scale", "1", TypeError),
    (_store_latent, "latent", torch.ones(3, 7), ValueError),
    (_store_latent, "latent", torch.ones(3, 1, 8), ValueError),
    (_store_latent, "latent_pages", torch.zeros(4, 16, 8), ValueError),
    (_store_latent, "latent_pages", torch.zeros(4, 8, 32).transpose(1, 2), ValueError),
    (_store_latent, "slots", torch.tensor([0, 128, 1]), IndexError),
    (_mla_attention, "query", torch.ones(3, 4, 9), ValueError),
    (_mla_attention, "latent_pages", torch.zeros(4, 32, 8, dtype=torch.int32), TypeError),
    (_mla_attention, "page_table", torch.tensor([[0, 4], [2, 3]], dtype=torch.int32), IndexError),
    (_mla_attention, "lengths", torch.tensor([65, 5]), IndexError),
    (_mla_attention, "query_begin", torch.tensor([0, 2, 4]), IndexError),
    (_mla_attention, "value_size", 9, ValueError),
    (_mla_attention, "value_size", 0, ValueError),
    (_mla_attention, "scale", "1", TypeError),
    # ------------------------------------------------------------------------------ moe
    (_moe, "hidden_states", None, TypeError),
    (_moe, "hidden_states", [[1.0] * 65] * 3, TypeError),
    (_moe, "hidden_states", torch.ones(3, 65, dtype=torch.float64), TypeError),
    (_moe, "hidden_states", torch.ones(3, 65, dtype=torch.int32), TypeError),
    (_moe, "hidden_states", torch.ones(3, 65).to_sparse(), TypeError),
    (_moe, "hidden_states", torch.ones(65), ValueError),
    (_moe, "hidden_states", torch.ones(1, 3, 65), ValueError),
    (_moe, "hidden_states", torch.ones(3, 64), ValueError),
    (_moe, "hidden_states", torch.ones(3, 65, device="meta"), ValueError),
    (_moe, "experts", None, TypeError),
    (_moe, "experts", STACK, TypeError),
    (_moe, "experts", torch.ones(5, 48, 65), TypeError),
    (_moe, "topk_ids", None, TypeError),
    (_moe, "topk_ids", [[0, 1]] * 3, TypeError),
    (_moe, "topk_ids", torch.ones(3, 2), TypeError),
    (_moe, "topk_ids", torch.ones(3, 2, dtype=torch.int16), TypeError),
    (_moe, "topk_ids", torch.ones(3, 2, dtype=torch.bool), TypeError),
    (_moe, "topk_ids", torch.ones(3, dtype=torch.int64), ValueError),
    (_moe, "topk_ids", torch.ones(4, 2, dtype=torch.int64), ValueError),
    (_moe, "topk_ids", torch.ones(3, 0, dtype=torch.int64), ValueError),
    (_moe, "topk_ids", torch.ones(3, 2, dtype=torch.int64, device="meta"), ValueError),
    (_moe, "topk_weights", None, TypeError),
    (_moe, "topk_weights", torch.ones(3, 2, dtype=torch.int64), TypeError),
    (_moe, "topk_weights", torch.ones(3, 2, dtype=torch.complex64), TypeError),
    (_moe, "topk_weights", torch.ones(3), ValueError),
    (_moe, "topk_weights", torch.ones(3, 3), ValueError),
    (_moe, "topk_weights", torch.ones(3, 2, device="meta"), ValueError),
    (_moe, "activation", "relu", ValueError),
    (_moe, "activation", None, ValueError),
    (_moe, "activation", 0, ValueError),
    # --------------------------------------------------------------------------- linear
    (_linear, "x", None, TypeError),
    (_linear, "x", torch.ones(3, 65, dtype=torch.float64), TypeError),
    (_linear, "x", torch.ones(3, 65).to_sparse(), TypeError),
    (_linear, "x", torch.ones(3, 64), ValueError),
    (_linear, "x", torch.ones(()), ValueError),
    (_linear, "x", torch.ones(3, 65, device="meta"), ValueError),
    (_linear, "weight", torch.ones(48, 65), TypeError),
    (_linear, "weight", STACK, ValueError),
    (_linear, "bias", 1.0, TypeError),
    (_linear, "bias", torch.ones(48, dtype=torch.int32), TypeError),
    (_linear, "bias", torch.ones(47), ValueError),
    (_linear, "bias", torch.ones(1, 48), ValueError),
    (_linear, "bias", torch.ones(48, device="meta"), ValueError),
    # ---------------------------------------------------------------------------- route
    (_route, "logits", None, TypeError),
    (_route, "logits", torch.zeros(3, 8, dtype=torch.float64), TypeError),
    (_route, "logits", torch.zeros(3, 8, dtype=torch.int64), TypeError),
    (_route, "logits", torch.zeros(8), ValueError),
    (_route, "logits", torch.zeros(3, 0), ValueError),
    (_route, "top_k", 0, ValueError),
    (_route, "top_k", -1, ValueError),
    (_route, "top_k", 9, ValueError),
    (_route, "top_k", 1.0, TypeError),
    (_route, "top_k", True, TypeError),
    (_route, "scoring", "tanh", ValueError),
    (_route, "correction_bias", [0.0] * 8, TypeError),
    (_route, "correction_bias", torch.zeros(8, dtype=torch.int32), TypeError),
    (_route, "correction_bias", torch.zeros(7), ValueError),
    (_route, "correction_bias", torch.zeros(8, device="meta"), ValueError),
    (_route, "n_group", 3, ValueError),
    (_route, "n_group", 0, ValueError),
    (_route, "n_group", None, TypeError),
    (_route, "topk_group", 2, ValueError),
    (_route, "topk_group", 0, ValueError),
    (_route, "scale", "much", TypeError),
    (_route, "scale", None, TypeError),
    # ----------------------------------------------------------------------- conversions
    (_quantize, "tensor", None, TypeError),
    (_quantize, "tensor", torch.zeros(3, 8, dtype=torch.int8), TypeError),
    (_quantize, "tensor", torch.zeros(3, 8, dtype=torch.float64), TypeError),
    (_quantize, "tensor", torch.zeros(8), ValueError),
    (_quantize, "tensor", torch.zeros(3, 8).to_sparse(), TypeError),
    (_quantize, "format", "int3", ValueError),
    (_quantize, "format", None, ValueError),
    (_dequantize, "weight", torch.zeros(3, 8), TypeError),
    (_dequantize, "dtype", torch.float64, TypeError),
    (_dequantize, "dtype", torch.int8, TypeError),
    (_dequantize, "dtype", "float32", TypeError),
]


def _label(value: object) -> str:
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        where = "sparse" if value.layout != torch.strided else value.device.type
        return f"{kind}{list(value.shape)} {where}"
    return str(value) if not isinstance(value, ktcore.QuantTensor) else "a stack"


@pytest.mark.parametrize(
    ("call", "name", "value", "error"),
    [pytest.param(*w, id=f"{w[0].__name__[1:]}-{w[1]}-{_label(w[2])[:40]}") for w in WRONG],
)
def test_named_in_the_message(call, name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        call(**{name: value})


@pytest.mark.parametrize("direct", [False, True], ids=["dispatched", "inference_mode"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31), 2**40])
def test_ids_out_of_range(variant, bad, dtype, direct):
    if bad > 2**31 - 1 and dtype == torch.int32:
        pytest.skip("does not fit int32")
    ids = torch.tensor([[0, 1], [4, -1], [2, bad]], dtype=dtype)
    with torch.inference_mode(direct):
        with pytest.raises(IndexError, match=rf"topk_ids\[2, 1\] is {bad}\b.*0 to 4"):
            _moe(topk_ids=ids)
        assert _moe().isfinite().all()  # and nothing is left locked or broken


def test_ids_of_no_tokens(variant):
    out = _moe(
        hidden_states=torch.ones(0, 65),
        topk_ids=torch.ones(0, 2, dtype=torch.int64),
        topk_weights=torch.ones(0, 2),
    )
    assert out.shape == (0, 65)


@pytest.mark.skipif(_native.ext is None, reason="needs the extension")
@pytest.mark.parametrize("distances", [(0, 0, 0), (-1, -1, 2), (4096, -1, 1)])
def test_prefetching_that_means_nothing_is_refused(distances):
    with pytest.raises(ValueError, match=r"set_prefetch: expected bytes .* panel_step of at least"):
        _native.ext.set_prefetch(*distances)


def test_weights_on_another_device_have_no_kernel():
    meta = ktcore.QuantTensor.quantize(torch.zeros(4, 8), "bf16")
    weight = ktcore.QuantTensor("bf16", (4, 8), {"data": meta.parts["data"].to("meta")})
    with pytest.raises(ValueError, match=r"x: expected device meta, like weight, got cpu"):
        ops.linear(torch.ones(1, 8), weight)


# ------------------------------------------------------------------------------ random arguments

_values = st.sampled_from([0.0, 1.0, -3.5, 1e-40, 1e30, float("nan"), float("inf")])


@st.composite
def _arrays(draw, rows, columns, dtypes=FLOATS):
    """A tensor [rows, columns], mostly: of some dtype, values and strides."""
    dtype = draw(st.sampled_from(dtypes))
    x = torch.full((2 * rows + 1, 2 * columns + 1), draw(_values)).to(dtype)
    x[::2] = 0.5
    step_r, step_c = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
    x = x[: rows * step_r : step_r, : columns * step_c : step_c]
    how = draw(st.sampled_from(["as is", "as is", "as is", "turned", "expanded", "flat"]))
    if how == "turned":
        return x.mT.contiguous().mT
    if how == "expanded" and rows:
        return x[:1].expand(rows, columns)
    return x.flatten() if how == "flat" else x


def _refused_or(call):
    """The call's result, or None if its arguments were refused."""
    try:
        return call()
    except (TypeError, ValueError, IndexError) as error:
        assert re.match(r"[a-z_]+(\[\d+, \d+\])?(:| is) ", str(error)), error  # names its argument
        return None


@given(data=st.data())
def test_random_arguments_of_moe(variant, data):
    format = data.draw(st.sampled_from(["bf16", "int8", "int4_g32"]))
    experts = inputs.experts(format, 5, 65, 48)
    tokens = data.draw(st.integers(0, 6))
    top_k = data.draw(st.integers(0, 4))
    x = data.draw(_arrays(tokens, data.draw(st.sampled_from([65, 65, 65, 65, 64]))))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-1, 5), min_size=tokens * top_k, max_size=tokens * top_k)),
        dtype=data.draw(st.sampled_from([torch.int64, torch.int32])),
    ).reshape(tokens, top_k)
    weights = data.draw(_arrays(tokens, top_k, [*FLOATS, torch.float64]))
    activation = data.draw(st.sampled_from(["silu", "gelu_tanh", "swiglu_oai", "relu"]))
    exact = data.draw(st.booleans())
    got = _refused_or(lambda: ops.moe(x, experts, ids, weights, activation=activation, exact=exact))
    if got is None:
        return
    assert got.shape == x.shape and got.dtype == x.dtype
    want, magnitude = oracle.moe(x, experts, ids, weights, activation)
    limits = activation == "swiglu_oai" and not x.isfinite().all()
    # What float32 cannot hold is no matter of arguments, even with a weight of zero.
    each = oracle.moe(x, experts, ids, torch.ones_like(weights), activation)[0]
    held = (want.abs() < 1e4).all() and (each.abs() < 1e30).all()
    if got.numel() and held and not limits:
        outcome = oracle.judge(got, want, experts.format.tolerance, magnitude)
        assert not outcome.problem, outcome.problem


@given(data=st.data())
def test_random_arguments_of_linear(variant, data):
    format = data.draw(st.sampled_from(["bf16", "int8", "int4_g32"]))
    weight = inputs.matrix(format, 48, 65)
    x = data.draw(_arrays(data.draw(st.integers(0, 6)), data.draw(st.sampled_from([65, 65, 1]))))
    bias = data.draw(st.sampled_from([None, torch.ones(48), torch.ones(1), torch.ones(48).half()]))
    got = _refused_or(lambda: ops.linear(x, weight, bias))
    if got is None:
        return
    assert got.shape == (*x.shape[:-1], 48) and got.dtype == x.dtype
    want = oracle.linear(x, weight, bias)[0].reshape(-1, 48)
    if want.numel() and (want.abs() < 1e4).all():
        # Beside a bias the product's error weighs less; rows that cancel are not of interest.
        scale = x.to(torch.float64).norm(dim=-1).reshape(-1) + 7
        outcome = oracle.judge(got.reshape(-1, 48), want, weight.format.tolerance * 2, scale)
        assert not outcome.problem, outcome.problem


@given(data=st.data())
def test_random_arguments_of_route(variant, data):
    tokens, experts = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 12))
    logits = data.draw(_arrays(tokens, experts))
    top_k = data.draw(st.integers(0, 6))
    got = _refused_or(
        lambda: ops.route(
            logits,
            top_k,
            scoring=data.draw(st.sampled_from(["softmax", "sigmoid"])),
            correction_bias=data.draw(st.sampled_from([None, torch.zeros(experts)])),
            n_group=data.draw(st.integers(0, 4)),
            topk_group=data.draw(st.integers(0, 3)),
            renormalize=data.draw(st.booleans()),
            scale=data.draw(st.sampled_from([1.0, 0.0, -2.5, 1e30])),
        )
    )
    if got is None:
        return
    ids, weights = got
    assert ids.shape == weights.shape == (logits.shape[0], top_k)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())
