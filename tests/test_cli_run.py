"""`ktcore run`: what it prints where, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ktcore
from ktcore import _native
from ktcore.cli import _run
from ktcore.cli.run import PROMPT
from ktcore.models import generate, load_model

pytest.importorskip("typer", reason="the commands need the cli extra")


@pytest.fixture(autouse=True)
def _torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_json(capsys, *arguments: str) -> dict:
    assert _run(["run", "--json", "-n", "8", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out)


def test_text_goes_to_stdout_and_statistics_to_stderr(capsys):
    assert _run(["run", "-n", "12", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    model = load_model()
    ids = model.tokenizer.encode(PROMPT)
    expected = model.tokenizer.decode([*ids, *generate(model, ids, 12)])
    assert captured.out == expected + "\n"
    for part in ("kjv-moe", "3.85 M weights", "bf16", "12 tokens", "decode", "prefill"):
        assert part in captured.err


def test_json_says_all_there_is_to_know(capsys):
    result = run_json(capsys, "--prompt", "In the beginning", "--seed", "7", "--format", "int4")
    assert result["prompt"] == "In the beginning"
    assert result["tokens"] == len(result["token_ids"]) == 8
    assert result["finish_reason"] == "length"
    assert load_model().tokenizer.decode(result["token_ids"]) == result["text"]
    assert result["model"]["expert_format"] == "int4_g32"
    assert result["model"]["parameters"] == 3_851_648
    assert result["settings"]["seed"] == 7
    for name in (
        "load_seconds",
        "time_to_first_token_seconds",
        "tokens_per_second",
        "prefill_tokens_per_second",
    ):
        assert result[name] > 0
    assert set(result["backends"]) == {"moe", "route", "linear"}
    assert set(result["backends"].values()) <= set(ktcore.dispatch.backends())
    assert result["machine"]["cpu"] and result["machine"]["threads"] >= 1
    assert "explanations" not in result and "compare" not in result
    again = run_json(capsys, "--prompt", "In the beginning", "--seed", "7", "--format", "int4")
    assert again["text"] == result["text"]


def test_a_fresh_seed_is_reported_and_repeats_the_text(capsys):
    first = run_json(capsys, "--temperature", "1")
    again = run_json(capsys, "--temperature", "1", "--seed", str(first["settings"]["seed"]))
    assert again["text"] == first["text"]


def test_backend_and_threads_are_forced(capsys):
    result = run_json(capsys, "--backend", "reference", "--threads", "3")
    assert set(result["backends"].values()) == {"reference"}
    assert result["machine"]["threads"] == (3 if _native.ext else 1)


def test_explain_names_choices_for_both_phases(capsys):
    assert _run(["run", "-n", "2", "--explain", "--format", "int8"]) == 0
    err = capsys.readouterr().err
    assert "decode" in err and "prefill" in err
    assert "moe int8, 1 token(s)" in err and "moe int8, 9 token(s)" in err
    assert "reference" in err and "chosen" in err


def test_explain_in_json(capsys):
    result = run_json(capsys, "--explain")
    assert set(result["explanations"]) == {"decode", "prefill"}
    for rows in result["explanations"].values():
        purposes = {row["for"]: row for row in rows}
        assert purposes["experts"]["request"]["op"] == "moe"
        assert purposes["experts"]["chosen"] == result["backends"]["moe"]
        names = {c["backend"] for c in purposes["experts"]["candidates"]}
        assert names == set(ktcore.dispatch.backends())


def test_compare_runs_the_reference_too(capsys):
    result = run_json(capsys, "--compare", "--temperature", "0")
    compared = result["compare"]
    assert compared["backend"] == "reference"
    assert compared["tokens"] == 8
    assert 1 <= compared["same_tokens"] <= 8
    ratio = result["tokens_per_second"] / compared["tokens_per_second"]
    assert compared["speedup"] == pytest.approx(ratio)
    assert _run(["run", "-n", "4", "--compare"]) == 0
    assert "plain PyTorch (reference): prefill" in capsys.readouterr().err
    assert _run(["run", "-n", "1", "--compare"]) == 0
    assert "too few tokens" in capsys.readouterr().err


def test_no_tokens(capsys):
    assert _run(["run", "-n", "0", "--prompt", "Amen."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Amen.\n"
    assert "0 tokens" in captured.err


def test_full_context_is_said(capsys):
    assert _run(["run", "-n", "9", "--prompt", "and " * 2046]) == 0
    assert "context is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["/no/such/folder"], 1, "error: /no/such/folder: no such folder"),
        (["--backend", "abacus"], 1, "there is no backend 'abacus'"),
        (["--format", "int3"], 2, "--format: unknown format 'int3'"),
        (["--top-p", "0"], 2, "--top-p"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--threads", "0"], 2, "--threads"),
        (["--prompt", ""], 2, "--prompt: expected text"),
        (["--prompt", "and " * 2100], 2, "do not fit"),
        (["--no-such-option"], 2, "No such option"),
    ],
)
def test_errors_are_one_line_and_a_status(capsys, arguments, status, message):
    assert _run(["run", *arguments]) == status
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", "").split())
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_missing_tokenizers_package_is_an_error_of_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert _run(["run"]) == 1
    assert capsys.readouterr().err.startswith("error: text needs the package tokenizers")


def test_command_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "ktcore.cli", "run", "--json", "-n", "3", "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 3
    assert done.stderr == ""
