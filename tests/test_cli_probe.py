"""`ktcore-probe`: what it prints, its JSON against the schema, and its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from hypothesis import given
from hypothesis import strategies as st

from ktcore import _native
from ktcore.cli import _render, _report, _run
from ktcore.cli import probe as command
from ktcore.dispatch import figures, probe, registry
from ktcore.dispatch.machine import Device, Feature, Machine, Memory, NumaNode
from ktcore.testing import selftest

SCHEMA = json.loads((Path(__file__).parents[1] / "docs/probe.schema.json").read_text())
needs_extension = pytest.mark.skipif(_native.ext is None, reason=str(_native.why))


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing forced, no measured figures, 80 columns, no colours."""
    for name in ("KTCORE_BACKEND", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "_loaded", None)  # and what it becomes here is forgotten
    registry.use()
    yield
    registry.use()


@pytest.fixture
def run(capsys):
    """Runs the command; gives exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = _run(["probe", *arguments])
        return (status, *capsys.readouterr())

    return run


def pretend(**changes) -> Machine:
    """This machine with changes; those whose names `Cpu` has go there."""
    machine = probe.machine()
    of_cpu = {k: changes.pop(k) for k in list(changes) if hasattr(machine.cpu, k)}
    return replace(machine, cpu=replace(machine.cpu, **of_cpu), **changes)


BIG = {
    "affinity": tuple(range(0, 48, 2)),
    "logical_cores": 96,
    "physical_cores": 48,
    "quota": 12.5,
    "numa": (NumaNode(0, tuple(range(48)), 1 << 38), NumaNode(1, tuple(range(48, 96)), 1 << 38)),
    "memory": Memory(1 << 39, 1 << 36, 1 << 36),
    "devices": (
        Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 << 30, "sm_90"),
        Device("ascend", 0, "Ascend 910B", 64 << 30),
    ),
    "absent": {"rocm": "probing failed: RuntimeError: " + "a very long driver message " * 8},
    "features": {
        name: Feature(True, not name.startswith("amx")) if i % 5 else Feature(False, False)
        for i, name in enumerate(probe.FEATURES)
    },
}


def without_extension(monkeypatch) -> None:
    why = "the native extension ktcore._C cannot be loaded: No module named 'ktcore._C'"
    monkeypatch.setattr(_native, "ext", None)
    monkeypatch.setattr(_native, "why", why)


# ---------------------------------------------------------------------------------------- schema


def fits(value, schema: dict, at: str = "$") -> list[str]:
    """How a value departs from a schema, for the keywords that ours is written with."""
    known = {
        *("$schema", "$defs", "$ref", "title", "description", "oneOf", "const", "enum", "type"),
        *("properties", "required", "additionalProperties", "propertyNames", "items", "pattern"),
        *("minimum", "exclusiveMinimum"),
    }
    assert set(schema) <= known, f"{at}: this check does not know {set(schema) - known}"
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "oneOf" in schema:
        tries = [fits(value, s, at) for s in schema["oneOf"]]
        return [] if sum(not t for t in tries) == 1 else min(tries, key=len) or [f"{at}: several"]
    if "const" in schema and value != schema["const"]:
        return [f"{at}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is not one of {schema['enum']}"]
    names = {str: "string", bool: "boolean", dict: "object", list: "array", type(None): "null"}
    name = names.get(type(value), "integer" if isinstance(value, int) else "number")
    wanted = schema.get("type", name)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if name not in wanted and not (name == "integer" and "number" in wanted):
        return [f"{at}: {name}, not {wanted}"]
    out = []
    if name in ("integer", "number"):
        if value < schema.get("minimum", value):
            out.append(f"{at}: {value} is too small")
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            out.append(f"{at}: {value} is too small")
    if name == "string" and not re.search(schema.get("pattern", ""), value):
        out.append(f"{at}: {value!r} does not match")
    if name == "array":
        for i, item in enumerate(value):
            out += fits(item, schema.get("items", {}), f"{at}[{i}]")
    if name == "object":
        fields, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        out += [f"{at}: {key} is missing" for key in schema.get("required", ()) if key not in value]
        for key, item in value.items():
            out += fits(key, schema.get("propertyNames", {}), f"{at}: the name {key}")
            if key in fields:
                out += fits(item, fields[key], f"{at}.{key}")
            elif other is False:
                out.append(f"{at}: {key} is not in the schema")
            elif isinstance(other, dict):
                out += fits(item, other, f"{at}.{key}")
    return out


def check(text: str) -> dict:
    """The document in `text`, if it is as the schema says."""
    document = json.loads(text)
    assert fits(document, SCHEMA["$defs"][document["kind"]]) == []
    assert fits(document, SCHEMA) == []
    try:
        import jsonschema
    except ImportError:
        return document
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


def test_the_check_notices_what_is_wrong(run):
    """So that the tests below mean something where the package jsonschema is not installed."""
    document = json.loads(run("--json")[1])
    report = SCHEMA["$defs"]["report"]
    assert fits(document, report) == []
    for change in (
        {"schema_version": 2},
        {"kind": "selftest"},
        {"more": 1},
        {"gains": [{"what": "x"}]},
        {"backends": [{**document["backends"][0], "evidence": None}]},
        {"threads": {"usable": 0, "compute": 1}},
        {"threads": {"usable": True, "compute": 1}},
        {"serves": [{**document["serves"][0], "op": "mow"}]},
        {"figures": {"cpu": "x"}},
    ):
        assert fits({**document, **change}, report), change
    del document["machine"]["cpu"]["brand"]
    assert fits(document, report) == ["$.machine.cpu: brand is missing"]


# ---------------------------------------------------------------------------------------- report


def test_the_report_as_json(run):
    status, out, err = run("--json")
    assert (status, err) == (0, "")
    data = check(out)
    machine = probe.machine()
    assert data["machine"]["cpu"]["affinity"] == list(machine.cpu.affinity)
    assert data["machine"]["memory"]["total_bytes"] == machine.memory.total_bytes
    assert data["figures"] is None and data["problems"] == []
    assert {b["name"] for b in data["backends"]} == set(registry.backends())
    for b in data["backends"]:
        assert b["reason"] == registry.why_not(b["name"])
        assert bool(b["operators"]) == (b["reason"] is None)
    for row in data["serves"]:
        for phase, tokens in _report.PHASES.items():
            tokens = 1 if row["op"] in _report.WITHOUT_TOKENS else tokens
            expected = registry.explain(
                row["op"], format=row["format"], tokens=tokens, **_report.SHAPE
            )
            assert row[phase]["backend"] == expected.chosen
    ops = {row["op"] for row in data["serves"]}
    assert ops == set(registry.OPS)


def test_requests_are_passed_over_or_served(run):
    """Each running backend is told for each request: it is chosen, or why it is not."""
    data = check(run("--json")[1])
    cells = [(r["op"], r["format"], p) for r in data["serves"] for p in _report.PHASES]
    served = {
        (r["op"], r["format"], p): r[p]["backend"]
        for r in data["serves"]
        for p in r
        if p in _report.PHASES
    }
    for b in data["backends"]:
        if b["reason"] is None:
            passed = [
                (q["op"], q["format"], q["phase"]) for o in b["passed_over"] for q in o["requests"]
            ]
            assert sorted(passed, key=str) == sorted(
                (c for c in cells if served[c] != b["name"]), key=str
            )


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 60, 120])
@pytest.mark.parametrize("kind", ["here", "big", "bare"])
def test_the_report_fits_the_width_and_is_plain(run, monkeypatch, columns, kind):
    monkeypatch.setenv("COLUMNS", str(columns))
    if kind == "bare":
        without_extension(monkeypatch)
    machine = probe.machine() if kind == "here" else pretend(**BIG)
    with probe.override(machine):
        status, out, _ = run()
        data = check(run("--json")[1])
    assert status == 0
    assert all(len(line) <= columns for line in out.splitlines())
    assert out.isascii() and "\x1b" not in out  # so also no ellipsis and no colours
    text = "".join(out.split())
    # Nothing that matters is cut off, whatever is folded where.
    for b in data["backends"]:
        assert b["name"] in text
        assert "".join((b["reason"] or "").split()) in text
    for reason in data["machine"]["no_devices"].values():
        assert "".join(reason.split()) in text
    for gain in data["gains"]:
        assert "".join(gain["what"].split()) in text and "".join(gain["how"].split()) in text
    for name in data["machine"]["cpu"]["features"]:
        assert name in text


def test_the_report_on_this_machine_is_a_screenful(run):
    backends = sum(b is None for b in map(registry.why_not, registry.backends()))
    assert len(run()[1].splitlines()) < 44 + 8 * backends


def test_the_report_of_a_big_machine(run):
    with probe.override(pretend(**BIG).without("avx2")):
        text = words(run()[1])
    assert "48 physical, 96 logical; this process: CPUs 0,2,4,6," in text
    assert "container quota 12.5" in text
    assert "0: CPUs 0-47, 256 GiB; 1: CPUs 48-95, 256 GiB" in text
    assert "512 GiB, 64 GiB available, container limit 64 GiB" in text
    assert "OS disabled: amx_" in text and "hidden: avx2" in text
    assert "cuda:0 NVIDIA H100 80GB HBM3, sm_90, 80 GiB" in text
    assert "ascend:0 Ascend 910B, 64 GiB" in text
    for device in ("cpu", "cuda", "npu"):
        assert f"Chosen backends on {device}, by weight format and operator" in text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"features": {"amx_tile": Feature(True, False)}}, "has amx_tile, but the operating sys"),
        ({"disabled": ("avx2",), "features": {"avx2": Feature(True, True)}}, "avx2 is hidden"),
        ({"affinity": (0, 1), "quota": 1.5}, "the container's quota is 1.5 of 2 CPUs"),
        ({"affinity": (0, 1), "logical_cores": 8}, "may run on 2 of 8 CPUs"),
        ({"memory": Memory(1 << 34, 1 << 30, 1 << 31)}, "may use 2 GiB of 16 GiB"),
        (
            {"devices": (Device("xpu", 0, "Arc", 1 << 34),)},
            "there are xpu devices, but no backend with kernels for them",
        ),
    ],
)
def test_gains_of_pretended_machines(run, changes, what):
    usual = pretend(quota=None, logical_cores=1, affinity=(0,), devices=())
    usual = replace(usual, memory=Memory(1 << 34, 1 << 33))
    with probe.override(usual):
        assert what not in words(run()[1])
    with probe.override(usual):
        changed = pretend(**changes)
    with probe.override(changed):
        status, out, _ = run()
    assert status == 0 and what in words(out)


def test_gains_of_this_process(run, monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "get_num_threads", lambda: 3)
    monkeypatch.setattr(_native, "available_threads", lambda: 5)
    driver = tmp_path / "nvidiactl"
    driver.touch()
    trace = {"cuda": (str(driver), "an NVIDIA driver is loaded", "a torch built for CUDA")}
    monkeypatch.setattr(_report, "TRACES", trace)
    monkeypatch.setattr(_report, "EXTRAS", ("json", "no_such_package"))
    machine = replace(probe.machine(), devices=(), absent={"cuda": "torch has no CUDA"})
    with probe.override(machine):
        text = words(run()[1])
    if _native.ext is not None:
        assert "compute with 3 thread(s), fewer than the 5 usable CPU(s)" in text
    assert "driver is loaded, but: torch has no CUDA; install a torch built for CUDA" in text
    assert "commands lack no_such_package; pip install 'ktcore[cli]'" in text
    with probe.override(replace(machine, devices=(Device("cuda", 0, "H100", 1 << 36),))):
        assert "driver is loaded" not in run()[1]


def test_without_the_extension_the_report_says_what_is_missing(run, monkeypatch):
    without_extension(monkeypatch)
    with probe.override():  # what backends were found to lack may be remembered
        status, out, _ = run()
        data = check(run("--json")[1])
    assert status == 0 and "No module named 'ktcore._C'" in words(out)
    assert "install a ktcore wheel for this platform" in words(out)
    assert data["instruction_sets"] == [] and "ktcore._C" in data["software"]["extension_missing"]
    assert {r["decode"]["backend"] for r in data["serves"]} == {"reference"}


def test_import_and_self_check_failures_are_shown(run, monkeypatch):
    monkeypatch.setattr(registry, "import_failures", lambda: {"lost": "import failed: no luck"})
    monkeypatch.setattr(registry, "_self_check_failure", lambda name: f"self-check failed: {name}")
    status, out, _ = run()
    assert status == 0
    assert "import failed: no luck" in out and "self-check failed: reference" in out
    data = check(run("--json")[1])
    assert data["import_failures"] == {"lost": "import failed: no luck"}
    assert all(r[p]["backend"] is None for r in data["serves"] for p in _report.PHASES)
    assert "NONE" in out


# ------------------------------------------------------------------------------------ exit status


def nowhere() -> str:
    """A backend that exists and cannot run here."""
    name = next((n for n in registry.backends() if registry.why_not(n) is not None), None)
    if name is None:
        pytest.skip("every backend runs here")
    return name


def test_required_backends(run):
    assert run("--require", "reference")[0] == 0
    status, out, err = run("--require", "reference", "--require", "nix")
    assert status == 1 and "Machine" in out
    assert err.startswith("error: --require: there is no backend 'nix'; there are: ")
    name = nowhere()
    status, out, err = run("--require", name, "--json")
    assert status == 1
    assert check(out)["problems"] == [
        f"--require: backend {name!r} cannot run: " + registry.why_not(name)
    ]
    assert check(out)["problems"][0] in err
    status, out, err = run("--require", name, "--explain", "moe")
    assert status == 1 and "moe bf16 on cpu" in out and f"--require: backend {name!r}" in err


def test_a_forced_backend_that_cannot_run(run, monkeypatch):
    name = nowhere()
    monkeypatch.setenv("KTCORE_BACKEND", name)
    status, out, err = run()
    assert status == 1
    assert f"KTCORE_BACKEND: backend {name!r} cannot run: {registry.why_not(name)}" in err
    assert f"KTCORE_BACKEND demands {name} for moe, linear, " in out and "NONE" in out
    assert check(run("--json")[1])["forced"][0] == {
        "op": "moe",
        "backend": name,
        "source": "KTCORE_BACKEND",
    }
    status, out, err = run("--explain", "moe")
    assert (status, out) == (1, "") and registry.why_not(name) in err


def test_a_forced_backend_that_can_run(run, monkeypatch):
    monkeypatch.setenv("KTCORE_BACKEND", "route=reference")
    status, out, _ = run()
    assert status == 0 and "route: reference" in out
    assert "KTCORE_BACKEND demands reference for route\n" in out


@pytest.mark.parametrize(
    ("variable", "value"), [("KTCORE_BACKEND", "mow=avx2"), ("KTCORE_CPU_DISABLE", "avx1024")]
)
def test_a_malformed_variable_is_one_line(run, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(probe, "_probed", probe._probed.__wrapped__)
    status, out, err = run()
    assert status == 1 and out == ""
    assert err.startswith(f"error: {variable}: unknown") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["extra"], "extra"),
        (["--explain", "mow"], "unknown operator 'mow'; expected one of moe, linear"),
        (["--explain", "moe", "--format", "int3"], "unknown format 'int3'"),
        (["--explain", "moe", "--tokens", "0"], "--tokens"),
        (["--explain", "moe", "--tokens", "many"], "--tokens"),
        (["--explain", "moe", "--device", "abacus"], "abacus"),
        (["--tokens", "5"], "--tokens describes the call of --explain OP, which is missing"),
        (["--exact"], "--exact describes"),
        (["--top-k", "5"], "--top-k describes"),
        (["--backend", "avx2"], "--backend narrows --selftest, which is missing"),
        (["--bench", "--selftest"], "--bench and --selftest cannot be combined"),
        (["--bench", "--explain", "moe"], "--bench and --explain cannot be combined"),
        (["--selftest", "--backend", "nix"], "there is no backend 'nix'"),
    ],
)
def test_wrong_command_lines(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert message in words(err)


def test_help_has_examples_and_exit_status(run):
    status, out, _ = run("--help")
    assert status == 0
    for text in ("ktcore-probe --explain moe", "Exit status:", "--require", "--selftest"):
        assert text in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_commands_say_which_packages_they_need(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert _run(["probe"]) == 1
    assert "pip install 'ktcore[cli]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("op", registry.OPS)
def test_explain_every_operator(run, op):
    status, out, _ = run("--explain", op)
    expected = registry.explain(op, **_report.SHAPE)
    assert status == 0
    assert out.splitlines()[0].endswith(f"1 token, bfloat16: {expected.chosen}")
    for c in expected.candidates:
        assert "".join(c.reason.split()) in "".join(out.split())


def test_explain_passes_the_call_on(run):
    call = {
        "format": "int4_g32",
        "tokens": 100,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_experts": 4,
        "top_k": 2,
        "device": "cuda",
        "exact": True,
    }
    options = ["--explain", "moe", "--exact"]
    for name, value in call.items():
        if name != "exact":
            given = {"format": "int4", "device": "cuda:1"}.get(name, value)  # alias, index
            options += [f"--{name.replace('_', '-')}", str(given)]
    data = check(run(*options, "--json")[1])
    expected = registry.explain("moe", **call)
    assert data["request"] == {"op": "moe", "dtype": "bfloat16", "down_format": None, **call}
    assert data["chosen"] == expected.chosen and data["judged_tokens"] == 128
    assert [c["reason"] for c in data["candidates"]] == [c.reason for c in expected.candidates]
    text = words(run(*options)[1])
    assert "moe int4_g32 on cuda, 100 tokens, bfloat16, exact: " in text
    assert "hidden_size 64, intermediate_size 32, num_experts 4, top_k 2" in text
    assert "as 128 tokens" in text


def test_explain_when_nothing_serves(run, monkeypatch):
    monkeypatch.setattr(registry, "_self_check_failure", lambda name: "self-check failed: no")
    status, out, _ = run("--explain", "moe")
    assert status == 0 and "nothing can serve this" in out
    assert check(run("--explain", "moe", "--json")[1])["chosen"] is None


# ------------------------------------------------------------------------------------------ bench


@needs_extension
def test_bench_measures_keeps_and_shows(run, monkeypatch):
    monkeypatch.setattr(_native, "available_threads", lambda: 24)
    fake = SimpleNamespace(
        isas=_native.ext.isas,
        set_generation=_native.ext.set_generation,
        get_num_threads=lambda: 24,
        measure_read_bandwidth=lambda threads, nbytes: 7.25 * threads,
        measure_dot_peak=lambda isa, kind, threads: 100.0 * threads,
    )
    monkeypatch.setattr(_native, "ext", fake)
    status, out, err = run("--bench")
    assert status == 0 and err == ""  # no bar where there is no terminal
    text = words(out)
    assert re.search(r"Measured limits, \d{4}-\d\d-\d\dT", text)
    assert "threads 1 2 4 8 16 24 " in text
    assert "read, GB/s 7.2 14.5 29.0 58.0 116 174" in text
    assert "has not been measured" not in text
    again = check(run("--json")[1])
    assert again["figures"]["read_gbps"]["24"] == 174.0
    assert Path(again["figures_file"]).is_file()
    assert "limits measured at" in words(run("--explain", "moe")[1])


def test_more_thread_counts_than_fit(run, monkeypatch):
    counts = [1 << i for i in range(10)]
    known = figures.Figures(
        figures.processor_key(probe.machine()),
        "2025-01-02T03:04:05Z",
        {str(n): 1.0 * n for n in counts},
        {"avx512_bf16": {"int8": {str(n): 1e3 * n for n in counts}}},
    )
    monkeypatch.setattr(figures, "load", lambda machine: known)
    out = run()[1]
    assert all(len(line) <= 80 for line in out.splitlines())
    row = next(line for line in out.splitlines() if line.startswith("  threads"))
    assert row.split()[1:] == ["1", "8", "16", "32", "64", "128", "256", "512"]
    assert check(run("--json")[1])["figures"]["read_gbps"]["2"] == 2.0


def test_bench_that_fails_still_reports(run, monkeypatch, tmp_path):
    without_extension(monkeypatch)
    with probe.override():
        status, out, err = run("--bench")
        assert status == 1 and "Machine" in out
        assert err.startswith("error: --bench: cannot measure: the native extension")
        assert check(run("--bench", "--json")[1])["problems"][0].startswith("--bench: cannot")


@needs_extension
def test_bench_into_a_folder_that_cannot_be(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KTCORE_CACHE_DIR", str(tmp_path / "file"))
    status, _, err = run("--bench")
    assert status == 1 and "--bench: " in err and str(tmp_path / "file") in err


# --------------------------------------------------------------------------------------- self-test


def result(case="x", error=1e-3, tolerance=4e-3, passed=True, message="", format="bf16", op="moe"):
    return selftest.Result("reference", op, format, case, error, tolerance, passed, message)


@pytest.fixture
def results(monkeypatch):
    """Results that the self-test gives; and the arguments it was called with."""
    given, calls = [], []

    def run(backends=None, *, progress=None):
        calls.append(backends)
        for i, r in enumerate(given):
            progress(r.backend, i, len(given))
        return given

    monkeypatch.setattr(selftest, "run", run)
    return given, calls


def test_selftest_that_passes(run, results):
    results[0].extend(
        [
            result("one", error=1e-3),
            result("two", error=5e-4, tolerance=1e-3),  # nearer to its tolerance
            result("three", error=None, tolerance=None),
            result("four", format=None, op="route", error=0.0),
        ]
    )
    status, out, err = run("--selftest")
    assert (status, err) == (0, "") and results[1] == [None]
    assert "all 4 cases passed" in out
    assert "reference moe bf16 3/3 5.0e-04 1.0e-03 ok" in words(out)
    assert "reference route - 1/1 0 4.0e-03 ok" in words(out)
    data = check(run("--selftest", "--json")[1])
    assert data["passed"] and len(data["results"]) == 4
    assert data["summary"][0]["worst_error"] == 5e-4


def test_selftest_that_fails(run, results):
    long = "off by a lot " * 20
    results[0].extend(
        [
            result("good"),
            result("513 tokens", error=0.5, passed=False),
            result("NaN", error=float("nan"), passed=False, message=long),
            result("raises", error=None, passed=False, message="ValueError: [bold]no[/bold]"),
        ]
    )
    status, out, err = run("--selftest")
    assert status == 1 and err == "error: self-test: 3 of 4 cases failed\n"
    assert "reference moe bf16 1/4 5.0e-01 4.0e-03 FAILED" in words(out)
    assert "reference moe bf16 513 tokens: error 5.0e-01, tolerance 4.0e-03" in words(out)
    assert long.strip() in words(out) and "ValueError: [bold]no[/bold]" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    status, out, _ = run("--selftest", "--json")
    data = check(out)
    assert status == 1 and not data["passed"]
    assert data["results"][2]["error"] is None and data["results"][2]["message"] == long


def test_selftest_that_tests_nothing_is_no_success(run, results):
    status, out, err = run("--selftest")
    assert status == 1 and "nothing is verified" in out and "no case was run" in err
    assert not check(run("--selftest", "--json")[1])["passed"]


def test_selftest_of_some_backends(run, results):
    results[0].append(result())
    assert run("--selftest", "--backend", "reference")[0] == 0
    assert results[1] == [["reference"]]
    name = nowhere()
    status, out, err = run("--selftest", "--backend", name)
    assert (status, out) == (1, "") and registry.why_not(name) in err
    assert results[1] == [["reference"]]  # not called


def test_selftest_runs_the_real_thing(run, monkeypatch):
    """A few of the real cases, through the command."""
    every = selftest.pairs
    monkeypatch.setattr(selftest, "pairs", lambda op: every(op)[:2])
    status, out, _ = run("--selftest", "--backend", "reference", "--json")
    data = check(out)
    assert status == 0 and data["passed"]
    assert {(s["op"], s["cases"]) for s in data["summary"]} == {(op, 2) for op in registry.OPS}


# --------------------------------------------------------------------------------------- the rest


def test_progress_counts_on_a_terminal(monkeypatch):
    import io

    from rich import console

    screen = io.StringIO()
    real = console.Console

    def terminal(**options):
        return real(file=screen, force_terminal=True, width=80, markup=options["markup"])

    monkeypatch.setattr(console, "Console", terminal)
    with command._progress() as progress:
        progress("avx2 [int8] dot products", 3, 16)
    assert "3/16" in screen.getvalue() and "avx2 [int8] dot products" in screen.getvalue()


@given(st.sets(st.integers(0, 400), max_size=30))
def test_ranges_are_what_the_system_would_write(numbers):
    assert set(probe._cpu_list(_render._ranges(numbers))) == numbers


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (5 << 42, "20 TiB")],
)
def test_sizes(n, text):
    assert _report.size(n) == text


@pytest.mark.parametrize(
    ("us", "text"), [(0.5, "0.5 us"), (999, "999 us"), (1500, "1.5 ms"), (2e6, "2 s")]
)
def test_times(us, text):
    assert _render._time(us) == text


def test_as_a_program_of_its_own(tmp_path):
    """Through `python -m ktcore.cli`, into a pipe, with an encoding that knows only ASCII."""
    env = {k: v for k, v in os.environ.items() if k not in ("KTCORE_BACKEND", "COLUMNS")}
    env |= {"PYTHONIOENCODING": "ascii", "KTCORE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "ktcore.cli", "probe", "--require", "nix"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "there is no backend 'nix'" in done.stderr
    assert "Chosen backends on cpu" in done.stdout and "\x1b" not in done.stdout
