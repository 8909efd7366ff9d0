"""Weights cut over NUMA nodes: pretended ones, and one node that stands for several."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ktcore import _native, get_num_threads, ops, set_num_threads
from ktcore.backends.native import packing
from ktcore.formats import format_names
from ktcore.models import load_model
from ktcore.testing.cases import inputs

pytestmark = pytest.mark.skipif(_native.ext is None, reason="needs the native extension")

# Nodes and threads: one thread a node, several, none for some of the nodes, more nodes than blocks.
TOPOLOGIES = ((2, 2), (4, 8), (3, 1), (9, 9))


@pytest.fixture
def layer():
    """A layer of a format that is not packed yet, and a call of it."""
    packed = []

    def make(format: str):
        sizes = [inputs.whole_blocks(format, size) for size in (96, 96)]
        biases = ("gate_bias", "up_bias", "down_bias")
        experts = inputs.experts(format, 5, *sizes, "quantised", biases)
        packed.extend((experts.packed, experts.gate[0].packed))
        _clear(packed)
        rng = inputs.generator(format)
        x = torch.randn(70, sizes[0], generator=rng)
        ids = torch.randint(-1, 5, (70, 2), generator=rng)
        return experts, x, ids, torch.rand(70, 2, generator=rng)

    yield make
    _clear(packed)  # other tests have the same weights


def _clear(packed: list[dict]) -> None:
    for each in packed:
        each.clear()


@pytest.fixture
def on_nodes():
    """Packs and computes on so many nodes from now on."""
    before = _native.ext.get_memory_nodes(), get_num_threads()

    def change(nodes: list[int], threads: int) -> None:
        _native.ext.set_memory_nodes(nodes)
        set_num_threads(threads + 1)  # a pool keeps its nodes: have another one made
        set_num_threads(threads)

    yield change
    change(*before)


@pytest.mark.parametrize("format", format_names())
def test_results_do_not_depend_on_nodes(format, layer, on_nodes):
    experts, x, ids, weights = layer(format)
    batches = (1, 4, 70)

    def results() -> list[torch.Tensor]:
        matrix = experts.gate[0]
        _clear([experts.packed, matrix.packed])
        out = [ops.moe(x[:t], experts, ids[:t], weights[:t]) for t in batches]
        return out + [ops.linear(x[:t], matrix) for t in batches]

    on_nodes([], 2)
    expected = results()
    for nodes, threads in TOPOLOGIES:
        on_nodes([-1] * nodes, threads)
        for got, want in zip(results(), expected, strict=True):
            assert torch.equal(got, want), (nodes, threads)


@pytest.mark.parametrize("format", ["int4", "q4_k", "gptq4_g128_sym", "bf16"])
def test_stored_weights_do_not_depend_on_nodes(format, layer, on_nodes):
    """What a cache holds is the same, and is read on any number of nodes."""
    experts, x, ids, weights = layer(format)
    layout = packing.layout()
    on_nodes([], 2)
    expected = ops.moe(x, experts, ids, weights)
    one = experts.packed[layout.name]
    assert one.in_one_piece() is one and one.nodes == 1
    stored = mmap.mmap(-1, one.nbytes)
    stored[:] = layout.memory(one)
    for nodes, threads in TOPOLOGIES:
        on_nodes([-1] * nodes, threads)
        cut = packing._pack_experts(experts)
        assert cut.nodes == nodes
        assert bytes(layout.memory(cut)) == stored[:]
        again = layout.restore(layout.describe(one), memoryview(stored))
        assert again.nodes == nodes and bytes(memoryview(again)) == bytes(memoryview(cut))
        experts.packed[layout.name] = again
        assert torch.equal(ops.moe(x, experts, ids, weights), expected)


def test_a_model_on_nodes(on_nodes):
    ids = torch.arange(40) * 7 % 300
    on_nodes([], 2)
    expected = load_model(format="int4")(ids)
    on_nodes([-1, -1], 2)
    assert torch.equal(load_model(format="int4")(ids), expected)


PLACED = """
import torch
from ktcore import _native, set_num_threads
ext = _native.ext
ext.set_memory_nodes([0, 0])
set_num_threads(2)
experts = ext.PackedExperts(ext.WeightLayout("bf16"), ext.WeightLayout("bf16"), 4, 1024, 512)
matrix = ext.PackedMatrix(ext.WeightLayout("bf16"), 2048, 1024)
print(sum("prefer:0" in line for line in open("/proc/self/numa_maps")))
"""


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_memory_is_placed():
    """On one node twice: the system takes what it is asked, of runs and of threads."""
    out = subprocess.run(
        [sys.executable, "-c", PLACED], check=True, capture_output=True, text=True
    ).stdout
    assert int(out) >= 2


@pytest.mark.parametrize(("text", "nodes", "threads"), [("2x1", 2, 2), ("4x2", 4, 8)])
def test_pretended_nodes(text, nodes, threads):
    program = (
        "import ktcore; from ktcore import _native;"
        "print(_native.ext.get_memory_nodes(), ktcore.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={k: v for k, v in os.environ.items() if k != "KTCORE_NUM_THREADS"}
        | {"KTCORE_NUMA_NODES": text}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split("]") == [str([-1] * nodes)[:-1], f" {threads}\n"]
