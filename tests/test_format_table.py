"""examples/format_table.py: what it keeps, and the table that it makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ktcore.formats import format_names, get_format
from ktcore.testing.variants import all_variants

pytest.importorskip("typer")
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "format_table.py"
spec = importlib.util.spec_from_file_location("format_table", SCRIPT)
assert spec is not None and spec.loader is not None
format_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(format_table)

FORMATS = [get_format(name) for name in ("bf16", "q4_0", "int8", "fp8_e4m3")]
SPREAD = ("ms", "gbps", "read_fraction", "gops", "peak_fraction")


def timed(value: float) -> dict:
    return {"status": "measured", "reason": ""} | {
        key: {"median": value, "min": value, "max": value} for key in SPREAD
    }


def entry(format: str, isa: str, error: float | None = 1e-4, **more) -> dict:
    backend = isa.split("_")[0]
    found = {"format": format, "backend": backend, "isa": isa, "error": error, "stored_bits": 4.5}
    return found | {"date": "2026-01-02T00:00:00Z"} | more


def results(cpu: str, isas: list[str], entries: list[dict]) -> dict:
    settings = {"model": "Qwen3-30B-A3B", "threads": 2, "seconds": 3.0, "experts": None}
    return {
        "schema_version": 1,
        "kind": "formats",
        "machine": {"cpu": cpu, "system": "Linux"},
        "settings": settings,
        "isas": isas,
        "entries": entries,
    }


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the first table's rows, by format."""
    lines = [text.split("Relative error by")[0].splitlines()][0]
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in table}


ZEN = results(
    "Zen",
    ["avx2"],
    [
        entry("q4_0", "avx2", decode=timed(0.5), prefill=timed(12.34), packed_bits=4.75),
        entry("bf16", "avx2", decode=timed(1.0),
              prefill={"status": "skipped", "reason": "one call took 9 s"}),
        entry("fp8_e4m3", "avx2", None),
    ],
)  # fmt: skip
EMULATED = results("Zen", ["avx512", "avx512_vnni"], [entry("q4_0", "avx512_vnni", 2.5e-7)])


def test_every_cell_says_what_it_is():
    found = rows(format_table.markdown({"zen": ZEN, "emulated": EMULATED}, FORMATS))
    assert found["format"][2] == "AVX2, Zen: decode, GB/s"
    assert found["format"][5] == "AVX-512 with VNNI, emulated: decode, GB/s"
    assert found["q4_0"] == [
        "4.50", "4.75", "0.5 (50 %)", "12.3 (1234 %)", "0.01 %", "—", "—", "0.000025 %",
    ]  # fmt: skip
    assert found["bf16"][1:5] == ["—", "1 (100 %)", "too slow", "0.01 %"]
    assert found["int8"][2:] == ["not measured"] * 6
    assert found["fp8_e4m3"][2:5] == ["not served"] * 3
    assert all(len(row) == 8 and all(row) for row in found.values())


def test_hardware_takes_the_place_of_emulation_without_editing():
    entries = [entry("q4_0", "avx512_vnni", decode=timed(0.9), prefill=timed(80.0))]
    xeon = results("Xeon", ["avx512_vnni"], entries)
    text = format_table.markdown({"zen": ZEN, "emulated": EMULATED, "xeon": xeon}, FORMATS)
    found = rows(text)
    assert found["format"][5] == "AVX-512 with VNNI, Xeon: decode, GB/s"
    assert found["q4_0"][5:] == ["0.9 (90 %)", "80 (8000 %)", "0.01 %"]
    assert "emulated" not in text.split("Relative error")[1].replace("avx512, emulated", "")


def test_two_machines_have_a_group_each_and_never_share_one():
    other = results("Lake", ["avx2", "avx2_vnni"], [
        entry("q4_0", "avx2", decode=timed(3.0), prefill=timed(4.0)),
        entry("int8", "avx2_vnni", decode=timed(5.0), prefill=timed(6.0)),
    ])  # fmt: skip
    found = rows(format_table.markdown({"zen": ZEN, "lake": other}, FORMATS))
    titles = [t for t in found["format"] if "decode" in t]
    assert titles == [
        "AVX2 with VNNI, Lake: decode, GB/s",  # the most capable of that machine
        "AVX2, Zen: decode, GB/s",
        "AVX-512, no such machine: decode, GB/s",
    ]
    assert found["q4_0"][2:5] == ["not measured"] * 3 and found["q4_0"][5] == "0.5 (50 %)"


def test_figures_are_kept_and_replaced_one_by_one(tmp_path):
    path = tmp_path / "formats-x.json"
    kept = results("Zen", ["avx2"], [])
    format_table.keep(path, kept, [entry("q4_0", "avx2", 1e-4), entry("bf16", "avx2", 2e-4)])
    again = format_table.load(path)
    format_table.keep(path, again, [entry("q4_0", "avx2", 3e-4), entry("q4_0", "avx512", 4e-4)])
    found = {(e["format"], e["isa"]): e["error"] for e in format_table.load(path)["entries"]}
    assert found == {
        ("q4_0", "avx2"): 3e-4, ("bf16", "avx2"): 2e-4, ("q4_0", "avx512"): 4e-4,
    }  # fmt: skip


def test_figures_that_cannot_be_compared_do_not_share_a_file(tmp_path):
    path = tmp_path / "formats-x.json"
    path.write_text(json.dumps(ZEN))
    assert format_table.opened(path, ZEN["settings"])["entries"] == ZEN["entries"]
    with pytest.raises(format_table.Refused, match="holds figures with threads 2"):
        format_table.opened(path, ZEN["settings"] | {"threads": 8})


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "not JSON"), ("[]", "not written by this"), ('{"kind": "bench"}', "not written by"),
     ('{"kind": "formats", "schema_version": 9}', "schema_version 9, expected 1")],
)  # fmt: skip
def test_files_that_are_no_results(tmp_path, text, what):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(format_table.Refused, match=what):
        format_table.load(tmp_path / "x.json")


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    before = f"# A\n{format_table.BEGIN}\nold\n{format_table.END}\nrest \\1\n"
    page.write_text(before)
    format_table.put(page, "new \\g<0>")
    assert page.read_text() == before.replace("old", "new \\g<0>")
    page.write_text("# A\n")
    with pytest.raises(format_table.Refused, match="expected the lines"):
        format_table.put(page, "new")
    assert page.read_text() == "# A\n"


def test_the_page_has_its_markers():
    text = format_table.PAGE.read_text("utf-8")
    assert text.count(format_table.BEGIN) == text.count(format_table.END) == 1


@pytest.mark.parametrize("name", format_names())
def test_errors_are_the_kernels_alone(name):
    variants = [v for v in all_variants() if v.why_not is None]
    format = get_format(name)
    found = format_table.errors(format, variants)
    assert found["reference"] < 1e-5
    assert all(0 < error <= format.tolerance for error in found.values())


def test_a_run_of_two_formats(tmp_path, monkeypatch):
    """Of the embedded model's layer, so that it takes no time."""
    from ktcore.bench import measure, plan

    monkeypatch.setattr(plan, "MOST_ROTATION", 1 << 18)
    monkeypatch.setattr(measure, "MAX_CALLS", 3)
    monkeypatch.setattr(format_table, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"{format_table.BEGIN}\n{format_table.END}\n")
    format_table.main(
        format=["int8", "q4_0"], backend=None, name="here", model="kjv-moe", threads=1,
        seconds=0.1, experts=None, emulation=False, table_only=False, page=page, extension=None,
    )  # fmt: skip
    kept = json.loads((tmp_path / "formats-here.json").read_text())
    assert {e["format"] for e in kept["entries"]} == {"int8", "q4_0"}
    # Timed is what a backend is used with; its lesser instruction sets have their errors alone.
    fastest = {e["backend"]: e["isa"] for e in kept["entries"]}
    for e in kept["entries"]:
        assert e["error"] < 0.01
        if e["isa"] != fastest[e["backend"]]:
            assert "decode" not in e and "prefill" not in e
            continue
        assert e["decode"]["status"] == "measured" and e["decode"]["gbps"]["median"] > 0
        assert ("packed_bits" in e) == (e["backend"] != "reference")
        # Padding included, and the layout is not the file's: but about as large.
        assert e["backend"] == "reference" or 4.5 <= e["packed_bits"] < 12
    assert "`q4_0`" in page.read_text()
