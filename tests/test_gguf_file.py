"""Reading GGUF: whole files as llama.cpp's package reads them, damaged ones never as anything."""

from __future__ import annotations

import os
import random
import shutil
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from gguf_models import CODES, SCALARS, entry, package, raw_gguf, tensor, text, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from ktcore import CheckpointError
from ktcore.formats import format_names
from ktcore.weights import GgufFile, QuantTensor
from ktcore.weights.gguf_file import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, find_gguf
from ktcore.weights.gguf_header import MAX_HEADER, TENSOR_TYPES, read_header


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


def refused(path, *what: str, named=None) -> None:
    """Opening must fail with an error that names the file and what is wrong."""
    with pytest.raises(CheckpointError) as raised:
        GgufFile(path)
    assert str(raised.value).startswith(f"{named or path}: ")
    assert raised.value.path == (named or path)
    for part in what:
        assert part in str(raised.value)


# -------------------------------------------------------------------------------- sound files


def test_types_are_those_of_the_package():
    gguf = package()
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    # The package has the size of its early days: two floats, which are halves now (ggml-common.h).
    assert theirs.pop(9) == ("Q8_1", 32, 40)
    theirs[9] = ("Q8_1", 32, 36)
    assert {n: (t.name, t.block, t.nbytes) for n, t in TENSOR_TYPES.items()} == theirs


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value(file, version):
    entries = (
        entry("u8", "u8", 200), entry("i8", "i8", -100), entry("u16", "u16", 60_000),
        entry("i16", "i16", -30_000), entry("u32", "u32", 4_000_000_000),
        entry("i32", "i32", -2_000_000_000), entry("u64", "u64", 2**64 - 1),
        entry("i64", "i64", -(2**63)), entry("f32", "f32", 0.5), entry("f64", "f64", 0.1),
        entry("yes", "bool", 1), entry("no", "bool", 0), entry("text", "str", "é ✓"),
        entry("empty", "str", ""),
        entry("numbers", 9, struct.pack("<IQ3i", SCALARS["i32"], 3, 1, -2, 3)),
        entry("bools", 9, struct.pack("<IQ", SCALARS["bool"], 2) + b"\1\0"),
        entry("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        entry("nothing", 9, struct.pack("<IQ", 8, 0)),
    )  # fmt: skip
    file.write_bytes(raw_gguf(entries, version=version))
    found = GgufFile(file)
    assert found.version == version
    assert found.metadata == {
        "u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000,
        "i32": -2_000_000_000, "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 0.1,
        "yes": True, "no": False, "text": "é ✓", "empty": "",
        "numbers": [1, -2, 3], "bools": [True, False], "texts": ["a", ""], "nothing": [],
    }  # fmt: skip
    assert found.metadata["yes"] is True and found.names() == []


@pytest.mark.parametrize("number", TENSOR_TYPES, ids=lambda n: TENSOR_TYPES[n].name)
def test_every_type_of_tensor(file, number):
    """The file's bytes come out as they are, whole and by rows, in torch's order of dimensions."""
    kind = TENSOR_TYPES[number]
    shape = (5, 3, 2 * kind.block)
    line = 2 * kind.nbytes
    data = np.random.default_rng(number).integers(0, 256, 15 * line, dtype=np.uint8).tobytes()
    other = struct.pack("<4f", 1, 2, 3, 4)
    entries = (tensor("w", shape[::-1], number), tensor("v", (4,), 0, -(-len(data) // 32) * 32))
    file.write_bytes(raw_gguf((), entries, data + bytes(-len(data) % 32) + other))
    found = GgufFile(file)
    assert found.names() == ["w", "v"] and "w" in found and "x" not in found
    assert found.info("w").shape == shape and found.info("w").type is kind
    assert found.tensor("v").tolist() == [1, 2, 3, 4]
    if kind.dtype is None and kind.format not in format_names():
        with pytest.raises(CheckpointError, match=f"'w' is of type {kind.name}, which is not"):
            found.tensor("w")
        return
    for rows in (slice(None), slice(1, 4), slice(4, 9)):
        taken = found.tensor("w", shape, rows)
        count = len(range(5)[rows])
        assert tuple(taken.shape) == (count, *shape[1:])
        if kind.dtype is None:
            assert isinstance(taken, QuantTensor) and taken.format.name == kind.format
            taken = taken.parts["data"]
            assert taken.shape == (count, 3, line)
        else:
            assert taken.dtype == kind.dtype
        begin = (rows.start or 0) * 3 * line
        assert taken.view(torch.uint8).numpy().tobytes() == data[begin:][: count * 3 * line]


def test_a_whole_model_is_read_as_the_package_reads_it(file):
    gguf = package()
    write_gguf(file, "Q5_1", kinds={"attn_v": "F16", "down": "Q8_0"})
    theirs, ours = gguf.GGUFReader(str(file)), GgufFile(file)
    assert ours.names() == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.info(t.name)
        assert info.shape == tuple(reversed(t.shape.tolist()))
        assert (info.type.name, info.begin) == (t.tensor_type.name, t.data_offset)
        found = ours.tensor(t.name)
        if isinstance(found, QuantTensor):
            expected = torch.from_numpy(
                np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type))
            )
            assert torch.equal(found.dequantize(), expected)
        else:
            assert torch.equal(found, torch.from_numpy(np.array(t.data)))
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents()


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_alignment(file, alignment):
    offset = -(-32 // alignment) * alignment
    data = struct.pack("<8f", *range(8)).ljust(offset, b"\0") + struct.pack("<8f", *range(8, 16))
    entries = (entry("general.alignment", "u32", alignment),)
    tensors = (tensor("a"), tensor("b", offset=offset))
    file.write_bytes(raw_gguf(entries, tensors, data, alignment=alignment))
    found = GgufFile(file)
    assert found.tensor("a").flatten().tolist() == list(range(8))
    assert found.tensor("b").flatten().tolist() == list(range(8, 16))


def test_what_is_asked_for_must_be_there(file):
    file.write_bytes(raw_gguf((), (tensor(),)))
    found = GgufFile(file)
    for ask in (found.tensor, found.info):
        with pytest.raises(CheckpointError, match="lacks the tensor 'b'"):
            ask("b")
    with pytest.raises(CheckpointError, match=r"'a' has shape \[2, 4\], expected \[4, 2\]"):
        found.tensor("a", (4, 2))
    for rows in (slice(2, 2), slice(5, 9), slice(0, 2, 2)):
        with pytest.raises(ValueError, match="rows: expected"):
            found.tensor("a", rows=rows)


def test_tensors_outlive_the_file(file):
    file.write_bytes(raw_gguf((), (tensor(),), struct.pack("<8f", *range(8))))
    a = GgufFile(file).tensor("a")
    file.write_bytes(b"gone")
    a += 1
    assert a.flatten().tolist() == list(range(1, 9))


def test_a_vector_of_quantised_blocks_is_refused_when_used(file):
    file.write_bytes(raw_gguf((), (tensor("a", (32,), 8),)))
    with pytest.raises(CheckpointError, match="no matrix"):
        GgufFile(file).tensor("a")


# ------------------------------------------------------------------------------- no such thing


def test_nothing_there(tmp_path):
    refused(tmp_path / "none.gguf", "no such file")
    refused(tmp_path, "is not a file")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "too short")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "is not a file")


# ------------------------------------------------------------------------------ damaged files


def test_truncated_anywhere(file):
    whole = raw_gguf(
        (entry("k", "str", "v"), entry("n", 9, struct.pack("<IQ2H", 2, 2, 1, 2))),
        (tensor("a"), tensor("b", (4,), 30, 32)),
        bytes(40),
    )
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        refused(file)
    file.write_bytes(whole)
    assert GgufFile(file).names() == ["a", "b"]


def test_truncated_after_it_was_opened(file):
    whole = raw_gguf((), (tensor(),), bytes(32))
    file.write_bytes(whole)
    found = GgufFile(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="'a' is cut short"):
        found.tensor("a")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        found.tensor("a")


def _array(kind: int, claimed: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, claimed) + data


BIG = 2**64 - 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(b"\x89PNG" + bytes(60), "not a GGUF file: it starts with", id="magic"),
        pytest.param(raw_gguf(magic=b"FUGG"), "big-endian", id="magic swapped"),
        pytest.param(raw_gguf(version=3 << 24), "big-endian", id="version swapped"),
        pytest.param(raw_gguf(version=1), "version 1;", id="version 1"),
        pytest.param(raw_gguf(version=4), "version 4;", id="version 4"),
        pytest.param(raw_gguf(version=0), "version 0;", id="version 0"),
        pytest.param(raw_gguf(keys=BIG), "keys", id="keys overflow"),
        pytest.param(raw_gguf(keys=1000), "claims 1000 keys", id="more keys than fit"),
        pytest.param(raw_gguf(keys=2), "appears twice", id="more keys than there are"),
        pytest.param(raw_gguf(count=BIG), "tensors", id="tensors overflow"),
        pytest.param(raw_gguf(count=2**59), "tensors", id="tensors times size overflow"),
        pytest.param(raw_gguf(count=1), "tensor", id="more tensors than there are"),
        pytest.param(raw_gguf((text("k", BIG),)), "claims a length", id="key length overflows"),
        pytest.param(raw_gguf((text("k", 2**16),)), "claims a length", id="key too long"),
        pytest.param(raw_gguf((text("k", 500),)), "would end at byte", id="key beyond the file"),
        pytest.param(raw_gguf((entry(b"\xff\xfe", "u8", 1),)), "UTF-8", id="key not UTF-8"),
        pytest.param(raw_gguf((entry("k", "str", b"\xc3"),)), "UTF-8", id="value not UTF-8"),
        pytest.param(raw_gguf((entry("k", "str", b"\xed\xa0\x80"),)), "UTF-8", id="a surrogate"),
        pytest.param(raw_gguf((entry("k", 8, text("v", BIG)),)), "'k' claims", id="text overflows"),
        pytest.param(raw_gguf((entry("k", 8, text("v", 999)),)), "'k'", id="text beyond the file"),
        pytest.param(
            raw_gguf((entry("k", "u8", 1), entry("k", "u8", 1))), "'k' appears twice",
            id="key twice",
        ),
        pytest.param(raw_gguf((entry("k", 13, bytes(8)),)), "value type 13", id="value type"),
        pytest.param(raw_gguf((entry("k", 2**32 - 1, bytes(8)),)), "value type", id="type absurd"),
        pytest.param(raw_gguf((entry("k", 7, b"\2"),)), "truth value", id="bool neither"),
        pytest.param(raw_gguf((entry("k", 9, _array(9, 1)),)), "array of arrays", id="nested"),
        pytest.param(raw_gguf((entry("k", 9, _array(13, 1)),)), "type 13", id="array type"),
        pytest.param(raw_gguf((entry("k", 9, _array(13, 0)),)), "type 13", id="empty array type"),
        pytest.param(raw_gguf((entry("k", 9, _array(0, BIG)),)), "elements", id="array overflows"),
        pytest.param(raw_gguf((entry("k", 9, _array(12, 2**61)),)), "elements", id="array wraps"),
        pytest.param(raw_gguf((entry("k", 9, _array(4, 99)),)), "elements", id="array too long"),
        pytest.param(raw_gguf((entry("k", 9, _array(8, 99)),)), "elements", id="texts too many"),
        pytest.param(raw_gguf((entry("k", 9, _array(7, 1, b"\7")),)), "truth", id="array of bools"),
        pytest.param(
            raw_gguf((entry("general.alignment", "u32", 0),)), "power of two", id="alignment 0"
        ),
        pytest.param(
            raw_gguf((entry("general.alignment", "u32", 24),)), "power of two", id="alignment 24"
        ),
        pytest.param(
            raw_gguf((entry("general.alignment", "u32", 2**31),)), "power of two",
            id="alignment absurd",
        ),
        pytest.param(
            raw_gguf((entry("general.alignment", "str", "32"),)), "power of two",
            id="alignment a text",
        ),
        pytest.param(
            raw_gguf((entry("general.alignment", "bool", 1),)), "power of two",
            id="alignment a bool",
        ),
        pytest.param(
            raw_gguf((entry("general.alignment", "f32", 32.0),)), "power of two",
            id="alignment a float",
        ),
        pytest.param(raw_gguf((), (text("a", BIG),)), "claims", id="name overflows"),
        pytest.param(raw_gguf((), (tensor("x" * 2000),)), "claims", id="name too long"),
        pytest.param(raw_gguf((), (tensor(b"\xff"),)), "UTF-8", id="name not UTF-8"),
        pytest.param(raw_gguf((), (tensor(sizes=()),)), "0 dimensions", id="no dimensions"),
        pytest.param(raw_gguf((), (tensor(sizes=(1,) * 5),)), "5 dimensions", id="5 dimensions"),
        pytest.param(
            raw_gguf((), (tensor(dimensions=2**32 - 1),)), "dimensions", id="dimensions absurd"
        ),
        pytest.param(raw_gguf((), (tensor(sizes=(4, 0)),)), "shape", id="a size of 0"),
        pytest.param(raw_gguf((), (tensor(sizes=(2**63, 4)),)), "shape", id="sizes overflow"),
        pytest.param(
            raw_gguf((), (tensor(sizes=(2**32, 2**32)),)), "shape", id="sizes wrap to nothing"
        ),
        pytest.param(raw_gguf((), (tensor(sizes=(2**40,)),)), "ends at byte", id="size absurd"),
        pytest.param(
            raw_gguf((), (tensor(sizes=(48, 2), kind=8),)), "no multiple of 32", id="odd rows"
        ),
        pytest.param(
            raw_gguf((), (tensor(sizes=(32, 8), kind=12),)), "no multiple of 256", id="short rows"
        ),
        pytest.param(raw_gguf((), (tensor(kind=999),)), "type 999, which is unknown", id="type"),
        pytest.param(raw_gguf((), (tensor(kind=4),)), "no longer have", id="a removed type"),
        pytest.param(raw_gguf((), (tensor(offset=4),)), "alignment", id="misaligned"),
        pytest.param(raw_gguf((), (tensor(offset=64),)), "ends at byte", id="beyond the file"),
        pytest.param(
            raw_gguf((), (tensor(offset=2**64 - 32),)), "ends at byte", id="offset overflows"
        ),
        pytest.param(
            raw_gguf((), (tensor("a"), tensor("a", offset=32))), "'a' appears twice", id="twice"
        ),
        pytest.param(
            raw_gguf((), (tensor("a", (16,)), tensor("b", offset=32))), "overlap", id="overlap"
        ),
        pytest.param(
            raw_gguf((), (tensor("a"), tensor("b"))), "overlap", id="the same bytes twice"
        ),
        pytest.param(raw_gguf((), (tensor(),), bytes(31)), "cut short", id="data cut"),
    ],
)  # fmt: skip
def test_damaged(file, content, what):
    file.write_bytes(content)
    refused(file, what)


def test_a_header_without_end_is_refused_before_it_is_read(file):
    """Claims that fit into the (sparse) file, but take more memory than a header ever does."""
    first, second = (entry(k, 8, text(b"", n)) for k, n in (("k 0", 1 << 20), ("k 1", MAX_HEADER)))
    with file.open("wb") as handle:
        handle.write(raw_gguf((first,), keys=2))
        handle.seek(24 + len(first) + (1 << 20))
        handle.write(second)
        handle.truncate(2 * MAX_HEADER)
    refused(file, f"beyond {MAX_HEADER} bytes", "'k 1'")


# --------------------------------------------------------------------------------- split models


def _part(number: int, count: int, names: tuple[str, ...], total: int | None = None) -> bytes:
    entries = [
        entry("general.name", "str", f"part {number}"),
        entry(SPLIT_COUNT, "u16", count),
        entry(SPLIT_NO, "u16", number),
    ]
    if total is not None:
        entries.append(entry(SPLIT_TENSORS, "i32", total))
    tensors = tuple(tensor(n, offset=32 * i) for i, n in enumerate(names))
    data = b"".join(struct.pack("<8f", *[10 * number + i] * 8) for i in range(len(names)))
    return raw_gguf(tuple(entries), tensors, data)


@pytest.fixture
def parts(tmp_path):
    """Three parts with tensors a b, c, d."""
    paths = [tmp_path / f"m-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, names in enumerate((("a", "b"), ("c",), ("d",))):
        paths[i].write_bytes(_part(i, 3, names, 4))
    return paths


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_any_part_stands_for_all(parts, asked):
    found = GgufFile(parts[asked])
    assert found.names() == ["a", "b", "c", "d"]
    assert [found.tensor(n)[0, 0].item() for n in found.names()] == [0, 1, 10, 20]
    assert found.metadata["general.name"] == "part 0"
    assert found.files == parts
    assert find_gguf(parts[0].parent) == parts[0]


def test_parts_that_the_package_writes(tmp_path):
    whole = GgufFile(write_gguf(tmp_path / "whole.gguf", "Q8_0"))
    write_gguf(tmp_path / "split.gguf", "Q8_0", split_max_tensors=20)
    split = GgufFile(tmp_path / "split-00002-of-00004.gguf")
    assert split.names() == whole.names() and len(split.files) == 4
    for name in whole.names():
        ours, expected = split.tensor(name), whole.tensor(name)
        if isinstance(ours, QuantTensor):
            ours, expected = ours.parts["data"], expected.parts["data"]
        assert torch.equal(ours, expected)
    assert {k: v for k, v in split.metadata.items() if not k.startswith("split.")} == whole.metadata


def test_a_part_is_missing(parts):
    parts[1].unlink()
    refused(parts[0], "part 2 of 3 is missing", named=parts[1])


def test_a_part_leads_back_to_the_first(parts):
    parts[1].unlink()
    try:
        parts[1].symlink_to(parts[0])
    except OSError:
        shutil.copy(parts[0], parts[1])
    refused(parts[2], "should be part 2 of 3", "says that it is part 1 of 3", named=parts[1])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_part(2, 3, ("c",)), "should be part 2 of 3"),
        (_part(1, 4, ("c",)), "part 2 of 4"),
        (_part(1, 3, ("a",)), "holds the tensor 'a', which m-00001-of-00003.gguf holds too"),
        (raw_gguf((), (tensor("c"),)), "split.no: expected an integer"),
        (b"garbage" * 9, "not a GGUF file"),
    ],
)
def test_a_part_that_does_not_belong(parts, content, what):
    parts[1].write_bytes(content)
    refused(parts[0], what, named=parts[1])


def test_a_part_holds_fewer_tensors_than_promised(parts):
    parts[1].write_bytes(_part(1, 3, ()))
    refused(parts[1], "promises 4 tensors, the 3 files hold 3", named=parts[0])


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00003.gguf"])
def test_a_part_under_another_name(parts, name):
    path = parts[0].with_name("other-" + name)
    path.write_bytes(parts[0].read_bytes())
    refused(path, "its name must end in -00001-of-00003.gguf")


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ((entry(SPLIT_COUNT, "str", "3"),), "split.count: expected an integer"),
        ((entry(SPLIT_COUNT, "i32", -3),), "split.count: expected an integer"),
        ((entry(SPLIT_COUNT, "u64", BIG),), "split.count: expected an integer"),
        ((entry(SPLIT_COUNT, "u16", 3),), "split.no: expected an integer"),
        ((entry(SPLIT_COUNT, "u16", 3), entry(SPLIT_NO, "u16", 3)), "its name must end in"),
        ((entry(SPLIT_COUNT, "u32", 2**30), entry(SPLIT_NO, "u32", 0)), "its name must end in"),
    ],
)
def test_split_keys_that_make_no_sense(file, entries, what):
    file.write_bytes(raw_gguf(entries))
    refused(file, what)


def test_folder_with_several_models(tmp_path):
    assert find_gguf(tmp_path) is None
    for name in ("a.gguf", "mmproj-a.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "c.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several GGUF models.*a\.gguf, c\.gguf"):
        find_gguf(tmp_path)


# ---------------------------------------------------------------------------- damaged by chance


def _read_all(path) -> bool:
    """Every outcome is a CheckpointError or tensors of the size that the header says."""
    try:
        found = GgufFile(path)
        for name in found.names():
            info = found.info(name)
            assert tuple(found.tensor(name).shape) == info.shape
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    return True


SOUND = raw_gguf(
    (
        entry("general.architecture", "str", "qwen3moe"),
        entry("general.alignment", "u32", 32),
        entry("x.flag", "bool", 1),
        entry("x.numbers", 9, _array(SCALARS["f32"], 3, bytes(12))),
        entry("x.texts", 9, _array(8, 2, text("ab") + text(""))),
        entry(SPLIT_COUNT, "u16", 1),
    ),
    (tensor("a"), tensor("bc", (32, 2), 8, 32), tensor("d", (2, 2, 2), 30, 128)),
    bytes(range(144)),
)  # fmt: skip
HEADER = len(SOUND) - 144

# Bytes that turn small numbers into large, negative or empty ones.
_EDGES = (0, 1, 2, 7, 8, 9, 13, 31, 32, 0x7F, 0x80, 0xFF)


def mutated(rng: random.Random, content: bytes, header: int) -> bytes:
    """A copy that is damaged in some way, in its header mostly."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(header if rng.random() < 0.95 else len(out))
        at = min(at, max(0, len(out) - 1))
        what = rng.random()
        if what < 0.4:
            out[at : at + 1] = bytes(
                [rng.choice(_EDGES) if rng.random() < 0.5 else rng.randrange(256)]
            )
        elif what < 0.55:
            out[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, BIG, 2**61))
            )
        elif what < 0.7:
            out[at : at + 4] = struct.pack("<I", rng.choice((0, 5, 9, 2**31, 2**32 - 1)))
        elif what < 0.8:
            del out[at : at + rng.choice((1, 4, 8, 50))]
        elif what < 0.9:
            begin = rng.randrange(len(out))
            out[at:at] = out[begin : begin + rng.choice((1, 4, 8, 40))]
        else:
            del out[at:]
        if not out:
            out = bytearray(b"G")
    return bytes(out)


def _fuzz(file, rounds: int, seed: int) -> None:
    print(f"seed {seed}")  # pytest shows it if this fails
    rng = random.Random(seed)
    sound = 0
    for i in range(rounds):
        content = mutated(rng, SOUND, HEADER)
        file.write_bytes(content)
        try:
            sound += _read_all(file)
        except Exception as error:
            raise AssertionError(f"seed {seed}, round {i}: {content!r}") from error
    assert 0 < sound < rounds / 2  # some damage does not show; most must


def test_sound_file_of_the_fuzzer(file):
    file.write_bytes(SOUND)
    assert _read_all(file)


def test_fuzz(file):
    _fuzz(file, 4000, random.SystemRandom().randrange(1 << 32))


@pytest.mark.slow
def test_fuzz_long(file):
    _fuzz(file, 150_000, random.SystemRandom().randrange(1 << 32))


@given(
    edits=st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
)
def test_mutated_bytes(file, edits, cut):
    content = bytearray(SOUND)
    for at, value in edits:
        content[at] = value
    file.write_bytes(content[: len(content) - cut] if cut < 20 else content)
    _read_all(file)


_sizes = st.one_of(st.integers(0, 70), st.sampled_from([2**31, 2**32, 2**60, 2**63, BIG]))


@given(
    tensors=st.lists(
        st.tuples(
            st.text(max_size=2),
            st.lists(_sizes, max_size=5),
            st.sampled_from([0, 1, 2, 8, 12, 24, 30, 99]),
            st.one_of(st.integers(0, 4).map(lambda n: 32 * n), _sizes),
        ),
        max_size=4,
    )
)
def test_random_tensors(file, tensors):
    """What opens holds only tensors within the file, none of which overlap."""
    file.write_bytes(raw_gguf((), tuple(tensor(*t) for t in tensors), bytes(160)))
    if _read_all(file):
        infos = sorted(read_header(file).tensors.values(), key=lambda info: info.begin)
        assert len(infos) == len(tensors)
        assert all(a.end <= b.begin for a, b in pairwise(infos))
        assert all(info.end <= file.stat().st_size for info in infos)


@given(
    entries=st.lists(
        st.one_of(
            st.tuples(st.text(max_size=3), st.just("str"), st.text(max_size=5)),
            st.tuples(st.text(max_size=3), st.integers(0, 14), st.binary(max_size=24)),
            st.tuples(st.text(max_size=3), st.just("u32"), st.integers(0, 2**32 - 1)),
        ),
        max_size=4,
    )
)
def test_random_keys(file, entries):
    file.write_bytes(raw_gguf(tuple(entry(*e) for e in entries)))
    _read_all(file)


def test_codes_of_the_helper_are_those_of_the_format():
    gguf = package()
    names = {"u": "UINT", "i": "INT", "f": "FLOAT"}
    for name, number in SCALARS.items():
        expected = "BOOL" if name == "bool" else names[name[0]] + name[1:]
        assert gguf.GGUFValueType(number).name == expected
        assert struct.calcsize(CODES[name]) == (1 if name == "bool" else int(name[1:]) // 8)
