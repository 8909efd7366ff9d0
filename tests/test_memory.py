"""What loading takes of memory: at its peak the packed weights and one layer as stored."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sparse_models import config, write_folder, write_gguf

from ktcore import _native
from ktcore.dispatch import probe
from ktcore.models import load_model
from ktcore.models.loading import EMBEDDED

pytestmark = [
    pytest.mark.skipif(_native.ext is None, reason="only native backends pack weights"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux"),
]

# Peak of anonymous memory, which file mappings are no part of, sampled; VmHWM would count those.
MEASURE = """
import json, sys, threading, torch
from ktcore.models import load_model

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))

path, format, cache = sys.argv[1:]
load_model()(torch.arange(4))  # what every program needs
before = peak = status("RssAnon")
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, status("RssAnon"))

thread = threading.Thread(target=watch)
thread.start()
model = load_model(path, format or None, release=True, cache=cache or False)
done.set()
thread.join()
packed = sum(
    packed.nbytes
    for layer in model.decoder.layers
    for _, _, weight in layer.packed_weights("")
    for packed in weight.packed.values()
)
print(json.dumps({
    "packed": packed,
    "peak": peak - before,
    "end": status("RssAnon") - before,
    "embedding_and_head": 4 * model.config.vocab_size * model.config.hidden_size,
}))
"""

# A few temporaries of `WEIGHTS_AT_ONCE` weights, buffers, pages of the allocator.
SLACK = 96 << 20


def measure(path: Path, format: str | None = None, cache: Path | None = None) -> dict:
    command = [sys.executable, "-c", MEASURE, path, format or "", cache or ""]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def write(path: Path, kind: str, sizes: dict) -> tuple[Path, int]:
    """A model and the bytes of a layer's experts as stored."""
    weights = sizes["num_experts"] * 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"]
    if kind in ("apart", "stacked"):
        return write_folder(path, sizes, kind == "stacked"), 2 * weights
    return write_gguf(path, sizes, kind), weights * {"Q4_0": 18, "Q8_0": 34}[kind] // 32


def check(path: Path, kind: str, format: str | None, sizes: dict, cache: Path | None) -> None:
    model, layer = write(path, kind, sizes)
    found = measure(model, format, cache)
    weights = found["packed"] + found["embedding_and_head"]
    assert weights < found["end"] + SLACK // 2, "not all was measured"
    assert found["peak"] < weights + layer + SLACK
    assert found["end"] < weights + SLACK // 2
    if cache is None:
        return
    again = measure(model, format, cache)
    assert again["packed"] == found["packed"]
    assert again["peak"] < found["embedding_and_head"] + SLACK // 2, "it is mapped"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("apart", None),
        ("apart", "int4"),
        ("stacked", None),
        ("stacked", "int4"),
        ("Q8_0", "int4"),
    ],
)
def test_peak(tmp_path, kind, format):
    check(tmp_path / "model", kind, format, config(3, 1024, 512, 64), None)


def test_peak_with_a_cache(tmp_path):
    check(tmp_path / "model", "apart", None, config(4, 512, 512, 64), tmp_path / "cache")


@pytest.mark.slow
def test_peak_of_gigabytes(tmp_path):
    check(tmp_path / "model", "apart", None, config(6, 2048, 768, 64), tmp_path / "cache")


@pytest.mark.parametrize("ample", [True, False])
def test_files_are_dropped_from_the_system_cache_where_memory_is_tight(
    tmp_path, monkeypatch, ample
):
    """What was read, and what was written; and only there."""
    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, at, size, advice: dropped.append((advice, size))
    )
    machine = probe.machine()
    available = (1 << 40) if ample else 5_000_000
    pretended = replace(machine, memory=replace(machine.memory, available_bytes=available))
    with probe.override(pretended):
        load_model(cache=tmp_path)
    sizes = [size for advice, size in dropped if advice == os.POSIX_FADV_DONTNEED]
    stored = (EMBEDDED / "model.safetensors").stat().st_size
    assert sum(sizes) > 1.8 * stored if not ample else not sizes


# ------------------------------------------------------------------------------ locked in memory

# Without the right to lock any amount, which root has; imports come first, for others may not be
# allowed to read the files.
MLOCK = """
import os, resource, sys, warnings
import torch
from ktcore.models import load_model
load_model()
if os.getuid() == 0:
    import ctypes
    CAP_IPC_LOCK, PR_CAPBSET_DROP = 14, 24
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
    os.setresuid(65534, 65534, 65534)
soft = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, soft))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = load_model(sys.argv[2], "int4", mlock=True)
assert model(torch.arange(4)).isfinite().all()
for warning in caught:
    print(warning.message)
print([line for line in open("/proc/self/status") if line.startswith("VmLck")][0])
"""


def locked(limit: int, model: Path) -> tuple[str, int]:
    """What is said, and the kilobytes that are locked."""
    command = [sys.executable, "-c", MLOCK, str(limit), model]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return out, int(re.search(r"VmLck:\s+(\d+) kB", out)[1])


@pytest.fixture
def small(tmp_path_factory) -> Path:
    """A model that everybody may read, of 1.2 MB as int4."""
    path = write_folder(tmp_path_factory.mktemp("mlock") / "model", config(2, 256, 128, 16))
    for folder in (path, *path.parents):
        if folder.owner() == path.owner() and folder != Path(folder.anchor):
            folder.chmod(folder.stat().st_mode | 0o055)
    return path


def test_mlock(small):
    import resource

    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if most != resource.RLIM_INFINITY and most < 8 << 20:
        pytest.skip(f"only {most} bytes may be locked here")
    said, kilobytes = locked(8 << 20, small)
    assert "refuses" not in said
    assert kilobytes > 1000


def test_mlock_that_is_refused_says_what_to_do(small):
    said, kilobytes = locked(256 << 10, small)
    assert said.count("the system refuses to keep more in memory") == 1
    assert "This process may lock 0 MB" in said
    assert "ulimit -l" in said
    assert kilobytes <= 256


# ------------------------------------------------------------------------------------ NUMA nodes

INTERLEAVED = """
from ktcore import _native
packed = _native.ext.PackedMatrix(_native.ext.WeightLayout("bf16"), 1024, 8192)
print(open("/proc/self/numa_maps").read())
"""


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
@pytest.mark.parametrize(
    ("nodes", "spread"), [("0", True), ("none", False), ("2x1", False), ("", None)]
)
def test_large_weights_are_spread_over_nodes(nodes, spread):
    environment = os.environ | {"KTCORE_NUMA_NODES": nodes}
    out = subprocess.run(
        [sys.executable, "-c", INTERLEAVED],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    if spread is None:  # as the machine is
        spread = len(_native.ext.get_memory_nodes()) > 1
    assert ("interleave" in out) == spread


@pytest.mark.parametrize(
    "nodes", ["77", "0,77", "all", "-1", "0;1", "0x2", "2x", "x2", "2x-1", "200x1"]
)
def test_nodes_that_are_not_there(nodes):
    done = subprocess.run(
        [sys.executable, "-c", "import ktcore._native"],
        env=os.environ | {"KTCORE_NUMA_NODES": nodes}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "KTCORE_NUMA_NODES: expected none, or some of the nodes 0" in done.stderr
    assert repr(nodes) in done.stderr
