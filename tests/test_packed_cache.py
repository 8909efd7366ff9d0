"""The packed-weight cache: what a second start reads, and what may not go wrong with its file."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_models import write_gguf
from safetensors.torch import load_file, save_file

import ktcore
from ktcore import _native
from ktcore.cli import _run
from ktcore.models import load_model, loading, packing, projection
from ktcore.models.expert_layout import PER_EXPERT
from ktcore.models.loading import EMBEDDED
from ktcore.models.source import open_source
from ktcore.weights import Checkpoint, GgufFile, packed_cache
from ktcore.weights.packed_cache import _START, CacheFile, CacheWriter

pytestmark = pytest.mark.skipif(_native.ext is None, reason="only native backends pack weights")

IDS = torch.arange(20, 60)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be changed."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def only(folder: Path) -> Path:
    """The one file of a folder, and no temporary one beside it."""
    (path,) = folder.iterdir()
    assert path.suffix == packed_cache.SUFFIX
    return path


def load_quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(*arguments, **options)


@pytest.fixture
def read_names(monkeypatch) -> list[str]:
    """The names of the tensors that are read from a model's files."""
    names: list[str] = []
    for kind in (Checkpoint, GgufFile):

        def tensor(self, name, *arguments, _original=kind.tensor, **options):
            names.append(name)
            return _original(self, name, *arguments, **options)

        monkeypatch.setattr(kind, "tensor", tensor)
    return names


# ----------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("format", [None, "int4", "int8"])
@pytest.mark.parametrize("small", [projection.SMALL, 0])
def test_second_start_is_the_same_and_reads_no_weights(
    folder, format, small, read_names, monkeypatch
):
    monkeypatch.setattr(projection, "SMALL", small)  # what is smaller is not packed
    expected = load_model(format=format)(IDS)
    assert torch.equal(load_quietly(format=format, cache=folder)(IDS), expected)
    inode = only(folder).stat().st_ino
    assert any("experts" in name for name in read_names)
    read_names.clear()
    model = load_quietly(format=format, cache=folder)
    assert torch.equal(model(IDS), expected)
    assert not [n for n in read_names if "experts" in n or ("_proj" in n and not small)]
    assert only(folder).stat().st_ino == inode


def test_gguf(folder, tmp_path, read_names):
    path = write_gguf(tmp_path / "model.gguf", "Q8_0")
    expected = load_model(path)(IDS)
    load_quietly(path, cache=folder)
    read_names.clear()
    assert torch.equal(load_quietly(path, cache=folder)(IDS), expected)
    assert not [n for n in read_names if "exps" in n]


def test_biases_of_experts(folder, source, monkeypatch):
    """They are no part of what is packed, and come from the model's files again."""
    expected = load_model(source)(IDS)
    layout = replace(
        PER_EXPERT, gate_bias="{layer}.gate", up_bias="{layer}.up", down_bias="{layer}.down"
    )
    config = json.loads((source / "config.json").read_text())
    sizes = {"gate": "moe_intermediate_size", "up": "moe_intermediate_size", "down": "hidden_size"}
    tensors = load_file(source / Checkpoint.SINGLE)
    for layer in range(config["num_hidden_layers"]):
        for seed, (role, size) in enumerate(sizes.items()):
            rng = torch.Generator().manual_seed(3 * layer + seed)
            bias = torch.randn(config["num_experts"], config[size], generator=rng) / 4
            tensors[f"{layer}.{role}"] = bias.to(torch.bfloat16)
    save_file(tensors, source / Checkpoint.SINGLE)

    def open_biased(path):
        found = open_source(path)
        return replace(found, names=replace(found.names, experts=(layout,)))

    monkeypatch.setattr(loading, "open_source", open_biased)
    biased = load_model(source)(IDS)
    assert not torch.allclose(biased, expected, atol=0.1)
    for _ in range(2):  # stored, restored
        assert torch.equal(load_quietly(source, cache=folder)(IDS), biased)
    experts = load_model(source, cache=folder).decoder.layers[0].mlp.experts
    assert not experts.gate.parts
    assert torch.equal(experts.down_bias, tensors["0.down"].float())


def test_model_says_the_same_of_itself(folder):
    first, second = load_model(cache=folder), load_model(cache=folder)
    assert second.expert_formats == first.expert_formats
    assert second.parameters == first.parameters
    assert list(second.requests(1)) == list(first.requests(1))


def test_formats_do_not_share_a_file(folder):
    load_model(cache=folder)
    load_model(format="int4", cache=folder)
    assert len(list(folder.iterdir())) == 2


def test_stored_form_is_not_there(folder):
    load_model(cache=folder)
    model = load_model(cache=folder)
    with ktcore.use("reference"), pytest.raises(RuntimeError, match="only exists packed"):
        model(IDS)
    with pytest.raises(ValueError, match="release=False"):
        load_model(cache=folder, release=False)


def test_other_backend_reads_the_model_instead(folder, read_names):
    load_model(cache=folder)
    before = only(folder).stat().st_mtime_ns
    read_names.clear()
    with ktcore.use("reference"):
        assert load_quietly(cache=folder)(IDS).isfinite().all()
    assert any("experts" in name for name in read_names)
    assert only(folder).stat().st_mtime_ns == before


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(tmp_path))
    load_model()
    assert not (tmp_path / "packed").exists()
    monkeypatch.setenv("KTCORE_PACKED_CACHE", "1")
    load_model(cache=False)
    load_model(release=False)
    assert not (tmp_path / "packed").exists()
    load_model()
    only(tmp_path / "packed")
    monkeypatch.setenv("KTCORE_PACKED_CACHE", "perhaps")
    with pytest.raises(ValueError, match="KTCORE_PACKED_CACHE: expected 1 or 0, got 'perhaps'"):
        load_model()


# ----------------------------------------------------------------------------- what makes it stale


def touch(source: Path, monkeypatch) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))


def change_weight(source: Path, monkeypatch) -> None:
    """One byte, with the file's times as before."""
    path = source / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_config(source: Path, monkeypatch) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


def other_build(source: Path, monkeypatch) -> None:
    layout = packing.layouts()["native"]
    object.__setattr__(layout, "identity", "another")
    monkeypatch.setattr(packing, "layouts", lambda: {"native": layout})


@pytest.mark.parametrize("change", [touch, change_weight, change_config, other_build])
def test_change_makes_it_anew(folder, source, change, monkeypatch, read_names):
    load_model(source, cache=folder)
    identity = packing.layouts()["native"].identity
    old = CacheFile(only(folder)).identity
    try:
        change(source, monkeypatch)
        assert packing.why_stale(old)
        read_names.clear()
        expected = load_model(source)(IDS)
        assert torch.equal(load_quietly(source, cache=folder)(IDS), expected)
        new = CacheFile(only(folder)).identity
        assert new != old
        assert packing.why_stale(new) is None
    finally:
        object.__setattr__(packing.layouts()["native"], "identity", identity)


def test_identity_covers_the_code(monkeypatch):
    """What decides how weights are packed: the extension's sources and the Python side's."""
    from ktcore.backends.native import packing as native

    before = native._identity()
    assert before.startswith(ktcore.__version__)
    monkeypatch.setattr(native._native, "ext", type("ext", (), {"sources": "others"}))
    assert native._identity() != before


def test_source_that_changes_while_it_is_loaded(folder, source):
    def progress(done: int, total: int) -> None:
        if done == total:
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.warns(RuntimeWarning, match="changed while it was loaded"):
        load_model(source, cache=folder, progress=progress)
    assert not list(folder.iterdir())


# ----------------------------------------------------------------------------------------- damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGE = {
    "empty": lambda p: cut(p, 0),
    "first bytes only": lambda p: cut(p, 20),
    "first page only": lambda p: cut(p, 4096),
    "half": lambda p: cut(p, p.stat().st_size // 2),
    "last byte gone": lambda p: cut(p, p.stat().st_size - 1),
    "a byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "other magic": lambda p: flip(p, 0),
    "other version": lambda p: flip(p, 8),
    "other place of the header": lambda p: flip(p, 12),
    "other length of the header": lambda p: flip(p, 22),
    "other digest": lambda p: flip(p, 30),
    "header": lambda p: flip(p, p.stat().st_size - 100),
    "first weight": lambda p: flip(p, 4096),
    "a weight": lambda p: flip(p, p.stat().st_size // 2 // 64 * 64),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "text": lambda p: p.write_text("not a cache file"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_made_anew(folder, damage):
    expected = load_model(cache=folder)(IDS)
    whole = only(folder).read_bytes()
    damage(only(folder))
    with pytest.warns(RuntimeWarning, match="packed-weight cache.*made anew"):
        assert torch.equal(load_model(cache=folder)(IDS), expected)
    assert only(folder).stat().st_size == len(whole)
    assert torch.equal(load_quietly(cache=folder)(IDS), expected)


def rewrite_header(path: Path, change) -> None:
    """A header that somebody made on purpose: all digests are right."""
    data = path.read_bytes()
    magic, version, begin, length, _ = _START.unpack(data[: _START.size])
    header = json.loads(data[begin : begin + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    digest = hashlib.blake2b(text, digest_size=32).digest()
    start = _START.pack(magic, version, begin, len(text), digest)
    path.write_bytes(start + data[_START.size : begin] + text)


def set_entry(name: str, value):
    def change(header: dict) -> None:
        header["entries"][1][name] = value

    return change


def set_about(*keys, value):
    def change(header: dict) -> None:
        at = header["entries"][1]["about"]
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


HOSTILE = {
    "a list": lambda h: [],
    "no entries": lambda h: {k: v for k, v in h.items() if k != "entries"},
    "entries of another type": lambda h: h | {"entries": [1]},
    "beyond the end": set_entry("offset", 1 << 40),
    "negative": set_entry("offset", -4096),
    "not aligned": set_entry("offset", 4100),
    "too large": set_entry("size", 1 << 50),
    "not a number": set_entry("size", "many"),
    "smaller than the weight": set_entry("size", 64),
    "unknown field": set_entry("colour", "red"),
    "about nothing": set_entry("about", []),
    "no such layout": set_about("description", "layouts", 0, "format", value="int3"),
    "other layout": set_about("description", "layouts", 0, "format", value="int8"),
    "other sizes": set_about("description", "sizes", value=[1 << 20, 1 << 20]),
    "negative sizes": set_about("description", "sizes", value=[-1, -1]),
    "huge sizes": set_about("description", "sizes", value=[1 << 62, 1 << 62]),
    "no sizes": set_about("description", value={}),
    "unknown request": set_about("request", "colour", value="red"),
    "unknown format": set_about("request", "format", value="int3"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore:packed-weight cache")
def test_hostile_header_is_no_crash(folder, change):
    expected = load_model(cache=folder)(IDS)
    rewrite_header(only(folder), change)
    assert torch.equal(load_model(cache=folder)(IDS), expected)
    assert torch.equal(load_quietly(cache=folder)(IDS), expected)


# ------------------------------------------------------------------------- what happens to writers


def test_unwritable_folder_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be written to"):
        assert load_model(cache=tmp_path / "file")(IDS).isfinite().all()


@POSIX
def test_full_disk_is_a_warning(folder):
    """A limit of file size fails as a full disk does: some bytes go, then no more."""
    import resource

    load_model(format="int8", cache=folder)  # stays as it is
    before = only(folder).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="cannot be written .*packed again next time"):
            model = load_model(cache=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(model(IDS), load_model()(IDS))
    assert only(folder).read_bytes() == before


def test_short_writes_are_continued(folder, monkeypatch):
    def write_all(file, memory, original=packed_cache._write_all):
        class Slow:
            def write(self, data):
                return file.write(data[:100_000])

        original(Slow(), memory)

    monkeypatch.setattr(packed_cache, "_write_all", write_all)
    expected = load_model(cache=folder)(IDS)
    assert torch.equal(load_quietly(cache=folder)(IDS), expected)


def test_error_while_loading_leaves_nothing(folder):
    def progress(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(cache=folder, progress=progress)
    assert not list(folder.iterdir())


KILLED = """
import os, signal, sys
from ktcore.models import load_model
from ktcore.weights import packed_cache
count, write = 0, packed_cache._write_all
def some(file, memory):
    global count
    count += 1
    if count == int(sys.argv[2]):
        file.write(memory[: len(memory) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, memory)
packed_cache._write_all = some
load_model(cache=sys.argv[1])
"""


@POSIX
@pytest.mark.parametrize("at", [2, -1])
def test_killed_writer_leaves_no_broken_file(folder, at):
    load_model(cache=folder)
    writes = len(CacheFile(only(folder)).entries) + 2
    only(folder).unlink()
    at = at if at > 0 else writes + 1 + at
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.suffix == packed_cache.TEMPORARY
    expected = load_model()(IDS)
    for _ in range(2):
        assert torch.equal(load_quietly(cache=folder)(IDS), expected)
        only(folder)  # what was left has been removed


def test_what_is_being_written_is_left_alone(folder):
    writer = CacheWriter(folder / f"a{packed_cache.SUFFIX}")
    assert packed_cache.remove_abandoned(folder) == 0
    load_model(cache=folder)
    assert len(list(folder.iterdir())) == 2
    writer.abort()
    only(folder)


LOADS = """
import sys, torch, warnings
warnings.simplefilter("error")
from ktcore.models import load_model
for i in range(3):
    logits = load_model(cache=sys.argv[1])(torch.arange(20, 60))
    assert torch.equal(logits, torch.load(sys.argv[2])), i
"""


@POSIX
def test_many_at_once(folder, tmp_path):
    torch.save(load_model()(IDS), tmp_path / "expected")
    command = [sys.executable, "-c", LOADS, folder, tmp_path / "expected"]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    CacheFile(only(folder))


def test_replaced_while_in_use(folder):
    """Who has mapped the old file keeps it."""
    load_model(cache=folder)
    model = load_model(cache=folder)
    expected = model(IDS)
    only(folder).unlink()
    load_model(cache=folder)
    assert torch.equal(model(IDS), expected)


# ------------------------------------------------------------------------------------- the pieces


def test_packed_weights_over_memory():
    ext = _native.ext
    layout = ext.WeightLayout(
        "table4", scale_type=1, span=8, inner_scales=True, offsets=True, levels=range(-8, 8),
        largest=8, byte_activations=True,
    )  # fmt: skip
    assert ext.WeightLayout(**json.loads(json.dumps(layout.describe()))) == layout
    assert ext.WeightLayout("table4", scale_type=1, span=8, offsets=True) != layout
    with pytest.raises(ValueError, match="largest: expected 1 to 128, got 129"):
        ext.WeightLayout("table4", largest=129)
    with pytest.raises(ValueError, match="scale_type: expected 0 to 3, got 4"):
        ext.WeightLayout("table4", scale_type=4)
    with pytest.raises(ValueError, match="scale_type: f8"):
        ext.WeightLayout("f8", scale_type=3)
    with pytest.raises(ValueError, match="inner_nibbles: only of codes2_g16"):
        ext.WeightLayout("codes3_g16", inner_scales=True, inner_offsets=True, inner_nibbles=True)
    own = ext.PackedMatrix(layout, 40, 100)
    memory = mmap.mmap(-1, own.nbytes)
    memory[:] = memoryview(own)
    other = ext.PackedMatrix(layout, 40, 100, memory)
    assert (other.rows, other.cols, other.layout) == (40, 100, layout)
    assert bytes(memoryview(other)) == bytes(memoryview(own))
    assert memoryview(other).readonly
    with pytest.raises(BufferError):
        memory.close()  # it is in use
    with pytest.raises(RuntimeError, match="to be read"):
        other.pack(1, scales=1, offsets=1, inner_scales=1, scale_size=256, group_size=32)
    with pytest.raises(ValueError, match="memory: expected"):
        ext.PackedMatrix(layout, 41, 2000, memory)
    with pytest.raises(ValueError, match="memory: expected"):
        ext.PackedExperts(layout, layout, 2, 64, 64, memory)
    del other
    memory.close()


def test_damaged_order_of_columns():
    """Kernels trust the columns of act-order, so memory from elsewhere is looked at."""
    ext = _native.ext
    layout = ext.WeightLayout("codes4", scale_type=1, span=4, bias=8, reordered=True)
    own = ext.PackedMatrix(layout, 40, 128)
    with pytest.raises(ValueError, match="columns: this layout needs them"):
        own.pack(1, 1, scale_size=128)
    memory = mmap.mmap(-1, own.nbytes)
    memory[:] = memoryview(own)
    ext.PackedMatrix(layout, 40, 128, memory)
    memory[-4:] = (128).to_bytes(4, "little")
    with pytest.raises(ValueError, match="order of columns"):
        ext.PackedMatrix(layout, 40, 128, memory)
    experts = ext.PackedExperts(layout, layout, 2, 128, 64)
    memory = mmap.mmap(-1, experts.nbytes)
    memory[:] = memoryview(experts)
    ext.PackedExperts(layout, layout, 2, 128, 64, memory)
    memory[-4:] = (-1).to_bytes(4, "little", signed=True)
    with pytest.raises(ValueError, match="order of columns"):
        ext.PackedExperts(layout, layout, 2, 128, 64, memory)


def test_checksum():
    checksum = _native.ext.checksum
    data = bytearray(torch.arange(3_000_017).to(torch.uint8).numpy().tobytes())
    expected = checksum(data)
    for threads in (1, 2, 5):
        ktcore.set_num_threads(threads)
        assert checksum(data) == expected
    for at in (0, 7, 63, 64, 1 << 20, len(data) - 20, len(data) - 1):
        for bit in (1, 128):
            data[at] ^= bit
            assert checksum(data) != expected
            data[at] ^= bit
    assert checksum(data[:-1]) != expected
    assert checksum(data + b"\0") != expected
    assert len({checksum(bytes(n)) for n in range(200)}) == 200
    assert checksum(data) == expected


# ----------------------------------------------------------------------------------- the commands


def test_commands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer", reason="the commands need the cli extra")
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(tmp_path))

    def cache(*options: str) -> dict:
        assert _run(["cache", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert cache() == {"folder": str(tmp_path / "packed"), "files": [], "freed_bytes": 0}
    texts = []
    for _ in range(2):
        assert _run(["run", "-n", "4", "--temperature", "0", "--cache"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (file,) = cache("--verify")["files"]
    assert file["usable"]
    assert file["reason"] is None
    assert file["model"] == str(EMBEDDED)
    path = Path(file["path"])
    assert file["bytes"] == path.stat().st_size
    size = path.stat().st_size

    flip(path, 4096)
    assert cache()["files"][0]["usable"]  # it only read the header
    assert "is not what was written" in cache("--verify")["files"][0]["reason"]
    assert _run(["run", "-n", "4", "--temperature", "0", "--cache"]) == 0
    captured = capsys.readouterr()
    assert captured.out == texts[0]
    assert "warning: packed-weight cache" in captured.err
    assert "Traceback" not in captured.err

    cut(path, 5000)
    assert _run(["cache"]) == 0
    assert "cut short" in capsys.readouterr().out.replace("\n", " ")
    freed = cache("--clear-unusable")
    assert freed["freed_bytes"] == 5000
    assert freed["files"][0]["deleted"]
    _run(["run", "-n", "1", "--cache"])
    capsys.readouterr()
    assert cache("--clear-unusable")["freed_bytes"] == 0
    assert cache("--clear")["freed_bytes"] == size
    assert cache()["files"] == []

    assert _run(["run", "--cache", "--compare"]) == 2
    assert "--compare needs the weights" in capsys.readouterr().err


def test_long_loading_mentions_the_cache(monkeypatch, capsys, folder):
    pytest.importorskip("typer", reason="the commands need the cli extra")
    from ktcore.cli import run

    monkeypatch.setattr(run, "LONG", -1.0)
    assert _run(["run", "-n", "1"]) == 0
    assert "with --cache" in capsys.readouterr().err
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(folder))
    assert _run(["run", "-n", "1", "--cache"]) == 0
    assert "with --cache" not in capsys.readouterr().err
