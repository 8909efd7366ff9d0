"""Models from a .gguf file alone: weights, settings, tokenizer, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import (
    add_metadata,
    dequantized,
    embedded_metadata,
    embedded_tensors,
    package,
    stored_type,
    write_gguf,
)
from test_gguf_file import mutated

import ktcore
from ktcore.cli import _run
from ktcore.formats import get_format
from ktcore.models import generate, load_model, loading, perplexity
from ktcore.models.config import Yarn
from ktcore.models.loading import EMBEDDED
from ktcore.testing.cases import inputs
from ktcore.weights import CheckpointError, GgufFile

KINDS = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q4_0")
# Largest relative difference of perplexity to bf16's, by the type of all matrices: what the types
# lose, not the kernels. Measured, on every backend alike: 0, 0, 0, -1.0e-3, -2e-4, 5.1e-3.
PERPLEXITY = dict(zip(KINDS, (1e-5, 1e-5, 1e-5, 3e-3, 3e-3, 0.015), strict=True))
# Where bf16 experts round their activations to bf16, as those of f32 and f16 do not.
ROUNDED = 2e-3
INTEGERS = 1e-4  # where they multiply as integers of 16 bits: measured 3e-5
EXACT = 1e-4  # of logits, where only the order of float32 sums may differ
# Where integer weights meet activations of 16 bits: 5e-5 of a layer's experts, measured 0.9e-4 to
# 1.04e-4 of the logits over the instruction sets.
SIXTEEN_BITS = 2e-4
IDS = torch.tensor([1, 5, 300, 2, 77, 1024, 2047, 0, 9, 9])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The embedded model in a type, written when first asked for."""
    folder = tmp_path_factory.mktemp("gguf")

    def file(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        return path if path.exists() else write_gguf(path, kind)

    return file


@pytest.fixture(scope="module")
def heldout() -> list[int]:
    text = (EMBEDDED / "heldout.txt").read_text("utf-8")
    return load_model().tokenizer.encode(text[:8000])


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_near_that_of_bf16(files, heldout, kind):
    expected = perplexity(load_model(), heldout, 256)
    model = load_model(files(kind))
    assert model.expert_format is get_format(kind.lower())
    allowed = PERPLEXITY[kind]
    config = model.config
    chosen = ktcore.explain(
        "moe",
        format="bf16",
        tokens=256,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
    ).chosen
    if kind in ("F32", "F16") and inputs.rounds_to_bf16(chosen):
        allowed = ROUNDED
    elif kind in ("F32", "F16") and inputs.floats_as_integers(chosen):
        allowed = INTEGERS
    assert perplexity(model, heldout, 256) == pytest.approx(expected, rel=allowed)


def test_bf16_gives_the_numbers_of_the_folder(files):
    model, folder = load_model(files("BF16")), load_model()
    assert torch.equal(model(IDS), folder(IDS))
    # The file holds it in float32.
    assert model.config.rms_norm_eps == pytest.approx(1e-6)
    assert replace(model.config, rms_norm_eps=1e-6) == folder.config
    assert (model.name, model.model_type) == ("BF16", "qwen3_moe")
    assert model.parameters == folder.parameters
    assert model.eos_token_ids == folder.eos_token_ids == frozenset({0})
    assert model.chat_template == "{{ messages[0].content }}" and folder.chat_template is None


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_logits_are_those_of_the_dequantised_weights(tmp_path, files, kind):
    """Against the same stored numbers, dequantised by llama.cpp's package, in float32."""
    plain = {
        name: tensor if stored_type(name, tensor, kind) == "F32" else dequantized(tensor, kind)
        for name, tensor in embedded_tensors().items()
    }
    expected = load_model(write_gguf(tmp_path / "plain.gguf", "F32", tensors=plain))(IDS)
    assert relative(load_model(files(kind))(IDS), expected) < EXACT
    unquantised = load_model(files("F32"))(IDS)
    assert relative(unquantised, expected) > 10 * EXACT  # else this shows nothing


def test_types_may_be_mixed(tmp_path):
    """As llama.cpp's recipes do: v and down in more bits, the head apart from the embedding."""
    kinds = {"down_exps": "Q8_0", "attn_v": "Q5_1", "output.weight": "Q8_0", "attn_q.": "BF16"}
    tensors = embedded_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"].flip(1).contiguous()
    model = load_model(write_gguf(tmp_path / "m.gguf", "Q4_0", kinds=kinds, tensors=tensors))
    assert model.expert_formats == ["q4_0", "q8_0"]
    experts = model.decoder.layers[0].mlp.experts
    assert (experts.format.name, experts.down_format.name) == ("q4_0", "q8_0")
    wanted = {
        name: next((k for part, k in kinds.items() if part in name), "Q4_0") for name in tensors
    }
    plain = {
        name: tensor
        if stored_type(name, tensor, wanted[name]) == "F32"
        else dequantized(tensor, wanted[name])
        for name, tensor in tensors.items()
    }
    expected = load_model(write_gguf(tmp_path / "plain.gguf", "F32", tensors=plain))(IDS)
    assert relative(model(IDS), expected) < SIXTEEN_BITS


def _random_model(hidden: int = 256, vocab: int = 320) -> tuple[dict, dict[str, Any]]:
    """Tensors and keys of a small model whose rows are whole blocks of k-quants."""
    torch.manual_seed(0)
    experts, inner, heads, head_dim = 4, 256, 4, 64
    tensors = {
        "token_embd.weight": torch.randn(vocab, hidden),
        "output_norm.weight": torch.ones(hidden),
    }
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_norm.weight": torch.ones(hidden),
            f"blk.{i}.ffn_norm.weight": torch.ones(hidden),
            f"blk.{i}.attn_q_norm.weight": torch.ones(head_dim),
            f"blk.{i}.attn_k_norm.weight": torch.ones(head_dim),
            f"blk.{i}.attn_q.weight": torch.randn(heads * head_dim, hidden) / 16,
            f"blk.{i}.attn_k.weight": torch.randn(2 * head_dim, hidden) / 16,
            f"blk.{i}.attn_v.weight": torch.randn(2 * head_dim, hidden) / 16,
            f"blk.{i}.attn_output.weight": torch.randn(hidden, heads * head_dim) / 16,
            f"blk.{i}.ffn_gate_inp.weight": torch.randn(experts, hidden) / 16,
            f"blk.{i}.ffn_gate_exps.weight": torch.randn(experts, inner, hidden) / 16,
            f"blk.{i}.ffn_up_exps.weight": torch.randn(experts, inner, hidden) / 16,
            f"blk.{i}.ffn_down_exps.weight": torch.randn(experts, hidden, inner) / 16,
        }
    keys = {
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": 2,
        "qwen3moe.embedding_length": hidden,
        "qwen3moe.attention.head_count": heads,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": head_dim,
        "qwen3moe.expert_count": experts,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": inner,
    }
    return tensors, keys


def test_k_quants_as_in_q4_k_m(tmp_path):
    """Q4_K with Q6_K for v, down and the head, against llama.cpp's dequantised weights."""
    gguf = package()
    tensors, keys = _random_model()
    writer = gguf.GGUFWriter(str(tmp_path / "k.gguf"), "qwen3moe")
    add_metadata(writer, keys)
    plain = {}
    for name, tensor in tensors.items():
        kind = "Q6_K" if any(p in name for p in ("attn_v", "down", "token_embd")) else "Q4_K"
        kind = stored_type(name, tensor, kind)
        number = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            data, plain[name] = tensor.numpy(), tensor
        else:
            data = get_format(kind.lower()).quantize(tensor)["data"].numpy()
            found = gguf.quants.dequantize(data, number)
            plain[name] = torch.from_numpy(np.ascontiguousarray(found))
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_model(tmp_path / "k.gguf")
    assert model.expert_formats == ["q4_k", "q6_k"]
    ids = torch.arange(0, 300, 23)
    expected = load_model(write_gguf(tmp_path / "plain.gguf", "F32", metadata=keys, tensors=plain))(
        ids
    )
    assert relative(model(ids), expected) < EXACT


@pytest.mark.parametrize("release", [False, True])
def test_released_or_not(files, release):
    model = load_model(files("Q8_0"), release=release)
    assert torch.equal(model(IDS), load_model(files("Q8_0"))(IDS))
    with pytest.raises(IndexError):
        model(torch.tensor([2048]))


def test_experts_are_quantised_anew_on_request(files):
    expected = load_model(format="int4")(IDS)
    model = load_model(files("BF16"), "int4")
    assert model.expert_formats == ["int4_g32"]
    assert torch.equal(model(IDS), expected)
    from_q8 = load_model(files("Q8_0"), "int4")
    assert 0 < relative(from_q8(IDS), expected) < 0.2
    same = load_model(files("Q8_0"), "q8_0")
    assert torch.equal(same(IDS), load_model(files("Q8_0"))(IDS))


def test_gate_and_up_of_different_types(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "Q4_0", kinds={"up_exps": "Q8_0"})
    with pytest.raises(CheckpointError, match=r"gate_exps\.weight' is Q4_0, but .* is Q8_0"):
        load_model(path)
    assert load_model(path, "int8").expert_formats == ["int8"]


def test_a_split_model_is_one_model(tmp_path, files):
    write_gguf(tmp_path / "m.gguf", "Q8_0", split_max_tensors=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 7
    expected = load_model(files("Q8_0"))(IDS)
    for path in (parts[0], parts[3], tmp_path):  # the folder holds one model
        assert torch.equal(load_model(path)(IDS), expected)


# ---------------------------------------------------------------------------------- tokenizers

TEXTS = ["", " ", "In the beginning\n\n", "  two  spaces ", "Größe ✓ 12345", "<|endoftext|>amen",
         "I'll don't WE'VE", "a\r\nb\tc", "日本語 🎉"]  # fmt: skip


def test_tokenizer_is_that_of_tokenizer_json(files):
    ours, theirs = load_model(files("BF16")).tokenizer, load_model().tokenizer
    text = (EMBEDDED / "heldout.txt").read_text("utf-8")
    for part in (*TEXTS, text):
        ids = theirs.encode(part)
        assert ours.encode(part) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def keyed(path: Path, **changes: Any) -> Path:
    """A file with the embedded model's tensors and other keys; None leaves a key out."""
    keys = embedded_metadata() | {name.replace("__", "."): v for name, v in changes.items()}
    return write_gguf(path, metadata={name: v for name, v in keys.items() if v is not None})


@pytest.mark.parametrize(("rule", "digits"), [("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}")])
def test_pre_tokenizers_cut_as_the_published_patterns(tmp_path, rule, digits):
    tokenizers = pytest.importorskip("tokenizers")
    path = keyed(tmp_path / "m.gguf", tokenizer__ggml__pre=rule)
    # As in Qwen3's and Llama 3's tokenizer.json.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    document = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False},
        ],
    }  # fmt: skip
    document["normalizer"] = {"type": "NFC"} if rule == "qwen2" else None
    document["model"]["ignore_merges"] = rule == "llama-bpe"
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = load_model(path).tokenizer
    for part in (*TEXTS, "e\u0301", (EMBEDDED / "heldout.txt").read_text("utf-8")[:5000]):
        assert ours.encode(part) == theirs.encode(part).ids


def test_begin_and_end_are_added_if_the_file_says_so(tmp_path):
    plain = load_model().tokenizer.encode("Amen.")
    path = keyed(tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=True,
                 tokenizer__ggml__bos_token_id=7)  # fmt: skip
    assert load_model(path).tokenizer.encode("Amen.") == [7, *plain]
    path = keyed(tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=True,
                 tokenizer__ggml__add_eos_token=True)  # fmt: skip
    assert load_model(path).tokenizer.encode("Amen.") == [0, *plain, 0]


def test_tokens_of_the_users_and_ends_by_name(tmp_path):
    keys = embedded_metadata()
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    tokens[2046:], types[2046:] = ["<think>", "<|im_end|>"], [4, 3]
    merges = [m for m in keys["tokenizer.ggml.merges"] if m.replace(" ", "") in tokens]
    keys |= {"tokenizer.ggml.merges": merges, "tokenizer.ggml.eot_token_id": 5}
    model = load_model(write_gguf(tmp_path / "m.gguf", metadata=keys))
    assert model.eos_token_ids == {0, 5, 2047}
    ids = model.tokenizer.encode("a<think>b<|im_end|>")
    assert ids[1] == 2046 and ids[3] == 2047
    assert model.tokenizer.decode(ids) == "a<think>b"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model: 'llama' is not supported"),
        ({"model": "t5"}, "'t5' is not supported"),
        ({"model": None}, "tokenizer.ggml.model: missing"),
        ({"pre": "chatglm-bpe"}, "tokenizer.ggml.pre: 'chatglm-bpe' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre: missing"),
        ({"tokens": None}, "tokens: expected a list of strings"),
        ({"tokens": [1, 2]}, "tokens: expected a list of strings"),
        ({"tokens": ["a", "b", "a"]}, "tokens: 'a' appears twice"),
        ({"tokens": [str(i) for i in range(2049)]}, "2049 tokens, but the model knows 2048"),
        ({"merges": None}, "merges: expected"),
        ({"merges": ["t h", "th"]}, "merge 1, 'th', is not one of two tokens"),
        ({"merges": ["t zzzz"]}, "merge 0, 't zzzz'"),
        ({"token_type": [1, 2]}, "token_type: expected a list of 2048"),
        ({"add_bos_token": True, "bos_token_id": 5000}, "bos_token_id: expected an integer"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id: missing"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, changes, what):
    """The model loads all the same: token ids need no tokenizer."""
    named = {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
    model = load_model(keyed(tmp_path / "m.gguf", **named))
    assert model(IDS[:1]).shape == (1, 2048)
    with pytest.raises(CheckpointError) as raised:
        _ = model.tokenizer
    assert what in str(raised.value) and str(raised.value).startswith(str(tmp_path / "m.gguf"))


def test_yarn(tmp_path):
    """llama.cpp multiplies what the factor asks for by what the file states."""
    prefix = "qwen3moe__rope__scaling__"
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 512, "attn_factor": 1.25}
    path = keyed(tmp_path / "m.gguf", **{f"{prefix}{k}": v for k, v in keys.items()})
    config = load_model(path).config
    assert config.yarn == Yarn(4.0, 512, 1.25 * (0.1 * math.log(4) + 1))
    assert config.context_length == 2048
    keys = {f"{prefix}{k}": v for k, v in {**keys, "yarn_ext_factor": 0.5}.items()}
    with pytest.raises(CheckpointError, match=r"rope.scaling.yarn_ext_factor: only 1"):
        load_model(keyed(tmp_path / "n.gguf", **keys))


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"general__architecture": "llama"}, "'llama' is not supported; supported: qwen3moe"),
        ({"qwen3moe__block_count": None}, "qwen3moe.block_count: missing"),
        ({"qwen3moe__block_count": "five"}, "qwen3moe.block_count: expected an integer"),
        ({"qwen3moe__block_count": 6}, "lacks the tensor 'blk.5."),
        ({"qwen3moe__embedding_length": 191}, "'token_embd.weight' has shape [2048, 192]"),
        ({"qwen3moe__attention__head_count": [6] * 5}, "head_count: expected an integer"),
        ({"qwen3moe__attention__head_count_kv": 4}, "expected a divisor"),
        ({"qwen3moe__attention__key_length": 33}, "expected an even number"),
        ({"qwen3moe__attention__value_length": 64}, "attention.value_length: expected"),
        ({"qwen3moe__rope__dimension_count": 16}, "rope.dimension_count: expected"),
        ({"qwen3moe__rope__scaling__type": "linear"}, "'linear' is not supported"),
        ({"qwen3moe__rope__scaling__type": "yarn"}, "rope.scaling.factor: missing"),
        ({"qwen3moe__rope__freq_base": -1.0}, "expected a positive number"),
        ({"qwen3moe__rope__freq_base": float("nan")}, "expected a positive number"),
        ({"qwen3moe__expert_count": 0}, "expert_count: expected an integer from 1"),
        ({"qwen3moe__expert_count": 8}, "but its metadata makes it [8, 192]"),
        ({"qwen3moe__expert_used_count": 17}, "expert_used_count: expected an integer from 1 to"),
        ({"qwen3moe__expert_feed_forward_length": 2**31}, "makes it [16, 2147483648, 192]"),
        ({"tokenizer__ggml__eos_token_id": "x"}, "eos_token_id: expected an integer"),
    ],
)
def test_settings_that_are_refused(tmp_path, changes, what):
    path = keyed(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    assert what in str(raised.value) and str(raised.value).startswith(str(path))
    assert loading.why_not_loadable(path) == str(raised.value)


def test_a_tensor_of_an_unsupported_type(tmp_path):
    tensors = embedded_tensors()
    gguf = package()
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen3moe")
    add_metadata(writer, embedded_metadata())
    for name, t in tensors.items():
        whole = name == "output_norm.weight"
        writer.add_tensor(name, t.to(torch.int32).numpy() if whole else t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' is torch\.int32, expected"):
        load_model(tmp_path / "m.gguf")


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="too short for a GGUF file"):
        load_model(tmp_path / "x.gguf")
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="nor a GGUF file"):
        load_model(tmp_path / "x")


def test_a_file_is_known_by_its_first_bytes(files, tmp_path):
    path = tmp_path / "sha256-0123"
    path.write_bytes(files("BF16").read_bytes())
    assert torch.equal(load_model(path)(IDS), load_model()(IDS))


# ------------------------------------------------------------------------------- ktcore run


def test_run_needs_nothing_but_the_file(files, capsys):
    assert _run(["run", str(files("BF16")), "-n", "12", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    model = load_model()
    ids = model.tokenizer.encode("And it came to pass in those days,")
    assert captured.out == model.tokenizer.decode([*ids, *generate(model, ids, 12)]) + "\n"
    assert "BF16: 3.85 M weights, bf16 experts" in captured.err


def test_run_says_what_is_wrong_in_one_line(tmp_path, capsys):
    path = keyed(tmp_path / "m.gguf", general__architecture="llama")
    assert _run(["run", str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: general.architecture: 'llama'") and err.count("\n") == 1


# ----------------------------------------------------------------------------- damaged by chance


def _load_damaged(path: Path, rounds: int, seed: int) -> None:
    """Whole loads, tokenizer included, of a small model whose header is damaged."""
    print(f"seed {seed}")  # pytest shows it if this fails
    tensors, keys = _random_model(hidden=64, vocab=96)
    tensors = {n: t[..., :64] if "attn_output" not in n else t for n, t in tensors.items()}
    tensors = {n: t[..., :64, :] if "down" in n else t for n, t in tensors.items()}
    keys["qwen3moe.embedding_length"] = 64
    tokens = [chr(i) for i in range(33, 126)] + ["ab", "<|endoftext|>"]
    keys |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 94,
        "tokenizer.ggml.add_bos_token": True,
    }
    sizes = {"down": (4, 64, 64), "gate_exps": (4, 64, 64), "up_exps": (4, 64, 64)}
    for name in tensors:
        size = next((s for part, s in sizes.items() if part in name), None)
        tensors[name] = (torch.randn(size) if size else tensors[name]).contiguous()
        if "attn_output" in name:
            tensors[name] = torch.randn(64, 256)
    keys["qwen3moe.expert_feed_forward_length"] = 64
    tensors["output_norm.weight"] = torch.ones(64)
    write_gguf(path, "Q8_0", metadata=keys, tensors=tensors)
    assert load_model(path).tokenizer.encode("ab") == [94, 93]
    content = path.read_bytes()
    header = min(info.begin for info in map(GgufFile(path).info, GgufFile(path).names()))
    rng = random.Random(seed)
    loaded = 0
    for i in range(rounds):
        damaged = mutated(rng, content, header)
        path.write_bytes(damaged)
        try:
            model = load_model(path)
            model(torch.tensor([1, 2]))
            model.tokenizer.decode(model.tokenizer.encode("ab c"))
            loaded += 1
        except CheckpointError as error:
            assert str(path) in str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, round {i}") from error
    assert 0 < loaded < rounds


def test_damaged_models(tmp_path):
    _load_damaged(tmp_path / "m.gguf", 150, random.SystemRandom().randrange(1 << 32))


@pytest.mark.slow
def test_damaged_models_long(tmp_path):
    _load_damaged(tmp_path / "m.gguf", 5000, random.SystemRandom().randrange(1 << 32))
