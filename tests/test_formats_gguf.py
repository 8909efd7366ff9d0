"""GGUF's block types, held bit for bit against `gguf.quants`, llama.cpp's own reader in numpy."""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_types import fits
from torch import Tensor

from ktcore import QuantTensor
from ktcore.formats import Format, format_names, get_format, gguf_blocks, gguf_grids
from ktcore.formats.gguf_blocks import BlockFormat, set_half
from ktcore.formats.gguf_search import Levels, affine, symmetric
from ktcore.testing.cases import inputs

gguf = pytest.importorskip("gguf", reason="the independent reader of GGUF blocks")
quants = gguf.quants

FORMATS = [f for f in map(get_format, format_names()) if isinstance(f, BlockFormat)]
OFFERED = [f for f in FORMATS if inputs.can_quantize(f.name)]
READ_ONLY = [f for f in FORMATS if f not in OFFERED]

# float16: zeros, the least and largest subnormal, least normal, 1, the largest, infinity, NaN
HALVES = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00)
HALVES = (*HALVES, *(h | 0x8000 for h in HALVES))

ids = {"ids": lambda f: f.name if isinstance(f, Format) else None}


def _type(format: Format):
    return gguf.GGMLQuantizationType[format.name.removeprefix("gguf_").upper()]


def _theirs(format: Format, data: Tensor) -> Tensor:
    with warnings.catch_warnings():  # of infinities times zero
        warnings.simplefilter("ignore", RuntimeWarning)
        return torch.from_numpy(quants.dequantize(data.numpy(), _type(format)))


def _ours(format: Format, data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    columns = data.shape[-1] // format.type_size * format.block_size
    shape = (*data.shape[:-1], columns)
    format.check({"data": data}, shape)
    return format.dequantize({"data": data}, shape, dtype)


def _same_bits(got: Tensor, want: Tensor) -> bool:
    equal = got.view(torch.int32) == want.view(torch.int32)
    return bool((equal | (got.isnan() & want.isnan())).all())


def _random(format: Format, blocks: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (blocks, format.type_size), generator=rng).to(torch.uint8)


# ------------------------------------------------------------------------------------- decoding


def test_every_type_is_there():
    named = {f.name.removeprefix("gguf_").upper() for f in FORMATS}
    assert named == {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4"),
    }


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_names_and_sizes(format):
    assert get_format(format.name.upper()) is format
    assert gguf.GGML_QUANT_SIZES[_type(format)] == (format.block_size, format.type_size)
    assert format.bits == 8 * format.type_size / format.block_size
    shape = (2, 3, 5, 2 * format.block_size)
    assert format.nbytes(shape) == 60 * format.type_size


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_rows_must_be_whole_blocks(format):
    for columns in (1, format.block_size - 1, format.block_size + 1, 2 * format.block_size + 16):
        with pytest.raises(ValueError, match=rf"{format.name}.*{format.block_size}.*{columns}"):
            format.part_specs((3, columns))
        if format in OFFERED:
            with pytest.raises(ValueError, match=format.name):
                format.quantize(torch.zeros(3, columns))


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_any_bytes(format, rng):
    data = _random(format, 3000, rng)
    assert _same_bits(_ours(format, data), _theirs(format, data))
    # Every code of every level occurs, or that would show little.
    codes = format.codes({"data": data}, (3000, format.block_size))
    used = codes.codes.unique().tolist()
    assert used == list(range(len(codes.levels)))
    assert format.unpack_codes(data).unique().tolist() == list(range(len(format.levels)))


@pytest.mark.parametrize("bits", HALVES, ids=hex)
@pytest.mark.parametrize("format", [f for f in FORMATS if f.halves], **ids)
def test_extreme_scales(format, bits, rng):
    """Each float16 of a block at an extreme, in turn and together."""
    value = torch.tensor([[bits]], dtype=torch.int32).to(torch.int16).view(torch.float16)
    for chosen in {tuple(format.halves), format.halves[:1], format.halves[-1:]}:
        data = format.example((40, format.block_size), rng)["data"]
        for at, _ in chosen:
            data[:, at : at + 2] = value.view(torch.uint8)
        assert _same_bits(_ours(format, data), _theirs(format, data))


@pytest.mark.parametrize("bits", HALVES, ids=hex)
def test_extreme_scales_of_iq1_m(bits, rng):
    format = get_format("iq1_m")
    data = _random(format, 40, rng)
    for piece in range(4):
        high = data[:, 49 + 2 * piece]
        high &= 15
        high |= bits >> 4 * piece << 4 & 0xF0
    assert _same_bits(_ours(format, data), _theirs(format, data))


def test_every_exponent_of_mxfp4(rng):
    format = get_format("gguf_mxfp4")
    data = _random(format, 256, rng)
    data[:, 0] = torch.arange(256)
    assert _same_bits(_ours(format, data), _theirs(format, data))
    assert _ours(format, data, torch.float64).isfinite().all()


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("format", FORMATS, **ids)
def test_bytes_all_alike(format, byte):
    data = torch.full((2, format.type_size), byte, dtype=torch.uint8)
    assert _same_bits(_ours(format, data), _theirs(format, data))


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"])
def test_every_entry_of_a_codebook(name):
    theirs = quants._type_traits[_type(get_format(name))]
    theirs.init_grid()
    values = torch.tensor(theirs.grid_map, dtype=torch.float32)
    want = torch.from_numpy(theirs.grid).reshape(theirs.grid_shape)
    got = gguf_grids.grid(name, torch.arange(theirs.grid_shape[0]))
    assert torch.equal(values[got.long()], want)


def test_every_pattern_of_signs():
    want = np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)
    got = gguf_grids.signs_of_seven(torch.arange(128))
    assert (np.packbits(got.numpy(), axis=-1, bitorder="little")[:, 0] == want).all()


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_float64_is_exact(format, rng):
    """What float32 rounds, float64 does not, and the other types round float32 once."""
    shape = (3, 2 * format.block_size)
    parts = format.example(shape, rng)
    exact = format.dequantize(parts, shape, torch.float64)
    assert exact.dtype == torch.float64
    codes = format.codes(parts, shape)
    scales, offsets = codes.factors(torch.float64)
    for index in torch.randint(0, exact.numel(), (200,), generator=rng).tolist():
        row, column = divmod(index, shape[1])
        group = column // codes.group_size
        level = int(codes.levels[codes.codes[row, column].long()])
        value = Fraction(scales[row, group].item()) * level
        if offsets is not None:
            value += Fraction(offsets[row, group].item())
        assert Fraction(exact[row, column].item()) == value
    assert torch.equal(exact.to(torch.float32), _theirs(format, parts["data"]))
    single = format.dequantize(parts, shape)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(format.dequantize(parts, shape, dtype), single.to(dtype))


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_codes(format, rng):
    shape = (2, 3, 3 * format.block_size)
    parts = format.example(shape, rng)
    codes = format.codes(parts, shape)
    assert codes.codes.dtype == torch.uint8 and codes.codes.shape == shape
    levels = [-1, 0, 1] if format.name == "iq1_s" else list(format.levels)  # its delta is an offset
    assert codes.levels.dtype == torch.int8 and codes.levels.tolist() == levels
    assert codes.group_size == format.group_size and codes.columns is None
    outer, inner = ((2, 3, shape[-1] // size) for size in (codes.scale_size, codes.group_size))
    assert codes.scales.dtype == torch.float32 and codes.scales.shape == outer
    assert fits(codes.scales, format.exact_scale_dtype())
    for factors in (codes.inner_scales, codes.inner_offsets):
        assert factors is None or (factors.dtype == torch.int8 and factors.shape == inner)
    values = codes.levels.double()[codes.codes.long()]
    scales, offsets = codes.factors(torch.float64)
    values *= scales.repeat_interleave(codes.group_size, -1)
    if offsets is not None:
        values += offsets.repeat_interleave(codes.group_size, -1)
    assert torch.equal(values, format.dequantize(parts, shape, torch.float64))
    theirs = _theirs(format, parts["data"].reshape(6, -1)).reshape(shape)
    assert torch.equal(values.to(torch.float32), theirs)


@pytest.mark.parametrize("format", FORMATS, **ids)
def test_examples(format, rng):
    shape = (3, 16, 4 * format.block_size)
    parts = format.example(shape, rng)
    format.check(parts, shape)
    values = format.dequantize(parts, shape)
    assert values.isfinite().all()
    assert 0.7 < values.std().item() < 1.4 and abs(values.mean().item()) < 0.15
    again = format.example(shape, torch.Generator().manual_seed(0))
    assert torch.equal(parts["data"], again["data"])  # `rng` is of seed 0


@pytest.mark.parametrize("format", FORMATS, **ids)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (3, 2, 5)])
def test_stacks_and_nothing(format, leading, rng):
    shape = (*leading, format.block_size)
    weight = QuantTensor(format, shape, format.example(shape, rng))
    values = weight.dequantize()
    assert values.shape == shape and format.codes(weight.parts, shape).codes.shape == shape
    if len(leading) == 3:
        assert torch.equal(weight[1].dequantize(), values[1])
        assert torch.equal(weight[1:].dequantize(), values[1:])
    assert format.dequantize({"data": torch.empty(4, 0, dtype=torch.uint8)}, (4, 0)).shape == (4, 0)


# ----------------------------------------------------------------------------------- quantising

# Relative L2 error allowed on Gaussian weights: about 2 % above what was measured.
LOSS = {
    "q4_0": 0.083, "q4_1": 0.0715, "q5_0": 0.041, "q5_1": 0.0345, "q8_0": 0.0052,
    "q2_k": 0.275, "q3_k": 0.147, "q4_k": 0.0727, "q5_k": 0.0365, "q6_k": 0.0177,
    "iq4_nl": 0.075, "iq4_xs": 0.0757, "gguf_mxfp4": 0.114, "tq1_0": 0.445, "tq2_0": 0.445,
}  # fmt: skip


def _loss(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("format", OFFERED, **ids)
def test_loss_on_gaussian_weights(format, rng):
    x = torch.randn(64, 1024, generator=rng)
    assert _loss(_theirs(format, format.quantize(x)["data"]), x) < LOSS[format.name]


def test_a_limit_for_every_quantiser():
    assert set(LOSS) == {f.name for f in OFFERED}


@pytest.mark.parametrize("kind", ["normal", "heavy_tailed", "shifted", "few", "small", "equal"])
@pytest.mark.parametrize("format", OFFERED, **ids)
def test_no_worse_than_llama_cpp(format, kind, rng):
    x = torch.randn(40, 1024, generator=rng)
    if kind == "heavy_tailed":
        x = x**3
    elif kind == "shifted":
        x = x * 0.1 + 1
    elif kind == "few":
        x[torch.rand(x.shape, generator=rng) < 0.9] = 0
    elif kind == "small":
        x = x * 1e-3
    elif kind == "equal":
        x = torch.full_like(x, -0.37)
    try:
        theirs = torch.from_numpy(quants.quantize(x.numpy(), _type(format)))
    except NotImplementedError:
        # In numpy there is none: no worse than one bit less, rounded by the largest of 32 weights.
        groups, half = x.unflatten(-1, (-1, 32)), len(format.levels) // 4
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -half
        scale = torch.where(scale == 0, 1.0, scale)
        plain = (groups / scale).round().clamp(-half, half - 1) * scale
        limit = max(_loss(plain.flatten(-2), x), 2**-11)  # scales are float16
    else:
        limit = _loss(_theirs(format, theirs), x)
    assert _loss(_ours(format, format.quantize(x)["data"]), x) <= limit + 1e-7


@pytest.mark.parametrize("format", READ_ONLY, **ids)
def test_quantising_is_not_offered(format):
    for rows in (0, 3):
        with pytest.raises(TypeError, match=rf"{format.name} is not offered"):
            format.quantize(torch.zeros(rows, format.block_size))


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ternary_weights_are_kept_exactly(name, rng):
    x = torch.randint(-1, 2, (8, 1024), generator=rng) * 0.0625
    format = get_format(name)
    assert torch.equal(_ours(format, format.quantize(x)["data"]), x)


@pytest.mark.parametrize("format", OFFERED, **ids)
def test_codes_times_a_scale_survive(format, rng):
    """What the format itself stores is stored again about as it was."""
    parts = format.example((4, 2048), rng)
    x = format.dequantize(parts, (4, 2048))
    assert _loss(_ours(format, format.quantize(x)["data"]), x) < LOSS[format.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", OFFERED, **ids)
def test_what_is_not_finite_spoils_its_block_alone(format, value, rng):
    block = format.block_size
    x = torch.randn(3, 3 * block, generator=rng)
    x[1, block + 7] = value
    if format.name == "gguf_mxfp4":
        with pytest.raises(ValueError, match=r"weight: expected finite.*gguf_mxfp4"):
            format.quantize(x)
        return
    got = _ours(format, format.quantize(x)["data"])
    expected = torch.zeros(3, 3 * block, dtype=torch.bool)
    expected[1, block : 2 * block] = True
    assert torch.equal(got.isnan(), expected)
    clean = torch.where(expected, 0.0, x)
    others = _ours(format, format.quantize(clean)["data"])
    assert torch.equal(got[~expected], others[~expected])


@pytest.mark.parametrize("format", OFFERED, **ids)
def test_zeros_stay_zeros(format, rng):
    x = torch.zeros(3, 2 * format.block_size)
    x[1, : format.block_size] = torch.randn(format.block_size, generator=rng)
    got = _ours(format, format.quantize(x)["data"])
    assert (got[[0, 2]] == 0).all() and (got[1, format.block_size :] == 0).all()
    assert (got[1, : format.block_size] != 0).any()


@pytest.mark.parametrize("format", OFFERED, **ids)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-9, 1e6, 1e30])
def test_weights_beyond_the_scales(format, size, rng):
    """Too small: zero, or at least as small. Too large: not finite, never a wrong finite number."""
    x = (torch.randn(4, 512, generator=rng) * size).clamp(-3e38, 3e38)
    got = _ours(format, format.quantize(x)["data"])
    if format.name == "gguf_mxfp4" and size > 1e-40:
        assert _loss(got.double(), x.double()) < 0.12
    elif size < 1:
        assert got.abs().max() <= 1.5 * x.abs().max() + 2**-24
    else:
        finite = got.isfinite()
        assert ((got - x)[finite].abs() <= x.abs().max()).all()


@pytest.mark.parametrize("format", OFFERED, **ids)
def test_quantised_piece_by_piece(format, rng, monkeypatch):
    x = torch.randn(5, 7, 2 * format.block_size, generator=rng)
    whole = format.quantize(x)["data"]
    monkeypatch.setattr(gguf_blocks, "CHUNK_WEIGHTS", 3 * format.block_size)
    assert torch.equal(format.quantize(x)["data"], whole)


@pytest.mark.parametrize("format", OFFERED, **ids)
@given(
    rows=st.integers(1, 3),
    blocks=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["row_stride", "inner_stride", "transposed", "expanded"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10)
def test_any_layout(format, rows, blocks, dtype, layout, seed):
    x = torch.randn(
        rows, blocks * format.block_size, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)
    laid = inputs.lay_out(x, layout)
    want = format.quantize(laid.contiguous().to(torch.float32))["data"]
    kept = laid.clone()
    assert torch.equal(format.quantize(laid)["data"], want)
    assert torch.equal(laid, kept)


# ------------------------------------------------------------------------------------- searching


@given(st.lists(st.floats(-200, 200), min_size=1, max_size=50))
def test_nearest_level(values):
    y = torch.tensor(values, dtype=torch.float32)
    for levels in (Levels(range(-8, 8)), Levels(get_format("iq4_nl").levels)):
        table = torch.tensor(levels.values, dtype=torch.float32)
        nearest = (y[:, None] - table).abs().amin(-1)
        assert torch.equal((levels.nearest(y) - y).abs(), nearest)
        assert torch.equal(table[levels.index(y).long()], levels.nearest(y))


def test_a_search_finds_the_scale_that_is_there(rng):
    q = torch.randint(-8, 8, (50, 32), generator=rng)
    q[:, 3] = -8
    scale = torch.randn(50, 1, generator=rng)
    found = symmetric(q * scale, Levels(range(-8, 8)), [-8.2, -8.0, -7.8])
    torch.testing.assert_close(found, scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_search_finds_the_offset_that_is_there(sign, rng):
    q = torch.randint(0, 16, (50, 32), generator=rng).float()
    q[:, 3], q[:, 4] = 0, 15
    scale = torch.rand(50, 1, generator=rng) + 0.1
    offset = sign * (torch.rand(50, 1, generator=rng) + 0.1)
    got = affine(q * scale + offset, 15, positive_offset=True, steps=[-0.2, 0.0, 0.2])
    torch.testing.assert_close(got, (scale, offset), rtol=1e-4, atol=1e-5)
    _, negative = affine(q * scale + offset, 15, positive_offset=False, steps=[-0.2, 0.0, 0.2])
    assert (negative <= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("run", [1, 4, 16])
def test_fields_and_back(bits, run, rng):
    packed = torch.randint(0, 256, (5, 32), generator=rng).to(torch.uint8)
    values = gguf_blocks.fields(packed, bits, run)
    assert values.max() < 1 << bits
    assert torch.equal(gguf_blocks.unfields(values, bits, run), packed)


def test_set_half():
    blocks = torch.zeros(3, 6, dtype=torch.uint8)
    set_half(blocks, 2, torch.tensor([[1.0], [-0.5], [float("inf")]]))
    assert gguf_blocks.half(blocks, 2).flatten().tolist() == [1.0, -0.5, float("inf")]
    assert (blocks[:, [0, 1, 4, 5]] == 0).all()
