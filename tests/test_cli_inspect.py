"""`ktcore inspect`: what it says of GGUF files and of safetensors folders, and how."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gguf_models import embedded_metadata, embedded_tensors, entry, raw_gguf, tensor, write_gguf
from safetensors.torch import save_file
from test_gguf_file import HEADER, SOUND, mutated

from ktcore.cli import _run
from ktcore.cli._inspect import Stored, inspect
from ktcore.dispatch import probe
from ktcore.models import load_model
from ktcore.models.loading import EMBEDDED
from ktcore.weights import CheckpointError, GgufFile

pytest.importorskip("typer", reason="the commands need the cli extra")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Q4_0 with Q8_0 down matrices."""
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    return write_gguf(path, "Q4_0", kinds={"down_exps": "Q8_0"})


def as_json(capsys, *arguments: str) -> dict:
    assert _run(["inspect", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def by(rows: list[dict], name: str) -> dict[str, dict]:
    return {row[name]: row for row in rows}


def test_gguf_in_json(capsys, mixed):
    data = as_json(capsys, mixed)
    file = GgufFile(mixed)
    assert (data["kind"], data["architecture"]) == ("GGUF version 3", "qwen3moe")
    assert data["model_type"] == "qwen3_moe"
    assert data["files"] == [{"name": "mixed.gguf", "bytes": mixed.stat().st_size}]
    assert data["tensors"] == len(file.names())
    assert data["parameters"] == load_model(mixed).parameters
    sizes = [file.info(n).end - file.info(n).begin for n in file.names()]
    assert data["bytes"] == sum(sizes)
    for rows in (data["types"], data["kinds"]):
        assert sum(r["bytes"] for r in rows) == sum(sizes)
        assert sum(r["tensors"] for r in rows) == len(sizes)
        assert sum(r["parameters"] for r in rows) == data["parameters"]
    assert set(by(data["types"], "type")) == {"F32", "Q4_0", "Q8_0"}
    kinds = by(data["kinds"], "kind")
    assert set(kinds) == {"experts", "attention", "embeddings and head", "norms", "routers"}
    assert kinds["experts"]["tensors"] == 15 and kinds["norms"]["tensors"] == 21
    assert kinds["experts"]["parameters"] == 5 * 16 * 3 * 192 * 64
    assert data["experts"]["stored"] == [
        {"layers": 5, "gate_up": ["Q4_0"], "down": ["Q8_0"], "format": "q4_0",
         "down_format": "q8_0"}
    ]  # fmt: skip
    assert data["experts"]["num_experts"] == 16 and data["experts"]["top_k"] == 4
    assert data["experts"]["bytes_per_layer"] * 5 == kinds["experts"]["bytes"]
    [served] = data["backends"]
    assert served["decode"]["chosen"] and served["decode"]["request"]["down_format"] == "q8_0"
    assert served["prefill"]["request"]["hidden_size"] == 192
    assert data["loads"] == {"ok": True, "reason": None}
    assert data["tokenizer"] == {"kind": "gpt2, gpt-2", "tokens": 2048}
    assert data["chat_template"] is True
    assert data["metadata"]["qwen3moe.expert_count"] == 16
    assert data["metadata"]["tokenizer.ggml.tokens"][-1] == "... 2,040 more"
    assert "tensor_list" not in data


def test_tensors_are_listed_on_request(capsys, mixed):
    listed = by(as_json(capsys, mixed, "--tensors")["tensor_list"], "name")
    assert listed["blk.0.ffn_down_exps.weight"] == {
        "name": "blk.0.ffn_down_exps.weight", "type": "Q8_0", "shape": [16, 192, 64],
        "bytes": 16 * 192 * 2 * 34,
    }  # fmt: skip
    assert list(listed) == GgufFile(mixed).names()
    assert _run(["inspect", str(mixed), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in listed)


def test_folder_in_json(capsys):
    data = as_json(capsys, EMBEDDED)
    assert (data["kind"], data["architecture"]) == ("safetensors", "Qwen3MoeForCausalLM")
    assert data["parameters"] == 3_851_648 and data["bytes"] == 2 * 3_851_648
    kinds = by(data["kinds"], "kind")
    assert set(kinds) == {"experts", "attention", "embeddings and head", "norms", "routers"}
    assert kinds["experts"]["tensors"] == 5 * 16 * 3
    assert data["experts"]["stored"][0]["format"] == "bf16"
    assert data["backends"][0]["decode"]["request"]["down_format"] is None
    assert data["loads"]["ok"] and data["tokenizer"]["kind"] == "tokenizer.json"
    assert data["chat_template"] is False and data["metadata"]["num_experts"] == 16


def test_one_safetensors_file(capsys):
    data = as_json(capsys, EMBEDDED / "model.safetensors")
    assert data["parameters"] == 3_851_648 and data["architecture"] is None
    assert not data["loads"]["ok"] and "not a folder" in data["loads"]["reason"]


def test_folder_with_a_chat_template_and_a_scheme(capsys, tmp_path):
    config = json.loads((EMBEDDED / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    save_file(
        {
            "model.layers.0.mlp.experts.0.up_proj.qweight": torch.zeros(4, 8, dtype=torch.int32),
            "model.layers.0.mlp.experts.0.down_proj.qweight": torch.zeros(4, 8, dtype=torch.int32),
        },
        tmp_path / "model.safetensors",
    )
    data = as_json(capsys, tmp_path)
    assert data["quantization"] == "gptq" and data["parameters"] is None
    assert data["chat_template"] is True and not data["loads"]["ok"]
    assert data["backends"][0]["decode"] is None
    assert _run(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "quantised: gptq" in out and "cannot:" in out


def test_split_models_and_folders_of_them(capsys, tmp_path, mixed):
    write_gguf(tmp_path / "m.gguf", "Q4_0", kinds={"down_exps": "Q8_0"}, split_max_tensors=30)
    whole = as_json(capsys, mixed)
    for path in (tmp_path, tmp_path / "m-00002-of-00003.gguf"):
        data = as_json(capsys, path)
        assert len(data["files"]) == 3
        for name in ("tensors", "parameters", "bytes", "types", "kinds", "experts", "loads"):
            assert data[name] == whole[name]


def test_why_a_model_does_not_load(capsys, tmp_path):
    keys = embedded_metadata() | {"general.architecture": "llama"}
    tensors = dict(list(embedded_tensors().items())[:3])
    path = write_gguf(tmp_path / "m.gguf", metadata=keys, tensors=tensors)
    data = as_json(capsys, path)
    assert data["architecture"] == "llama" and data["model_type"] is None
    assert "'llama' is not supported" in data["loads"]["reason"]
    assert _run(["inspect", str(path)]) == 0
    assert "cannot:" in capsys.readouterr().out


@pytest.mark.parametrize(("available", "fits"), [(1 << 40, True), (1 << 20, False)])
def test_whether_it_fits(capsys, mixed, available, fits):
    machine = probe.machine()
    memory = replace(machine.memory, available_bytes=available)
    with probe.override(replace(machine, memory=memory)):
        data = as_json(capsys, mixed)
        assert data["memory"]["fits"] is fits
        assert data["bytes"] < data["memory"]["needed_bytes"] < 2 * data["bytes"]
        assert _run(["inspect", str(mixed)]) == 0
    assert ("does not fit" in capsys.readouterr().out) is not fits


def test_only_headers_are_read(tmp_path):
    """A file of 1 TiB (sparse) takes no more time or memory than a small one."""
    head = raw_gguf((), (tensor("blk.0.ffn_up_exps.weight", (2**20, 2**18), 0),), b"")
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + 2**40)
        except OSError as error:
            pytest.skip(f"no sparse file of 1 TiB here: {error}")
    data = inspect(path, False)
    assert data["bytes"] == 2**40 and not data["memory"]["fits"]


def test_at_80_columns_and_without_escapes(mixed):
    """Piped: no colours, no line beyond 80 columns but what a name or value itself takes."""
    done = subprocess.run(
        [sys.executable, "-m", "ktcore.cli", "inspect", str(mixed)],
        capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
        env={"PATH": "", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in ("qwen3moe", "3.85 M in 62 tensors", "16 a layer, 4 used", "q4_0 + q8_0 (5 layers)",
                 "fits", "loads it", "with a chat template", "Q8_0", "general.name"):  # fmt: skip
        assert part in done.stdout


def test_names_from_files_cannot_reach_the_terminal(capsys, tmp_path):
    path = tmp_path / "m.gguf"
    evil = "\x1b]0;owned\x07\u202e\n"
    path.write_bytes(
        raw_gguf(
            (entry("general.architecture", "str", evil), entry(evil, "str", f"[bold]{evil}")),
            (tensor(evil),),
        )
    )
    assert _run(["inspect", str(path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(out)
    assert "\\x1b" in out and "[bold]" in out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "experts"),
        ("blk.3.ffn_up_exps.weight", "experts"),
        ("blk.3.ffn_up_shexp.weight", "shared experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.3.mlp.gate.weight", "routers"),
        ("blk.3.ffn_gate_inp.weight", "routers"),
        ("blk.3.exp_probs_b.bias", "routers"),
        ("model.layers.3.mlp.gate_proj.weight", "dense MLPs"),
        ("blk.3.ffn_gate.weight", "dense MLPs"),
        ("blk.3.attn_norm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"),
        ("blk.3.attn_q.weight", "attention"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention"),
        ("token_embd.weight", "embeddings and head"),
        ("output.weight", "embeddings and head"),
        ("blk.3.attn_output.weight", "attention"),
        ("model.embed_tokens.weight", "embeddings and head"),
        ("lm_head.weight", "embeddings and head"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_what_a_tensor_is_for(name, kind):
    stored = Stored(name, "F32", (1,), 4, None)
    assert stored.kind == kind
    assert stored.layer == (3 if ".3." in name else None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "holds neither model.safetensors nor"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(40)), "is GGUF version 0"),
        (lambda p: p.write_bytes(b"what is this?"), "claims"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, make, message):
    path = tmp_path / "x"
    make(path)
    assert _run(["inspect", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {path}") and message in captured.err


def test_several_models_in_a_folder(capsys, tmp_path, mixed):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(mixed, tmp_path / name)
    assert _run(["inspect", str(tmp_path)]) == 1
    assert "several GGUF models, name one of them: a.gguf, b.gguf" in capsys.readouterr().err


def test_damaged_files(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # pytest shows it if this fails
    rng, path, read = random.Random(seed), tmp_path / "m.gguf", 0
    for i in range(400):
        path.write_bytes(mutated(rng, SOUND, HEADER))
        try:
            json.dumps(inspect(path, True), allow_nan=False)
            read += 1
        except CheckpointError as error:
            assert str(path) in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}, round {i}") from error
    assert read
