"""Models stored in published quantisation schemes: read by their own quantization_config."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requantized import SCHEMES, is_linear, requantize, write
from safetensors.torch import load_file, save_file

import ktcore
from ktcore.formats import get_format
from ktcore.models import load_model
from ktcore.models.config import Fields
from ktcore.models.loading import EMBEDDED
from ktcore.models.moe_layer import MoeLayer
from ktcore.weights import Checkpoint, CheckpointError, QuantTensor
from ktcore.weights.quantization import QuantizedCheckpoint, stack

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 9, 3, 23, 84, 62, 64, 33])

# What each scheme's experts are held in.
FORMATS = {
    "fp8 block": "fp8_e4m3_b128",
    "fp8 channel": "fp8_e4m3",
    "fp8 tensor": "fp8_e4m3",
    "ct int4 g32": "int4_g32",
    "ct int4 g64 asym": "ct4_g64_asym",
    "ct int8 channel": "int8",
    "ct int8 g32 asym": "int8_g32_asym_f16",
    "gptq4": "gptq4_g32",
    "gptq4 v2": "gptq4_g32_v2",
    "gptq4 act": "gptq4_g32_sym_act",
    "gptq3 g64": "gptq3_g64_sym",
    "gptq4 row": "gptq4_sym",
    "awq4": "awq4_g32",
    "ct mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "ct nvfp4": "nvfp4_ct",
}
assert FORMATS.keys() == SCHEMES.keys()


def opened(folder: Path, settings: dict) -> QuantizedCheckpoint:
    fields = Fields(folder / "config.json", settings, "quantization_config.")
    return QuantizedCheckpoint(Checkpoint(folder), fields)


def layer(folder: Path, tensors: dict[str, torch.Tensor], settings: dict) -> QuantizedCheckpoint:
    """A checkpoint of one layer, "m.proj"."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / Checkpoint.SINGLE)
    return opened(folder, settings)


def moe_layers(model) -> list[MoeLayer]:
    return [layer.mlp for layer in model.decoder.layers if isinstance(layer.mlp, MoeLayer)]


# ------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module", params=SCHEMES)
def stored(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("stored")
    return request.param, requantize(EMBEDDED, folder, *SCHEMES[request.param])


def test_model_computes_with_the_stored_numbers(stored, tmp_path):
    """The same logits as with the same numbers in float32."""
    scheme, folder = stored
    checkpoint = opened(folder, SCHEMES[scheme][1])
    dense, original = {}, Checkpoint(EMBEDDED)
    for name in original.names():
        found = checkpoint.tensor(name)
        assert isinstance(found, QuantTensor) == is_linear(name)
        dense[name] = found.dequantize() if is_linear(name) else found
    # ... which are near those that were stored.
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    want = original.tensor(name).float()
    limit = {"gptq3": 0.3}.get(scheme.split()[0], 0.15)
    assert ((dense[name] - want).norm() / want.norm()).item() < limit
    with ktcore.use("reference"):
        model = load_model(folder)
        for mlp in moe_layers(model):
            assert mlp.experts.format.name == mlp.experts.down_format.name == FORMATS[scheme]
        got = model(IDS)
        expected = load_model(write(EMBEDDED, tmp_path, dense, None), "f32")(IDS)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    assert model.parameters == load_model().parameters


@pytest.mark.parametrize("scheme", ["fp8 block", "gptq4 act", "nvfp4"])
def test_quantised_anew_while_loading(scheme, tmp_path):
    folder = requantize(EMBEDDED, tmp_path, *SCHEMES[scheme])
    with ktcore.use("reference"):
        stored, anew = load_model(folder), load_model(folder, "int8")
        assert anew.expert_format is get_format("int8")
        want = stored(IDS)
        assert 1e-5 < ((anew(IDS) - want).norm() / want.norm()).item() < 0.05


def test_experts_that_are_not_stored_alike(tmp_path):
    folder = requantize(EMBEDDED, tmp_path, *SCHEMES["fp8 block"])
    tensors = load_file(folder / Checkpoint.SINGLE)
    base = "model.layers.1.mlp.experts.2.up_proj"
    tensors[f"{base}.weight"] = Checkpoint(EMBEDDED).tensor(f"{base}.weight")
    del tensors[f"{base}.weight_scale_inv"]
    folder = write(EMBEDDED, tmp_path / "mixed", tensors, SCHEMES["fp8 block"][1])
    with ktcore.use("reference"):
        with pytest.raises(CheckpointError, match=r"experts of layer 1: expert 2 is .* in bf16"):
            load_model(folder)
        load_model(folder, "int8")


def test_a_stack_of_experts_in_blocks(tmp_path):
    """As gpt-oss stores experts, with gate and up one after the other."""
    original, tensors = Checkpoint(EMBEDDED), {}
    experts = 0
    while f"model.layers.0.mlp.experts.{experts}.up_proj.weight" in original:
        experts += 1
    for name in original.names():
        if ".experts." not in name:
            tensors[name] = original.tensor(name)
    for i in range(load_model().config.num_hidden_layers):
        base = f"model.layers.{i}.mlp.experts"
        if f"{base}.0.up_proj.weight" not in original:
            continue
        gate, up, down = (
            torch.stack([original.tensor(f"{base}.{e}.{p}.weight") for e in range(experts)])
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        for name, w in (("gate_up_proj", torch.cat([gate, up], 1)), ("down_proj", down)):
            for part, tensor in get_format("mxfp4").quantize(w).items():
                tensors[f"{base}.{name}_{part}"] = tensor
    folder = write(EMBEDDED, tmp_path / "stacked", tensors, {"quant_method": "mxfp4"})
    same = requantize(
        EMBEDDED,
        tmp_path / "single",
        lambda base, w: (
            SCHEMES["ct mxfp4"][0](base, w) if ".experts." in base else {f"{base}.weight": w}
        ),
        SCHEMES["ct mxfp4"][1],
    )
    with ktcore.use("reference"):
        model = load_model(folder)
        assert model.expert_format is get_format("mxfp4")
        assert torch.equal(model(IDS), load_model(same)(IDS))


def test_different_schemes_in_one_model(tmp_path):
    """Attention and experts by their names, as some are published."""
    settings = copy.deepcopy(SCHEMES["ct int4 g32"][1])
    settings["format"] = "mixed-precision"
    settings["config_groups"] = {
        "rest": {
            **settings["config_groups"]["group_0"],
            "format": "pack-quantized",
        },
        "attention": {
            "targets": ["re:.*self_attn.*"],
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        },
    }

    def store(base, w):
        scheme = "fp8 channel" if "self_attn" in base else "ct int4 g32"
        return SCHEMES[scheme][0](base, w)

    folder = requantize(EMBEDDED, tmp_path, store, settings)
    checkpoint = opened(folder, settings)
    attention = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
    expert = checkpoint.tensor("model.layers.0.mlp.experts.0.up_proj.weight")
    assert (attention.format.name, expert.format.name) == ("fp8_e4m3", "int4_g32")
    with ktcore.use("reference"):
        assert load_model(folder)(IDS).isfinite().all()


# -------------------------------------------------------------------------------- single layers

SHAPE = (48, 128)


@pytest.fixture
def weight(rng) -> torch.Tensor:
    return torch.randn(SHAPE, generator=rng) / 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_layer_lacks(scheme, tmp_path, weight):
    """Without any one of its tensors: an error that names it, but for those that say nothing."""
    store, settings = SCHEMES[scheme]
    tensors = store("m.proj", weight)
    checkpoint = layer(tmp_path, tensors, settings)
    info = checkpoint.info("m.proj.weight")
    assert info.shape == SHAPE and info.dtype is None
    whole = checkpoint.tensor("m.proj.weight")
    assert whole.format is info.format
    for missing in tensors:
        rest = {n: t for n, t in tensors.items() if n != missing}
        checkpoint = layer(tmp_path, rest, settings)
        telling = not missing.endswith(("weight_shape", "input_scale"))
        if "act" not in scheme and missing.endswith("g_idx"):
            telling = False
        if telling:
            with pytest.raises(CheckpointError, match=r"lacks the tensor 'm\.proj\."):
                checkpoint.tensor("m.proj.weight")
        else:
            assert torch.equal(checkpoint.tensor("m.proj.weight").dequantize(), whole.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_of_wrong_shapes_and_types(scheme, tmp_path, weight):
    store, settings = SCHEMES[scheme]
    tensors = store("m.proj", weight)
    for spoiled, tensor in tensors.items():
        if spoiled.endswith("input_scale"):
            continue
        for wrong in (tensor.new_zeros((*tensor.shape, 3)), tensor.to(torch.float64)):
            checkpoint = layer(tmp_path, {**tensors, spoiled: wrong}, settings)
            with pytest.raises(CheckpointError, match=r"m\.proj") as raised:
                checkpoint.info("m.proj.weight")
            assert str(tmp_path) in str(raised.value)


def _settings(scheme: str, **changes) -> dict:
    return {**SCHEMES[scheme][1], **changes}


def _weights(scheme: str, **changes) -> dict:
    settings = copy.deepcopy(SCHEMES[scheme][1])
    settings["config_groups"]["group_0"]["weights"].update(changes)
    return settings


@pytest.mark.parametrize(
    ("scheme", "settings", "what"),
    [
        ("fp8 block", _settings("fp8 block", weight_block_size=[64, 64]), "weight_scale_inv"),
        ("fp8 block", _settings("fp8 block", weight_block_size=[128]), "weight_block_size"),
        ("fp8 block", _settings("fp8 block", weight_block_size=[0, 4]), "weight_block_size"),
        ("fp8 block", _settings("fp8 block", weight_block_size=None), "weight_scale_inv"),
        ("fp8 block", _settings("fp8 block", ignored_layers=["m"]), "ignored_layers"),
        ("fp8 block", _settings("fp8 block", modules_to_not_convert=["re:m.p"]), "lists"),
        ("fp8 block", _settings("fp8 block", modules_to_not_convert=["re:("]), "regular expr"),
        ("gptq4", _settings("gptq4", bits=5), "5 bits"),
        ("gptq4", _settings("gptq4", bits="4"), "bits"),
        ("gptq4", _settings("gptq4", bits=8), "qweight|scales|qzeros|g_idx"),
        ("gptq4", _settings("gptq4", group_size=0), "group_size"),
        ("gptq4", _settings("gptq4", group_size=64), "qzeros|scales"),
        ("gptq4", _settings("gptq4", checkpoint_format="marlin"), "'marlin'"),
        ("gptq4", _settings("gptq4", sym=True), "sym"),
        ("awq4", _settings("awq4", version="gemv"), "'gemv'"),
        ("awq4", _settings("awq4", bits=8), "4 bits only"),
        ("nvfp4", _settings("nvfp4", quant_algo="W4A8_AWQ"), "quant_algo"),
        ("nvfp4", _settings("nvfp4", exclude_modules=["*proj"]), "exclude_modules"),
        ("nvfp4", _settings("nvfp4", group_size=32), "group_size"),
        ("ct int4 g32", _weights("ct int4 g32", num_bits=3), "3-bit"),
        ("ct int4 g32", _weights("ct int4 g32", strategy="block"), "per 'block'"),
        ("ct int4 g32", _weights("ct int4 g32", symmetric=False), "weight_zero_point"),
        ("ct int4 g32", _settings("ct int4 g32", format="marlin-24"), "marlin-24"),
        ("ct int4 g32", _settings("ct int4 g32", config_groups={}), "'m.proj'"),
        ("ct int4 g32", _settings("ct int4 g32", config_groups=None), "config_groups"),
        ("ct int4 g32", _settings("ct int4 g32", ignore="m"), "ignore"),
    ],
)
def test_what_is_not_supported_or_contradicts(scheme, settings, what, tmp_path, weight):
    tensors = SCHEMES[scheme][0]("m.proj", weight)
    with pytest.raises(CheckpointError, match=what) as raised:
        layer(tmp_path, tensors, settings).tensor("m.proj.weight")
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "", 3, None])
def test_unknown_methods(method, tmp_path, weight):
    with pytest.raises(CheckpointError, match="quant_method"):
        layer(tmp_path, {"m.proj.weight": weight}, {"quant_method": method})


def test_contents_that_contradict_each_other(tmp_path, weight):
    store, settings = SCHEMES["gptq4 act"]
    tensors = store("m.proj", weight)
    for wrong in (-1, 4):
        spoiled = {**tensors, "m.proj.g_idx": tensors["m.proj.g_idx"].clone()}
        spoiled["m.proj.g_idx"][5] = wrong
        with pytest.raises(CheckpointError, match=r"g_idx.*expected groups 0 to 3"):
            layer(tmp_path, spoiled, settings).tensor("m.proj.weight")
    store, settings = SCHEMES["ct int4 g32"]
    tensors = {**store("m.proj", weight), "m.proj.weight_shape": torch.tensor([48, 127])}
    with pytest.raises(CheckpointError, match="weight_shape"):
        layer(tmp_path, tensors, settings).tensor("m.proj.weight")


def test_act_order_that_is_none(tmp_path, weight):
    """desc_act is false, g_idx says otherwise: the numbers count. And without it, they are even."""
    store, settings = SCHEMES["gptq4 act"]
    checkpoint = layer(tmp_path, store("m.proj", weight), {**settings, "desc_act": False})
    assert checkpoint.tensor("m.proj.weight").format.name == "gptq4_g32_sym_act"


def test_layers_that_are_left_as_they_were(tmp_path, weight):
    """With or without being listed."""
    for settings in (_settings("gptq4"), _settings("fp8 block", modules_to_not_convert=["m"])):
        checkpoint = layer(tmp_path, {"m.proj.weight": weight}, settings)
        assert torch.equal(checkpoint.tensor("m.proj.weight"), weight)
        assert checkpoint.info("m.proj.weight").dtype == torch.float32
        assert "m.proj.weight" in checkpoint and "m.other.weight" not in checkpoint
        with pytest.raises(CheckpointError, match=r"lacks the tensor 'm\.other\.weight'"):
            checkpoint.info("m.other.weight")


def test_a_name_that_only_begins_like_one_that_is_left_out(tmp_path, weight):
    """mlp.gate is the router, mlp.gate_proj is not."""
    tensors = SCHEMES["fp8 block"][0]("m.mlp.gate_proj", weight)
    settings = _settings("fp8 block", modules_to_not_convert=["mlp.gate", "gate", "m.mlp.gat"])
    found = layer(tmp_path, tensors, settings).tensor("m.mlp.gate_proj.weight")
    assert isinstance(found, QuantTensor)


def test_stack():
    a = QuantTensor.quantize(torch.ones(2, 32), "int8")
    b = QuantTensor.quantize(torch.ones(2, 32), "int4")
    assert stack([a, a, a], 3).shape == (3, 2, 32)
    with pytest.raises(ValueError, match=r"expert 1 is \[2, 32\] in int4_g32"):
        stack([a, b], 2)
    with pytest.raises(ValueError, match="at least one"):
        stack([], 0)


_json = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 200), st.floats(), st.text(max_size=3),
        st.sampled_from(["group", "int", "float", "pack-quantized", "Linear", "re:m", "re:(", "*"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from([
                "bits", "num_bits", "group_size", "sym", "desc_act", "targets", "weights", "format",
                "strategy", "type", "symmetric", "version", "quant_algo", "ignore",
                "config_groups", "weight_block_size", "modules_to_not_convert", "group_0",
            ]),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


@given(scheme=st.sampled_from(sorted(SCHEMES)), changes=st.dictionaries(
    st.sampled_from(["bits", "group_size", "config_groups", "weight_block_size", "version", "sym",
                     "modules_to_not_convert", "ignore", "format", "quant_algo", "quant_method"]),
    _json, min_size=1, max_size=3,
))  # fmt: skip
def test_any_configuration(scheme, changes, tmp_path):
    """A tensor of the right shape, or an error that names the file."""
    weight = torch.linspace(-1, 1, 32 * 64).view(32, 64)
    tensors = SCHEMES[scheme][0]("m.proj", weight)
    try:
        found = layer(tmp_path, tensors, {**SCHEMES[scheme][1], **changes}).tensor("m.proj.weight")
        assert found.shape == (32, 64)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
