"""The layouts in which files hold the experts of a layer, against the models that they are from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ktcore
from ktcore import ops
from ktcore.formats import get_format
from ktcore.models.config import Fields
from ktcore.models.expert_layout import (
    FUSED,
    GGUF,
    GGUF_BIASES,
    GPT_OSS,
    LLAMA4,
    PER_EXPERT,
    ExpertLayout,
    ExpertReader,
)
from ktcore.weights import Checkpoint, CheckpointError, GgufFile, QuantTensor
from ktcore.weights.quantization import QuantizedCheckpoint

E, INNER, HIDDEN = 3, 96, 64
Tensors = dict[str, torch.Tensor]


def saved(folder: Path, tensors: Tensors, quantization: dict | None = None):
    """Tensors in a file, opened."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / Checkpoint.SINGLE)
    checkpoint = Checkpoint(folder)
    if quantization is None:
        return checkpoint
    fields = Fields(folder / "config.json", quantization, "quantization_config.")
    return QuantizedCheckpoint(checkpoint, fields)


def reader(files, *layouts: ExpertLayout, format: str | None = None) -> ExpertReader:
    wanted = None if format is None else get_format(format)
    found = ExpertReader(files, layouts, 0, E, INNER, HIDDEN, wanted)
    for name, shape in found.expected(0):
        assert files.info(name).shape == shape, name
    return found


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def routing(rng: torch.Generator, tokens: int = 9, top_k: int = 2):
    x = torch.randn(tokens, HIDDEN, generator=rng)
    ids = torch.rand(tokens, E, generator=rng).argsort(-1)[:, :top_k]
    return x, ids, torch.rand(tokens, top_k, generator=rng) + 0.1


# ------------------------------------------------------------------------- the models themselves


@pytest.fixture
def gpt_oss(rng):
    """A module of transformers with random numbers that bfloat16 holds; gates reach the limits."""
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = modeling.GptOssConfig(
        num_local_experts=E, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1
    )
    module = modeling.GptOssExperts(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 3.0 if "bias" in name else 0.4
            values = torch.randn(parameter.shape, generator=rng) * scale
            parameter.copy_(values.to(torch.bfloat16).float())
    return module


def gpt_oss_tensors(module) -> Tensors:
    prefix = "model.layers.0.mlp.experts."
    return {prefix + n: p.detach().to(torch.bfloat16) for n, p in module.named_parameters()}


def check_gpt_oss(module, experts, rng, tolerance: float) -> None:
    x, ids, weights = routing(rng)
    gate_up = x @ module.gate_up_proj[0] + module.gate_up_proj_bias[0]
    assert gate_up[:, ::2].max() > 7 and gate_up[:, 1::2].min() < -7
    with torch.no_grad():
        want = module(x, ids, weights)
    assert relative(ops.moe(x, experts, ids, weights, activation="swiglu_oai"), want) < tolerance


def test_gpt_oss_in_floating_point(gpt_oss, variant, tmp_path, rng):
    experts = reader(saved(tmp_path, gpt_oss_tensors(gpt_oss)), GPT_OSS).read(0)
    assert experts.format is get_format("bf16")
    assert experts.biases.keys() == {"gate_bias", "up_bias", "down_bias"}
    check_gpt_oss(gpt_oss, experts, rng, 0.004)
    with ktcore.use("reference"):
        check_gpt_oss(gpt_oss, experts, rng, 1e-5)


def test_gpt_oss_in_mxfp4(gpt_oss, variant, tmp_path, rng):
    """As published: the rows of the stored parts are told apart, nothing is quantised again."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = gpt_oss_tensors(gpt_oss)
    stored = {}
    for name, (rows, columns) in (
        ("gate_up_proj", (2 * INNER, HIDDEN)),
        ("down_proj", (HIDDEN, INNER)),
    ):
        blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), generator=rng).byte()
        scales = torch.randint(122, 127, (E, rows, columns // 32), generator=rng).byte()
        dense = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        getattr(gpt_oss, name).data.copy_(dense)
        del tensors[f"model.layers.0.mlp.experts.{name}"]
        for part, tensor in (("blocks", blocks), ("scales", scales)):
            stored[part] = tensors[f"model.layers.0.mlp.experts.{name}_{part}"] = tensor
        if name == "gate_up_proj":
            gate_up = dict(stored)
    files = saved(tmp_path, tensors, {"quant_method": "mxfp4"})
    experts = reader(files, GPT_OSS).read(0)
    assert experts.format is experts.down_format is get_format("mxfp4")
    for first, weight in ((0, experts.gate), (1, experts.up)):
        assert all(torch.equal(p, gate_up[n][:, first::2]) for n, p in weight.parts.items())
    assert all(torch.equal(p, stored[n]) for n, p in experts.down.parts.items())
    check_gpt_oss(gpt_oss, experts, rng, 0.004)
    with ktcore.use("reference"):
        check_gpt_oss(gpt_oss, experts, rng, 1e-5)


def test_llama4(variant, tmp_path, rng):
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = modeling.Llama4TextConfig(
        num_local_experts=E, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1
    )
    module = modeling.Llama4TextExperts(config)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_((torch.randn(p.shape, generator=rng) / 8).to(torch.bfloat16).float())
    prefix = "model.layers.0.feed_forward.experts."
    tensors = {prefix + n: p.detach().to(torch.bfloat16) for n, p in module.named_parameters()}
    experts = reader(saved(tmp_path, tensors), LLAMA4).read(0)
    x = torch.randn(5 * E, HIDDEN, generator=rng)  # sorted by expert, as the module wants it
    ids = torch.arange(E).repeat_interleave(5)[:, None]
    with torch.no_grad():
        want = module(x)
    assert relative(ops.moe(x, experts, ids, torch.ones(5 * E, 1)), want) < 0.004
    with ktcore.use("reference"):
        assert relative(ops.moe(x, experts, ids, torch.ones(5 * E, 1)), want) < 1e-5


# ------------------------------------------------------------------------------- every layout


@pytest.fixture
def dense(rng) -> Tensors:
    """What all layouts hold."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(torch.bfloat16)

    return {
        "gate": some(E, INNER, HIDDEN),
        "up": some(E, INNER, HIDDEN),
        "down": some(E, HIDDEN, INNER),
        "gate_bias": some(E, INNER),
        "up_bias": some(E, INNER),
        "down_bias": some(E, HIDDEN),
    }


def laid_out(layout: ExpertLayout, dense: Tensors) -> Tensors:
    """The experts' tensors as a layout has them, written out row by row."""
    gate, up = ("gate", "up") if layout.gate_up is None else ("gate_up", None)
    found = dict(dense)
    for suffix in ("", "_bias"):
        if up is None:
            pairs = zip(found.pop(f"gate{suffix}"), found.pop(f"up{suffix}"), strict=True)
            found[f"{gate}{suffix}"] = torch.stack([
                torch.stack([row for both in zip(g, u, strict=True) for row in both])
                if layout.interleaved
                else torch.cat([g, u])
                for g, u in pairs
            ])  # fmt: skip
    tensors = {}
    for role, stack in found.items():
        name = getattr(layout, role)
        if name is None:
            continue
        if layout.transposed and stack.dim() == 3:
            stack = stack.transpose(1, 2)
        if "{expert}" in name:
            tensors.update({name.format(layer=0, expert=e): t for e, t in enumerate(stack)})
        else:
            tensors[name.format(layer=0)] = stack
    return tensors


PER_EXPERT_FUSED = ExpertLayout(
    gate_up="m.{layer}.{expert}.gate_up_proj.weight",
    gate_up_bias="m.{layer}.{expert}.gate_up_proj.bias",
    down="m.{layer}.{expert}.down_proj.weight",
    down_bias="m.{layer}.{expert}.down_proj.bias",
    interleaved=True,
)
LAYOUTS = {
    "per expert": PER_EXPERT,
    "per expert transposed": replace(PER_EXPERT, transposed=True),
    "per expert, fused": PER_EXPERT_FUSED,
    "fused": FUSED,
    "fused interleaved": replace(FUSED, interleaved=True),
    "fused transposed": LLAMA4,
    "gpt-oss": GPT_OSS,
    "apart": GGUF,
    "apart with biases": GGUF_BIASES,
}


@pytest.mark.parametrize("format", [None, "bf16", "int4", "f32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_experts(name, format, dense, tmp_path):
    layout = LAYOUTS[name]
    files = saved(tmp_path, laid_out(layout, dense))
    experts = reader(files, layout, format=format).read(0)
    for role in ("gate", "up", "down"):
        want = QuantTensor.quantize(dense[role], format or "bf16").dequantize()
        assert torch.equal(getattr(experts, role).dequantize(), want)
    biases = [role for role in dense if role.endswith("_bias")] if layout.down_bias else []
    assert list(experts.biases) == biases
    assert all(torch.equal(experts.biases[b], dense[b].float()) for b in biases)


def test_the_first_layout_that_is_there(dense, tmp_path):
    files = saved(tmp_path, laid_out(PER_EXPERT, dense))
    assert reader(files, FUSED, GGUF, PER_EXPERT).layout is PER_EXPERT
    found = ExpertReader(files, (FUSED, GGUF), 0, E, INNER, HIDDEN, None)
    assert next(iter(found.expected(0)))[0] == "blk.0.ffn_gate_exps.weight"


@pytest.mark.parametrize("name", [n for n in LAYOUTS if LAYOUTS[n].down_bias])
def test_each_bias_is_expected(name, dense, tmp_path):
    layout = LAYOUTS[name]
    tensors = laid_out(layout, dense)
    missing = next(n for n in tensors if "bias" in n)
    del tensors[missing]
    files = saved(tmp_path, tensors)
    found = ExpertReader(files, (layout,), 0, E, INNER, HIDDEN, None)
    assert missing in dict(found.expected(0))
    with pytest.raises(CheckpointError, match="lacks the tensor") as raised:
        found.read(0)
    assert missing in str(raised.value)


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def test_fused_rows_that_share_a_scale(dense, tmp_path):
    """nvfp4 has one scale for a whole matrix: as stored gate and up cannot be told apart."""
    layout, tensors = PER_EXPERT_FUSED, {}
    plain = laid_out(layout, dense)
    for name, tensor in plain.items():
        if name.endswith("bias"):
            tensors[name] = tensor
            continue
        parts = get_format("nvfp4").quantize(tensor.float())
        tensors[name] = parts["data"]
        tensors[f"{name}_scale"] = parts["scales"]
        tensors[f"{name}_scale_2"] = parts["global_scale"]
    files = saved(tmp_path, tensors, NVFP4)
    with pytest.raises(CheckpointError, match=r"layer 0: gate and up are one tensor in nvfp4"):
        reader(files, layout).read(0)
    experts = reader(files, layout, format="int8").read(0)
    for role in ("gate", "up", "down"):
        assert relative(getattr(experts, role).dequantize(), dense[role].float()) < 0.15


# ----------------------------------------------------------------------------------------- GGUF


def gguf_file(path: Path, tensors: Tensors, quantised: dict[str, str]) -> GgufFile:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        kind = quantised.get(name.split(".")[2])
        if kind is None or name.endswith("bias"):
            writer.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_gguf_with_biases(variant, dense, tmp_path, rng):
    kinds = {"ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q8_0", "ffn_down_exps": "Q5_1"}
    files = gguf_file(tmp_path / "m.gguf", laid_out(GGUF_BIASES, dense), kinds)
    experts = reader(files, GGUF_BIASES).read(0)
    assert (experts.format.name, experts.down_format.name) == ("q8_0", "q5_1")
    assert all(torch.equal(b, dense[name].float()) for name, b in experts.biases.items())
    x, ids, weights = routing(rng)
    got = ops.moe(x, experts, ids, weights, activation="swiglu_oai")
    with ktcore.use("reference"):
        want = ops.moe(x, experts, ids, weights, activation="swiglu_oai")
    assert relative(got, want) < 0.004
    converted = reader(files, GGUF_BIASES, format="int8").read(0)
    assert converted.format is converted.down_format is get_format("int8")
    assert relative(converted.down.dequantize(), experts.down.dequantize()) < 0.02


def test_gguf_in_floating_point_stays_as_it_is(dense, tmp_path):
    files = gguf_file(tmp_path / "m.gguf", laid_out(GGUF, dense), {})
    experts = reader(files, GGUF).read(0)
    assert experts.format is get_format("f32")
    assert torch.equal(experts.up.dequantize(), dense["up"].float())


def test_gguf_with_gate_and_up_unlike_each_other(dense, tmp_path):
    kinds = {"ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q4_0"}
    files = gguf_file(tmp_path / "m.gguf", laid_out(GGUF, dense), kinds)
    with pytest.raises(CheckpointError, match=r"gate_exps.weight' is Q8_0, but .* is Q4_0"):
        reader(files, GGUF).read(0)
    assert reader(files, GGUF, format="int4").read(0).format is get_format("int4")
