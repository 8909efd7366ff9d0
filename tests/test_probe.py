"""The probe: what it reads, on this machine and on pretended ones, and the measured figures."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktcore import _cgroup, _native
from ktcore._settings import SettingError
from ktcore.dispatch import figures, probe, registry
from ktcore.dispatch.machine import Cache, Cpu, Device, Feature, Machine, Memory, NumaNode

needs_extension = pytest.mark.skipif(_native.ext is None, reason=str(_native.why))

ON, OFF, NONE = Feature(True, True), Feature(True, False), Feature(False, False)


def machine_with(**features: Feature) -> Machine:
    cpu = Cpu("x86_64", {n: features.get(n, NONE) for n in probe.FEATURES}, 8, 4, tuple(range(8)))
    return Machine(cpu, Memory(64 << 30, 32 << 30))


def write(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# -------------------------------------------------------------------------------------- features


def test_a_feature_needs_the_processor_and_the_operating_system():
    cpu = machine_with(avx2=ON, amx_tile=OFF).cpu
    assert cpu.has("avx2") and cpu.missing("avx2") == []
    assert not cpu.has("amx_tile")
    assert cpu.missing("avx2", "amx_tile", "avx512f", "no_such_feature") == [
        "amx_tile (not enabled by the operating system)",
        "avx512f",
        "no_such_feature",
    ]


def test_hidden_features_are_missing_on_request_only_if_they_were_there():
    cpu = machine_with(avx2=ON, amx_tile=OFF).without("avx2", "avx512f", "amx_tile").cpu
    assert cpu.missing("avx2") == ["avx2 (disabled on request)"]
    # Lifting the request would not bring these: the real reason comes first.
    assert cpu.missing("avx512f", "amx_tile") == [
        "avx512f",
        "amx_tile (not enabled by the operating system)",
    ]


def test_without_adds_up_and_leaves_the_original_alone():
    machine = machine_with(avx2=ON, fma=ON)
    assert machine.without("fma").without("avx2", "fma").cpu.disabled == ("fma", "avx2")
    assert machine.cpu.has("avx2", "fma")


@needs_extension
def test_features_are_what_the_extension_reads_from_the_processor():
    features = probe.machine().cpu.features
    raw = _native.ext.cpu_features()
    assert {n: (f.cpu, f.os) for n, f in features.items()} == raw
    if raw:
        assert tuple(raw) == probe.FEATURES


@needs_extension
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux only")
def test_usable_features_agree_with_linux():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(x.partition(":")[2].split()) for x in lines if x.startswith("flags")), None)
    if flags is None:
        pytest.skip("not an x86 processor")
    for name, feature in probe.machine().cpu.features.items():
        assert feature.usable == (name in flags), name


def test_features_without_the_extension_come_from_the_system(monkeypatch, tmp_path):
    write(tmp_path, {"cpuinfo": "processor : 0\nflags : fpu avx avx2 fma\nflags : none\n"})
    monkeypatch.setattr(_native, "ext", None)
    monkeypatch.setattr(probe, "PROC", tmp_path)
    features = probe._features()
    assert list(features) == list(probe.FEATURES)
    assert {n for n, f in features.items() if f.usable} == {"avx", "avx2", "fma"}


def test_cpu_disable_hides_features(monkeypatch):
    monkeypatch.setenv("KTCORE_CPU_DISABLE", " avx512f, fma,")
    machine = probe._probed.__wrapped__()
    assert machine.cpu.disabled == ("avx512f", "fma")
    assert not machine.cpu.has("fma")


def test_cpu_disable_rejects_unknown_features(monkeypatch):
    monkeypatch.setenv("KTCORE_CPU_DISABLE", "avx1024")
    with pytest.raises(SettingError, match="KTCORE_CPU_DISABLE: unknown CPU feature 'avx1024'"):
        probe._probed.__wrapped__()


# -------------------------------------------------------------------------------------- override


def test_override_holds_in_the_block_and_nests():
    real = probe.machine()
    other = machine_with(avx2=ON, fma=ON)
    with probe.override(other) as outer:
        assert outer.cpu.has("avx2", "fma") and probe.machine() is outer
        with probe.override(disable=("fma",)):
            assert probe.machine().cpu.has("avx2") and not probe.machine().cpu.has("fma")
        assert probe.machine() is outer
        with pytest.raises(KeyError), probe.override():
            raise KeyError
        assert probe.machine() is outer
    assert probe.machine() is real


def test_override_rejects_unknown_features():
    with (
        pytest.raises(ValueError, match="unknown CPU feature 'avx9'"),
        probe.override(disable=("avx9",)),
    ):
        pass


@needs_extension
def test_what_a_pretended_machine_lacks_is_not_used():
    if not probe.machine().cpu.has("avx2", "fma", "f16c"):
        pytest.skip("needs AVX2")
    request = registry.Request("route", num_experts=8, top_k=2)
    assert registry.select(request).backend != "reference"
    with probe.override(disable=("fma", "avx512f")):
        assert registry.select(request).backend == "reference"
    assert registry.select(request).backend != "reference"


@needs_extension
def test_a_pretended_machine_leaves_no_verdict_behind():
    """Pretending to have more fails the self-check there, and there alone."""
    before = {name: registry.why_not(name) for name in registry.backends()}
    boast = dataclasses.replace(
        probe.machine(), cpu=machine_with(**dict.fromkeys(probe.FEATURES, ON)).cpu
    )
    registry._self_check_failure.cache_clear()
    with probe.override(boast):
        for name in registry.backends():
            registry.why_not(name)
    assert {name: registry.why_not(name) for name in registry.backends()} == before


# ----------------------------------------------------------------------------- containers' limits


@pytest.fixture
def cgroup(monkeypatch, tmp_path):
    """A fake /sys/fs/cgroup, and the text of /proc/self/cgroup."""

    def make(own: str, files: dict[str, str]) -> None:
        write(tmp_path / "fs", files)
        (tmp_path / "fs").mkdir(exist_ok=True)
        (tmp_path / "own").write_text(own)

    monkeypatch.setattr(_cgroup, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(_cgroup, "OWN", tmp_path / "own")
    return make


V1 = "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        pytest.param("0::/\n", {}, None, id="no files"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, id="v2 unlimited"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 1.5, id="v2 in its own namespace"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "50000 100000"}, 0.5, id="v2 below the root"),
        pytest.param(
            "0::/a/b\n",
            {"a/b/cpu.max": "800000 100000", "a/cpu.max": "200000 100000"},
            2.0,
            id="v2 a parent's limit is smaller",
        ),
        pytest.param("0::/../up\n", {"cpu.max": "300000 100000"}, 3.0, id="v2 outside the root"),
        pytest.param("0::/gone\n", {"cpu.max": "100000 100000"}, 1.0, id="v2 path not visible"),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, None, id="v2 unreadable"),
        pytest.param("0::/\n", {"cpu.max": "100000 0"}, None, id="v2 no period"),
        pytest.param(
            V1,
            {"cpu/box/cpu.cfs_quota_us": "250000", "cpu/box/cpu.cfs_period_us": "100000"},
            2.5,
            id="v1",
        ),
        pytest.param(
            V1,
            {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"},
            None,
            id="v1 unlimited",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            0.5,
            id="v1 path not visible",
        ),
    ],
)
def test_cpu_quota(cgroup, own, files, quota):
    cgroup(own, files)
    assert _cgroup.cpu_quota() == quota


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        pytest.param("0::/\n", {}, None, id="no files"),
        pytest.param("0::/\n", {"memory.max": "max"}, None, id="v2 unlimited"),
        pytest.param("0::/a\n", {"a/memory.max": "1073741824"}, 1 << 30, id="v2"),
        pytest.param(
            "0::/a\n",
            {"a/memory.max": "4294967296", "memory.max": "1073741824"},
            1 << 30,
            id="v2 a parent's limit is smaller",
        ),
        pytest.param(V1, {"memory/box/memory.limit_in_bytes": "2147483648"}, 2 << 30, id="v1"),
        pytest.param(
            V1,
            {"memory/box/memory.limit_in_bytes": "9223372036854771712"},
            None,
            id="v1 unlimited",
        ),
    ],
)
def test_memory_limit(cgroup, own, files, limit):
    cgroup(own, files)
    assert _cgroup.memory_limit() == limit


def test_no_control_groups_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(_cgroup, "ROOT", tmp_path / "absent")
    monkeypatch.setattr(_cgroup, "OWN", tmp_path / "absent")
    assert _cgroup.cpu_quota() is None and _cgroup.memory_limit() is None


@pytest.mark.parametrize(
    ("quota", "cpus", "threads"), [(None, 8, 8), (0.2, 8, 1), (1.5, 8, 2), (2.4, 8, 2), (99, 4, 4)]
)
def test_threads_follow_affinity_and_quota(monkeypatch, quota, cpus, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(_cgroup, "cpu_quota", lambda: quota)
    assert _native.available_threads() == threads


# ------------------------------------------------------------------------------- system folders


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", ()), ("0", (0,)), ("0-3", (0, 1, 2, 3)), ("0-1,8,10-11", (0, 1, 8, 10, 11))],
)
def test_cpu_list(text, cpus):
    assert probe._cpu_list(text) == cpus


@given(st.sets(st.integers(0, 300), max_size=20))
def test_cpu_list_reads_any_list(cpus):
    text = ",".join(str(c) for c in sorted(cpus))
    assert probe._cpu_list(text) == tuple(sorted(cpus))


@pytest.mark.parametrize(
    ("text", "n"), [("32K", 32768), ("1M", 1 << 20), ("2G", 2 << 30), ("7", 7)]
)
def test_cache_sizes(text, n):
    assert probe._bytes(text) == n


def test_topology_from_system_folders(monkeypatch, tmp_path):
    cpu = "devices/system/cpu"
    write(
        tmp_path,
        {
            f"{cpu}/cpu0/cache/index0/level": "1\n",
            f"{cpu}/cpu0/cache/index0/type": "Data\n",
            f"{cpu}/cpu0/cache/index0/size": "48K\n",
            f"{cpu}/cpu0/cache/index0/shared_cpu_list": "0,2\n",
            f"{cpu}/cpu0/cache/index1/level": "3\n",
            f"{cpu}/cpu0/cache/index1/type": "Unified\n",
            f"{cpu}/cpu0/cache/index1/size": "32M\n",
            f"{cpu}/cpu0/cache/index1/shared_cpu_list": "0-3\n",
            f"{cpu}/cpu0/cache/index2/level": "9\n",  # not complete: left out
            **{
                f"{cpu}/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}"
                for i in range(4)
            },
            "devices/system/node/node0/cpulist": "0,2\n",
            "devices/system/node/node0/meminfo": "Node 0 MemTotal:    1024 kB\n",
            "devices/system/node/node1/cpulist": "1,3\n",
        },
    )
    monkeypatch.setattr(probe, "SYS", tmp_path)
    assert probe._caches() == (
        Cache(1, "data", 48 << 10, 2),
        Cache(3, "unified", 32 << 20, 4),
    )
    assert probe._physical_cores(4) == 2
    assert probe._numa() == (NumaNode(0, (0, 2), 1 << 20), NumaNode(1, (1, 3), 0))


def test_nothing_readable_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "SYS", tmp_path)
    monkeypatch.setattr(probe, "PROC", tmp_path)
    cpu = probe._cpu()
    assert cpu.caches == () and cpu.numa == () and cpu.physical_cores == cpu.logical_cores
    assert probe._memory().total_bytes > 0  # from sysconf


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, Memory(8 << 20, 4 << 20)),
        (2 << 20, Memory(8 << 20, 2 << 20, 2 << 20)),
        (6 << 20, Memory(8 << 20, 4 << 20, 6 << 20)),
        (9 << 20, Memory(8 << 20, 4 << 20)),  # more than there is: no limit
    ],
)
def test_memory_and_its_limit(monkeypatch, tmp_path, limit, expected):
    write(tmp_path, {"meminfo": "MemTotal: 8192 kB\nMemAvailable:  4096 kB\nHugePages_Total: 0\n"})
    monkeypatch.setattr(probe, "PROC", tmp_path)
    monkeypatch.setattr(_cgroup, "memory_limit", lambda: limit)
    assert probe._memory() == expected


def test_brand_from_the_system_and_from_py_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "PROC", tmp_path)
    write(tmp_path, {"cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n"})
    assert probe.cpu_brand.__wrapped__() == "Some CPU @ 2 GHz"
    write(tmp_path, {"cpuinfo": "processor : 0\n"})
    import cpuinfo

    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Other CPU"})
    assert probe.cpu_brand.__wrapped__() == "Other CPU"
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: 1 / 0)
    assert probe.cpu_brand.__wrapped__()


# ---------------------------------------------------------------------------------- accelerators


def test_a_broken_driver_is_a_line(monkeypatch):
    def broken():
        raise RuntimeError("driver version\n  is insufficient")

    found = [Device("xpu", 0, "Arc", 1 << 30)]
    monkeypatch.setattr(
        probe, "ACCELERATORS", {"cuda": broken, "rocm": lambda: "none\nhere", "xpu": lambda: found}
    )
    devices, absent = probe._devices()
    assert devices == found
    assert absent == {
        "cuda": "probing failed: RuntimeError: driver version is insufficient",
        "rocm": "none here",
    }


def test_every_kind_of_accelerator_is_found_or_explained():
    machine = probe.machine()
    for kind in probe.ACCELERATORS:
        present = any(d.kind == kind for d in machine.devices)
        assert present != bool(machine.absent.get(kind)), kind


def properties(index: int) -> SimpleNamespace:
    return SimpleNamespace(
        name="Card", total_memory=8 << 30, major=9, minor=0, gcnArchName="gfx942:sramecc+"
    )


@pytest.mark.parametrize(
    ("hip", "kind", "detail"), [(None, "cuda", "sm_90"), ("6.2", "rocm", "gfx942:sramecc+")]
)
def test_cuda_and_rocm_devices(monkeypatch, hip, kind, detail):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    expected = [Device(kind, i, "Card", 8 << 30, detail) for i in range(2)]
    assert probe.ACCELERATORS[kind]() == expected
    other = {"cuda": "rocm", "rocm": "cuda"}[kind]
    assert isinstance(probe.ACCELERATORS[other](), str)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "visible" in probe.ACCELERATORS[kind]()


# --------------------------------------------------------------------------------------- figures


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "_loaded", None)
    return tmp_path / "cache"


@pytest.fixture
def extension(monkeypatch):
    """An extension that answers at once."""
    calls = []
    fake = SimpleNamespace(
        isas=lambda: [
            {"name": "avx2", "requires": ["avx2"], "supported": True},
            {"name": "avx512", "requires": ["avx512f"], "supported": False},
        ],
        measure_read_bandwidth=lambda threads, nbytes: calls.append(nbytes) or 10.0 * threads,
        measure_dot_peak=lambda isa, kind, threads: 100.0 * threads,
    )
    monkeypatch.setattr(_native, "ext", fake)
    monkeypatch.setattr(_native, "available_threads", lambda: 6)
    return calls


def test_measured_figures_are_kept_for_this_processor(cache, extension):
    machine = machine_with(avx2=ON, avx512f=ON)
    steps = []
    measured = figures.measure(machine, lambda *step: steps.append(step))
    assert measured.read_gbps == {"1": 10.0, "2": 20.0, "4": 40.0, "6": 60.0}
    # What the extension itself says cannot run is not measured, whatever the machine claims.
    assert set(measured.peak_gops) == {"avx2"}
    assert set(measured.peak_gops["avx2"]) == set(figures.KINDS)
    assert [s[1] for s in steps] == list(range(16)) and {s[2] for s in steps} == {16}
    assert steps[0][0] == "read bandwidth, 1 thread" and "2 threads" in steps[4][0]
    assert min(extension) >= 1 << 28  # beyond any last-level cache
    assert figures.load(machine) == measured
    assert figures.load_cached(machine) == measured
    assert figures.load(machine_with(avx2=ON)) is None  # another processor
    assert [p.name for p in cache.iterdir()] == ["figures.json"]


def test_without_the_extension_nothing_can_be_measured(cache, monkeypatch):
    monkeypatch.setattr(_native, "ext", None)
    monkeypatch.setattr(_native, "why", "it is gone")
    with pytest.raises(RuntimeError, match="cannot measure: it is gone"):
        figures.measure(machine_with())


def test_a_cache_folder_that_cannot_be_written_fails_before_the_work(cache, extension):
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cache"):
        figures.measure(machine_with(avx2=ON))
    assert extension == []


def test_a_failed_write_keeps_the_old_figures(cache, extension, monkeypatch):
    machine = machine_with(avx2=ON)
    first = figures.measure(machine)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(figures.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.measure(machine)
    assert figures.load(machine) == first
    assert [p.name for p in cache.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "\xff",
        '{"cpu": "x", "measured_at": "", "read_gbps": {}, "peak_gops": {}, "more": 1}',
        "READ: 7",
        'READ: {"one": 1.0}',
        'READ: {"1": "fast"}',
        'READ: {"1": 0}',
        "READ: {}",
    ],
)
def test_a_damaged_file_is_as_good_as_none(cache, text):
    machine = machine_with(avx2=ON)
    key = json.dumps(figures.processor_key(machine))
    if text.startswith("READ: "):
        text = f'{{"cpu": {key}, "measured_at": "", "peak_gops": {{}}, "read_gbps": {text[6:]}}}'
    write(cache, {"figures.json": text})
    assert figures.load(machine) is None


def test_figures_are_looked_up_at_the_nearest_smaller_thread_count():
    known = figures.Figures("", "", {"2": 20.0, "8": 50.0}, {"avx2": {"int8": {"1": 7.0}}})
    assert [figures.read_bandwidth(known, n) for n in (1, 2, 3, 8, 99)] == [20, 20, 20, 50, 50]
    assert figures.dot_peak(known, "avx2", "int8", 4) == 7.0
    estimate = figures.ESTIMATED_PEAK["avx2"]["f32"]
    assert figures.dot_peak(known, "avx2", "f32", 2) == 2 * estimate
    assert figures.dot_peak(None, "avx2", "f32", 1) == estimate
    assert figures.read_bandwidth(None, 3) == 3 * figures.ESTIMATED_READ


@needs_extension
def test_every_instruction_set_has_estimates():
    for isa in _native.ext.isas():
        assert set(figures.ESTIMATED_PEAK[isa["name"]]) == set(figures.KINDS)


@needs_extension
def test_real_measurements_are_plausible():
    for isa in _native.ext.isas():
        if isa["supported"]:
            for kind in figures.KINDS:
                assert 0.01 < _native.ext.measure_dot_peak(isa["name"], kind, 1) < 1e6
    if any(isa["supported"] for isa in _native.ext.isas()):
        assert 0.01 < _native.ext.measure_read_bandwidth(1, 1 << 24) < 1e5


def test_cache_folder_follows_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv("KTCORE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr(figures.sys, "platform", "linux")
    assert figures.cache_folder() == tmp_path / "xdg/ktcore"
    monkeypatch.setattr(figures.sys, "platform", "win32")
    assert figures.cache_folder() == tmp_path / "local/ktcore"
