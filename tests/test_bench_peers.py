"""Other implementations beside ktcore's in `ktcore bench`: each computes the same layer."""

from __future__ import annotations

import json
import sys
import textwrap

import gguf
import numpy as np
import pytest
import torch

from ktcore.bench import measure, plan, report
from ktcore.bench.measure import Bench, Cell, Round, Settings
from ktcore.bench.peers import Peer, Session, llama_cpp, peers, timed
from ktcore.bench.peers._process import Process, why_not
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call, make_workload
from ktcore.cli import _run
from ktcore.dispatch import registry
from ktcore.formats import format_names, get_format
from ktcore.weights import QuantTensor

SHAPE = Shape(256, 512, 8, 2)
INSTALLED = [name for name, peer in peers().items() if not peer.missing()]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(plan, "MOST_ROTATION", 1 << 18)
    monkeypatch.setattr(measure, "MAX_CALLS", 3)


def settings(**changes) -> Settings:
    given = {"shape": SHAPE, "tokens": (1, 5), "seconds": 20.0, "backends": ("reference",)}
    return Settings(**given | changes)


def test_peers_name_formats_that_there_are():
    assert "torch" in INSTALLED
    for name, peer in peers().items():
        assert peer.name == name and peer.formats and set(peer.ops) <= set(measure.OPS)
        assert set(peer.formats) <= set(format_names())


@pytest.mark.parametrize(("name", "op"), [(n, op) for n in INSTALLED for op in peers()[n].ops])
def test_an_installed_peer_computes_the_same_layer(name, op):
    peer = peers()[name]
    formats = tuple(f for f in ("bf16", "int4_g32", "int8_g32", "q4_k") if f in peer.formats)
    bench = Bench(settings(op=op, formats=formats, peers=(name,)))
    bench.run()
    cells = [c for c in bench.cells if c.is_peer]
    assert {(c.format, c.tokens) for c in cells} == {(f, t) for f in formats for t in (1, 5)}
    assert peer.version()
    for cell in cells:
        # One may want instructions that its makers' machines have and this one has not.
        if cell.status == "failed" and "SIGILL" in cell.reason:
            continue
        assert cell.status == "measured", cell.reason
        assert cell.error < 0.05 and cell.rounds


@pytest.mark.parametrize("name", [n for n in peers() if n not in INSTALLED] or ["none"])
def test_a_peer_that_is_not_there_says_what_is_missing(name):
    if name == "none":
        pytest.skip("all are installed")
    with pytest.raises(registry.BackendUnavailable, match=name):
        Bench(settings(formats=("bf16",), peers=(name,)))


def test_a_wrong_name_lists_the_peers():
    with pytest.raises(ValueError, match=r"there is no 'other'; there are: .*torch"):
        Bench(settings(peers=("other",)))
    only_moe = next(name for name, p in peers().items() if "linear" not in p.ops)
    missing = peers()[only_moe].missing
    if not missing():
        with pytest.raises(ValueError, match="has no linear"):
            Bench(settings(op="linear", peers=(only_moe,)))


def test_plain_torch_multiplies_single_matrices_as_well():
    bench = Bench(settings(op="linear", formats=("bf16",), peers=("torch",)))
    bench.run()
    assert [c.error < 0.01 for c in bench.cells if c.is_peer] == [True, True]


# ---------------------------------------------------------------------------- ones that go wrong


class Scaled(Session):
    """Multiplies by a number instead."""

    def __init__(self, factor: float):
        self.factor, self.closed = factor, False

    def add(self, weights) -> None:
        if self.factor == 0:
            raise OSError("no room")

    def run(self, call: Call):
        return timed(lambda: call.inputs[0].float() * self.factor)

    def close(self) -> None:
        self.closed = True


class Fake(Peer):
    name = "fake"
    formats = ("bf16",)

    def __init__(self, factor: float):
        self.session = Scaled(factor)

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return "1"

    def open(self, op, format, shape, threads) -> Session:
        return self.session


@pytest.mark.parametrize(
    ("factor", "reason"), [(3.0, "not the same work: the result is off by"), (0.0, "no room")]
)
def test_a_peer_that_fails_has_no_numbers_and_does_not_fail_the_command(
    factor, reason, monkeypatch, capsys
):
    fake = Fake(factor)
    monkeypatch.setitem(peers(), "fake", fake)
    sizes = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8"]
    status = _run(
        ["bench", *sizes, "--top-k", "2", "--backend", "reference", "--format", "bf16",
         "--tokens", "1", "--peer", "fake", "--json"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0
    cell = next(c for c in json.loads(out)["cells"] if c["backend"] == "fake")
    assert cell["status"] == "failed" and reason in cell["reason"] and reason in err
    assert json.loads(out)["versions"]["fake"] == "1"
    assert fake.session.closed


# ------------------------------------------------------------------------- processes of their own

PROGRAM = textwrap.dedent("""
    import struct, sys, os
    read = sys.stdin.buffer
    layers = []
    while command := read.read(1):
        if command == b"w":
            layers.append(open(read.readline().rstrip().decode(), "rb").read())
            sys.stdout.buffer.write(b"+")
        else:
            layer, tokens = struct.unpack("<ii", read.read(8))
            if layer == 1:
                print("lost its way", file=sys.stderr)
                os.abort()
            x = read.read(tokens * 4 * 4)
            ids, weights = read.read(tokens * 2 * 4), read.read(tokens * 2 * 4)
            sys.stdout.buffer.write(struct.pack("<d", 0.25) + x)
        sys.stdout.buffer.flush()
""")


@pytest.mark.skipif(bool(why_not()), reason="processes cannot be stopped here")
def test_a_process_is_told_its_weights_and_calls_and_says_how_it_died():
    shape = Shape(4, 32, 3, 2)
    workload = make_workload("moe", shape, "bf16", 0, 0.0)
    weights = workload._layer_weights()
    session = Process([sys.executable, "-c", PROGRAM], shape, lambda w: [w.parts["data"]])
    try:
        session.add(weights)
        session.add(weights)
        call = workload.draw(5, 0)
        got, seconds = session.run(call)
        assert torch.equal(got, call.inputs[0].float()) and seconds == 0.25
        with pytest.raises(RuntimeError, match="SIGABRT: lost its way"):
            session.run(workload.draw(1, 1))
    finally:
        session.close()
    assert session.process.poll() is not None


@pytest.mark.parametrize("shape", [(3, 8, 64), (8, 64)])
@pytest.mark.parametrize(("name", "kind"), [("int4_g32", "Q4_0"), ("int8_g32", "Q8_0")])
def test_groups_of_32_become_llama_cpps_blocks_number_by_number(name, kind, shape):
    format = get_format(name)
    weight = QuantTensor(format, shape, format.quantize(torch.randn(shape)))
    blocks = llama_cpp.as_blocks(weight)
    type_ = gguf.GGMLQuantizationType[kind]
    want = weight.dequantize(torch.float32).view(-1, *shape[-2:]).numpy()
    got = gguf.quants.dequantize(np.ascontiguousarray(blocks.flatten(-2).numpy()), type_)
    np.testing.assert_array_equal(got, want)


def test_scales_that_llama_cpp_cannot_store_are_refused():
    format = get_format("int4_g32")
    weight = QuantTensor(format, (1, 1, 32), format.quantize(torch.randn(1, 1, 32) * 1e9))
    with pytest.raises(ValueError, match="beyond float16"):
        llama_cpp.as_blocks(weight)


# --------------------------------------------------------------------------------- the comparison


def cell(backend: str, is_peer: bool, *ms: float) -> Cell:
    made = Cell(backend, "int4_g32", 1, "", "int8", is_peer=is_peer)
    made.rounds = [Round(number, 1, value, 1.0, 1.0) for number, value in enumerate(ms)]
    return made


def test_the_lead_is_that_of_the_best_over_the_best_in_the_same_rounds():
    cells = [
        cell("slow", False, 9.0, 9.0, 9.0),
        cell("fast", False, 1.0, 2.0, 4.0),
        cell("peer", True, 3.0, 4.0, 8.0),
        cell("other", True, 5.0, 5.0, 5.0),
    ]
    (lead,) = report.leads(cells)
    assert (lead.backend, lead.peer, lead.ratio) == ("fast", "peer", 2.0)
    assert report.leads(cells[:2]) == [] and report.leads(cells[2:]) == []
