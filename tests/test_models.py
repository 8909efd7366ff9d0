"""Loading models, and their logits and perplexity against Hugging Face transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ktcore
from ktcore.models import families, kv_cache, load_model, loading, perplexity
from ktcore.models.config import Yarn
from ktcore.models.decoder import Mlp
from ktcore.models.moe_layer import MoeLayer
from ktcore.weights import CheckpointError

EMBEDDED = loading.EMBEDDED
WINDOW, WINDOWS = 256, 40
# Largest relative difference of perplexity to transformers in float32, by the experts' format.
PERPLEXITY = {"bf16": 0.002, "int8": 0.005, "int4": 0.03}

# A model with everything the embedded one lacks: dense layers by both settings, biases, an untied
# head, weights that are not renormalised, sizes that are no multiple of a tile.
SMALL = {
    "vocab_size": 99,
    "hidden_size": 40,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def transformers():
    return pytest.importorskip("transformers", reason="the reference is Hugging Face transformers")


def reference_model(folder: Path):
    """transformers' model in float32 with plain attention."""
    model = transformers().Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The small model in bfloat16, in one file."""
    return save_small(tmp_path_factory.mktemp("small"))


def save_small(folder: Path, dtype: torch.dtype = torch.bfloat16, **options) -> Path:
    torch.manual_seed(0)
    config = transformers().Qwen3MoeConfig(**SMALL)
    model = transformers().Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norms around 1; the rest large enough for every part to leave its mark on the logits.
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def exactly(model, ids, **options):
    """Logits with float32 keys and values."""
    return model(ids, model.new_cache(torch.float32), **options)


IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 9, 3, 23, 84, 62, 64, 33])


# ------------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def heldout() -> torch.Tensor:
    ids = load_model().tokenizer.encode((EMBEDDED / "heldout.txt").read_text("utf-8"))
    assert len(ids) >= WINDOW * WINDOWS
    return torch.tensor(ids[: WINDOW * WINDOWS])


@pytest.fixture(scope="module")
def expected_perplexity(heldout) -> float:
    model, loss = reference_model(EMBEDDED), 0.0
    with torch.inference_mode():
        for ids in heldout.split(WINDOW):
            logits = model(ids[None]).logits[0, :-1]
            loss += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    return math.exp(loss / (WINDOWS * (WINDOW - 1)))


_perplexities: dict[str, float] = {}


@pytest.mark.parametrize("format", PERPLEXITY)
def test_embedded_model_has_the_perplexity_of_transformers(
    variant, heldout, expected_perplexity, format
):
    found = perplexity(load_model(format=format), heldout.tolist(), WINDOW)
    assert found == pytest.approx(expected_perplexity, rel=PERPLEXITY[format])
    # And the same on every backend, whichever comes first: measured 3e-5 apart.
    first = _perplexities.setdefault(format, found)
    assert found == pytest.approx(first, rel=1e-3)


def test_perplexity_counts_all_but_the_first_token_of_each_window():
    model = load_model()
    ids = torch.tensor(model.tokenizer.encode("In the beginning God created the heaven"))
    text = model.tokenizer.decode(ids.tolist())
    losses = []
    for piece in ids.split(4):
        if len(piece) > 1:
            log = model(piece).log_softmax(-1)
            losses += [-log[i, piece[i + 1]].item() for i in range(len(piece) - 1)]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, ids.tolist(), 4) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, text, 4) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_the_second_half_of_each_window():
    """As llama.cpp's llama-perplexity: the logits of tokens n / 2 to n - 2 count."""
    model = load_model()
    ids = IDS.repeat(2)[:16]
    losses = []
    for piece in ids.split(8):
        log = model(piece).log_softmax(-1)
        losses += [-log[i, piece[i + 1]].item() for i in range(4, 7)]
    expected = math.exp(sum(losses) / len(losses))
    found = perplexity(model, ids.tolist(), 8, unscored=4)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(perplexity(model, ids.tolist(), 8), rel=1e-3)
    with pytest.raises(ValueError, match="unscored: expected 0 to window - 2, 6, got 7"):
        perplexity(model, ids.tolist(), 8, unscored=7)


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [([1, 2, 3], 1, "window"), ([1, 2, 3], 4096, "window"), ([1], 8, "text")],
)
def test_perplexity_names_what_is_wrong(text, window, message):
    with pytest.raises(ValueError, match=message):
        perplexity(load_model(), text, window)


# ------------------------------------------------------------------- logits of a small model


def test_logits_are_those_of_transformers(variant, small):
    with torch.inference_mode():
        expected = reference_model(small)(IDS[None]).logits[0]
    model = load_model(small)
    kinds = [type(layer.mlp) for layer in model.decoder.layers]
    assert kinds == [Mlp, Mlp, Mlp, MoeLayer, Mlp]
    # bf16 dot products round activations (0.4 % a layer); everything else is float32.
    tolerance = 1e-5 if variant.backend == "reference" else 0.01
    assert relative(exactly(model, IDS), expected) < tolerance
    assert relative(exactly(model, IDS, last=True), expected[-1:]) < tolerance
    assert relative(model(IDS), expected) < max(tolerance, 1e-3)  # with float16 keys and values


def test_sharded_checkpoint_is_the_same_model(small, tmp_path):
    save_small(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path)(IDS), load_model(small)(IDS))


def test_stacked_expert_tensors_are_the_same_model(small, tmp_path):
    tensors = load_file(small / "model.safetensors")
    prefix = "model.layers.3.mlp.experts"

    def stack(projection: str) -> torch.Tensor:
        names = [f"{prefix}.{e}.{projection}_proj.weight" for e in range(SMALL["num_experts"])]
        return torch.stack([tensors.pop(name) for name in names])

    gate, up, down = (stack(name) for name in ("gate", "up", "down"))
    tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), 1)
    tensors[f"{prefix}.down_proj"] = down.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    for format in (None, "int8"):
        assert torch.equal(load_model(tmp_path, format)(IDS), load_model(small, format)(IDS))


def test_float32_checkpoint_keeps_its_dense_weights(tmp_path):
    save_small(tmp_path, torch.float32)
    with torch.inference_mode():
        reference = reference_model(tmp_path)
        for name, p in reference.named_parameters():
            if ".experts." in name:  # there is no float32 format: experts are rounded
                p.copy_(p.bfloat16().float())
        expected = reference(IDS[None]).logits[0]
    with ktcore.use("reference"):
        assert relative(exactly(load_model(tmp_path), IDS), expected) < 1e-5


def test_large_projections_go_through_the_operator(variant, small, monkeypatch):
    from ktcore.models import projection

    expected = load_model(small)(IDS)
    monkeypatch.setattr(projection, "SMALL", 0)
    model = load_model(small)
    ops = {request.op for _, request in model.requests(1)}
    assert ops == {"linear", "route", "moe"}
    assert relative(model(IDS), expected) < 0.01


def test_format_quantises_the_experts_only(small):
    exact = load_model(small)(IDS)
    errors = {}
    for format in ("int8", "int4"):
        model = load_model(small, format)
        assert model.expert_format.name.startswith(format)
        errors[format] = relative(model(IDS), exact)
    assert 0 < errors["int8"] < errors["int4"] < 0.1
    with pytest.raises(ValueError, match="int3"):
        load_model(small, "int3")


# ------------------------------------------------------------------------------- the KV cache


def test_cache_gives_what_a_full_pass_gives(variant, small, monkeypatch):
    monkeypatch.setattr(kv_cache, "CHUNK", 1)  # so that it grows
    model = load_model(small)
    ids = IDS.repeat(3)
    expected = model(ids)
    cache = model.new_cache()
    pieces = [model(part, cache) for part in ids.split([3, 1, 1, 6, 1, 1, 18, 1, 1, 1, 1, 25])]
    assert cache.length == len(ids) <= cache.capacity <= SMALL["max_position_embeddings"]
    assert cache.moved == 2
    # Where activations are rounded to bf16, attention's last bits may tip one over.
    assert relative(torch.cat(pieces), expected) < (1e-5 if variant.backend != "avx512" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_recorded_step_is_the_step(variant, dtype):
    """Bit for bit, also where the cache has moved, or another backend was chosen meanwhile."""
    model = load_model(format="int4")
    ids = torch.arange(40) * 7 % model.config.vocab_size
    plain, recorded = (model.new_cache(dtype) for _ in range(2))
    for i in range(len(ids)):
        plain.recorded = None
        expected, got = (model(ids[i : i + 1], cache) for cache in (plain, recorded))
        assert torch.equal(got, expected)
        if i == 20:
            recorded.reserve(recorded.capacity)
        if i in (10, 21):
            assert recorded.recorded.recording.why_not is None or variant.backend == "reference"
        if i == 30:
            with ktcore.use("reference"):
                other = model(ids[:1], recorded)
            assert "reference" in recorded.recorded.recording.why_not
            assert other.isfinite().all()
            recorded.length -= 1
    assert model(ids[:3], recorded).isfinite().all()


def test_keys_and_values_are_of_a_floating_type():
    with pytest.raises(ValueError, match="dtype: expected float16, bfloat16 or float32, got"):
        load_model().new_cache(torch.int8)


def test_a_truncated_cache_goes_on_from_there(variant):
    model = load_model()
    cache = model.new_cache()
    expected = [model(part, cache) for part in IDS.split([9, 1, 1, 9])]
    cache.truncate(9)
    got = [model(part, cache) for part in IDS[9:].split([1, 1, 9])]
    for a, b in zip(got, expected[1:], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="length: expected 0 to 20, those filled, got 21"):
        cache.truncate(21)


def test_context_is_a_limit(small):
    model = load_model(small)
    limit = SMALL["max_position_embeddings"]
    cache = model.new_cache()
    model(torch.zeros(limit, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens do not fit.*context of {limit}"):
        model(torch.zeros(1, dtype=torch.int64), cache)
    assert cache.length == limit


def test_bad_ids_are_errors(small):
    model = load_model(small)
    with pytest.raises(ValueError, match="at least 1 token"):
        model(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(IndexError):
        model(torch.tensor([SMALL["vocab_size"]]))


def test_few_tokens_leave_torch_its_threads():
    model = load_model()
    torch.set_num_threads(2)
    try:
        model(torch.tensor([1, 2, 3]))
        assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            model(torch.tensor([10**6]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------ loading


def test_release_frees_what_was_packed(variant):
    kept, released = load_model(format="int4"), load_model(format="int4", release=True)
    experts = [layer.mlp.experts for layer in released.decoder.layers]
    if variant.backend == "reference":  # which packs nothing, and must keep what it reads
        assert all(e.gate.parts for e in experts)
    else:
        assert not any(e.gate.parts for e in experts)
        with ktcore.use("reference"), pytest.raises(RuntimeError, match="released"):
            released(IDS)
    assert torch.equal(released(IDS), kept(IDS))


def test_large_checkpoints_are_released_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(loading, "KEEP_STORED_BELOW", 1)
    sizes = {"hidden_size": 192, "intermediate_size": 64, "num_experts": 16, "top_k": 4}
    with ktcore.use():  # whatever other tests of this file force
        if ktcore.explain("moe", **sizes).chosen == "reference":
            pytest.skip("no backend here packs weights")
        assert not load_model().decoder.layers[0].mlp.experts.gate.parts
        assert load_model(release=False).decoder.layers[0].mlp.experts.gate.parts


def test_progress_counts_layers():
    seen = []
    load_model(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(6)]


def test_model_describes_itself():
    model = load_model()
    assert model.name == "kjv-moe" and model.model_type == "qwen3_moe"
    assert model.parameters == 3_851_648
    assert model.eos_token_ids == {0}
    assert model.expert_format.name == "bf16"
    assert "3,851,648" in repr(model)
    assert "qwen3_moe" in families()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 0}, {5, 7}),
        ({}, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": [3, 4]}, {3, 4}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_eos_tokens(tmp_path, generation, config, expected):
    folder = copied(tmp_path, config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load_model(folder).eos_token_ids == expected


# ------------------------------------------------------------------------ what is no model


def copied(tmp_path: Path, changes: dict | None = None) -> Path:
    """The embedded model's folder, with changes to config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        (folder / file).write_bytes((EMBEDDED / file).read_bytes())
    config = json.loads((EMBEDDED / "config.json").read_text())
    config.update(changes or {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not supported; supported: .*qwen3_moe"),
        ({"model_type": None}, "model_type: missing"),
        ({"model_type": 3}, "model_type: expected a string"),
        ({"hidden_size": "192"}, "hidden_size: expected an integer"),
        ({"hidden_size": True}, "hidden_size: expected an integer"),
        ({"hidden_size": -1}, "hidden_size: expected an integer"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": 191}, r"'model.embed_tokens.weight' has shape \[2048, 192\]"),
        ({"num_hidden_layers": 6}, "lacks the tensor 'model.layers.5"),
        ({"num_experts": 17}, "'model.layers.0.mlp.gate.weight' has shape"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok: expected an integer from 1 to 16"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor"),
        ({"head_dim": 33}, "head_dim: expected an even number"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"use_sliding_window": "no"}, "use_sliding_window: expected true or false"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type: 'longrope' is not supp"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor: expected at lea"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1}}, "beta_fast: expected mo"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_theta: expected"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type: 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
        ({"rope_theta": 0}, "rope_theta: expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"mlp_only_layers": [0, "1"]}, "mlp_only_layers: expected integers"),
        ({"mlp_only_layers": [0]}, "lacks the tensor 'model.layers.0.mlp.gate_proj.weight'"),
        ({"attention_bias": True}, "lacks the tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"tie_word_embeddings": False}, "lacks the tensor 'lm_head.weight'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method"),
        ({"eos_token_id": "end"}, None),  # generation_config.json goes before it
    ],
)
def test_config_errors_name_the_field(tmp_path, changes, message):
    folder = copied(tmp_path, changes)
    if message is None:
        load_model(folder)
        return
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_rope_parameters_of_transformers_5_are_read(tmp_path):
    ids = torch.tensor([5, 6, 7, 8])
    changes = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    model = load_model(copied(tmp_path, changes))
    assert model.config.rope_theta == 123.0
    assert not torch.equal(model(ids), load_model()(ids))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.5},
        {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"factor": 2.5, "original_max_position_embeddings": 48},
    ],
)
def test_yarn_as_in_transformers(tmp_path, changes):
    """Over more positions than were trained on, in transformers 5's fields; the frequencies bit for
    bit."""
    save_small(tmp_path, torch.float32)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_theta", None)
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {**YARN, **changes}
    path.write_text(json.dumps(config))
    with torch.inference_mode():
        reference = reference_model(tmp_path)
        for name, p in reference.named_parameters():
            if ".experts." in name:
                p.copy_(p.bfloat16().float())
        ids = torch.arange(110) * 37 % SMALL["vocab_size"]
        expected = reference(ids[None]).logits[0]
    with ktcore.use("reference"):
        model = load_model(tmp_path)
        assert model.config.context_length == {2.5: 120}.get(changes.get("factor"), 256)
        rotary = model.decoder.rotary
        assert torch.equal(rotary.frequencies, reference.model.rotary_emb.inv_freq)
        assert rotary.scale == reference.model.rotary_emb.attention_scaling
        assert relative(exactly(model, ids), expected) < 1e-5


def test_yarn_as_transformers_4_writes_it(tmp_path):
    scaling = {name: YARN[name] for name in YARN if name != "rope_theta"}
    model = load_model(copied(tmp_path, {"rope_scaling": {"type": "yarn", **scaling}}))
    assert model.config.yarn == Yarn(4.0, 64, 0.1 * math.log(4) + 1)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(file)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\udcff", "9" * 5000]
)
def test_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load_model(tmp_path)


def test_weights_that_are_missing_or_cut_short(tmp_path):
    folder = copied(tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 5, 1000, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(folder)


def test_weights_of_another_dtype(tmp_path):
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}' is torch.float8_e4m3fn, expected"):
        load_model(folder)


# On the second the package's Rust code panics.
PREFIXED = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
PREFIXED["continuing_subword_prefix"] = "longer than a token"


def test_tokenizer_errors(tmp_path):
    folder = copied(tmp_path)
    for content in ({}, {"version": "1.0", "model": PREFIXED}):
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="not a valid tokenizer"):
            _ = load_model(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    model = load_model(folder)  # token ids do without
    model(torch.tensor([1]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        _ = model.tokenizer


def test_missing_tokenizers_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install"):
        _ = load_model().tokenizer


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = [
    *sorted(json.loads((EMBEDDED / "config.json").read_text())),
    "rope_parameters",
    "rope_scaling",
    "num_local_experts",
    "quantization_config",
]


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("any"))


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_config_loads_or_is_a_checkpoint_error(any_folder, changes):
    config = json.loads((EMBEDDED / "config.json").read_text())
    (any_folder / "config.json").write_text(json.dumps({**config, **changes}))
    try:
        load_model(any_folder)
    except CheckpointError as error:
        assert str(any_folder) in str(error)
