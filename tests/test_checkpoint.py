"""Reading safetensors: whole files as the library reads them, damaged ones never as anything."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ktcore import CheckpointError
from ktcore.weights import Checkpoint
from ktcore.weights.safetensors_file import DTYPES, MAX_HEADER


def _bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def _refused(path, *what: str) -> None:
    """Opening must fail with an error that names the file and what is wrong."""
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(path)
    assert str(path) in str(raised.value)
    assert raised.value.path == path
    for part in what:
        assert part in str(raised.value)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )
    )


# -------------------------------------------------------------------------------- sound files


def _tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(shape))
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=rng).bool()
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(256, (size,), generator=rng, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_round_trip(file, dtype):
    shapes = [(), (1,), (7,), (3, 5), (0, 4), (2, 0), (2, 3, 4)]
    tensors = {f"t.{i}": _tensor(dtype, s) for i, s in enumerate(shapes)}
    save_file(tensors, file, metadata={"format": "pt"})
    library = load_file(file)
    checkpoint = Checkpoint(file)
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name in tensors:
        assert name in checkpoint
        assert _same(checkpoint.tensor(name), library[name])
        assert checkpoint.info(name).shape == tensors[name].shape


def test_mixed_dtypes_at_odd_offsets(file):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, dtype=torch.float64),
        "c": torch.randn(3).bfloat16(),
    }
    data = b"".join(bytes(t.view(torch.uint8).tolist()) for t in tensors.values())
    header, at = {}, 0
    for (name, t), kind in zip(tensors.items(), ("U8", "F64", "BF16"), strict=True):
        header[name] = _entry(kind, t.shape, (at, at + t.nbytes))
        at += t.nbytes
    file.write_bytes(_bytes(header, data))
    checkpoint = Checkpoint(file)
    assert all(_same(checkpoint.tensor(n), t) for n, t in tensors.items())


def test_shards(tmp_path):
    tensors = {f"w{i}": torch.randn(3, i + 1) for i in range(4)}
    names = list(tensors)
    for shard, part in (("one.safetensors", names[:2]), ("two.safetensors", names[2:])):
        save_file({n: tensors[n] for n in part}, tmp_path / shard)
    weight_map = {n: "one.safetensors" if n in names[:2] else "two.safetensors" for n in names}
    (tmp_path / Checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == names
    assert all(_same(checkpoint.tensor(n), t) for n, t in tensors.items())


def test_tensors_outlive_the_checkpoint_and_the_file(file):
    save_file({"a": torch.arange(4.0)}, file)
    checkpoint = Checkpoint(file)
    a = checkpoint.tensor("a")
    file.write_bytes(b"gone")
    assert a.tolist() == [0, 1, 2, 3]
    a += 1


def test_what_is_asked_for_must_be_there(file):
    save_file({"a": torch.zeros(2, 3)}, file)
    checkpoint = Checkpoint(file)
    assert checkpoint.tensor("a", (2, 3)).shape == (2, 3)
    assert "b" not in checkpoint
    for ask in (checkpoint.tensor, checkpoint.info):
        with pytest.raises(CheckpointError, match="lacks the tensor 'b'") as raised:
            ask("b")
        assert str(file) in str(raised.value)
    with pytest.raises(CheckpointError, match=r"'a' has shape \[2, 3\], expected \[3, 2\]"):
        checkpoint.tensor("a", (3, 2))


# ------------------------------------------------------------------------------- no such thing


def test_nothing_there(tmp_path):
    _refused(tmp_path / "none", "no such file or folder")
    _refused(tmp_path, "holds neither")
    (tmp_path / "empty.safetensors").touch()
    _refused(tmp_path / "empty.safetensors", "too short")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read all")
def test_not_readable(file):
    save_file({"a": torch.zeros(1)}, file)
    file.chmod(0)
    _refused(file, "cannot be read")


# ------------------------------------------------------------------------------ damaged files


def test_truncated_anywhere(file):
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3).bfloat16()}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        _refused(file)


def test_truncated_after_it_was_opened(file):
    """The header promised what is not there any more: an error, or what was there."""
    save_file({"a": torch.arange(6.0)}, file)
    whole = file.read_bytes()
    checkpoint = Checkpoint(file)
    file.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.tensor("a")


SOUND = {"a": _entry()}
DATA = bytes(16)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(_bytes(SOUND, DATA, 2**63), "claims", id="header length absurd"),
        pytest.param(_bytes(SOUND, DATA, 2**64 - 1), "claims", id="header length overflows"),
        pytest.param(_bytes(SOUND, DATA, MAX_HEADER + 1), "claims", id="header length too large"),
        pytest.param(_bytes(SOUND, DATA, 10**6), "claims", id="header longer than the file"),
        pytest.param(_bytes(SOUND, DATA, 10), "not valid", id="header cut"),
        pytest.param(_bytes(b""), "not valid", id="header empty"),
        pytest.param(_bytes(b"\xff\xfe{}"), "not valid", id="header not utf-8"),
        pytest.param(_bytes([]), "not a JSON object", id="header a list"),
        pytest.param(_bytes(None), "not a JSON object", id="header null"),
        pytest.param(_bytes(b"[" * 100_000), "not valid", id="header deep"),
        pytest.param(_bytes(b'{"a":' * 50_000), "not valid", id="header deep objects"),
        pytest.param(
            _bytes(b'{"a": 1' + b"0" * 10_000 + b"}"), "", id="entry a huge number"
        ),
        pytest.param(
            _bytes(('{"a":%s,"a":%s}' % ((json.dumps(_entry()),) * 2)).encode(), DATA),
            "'a' appears twice", id="duplicate name",
        ),
        pytest.param(
            _bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', DATA),
            "'dtype' appears twice", id="duplicate key",
        ),
        pytest.param(_bytes({"a": []}), "'a': its entry", id="entry a list"),
        pytest.param(_bytes({"a": {}}), "unknown dtype", id="entry empty"),
        pytest.param(_bytes({"a": _entry("F31")}, DATA), "unknown dtype 'F31'", id="dtype unknown"),
        pytest.param(
            _bytes({"a": {**_entry(), "dtype": ["F32"]}}, DATA), "dtype", id="dtype a list"
        ),
        pytest.param(_bytes({"a": {**_entry(), "shape": 4}}, DATA), "shape", id="shape a number"),
        pytest.param(_bytes({"a": _entry(shape=(2, -2))}, DATA), "shape", id="shape negative"),
        pytest.param(_bytes({"a": _entry(shape=(2, 2.0))}, DATA), "shape", id="shape a float"),
        pytest.param(_bytes({"a": _entry(shape=(True, 4))}, DATA), "shape", id="shape a bool"),
        pytest.param(_bytes({"a": _entry(shape=("2", 2))}, DATA), "shape", id="shape a string"),
        pytest.param(_bytes({"a": _entry(shape=(1,) * 500)}, DATA), "shape", id="shape long"),
        pytest.param(
            _bytes({"a": _entry(shape=(2**62, 2**62))}, DATA), "shape", id="shape overflows"
        ),
        pytest.param(
            _bytes({"a": _entry(shape=(2**62, 4, 0), offsets=(0, 0))}, DATA), "shape",
            id="shape overflows though empty",
        ),
        pytest.param(_bytes({"a": _entry(shape=(3, 2))}, DATA), "takes 24 bytes", id="shape large"),
        pytest.param(_bytes({"a": _entry(offsets=(0,))}, DATA), "offsets", id="one offset"),
        pytest.param(_bytes({"a": _entry(offsets=(16, 0))}, DATA), "takes", id="offsets backwards"),
        pytest.param(_bytes({"a": _entry(offsets=(-16, 0))}, DATA), "offsets", id="below zero"),
        pytest.param(_bytes({"a": _entry(offsets=(0, 16.0))}, DATA), "offsets", id="float offset"),
        pytest.param(
            _bytes({"a": _entry(offsets=(2**63 - 17, 2**63 - 1))}, DATA), "ends at byte",
            id="offsets far beyond",
        ),
        pytest.param(
            _bytes({"a": _entry(offsets=(2**64, 2**64 + 16))}, DATA), "offsets",
            id="offsets overflow",
        ),
        pytest.param(_bytes({"a": _entry(offsets=(4, 20))}, DATA), "ends at", id="offset beyond"),
        pytest.param(
            _bytes({"a": _entry(), "b": _entry(offsets=(12, 28))}, bytes(28)), "overlap",
            id="overlap",
        ),
        pytest.param(
            _bytes({"a": _entry(), "b": _entry()}, DATA), "overlap", id="the same bytes twice"
        ),
        pytest.param(
            _bytes({"a": _entry(shape=(8,), offsets=(0, 32)), "b": _entry(offsets=(8, 24))},
                   bytes(32)),
            "overlap", id="one within another",
        ),
    ],
)  # fmt: skip
def test_damaged(file, content, what):
    file.write_bytes(content)
    _refused(file, what)


@pytest.mark.parametrize("shape", [(0,) * 16, (2**40, 0), (0, 2**59)])
def test_empty_tensors_of_odd_shapes(file, shape):
    file.write_bytes(_bytes({"a": _entry(shape=shape, offsets=(4, 4))}, DATA))
    checkpoint = Checkpoint(file)
    assert checkpoint.tensor("a").shape == shape


@pytest.mark.parametrize(
    ("index", "what"),
    [
        pytest.param("{", "not a valid index", id="cut"),
        pytest.param("[]", "not a valid index", id="a list"),
        pytest.param("{}", "not a valid index", id="empty"),
        pytest.param('{"weight_map": 3}', "not a valid index", id="map a number"),
        pytest.param('{"weight_map": ["ab", "cd"]}', "not a valid index", id="map a list"),
        pytest.param(
            '{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}',
            "'a' appears twice",
            id="duplicate name",
        ),
        pytest.param("[" * 100_000, "not a valid index", id="deep"),
        pytest.param('{"weight_map": {"a": "../x.safetensors"}}', "bad file name", id="outside"),
        pytest.param('{"weight_map": {"a": "/etc/passwd"}}', "bad file name", id="absolute"),
        pytest.param('{"weight_map": {"a": ".."}}', "bad file name", id="the folder above"),
        pytest.param('{"weight_map": {"a": "."}}', "bad file name", id="the folder"),
        pytest.param('{"weight_map": {"a": ""}}', "bad file name", id="no name"),
        pytest.param(
            '{"weight_map": {"a": "x\\u0000y"}}', "bad file name", id="a zero in the name"
        ),
        pytest.param('{"weight_map": {"a": "sub/x.safetensors"}}', "bad file name", id="below"),
        pytest.param('{"weight_map": {"a": 3}}', "bad file name", id="a number"),
        pytest.param('{"weight_map": {"a": "none.safetensors"}}', "cannot be", id="missing"),
        pytest.param('{"weight_map": {"b": "one.safetensors"}}', "'b'", id="promises too much"),
    ],
)
def test_damaged_index(tmp_path, index, what):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / Checkpoint.INDEX).write_text(index)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert what in str(raised.value)


def test_damaged_index_bytes(tmp_path):
    (tmp_path / Checkpoint.INDEX).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not a valid index") as raised:
        Checkpoint(tmp_path)
    assert raised.value.path == tmp_path / Checkpoint.INDEX


# ---------------------------------------------------------------------------- damaged by chance


def _read_all(path) -> None:
    """Every outcome is a CheckpointError or tensors of the size that the header says."""
    try:
        checkpoint = Checkpoint(path)
        for name in checkpoint.names():
            info = checkpoint.info(name)
            tensor = checkpoint.tensor(name)
            assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype
    except CheckpointError as error:
        assert str(path) in str(error)


@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 400),
)
def test_mutated_bytes(file, edits, cut):
    header = {"__metadata__": {"format": "pt"}, "a": _entry(), "bc": _entry("BF16", (5,), (16, 26))}
    content = bytearray(_bytes(header, bytes(range(26))))
    for at, value in edits:
        content[at % len(content)] = value
    file.write_bytes(content[: len(content) - cut] if cut < 20 else content)
    _read_all(file)


_numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 1e400, 0.5]),
    st.none(), st.booleans(), st.text(max_size=2),
)  # fmt: skip


@given(
    header=st.dictionaries(
        st.text(max_size=3),
        st.one_of(
            _numbers,
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", "f32"]), _numbers),
                    "shape": st.one_of(st.lists(_numbers, max_size=4), _numbers),
                    "data_offsets": st.one_of(
                        st.lists(_numbers, max_size=3),
                        st.tuples(st.integers(0, 30), st.integers(0, 40)).map(list),
                    ),
                }
            ),
        ),
        max_size=4,
    )
)
def test_random_headers(file, header):
    file.write_bytes(_bytes(header, bytes(32)))
    _read_all(file)


@given(
    parts=st.lists(
        st.tuples(st.sampled_from(list(DTYPES)), st.integers(0, 4), st.integers(0, 40)), max_size=4
    )
)
def test_random_places(file, parts):
    """Tensors of the right size anywhere: read if they neither overlap nor leave the file."""
    header, spans = {}, []
    for i, (kind, count, begin) in enumerate(parts):
        end = begin + count * DTYPES[kind].itemsize
        header[f"t{i}"] = _entry(kind, (count,), (begin, end))
        spans.append((begin, end))
    file.write_bytes(_bytes(header, bytes(48)))
    filled = sorted(s for s in spans if s[0] < s[1])
    sound = all(end <= 48 for _, end in spans) and all(a[1] <= b[0] for a, b in pairwise(filled))
    if sound:
        checkpoint = Checkpoint(file)
        for name in header:
            assert not checkpoint.tensor(name).view(torch.uint8).any()
    else:
        _refused(file)
