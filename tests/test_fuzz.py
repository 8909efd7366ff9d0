"""What the fuzzer ci/fuzz.py tries, in small, and what it has found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcore.models import generate, load_model
from ktcore.models.config import JsonFile
from ktcore.weights import Checkpoint, CheckpointError
from ktcore.weights.quantization import QuantizedCheckpoint

CI = Path(__file__).resolve().parent.parent / "ci"
sys.path.insert(0, str(CI))

import _fuzz_cases  # noqa: E402
import _fuzz_target  # noqa: E402

SOUND = _fuzz_target.sound_files()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_sound(name, folder):
    _fuzz_target.write(SOUND[name], folder)
    path = folder / sorted(SOUND[name])[0] if "gguf" in name else folder
    assert _fuzz_target.exercise_header(folder, path) == "loaded"


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 32), number=st.integers(0, 1 << 32))
def test_damaged_files(folder, seed, number):
    _, model, opened = _fuzz_cases.case(SOUND, seed, number)
    _fuzz_target.write(model, folder)
    assert _fuzz_target.exercise_header(folder, folder / opened) in ("loaded", "refused")


def test_cases_are_the_same_for_the_same_seed():
    cases = [[_fuzz_cases.case(SOUND, seed, i) for i in range(50)] for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2]


def test_a_file_in_parts_and_whole_again():
    content = SOUND["gguf"]["m.gguf"]
    assert _fuzz_cases.parse_gguf(content).content() == content


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--headers",)])
def test_fuzzer(options, tmp_path):
    command = (sys.executable, str(CI / "fuzz.py"), "--count", "2000", "--json", *options)
    done = subprocess.run(
        (*command, "--out", str(tmp_path), "--seed", str(time.time_ns() % (1 << 32))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    found = json.loads(done.stdout)
    assert found["cases"] == 2000
    assert found["outcomes"]["loaded"] > 100
    assert found["outcomes"]["refused"] > 1000


# -------------------------------------------------------------------------------- what was found


def refused(call, *what: str, longest: int = 1000) -> None:
    with pytest.raises(CheckpointError) as error:
        call()
    for text in what:
        assert text in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < longest


def write_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("name", ["\x1b[31m", "a\0b", "\ud800", "a\nb", "x" * 5000 + "/"])
def test_index_with_names_that_no_file_has(folder, name):
    index = folder / Checkpoint.INDEX
    index.write_text(json.dumps({"weight_map": {"t": name}}))
    refused(lambda: Checkpoint(folder), str(index), "bad file name")


@pytest.mark.parametrize("field", ["shape", "data_offsets", "dtype"])
@pytest.mark.parametrize("value", ["\x1b[31m", "\ud800", "x" * 100_000])
def test_texts_in_place_of_numbers(folder, field, value):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], field: value}
    path = write_header(folder / "a.safetensors", {"t": entry}, bytes(4))
    refused(lambda: Checkpoint(path), str(path), "'t'")


def test_a_name_without_end(folder):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = write_header(folder / "a.safetensors", {"t" * 1_000_000: entry}, bytes(4))
    refused(lambda: Checkpoint(path), str(path), "1000000 characters")


def test_the_last_of_many_names_appears_twice(folder):
    """In time that does not grow with the square of their number."""
    names = [*(f"t{i}" for i in range(200_000)), "t199999"]
    path = folder / "a.safetensors"
    text = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    begin = time.process_time()
    refused(lambda: Checkpoint(path), str(path), "'t199999' appears twice")
    assert time.process_time() - begin < 20  # squared, it would be minutes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["config.json", "shard.safetensors"])
def test_a_pipe_does_not_hang(folder, name):
    (folder / Checkpoint.INDEX).write_text(json.dumps({"weight_map": {"t": "shard.safetensors"}}))
    os.mkfifo(folder / name)
    read = JsonFile if name == "config.json" else lambda path: Checkpoint(path.parent)
    refused(lambda: read(folder / name), name, "is not a file")


def test_a_configuration_without_end(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: JsonFile(folder / "config.json"), "config.json", "damaged")


def opened(folder: Path, quantization: dict) -> QuantizedCheckpoint:
    """A layer m.proj of integers, and a quantization_config."""
    entry = {"dtype": "I8", "shape": [2, 32], "data_offsets": [0, 64]}
    write_header(folder / Checkpoint.SINGLE, {"m.proj.weight": entry}, bytes(64))
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    settings = JsonFile(folder / "config.json").inner("quantization_config")
    return QuantizedCheckpoint(Checkpoint(folder), settings)


@pytest.mark.parametrize(
    "pattern",
    ["(.|.)*x", "(a+)+x", "(?:.*)+x", ".*" * 20 + "x", "(.|.)" * 40 + "x", "a" * 2000, "(" * 900],
)
def test_patterns_that_would_take_for_ever(folder, pattern):
    found = opened(folder, {"quant_method": "fp8", "ignore": [f"re:{pattern}"]})
    refused(lambda: found.info("m.proj.weight"), "config.json", "ignore", "regular expression")


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:m\.(q|k|v|proj)$",
        "re:.*(attn|proj).*",
        r"re:(layers\.(" + "|".join(map(str, range(62))) + r")\.)?m[.*+|(].*",
    ],
)
def test_patterns_that_tools_write(folder, pattern):
    found = opened(folder, {"quant_method": "fp8", "ignore": [pattern]})
    refused(lambda: found.info("m.proj.weight"), "ignore", "although")


@pytest.mark.parametrize("name", ["\x1b[31m", "g" * 5000])
def test_odd_names_of_config_groups(folder, name):
    groups = {name: {"targets": ["Linear"], "weights": {"num_bits": "\x1b[31m"}}}
    found = opened(folder, {"quant_method": "compressed-tensors", "config_groups": groups})
    refused(lambda: found.info("m.proj.weight"), "config.json", "num_bits" if len(name) < 9 else "")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_no_numbers(temperature):
    """Not a token made of nothing, nor torch's error about probabilities."""
    model = load_model()
    model.decoder.norm.weight = torch.full_like(model.decoder.norm.weight, float("nan"))
    refused(
        lambda: list(generate(model, [1, 2], 2, temperature=temperature)), str(model.path), "finite"
    )
