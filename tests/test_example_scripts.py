"""The scripts in examples/ that have no test file of their own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gguf_models import embedded_metadata, embedded_tensors, package, write_gguf

import ktcore
from ktcore import _native
from ktcore.bench import report
from ktcore.bench.measure import Bench, Settings
from ktcore.bench.presets import Shape
from ktcore.formats import get_format
from ktcore.models import generate, load_model
from ktcore.weights import GgufFile

pytest.importorskip("typer")
needs_extension = pytest.mark.skipif(_native.ext is None, reason=str(_native.why))
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IDS = torch.tensor([1, 5, 300, 2, 77, 1024, 2047, 0, 9, 9])


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look it up.
    __import__("sys").modules[name] = module
    spec.loader.exec_module(module)
    return module


perplexity_table, random_model = script("perplexity_table"), script("random_model")
peer_table, activation_bits = script("peer_table"), script("activation_bits")
model_speed = script("model_speed")
attention_speed = script("attention_speed")
token_profile, thread_scaling = script("token_profile"), script("thread_scaling")
prefetch_distance = script("prefetch_distance")  # after that whose layer it takes

# -------------------------------------------------------------------------------- perplexity table


def test_the_widened_model_computes_the_same(tmp_path):
    package()
    tensors, keys = perplexity_table.widened(embedded_tensors(), embedded_metadata())
    assert all(t.shape[-1] % 256 == 0 for t in tensors.values() if t.dim() > 1)
    path = tmp_path / "wide.gguf"
    perplexity_table.write(path, tensors, keys, get_format("f32"))
    wide, plain = load_model(path), load_model(write_gguf(tmp_path / "plain.gguf", "F32"))
    assert (wide.config.hidden_size, wide.config.num_attention_heads) == (256, 8)
    # (Rounded to float16, keys and values of other sizes would differ by more.)
    got, expected = (model(IDS, model.new_cache(torch.float32)) for model in (wide, plain))
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


def test_experts_alone_are_in_the_format(tmp_path):
    package()
    tensors, keys = perplexity_table.widened(embedded_tensors(), embedded_metadata())
    perplexity_table.write(tmp_path / "m.gguf", tensors, keys, get_format("q4_0"))
    file = GgufFile(tmp_path / "m.gguf")
    kinds = {name: file.info(name).type.name for name in file.names()}
    assert {k for n, k in kinds.items() if "_exps" in n} == {"Q4_0"}
    assert {k for n, k in kinds.items() if "_exps" not in n} == {"F32"}


@pytest.mark.parametrize("name", ["awq4_g32", "gptq4_g128_sym_act", "gptq3_g128"])
def test_formats_of_others_are_rounded_to(tmp_path, name):
    plain = write_gguf(tmp_path / "plain.gguf", "F32")
    got, expected = perplexity_table.rounded(plain, get_format(name))(IDS), load_model(plain)(IDS)
    assert 1e-4 < ((got - expected).norm() / expected.norm()).item() < 0.5


def test_which_formats_a_file_can_hold():
    package()
    held = {n for n in ("bf16", "q4_k", "gguf_mxfp4", "mxfp4", "nvfp4", "int8", "int4", "tq1_0")
            if perplexity_table.is_file_type(get_format(n))}  # fmt: skip
    assert held == {"bf16", "q4_k", "gguf_mxfp4", "tq1_0"}


def test_what_llama_perplexity_prints():
    assert perplexity_table.estimate("x\nFinal estimate: PPL = 19.0147 +/- 0.31\n") == 19.0147
    assert perplexity_table.estimate("[29]26.3455,[30]26.1773,") is None  # lost what followed


def test_the_perplexity_table():
    found = [
        {"name": "bf16", "kind": "format", "bits": 16.0, "ktcore": 20.0, "llama_cpp": 20.5,
         "note": ""},
        {"name": "int8", "kind": "format", "bits": 8.0, "ktcore": 20.1, "llama_cpp": None,
         "note": ""},
        {"name": "Q4_K_M", "kind": "mixture", "bits": 4.9, "ktcore": 21.0, "llama_cpp": 21.1,
         "note": ""},
    ]  # fmt: skip
    lines = perplexity_table.markdown(found, [get_format(n) for n in ("bf16", "int8", "q4_0")])
    assert "| `bf16` | 16.00 | 20.0000 | +0.00 % | 20.5000 | -0.5000 |  |" in lines
    assert "| `int8` | 8.00 | 20.1000 | +0.50 % | — | — |  |" in lines
    assert "| `q4_0` | 4.50 | not run |  |  |  |  |" in lines
    assert "| `Q4_K_M` | 4.90 | 21.0000 | +5.00 % | 21.1000 | -0.1000 |  |" in lines
    assert "| `Q2_K` |  | not run |" in lines


# ----------------------------------------------------------------------------------- random model

SMALL = Shape(256, 256, 4, 2)


@pytest.fixture
def small(monkeypatch):
    package()
    for name, value in {"VOCABULARY": 2100, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64}.items():
        monkeypatch.setattr(random_model, name, value)


def silent(*_: object) -> None:
    pass


def test_a_random_gguf_loads_and_generates(small, tmp_path):
    path = tmp_path / "m.gguf"
    random_model.write_gguf(path, SMALL, 3, silent)
    file = GgufFile(path)
    kinds = [file.info(f"blk.{i}.ffn_down_exps.weight").type.name for i in range(3)]
    assert kinds == ["Q4_K", "Q4_K", "Q6_K"]
    assert file.info("output.weight").type.name == "Q6_K"
    model = load_model(path)
    assert model.config.vocab_size == 2100 and not model.config.tie_word_embeddings
    assert model.tokenizer.decode([2099]) == "<unused2099>"
    logits = model(torch.arange(5))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert len(list(generate(model, model.tokenizer.encode("And"), 4))) <= 4


def test_a_random_folder_loads_and_generates(small, tmp_path):
    folder = tmp_path / "m"
    random_model.write_folder(folder, SMALL, 2, silent)
    model = load_model(folder)
    assert model.expert_formats == ["int4_g32"]
    assert model.tokenizer.decode([2099]) == "<unused2099>"
    logits = model(torch.arange(5))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    with pytest.raises(random_model.Refused, match="exists"):
        random_model.write_folder(folder, SMALL, 2, silent)


def test_q4_k_m_of_48_layers_is_llama_cpps():
    more = [i for i in range(48) if random_model.more_bits(i, 48)]
    # As llama-quantize chooses for a model of 48 layers.
    assert more == [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41,
                    42, 43, 44, 45, 46, 47]  # fmt: skip


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_failed_write_leaves_nothing(small, tmp_path, monkeypatch, kind):
    def fail(self, matrix):
        raise OSError("no luck")

    monkeypatch.setattr(random_model.Contents, "parts", fail)
    write = random_model.write_gguf if kind == "gguf" else random_model.write_folder
    with pytest.raises(OSError, match="no luck"):
        write(tmp_path / "m.gguf", SMALL, 2, silent)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_beforehand(small, tmp_path, monkeypatch):
    with pytest.raises(random_model.Refused, match="--model: its sizes do not fit"):
        random_model.write_gguf(tmp_path / "m.gguf", Shape(192, 64, 4, 2), 2, silent)
    monkeypatch.setattr(random_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(random_model.Refused, match=r"0\.0 GB are free"):
        random_model.write_folder(tmp_path / "m", SMALL, 2, silent)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ tables of others


@pytest.mark.parametrize(
    ("backend", "format", "tokens", "read", "peak", "ahead", "letters"),
    [
        ("avx512", "int4_g32", 1, 0.92, 0.01, 1.0, ""),
        ("avx512", "int4_g32", 1, 0.91, 0.01, 0.99, "a e"),
        ("avx2", "int4_g32", 1, 0.91, 0.01, 1.0, ""),
        ("avx512", "q5_k", 1, 0.80, 0.01, 1.2, ""),
        ("avx512", "iq2_xs", 1, 0.59, 0.01, 1.2, "a"),
        ("avx512", "int8", 16, 0.85, 0.2, 1.49, "e"),
        ("avx512", "int8", 64, 0.6, 0.2, None, "b"),
        ("avx512", "int8", 512, 0.02, 0.74, 1.6, "c"),
        ("avx512", "int8", 512, 0.02, 0.74, 1.4, "c"),
        ("avx2", "int8", 512, 0.02, 0.74, 1.6, ""),
        ("avx512", "fp8_e4m3", 512, 0.02, 0.75, None, ""),
        ("avx512", "bf16", 512, 0.02, 0.8, 1.4, "d"),
    ],
)
def test_a_missed_goal_has_a_reason(backend, format, tokens, read, peak, ahead, letters):
    cell = {"format": format, "tokens": tokens, "backend": backend}
    cell |= {"read_fraction": {"median": read}, "peak_fraction": {"median": peak}}
    lead = None if ahead is None else {"ratio": ahead}
    assert peer_table.short(cell, lead) == letters
    assert peer_table.short(cell | {"read_fraction": None}, lead) == ""


def test_the_table_of_peers_says_what_a_benchmark_found(tmp_path):
    settings = Settings(
        Shape(64, 32, 8, 2), tokens=(1, 5), seconds=20, backends=("reference",),
        formats=("bf16", "int8"), peers=("torch",),
    )  # fmt: skip
    bench = Bench(settings)
    bench.run()
    run = json.loads(json.dumps(report.to_dict(bench, None)))
    text = "\n".join(peer_table.section(tmp_path / "peers-here.json", run))
    cells = {c.format: c for c in bench.cells if c.backend == "reference" and c.tokens == 5}
    for format, cell in cells.items():
        ms = peer_table.number(sorted(r.ms for r in cell.rounds)[len(cell.rounds) // 2])
        assert f"| `{format}` | 5 | {ms} |" in text
    (first, second) = report.leads(bench.cells)
    assert f" {first.ratio:.2f} |" in text and f" {second.ratio:.2f} |" in text
    assert "benchmarks/peers-here.png" in text
    assert "| 92%, 1.0 |" in text and "| 85%, 1.5 |" in text
    peer_table.plot(tmp_path / "peers-here.png", run)
    assert (tmp_path / "peers-here.png").stat().st_size > 1000


def test_sixteen_bits_cost_what_the_numeric_contract_calls_exact():
    g = torch.Generator().manual_seed(1)
    shapes = ((4, 64), (32, 64), (32, 64), (64, 32))
    found = activation_bits.errors(
        *(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    )
    assert found["16 bits, groups of 32"] < 5e-4 < found["8 bits centred, groups of 16"]
    assert found["8 bits centred, groups of 16"] < found["8 bits, groups of 32"]


def test_model_speed_measures_a_model(tmp_path):
    ours = model_speed.Ours(write_gguf(tmp_path / "plain.gguf", "Q8_0"))
    for _ in range(2):  # the second time the cache is filled
        speeds = ours.round(prompt=20, generate=3, depth=40)
        assert set(speeds) == {"pp", "tg"} and min(speeds.values()) > 0
    assert ours.caches[40].length == 44
    c = ours.model.config
    cached = 2 * 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers
    assert ours.bytes_per_token(40) - ours.bytes_per_token(0) == 40 * cached
    assert 0 < ours.bytes_per_token(0) < 4 * ours.model.parameters


@needs_extension
def test_a_token_is_taken_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_profile, "TOKENS", 2)
    monkeypatch.setattr(_native.ext, "measure_read_bandwidth", lambda threads, size: 12.5)
    before = torch.get_num_threads(), ktcore.get_num_threads()
    try:
        path = write_gguf(tmp_path / "m.gguf", "Q8_0")
        token_profile.main(path, depth=3, threads=[1, 2])
    finally:
        torch.set_num_threads(before[0])
        ktcore.set_num_threads(before[1])
    printed = capsys.readouterr().out
    layers = load_model(path).config.num_hidden_layers
    assert f"| moe | {layers} |" in printed and f"| attention | {layers} |" in printed
    assert "2 threads, after 3 positions" in printed and "12.5 GB/s" in printed


@needs_extension
def test_threads_are_compared(monkeypatch, capsys):
    for name, value in {"HIDDEN": 64, "INTERMEDIATE": 64, "EXPERTS": 16}.items():
        monkeypatch.setattr(thread_scaling, name, value)
    monkeypatch.setattr(_native.ext, "measure_read_bandwidth", lambda threads, size: 12.5)
    before = ktcore.get_num_threads()
    try:
        thread_scaling.main(format=["int8"], tokens=[1, 4], threads=[1, 2], seconds=0.0)
    finally:
        ktcore.set_num_threads(before)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| int8")]
    assert [row.split("|")[2].strip() for row in rows] == ["1", "4"]
    assert all(row.count("%") == 2 for row in rows)


@needs_extension
@pytest.mark.parametrize("pages", ["float16", "float32"])
def test_attention_is_compared(pages, capsys):
    attention_speed.main(depth=[40], tokens=[1, 3], pages=pages, rounds=1, seconds=0.0)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[2].strip() for row in rows] == ["1", "3"]
    ours = ktcore.explain("attention").chosen
    assert f" {ours} " in head and "reference" not in head
    assert all(row.count("(") == head.count("|") - 3 for row in rows)


@needs_extension
def test_prefetch_distances_are_compared(monkeypatch, capsys):
    for name, value in {"HIDDEN": 64, "INTERMEDIATE": 64, "EXPERTS": 16}.items():
        monkeypatch.setattr(thread_scaling, name, value)
    monkeypatch.setattr(prefetch_distance, "HIDDEN", 64)
    monkeypatch.setattr(prefetch_distance, "EXPERTS", 16)
    asked = []
    set_prefetch = _native.ext.set_prefetch
    monkeypatch.setattr(_native.ext, "set_prefetch", lambda *d: asked.append(d) or set_prefetch(*d))
    prefetch_distance.main(format=["int8"], distance=["0,0,1", "64,128,2"], tokens=2, rounds=2)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| int8 |") and row.count("(") == 2
    assert asked == [(0, 0, 1), (64, 128, 2)] * 2 + [(-1, -1, -1)]  # and what is best is back
