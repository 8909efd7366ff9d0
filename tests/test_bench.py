"""`ktcore bench`: its presets, what it materialises, calls and counts, and whole runs of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktcore
from ktcore import _native, ops
from ktcore.bench import measure, plan, workload
from ktcore.bench.measure import Bench, Settings
from ktcore.bench.plan import DoesNotFit, Storage, layer_bytes, make_plan
from ktcore.bench.presets import EMBEDDED, PRESETS, Shape, find_preset
from ktcore.bench.workload import draw_routing, make_workload, random_parts, sample_rows
from ktcore.cli import _run
from ktcore.dispatch import probe, registry
from ktcore.formats import get_format

SHAPE = Shape(64, 32, 8, 2)
FORMATS = ("bf16", "int8", "int4_g32")
BACKENDS = tuple(n for n in registry.backends() if registry.why_not(n) is None)
UNAVAILABLE = tuple(n for n in registry.backends() if registry.why_not(n) is not None)
NATIVE = tuple(n for n in BACKENDS if n != "reference")
SIZES = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--top-k", "2"]
ALONE = ["--backend", "reference", "--format", "bf16", "--tokens", "1", "--seconds", "2"]
ALONE += ["--threads", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Rotate over little: what is tested here is not the speed."""
    monkeypatch.setattr(plan, "MOST_ROTATION", 1 << 18)
    monkeypatch.setattr(measure, "MAX_CALLS", 3)


def tiny(**changes) -> Settings:
    return Settings(**{"shape": SHAPE, "tokens": (1, 5), "seconds": 0.05} | changes)


# --------------------------------------------------------------------------------------- presets


def test_preset_names_are_distinct_in_any_case_and_say_where_they_are_from():
    assert len({p.name.lower() for p in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        for name in (preset.name, preset.name.lower(), preset.name.upper()):
            assert find_preset(name) is preset
        assert preset.repository in preset.source and "config.json" in preset.source


def test_the_embedded_preset_is_the_model_that_ships():
    preset = find_preset(EMBEDDED)
    config = json.loads(
        (Path(ktcore.__file__).parent / "data" / EMBEDDED / "config.json").read_text()
    )
    assert preset.shape == Shape(*(config[key] for key in preset.keys))


@pytest.mark.parametrize(
    ("name", "model_type", "keys"),
    [
        ("Qwen3-30B-A3B", "qwen3_moe", {"num_experts": "num_local_experts"}),
        ("DeepSeek-V3", "deepseek_v3", {}),
        ("Mixtral-8x7B", "mixtral", {}),
        ("GLM-4.5-Air", "glm4_moe", {}),
        ("Llama-4-Scout", "llama4_text", {}),
        ("gpt-oss-120b", "gpt_oss", {}),
    ],
)
def test_presets_agree_with_the_defaults_of_transformers(name, model_type, keys):
    """Its defaults are those of the model for which a family was added."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    config = auto.CONFIG_MAPPING[model_type]()
    preset = find_preset(name)
    names = [key.rpartition(".")[2] for key in preset.keys]
    values = [getattr(config, n, None) or getattr(config, keys.get(n, n)) for n in names]
    assert preset.shape == Shape(*values)


def test_an_unknown_model_is_answered_with_a_near_name_and_all_names():
    with pytest.raises(ValueError, match=r"Did you mean DeepSeek-V3") as error:
        find_preset("deepseek_v3")
    assert all(p.name in str(error.value) for p in PRESETS)
    with pytest.raises(ValueError, match=r"unknown model 'zzz'\. There are"):
        find_preset("zzz")


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 1, 2, 3), (1, -1, 1, 1), (1, 1, True, 1)])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="expected"):
        Shape(*sizes)


# ------------------------------------------------------------------------------------------ plan


def test_everything_fits_and_rotates_where_memory_is_plenty():
    storage = {"bf16": Storage(True, True), "int4_g32": Storage(False, True)}
    of = layer_bytes("moe", 64, 32)
    assert of("bf16") == 3 * 64 * 32 * 2
    got = make_plan(of, storage, experts=8, least_experts=2, rotation=300_000, budget=1 << 30)
    assert got.experts == 8
    assert got.layers == {"bf16": 4, "int4_g32": 11}  # of 98,304 and 27,648 bytes
    # bf16 twice; int4 once, and once more while a layer is packed.
    assert got.nbytes == 4 * 98_304 * 2 + 11 * 27_648 + 27_648


@given(
    experts=st.integers(2, 64),
    rotation=st.integers(1, 1 << 22),
    budget=st.integers(1, 1 << 24),
    kinds=st.dictionaries(
        st.sampled_from(FORMATS),
        st.sampled_from([Storage(True, True), Storage(False, True), Storage(True, False)]),
        min_size=1,
    ),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_keeps_to_its_budget_and_gives_up_layers_before_experts(
    experts, rotation, budget, kinds
):
    of = layer_bytes("moe", 64, 32)
    least = sum(of(n) * k.copies for n, k in kinds.items()) * 2
    try:
        got = make_plan(
            of, kinds, experts=experts, least_experts=2, rotation=rotation, budget=budget
        )
    except DoesNotFit:
        assert budget < least * 2  # at most one more copy exists in passing
        return
    assert got.nbytes <= budget
    assert 2 <= got.experts <= experts
    assert all(layers >= 1 for layers in got.layers.values())
    if got.experts < experts:
        assert set(got.layers.values()) == {1}


def test_an_asked_for_number_of_experts_is_not_reduced():
    with pytest.raises(DoesNotFit, match=r"8 in bf16 .* at most 4 experts fit"):
        make_plan(
            layer_bytes("moe", 64, 32),
            {"bf16": Storage(True, False)},
            experts=8,
            least_experts=2,
            rotation=1,
            budget=4 * 3 * 64 * 32 * 2,
            fixed_experts=True,
        )


# -------------------------------------------------------------------------------------- workload


@pytest.mark.parametrize("name", ["bf16", "int8", "int4_g32", "q8_0", "q4_k", "iq2_xs", "mxfp4"])
@pytest.mark.parametrize("shape", [(3, 40, 96), (200, 33), (1, 1, 32)])
def test_random_weights_are_valid_and_of_unit_size(name, shape):
    format = get_format(name)
    if shape[-1] % format.block_size or not workload.stored_by_rows(format, shape[-1]):
        pytest.skip(f"{name} has no such rows")
    sample = sample_rows(format, shape[-1], torch.Generator().manual_seed(0))
    parts = random_parts(format, shape, sample)
    format.check(parts, shape)
    values = format.dequantize(parts, shape)
    assert values.isfinite().all()
    if values.numel() > 1000 and name in ("bf16", "int8", "int4_g32", "q8_0", "q4_0"):
        assert values.std().item() == pytest.approx(1 / math.sqrt(shape[-1]), rel=0.1)
        rows = values.reshape(-1, shape[-1])
        assert len(rows.unique(dim=0)) == min(len(rows), workload.SAMPLE_ROWS)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 50),
    k=st.integers(1, 8),
    skew=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_routing_gives_each_token_distinct_experts(tokens, experts, k, skew, seed):
    k = min(k, experts)
    ids = draw_routing(tokens, experts, k, skew, torch.Generator().manual_seed(seed))
    assert ids.shape == (tokens, k)
    assert ids.min() >= 0 and ids.max() < experts
    assert all(len(row.unique()) == k for row in ids)


def test_routing_is_even_without_skew_and_zipf_with_it():
    generator = torch.Generator().manual_seed(0)
    even = draw_routing(20_000, 4, 1, 0.0, generator).flatten().bincount(minlength=4) / 20_000
    assert even.tolist() == pytest.approx([0.25] * 4, abs=0.02)
    skewed = draw_routing(20_000, 4, 1, 1.0, generator).flatten().bincount(minlength=4) / 20_000
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert skewed.tolist() == pytest.approx([1 / n / harmonic for n in (1, 2, 3, 4)], abs=0.02)


def built(op: str, format: str, layers: int = 1, **changes) -> workload.Workload:
    made = make_workload(op, SHAPE, format, changes.get("seed", 0), changes.get("skew", 0.0))
    made.build(layers, lambda weights, call: None, release=False)
    return made


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_moe_call_counts_the_distinct_experts_bytes_and_all_operations(format, tokens):
    made = built("moe", format)
    call = made.next_call(tokens)
    x, ids, weights = call.inputs
    assert x.shape == (tokens, 64) and ids.shape == weights.shape == (tokens, 2)
    assert weights.sum(-1).tolist() == pytest.approx([1.0] * tokens, rel=1e-5)
    projections = (made.weights[0].gate, made.weights[0].up, made.weights[0].down)
    touched = sum(
        part[e].numel() * part.element_size()
        for e in set(ids.flatten().tolist())
        for weight in projections
        for part in weight.parts.values()
    )
    assert call.nbytes == touched
    assert call.operations == tokens * 2 * (3 * 64 * 32) * 2


def test_a_linear_call_counts_its_matrix():
    made = built("linear", "int8", layers=3)
    calls = [made.next_call(7) for _ in range(4)]
    assert [c.layer for c in calls] == [1, 2, 0, 1]
    assert calls[0].nbytes == 32 * 64 + 32 * 4
    assert calls[0].operations == 2 * 7 * 32 * 64


@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_calls_come_back_to_an_expert_only_when_all_others_were_used(skew):
    made = built("moe", "bf16", skew=skew)
    made.next_call(1)
    drawn = [made.next_call(1).inputs[1].flatten().tolist() for _ in range(8)]
    assert sorted(itertools.chain(*drawn[:4])) == list(range(8))
    assert sorted(itertools.chain(*drawn[4:])) == list(range(8))


def test_the_same_seed_gives_the_same_calls():
    one, same, other = (built("moe", "int4_g32", seed=seed) for seed in (3, 3, 4))
    a, b, c = (w.next_call(9).inputs for w in (one, same, other))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert not torch.equal(a[1], c[1])


@pytest.mark.parametrize("op", measure.OPS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_the_check_accepts_what_is_right_and_sees_one_wrong_token(op, format, tokens):
    made = built(op, format)
    check = made.check(tokens)
    assert check.positions[0] == 0 and check.positions[-1] == tokens - 1
    with registry.use("reference"):
        got = made.run(made.weights[0], check.call)
    tolerance = made.format.tolerance
    assert check.problem(got, tolerance) == ""
    assert check.error(got) < 0.003  # of rounding to bf16
    got[-1] *= 1.1
    assert "off by" in check.problem(got, tolerance) or "error" in check.problem(got, tolerance)


# ------------------------------------------------------------------------------------------ runs


def test_every_combination_becomes_a_cell_and_none_stays_pending():
    bench = Bench(tiny(peers=("torch",)))
    bench.run()
    expected = set(itertools.product(BACKENDS, FORMATS, (1, 5))) | {("torch", "bf16", 1)}
    expected.add(("torch", "bf16", 5))
    assert {(c.backend, c.format, c.tokens) for c in bench.cells} == expected
    assert len(bench.cells) == len(expected)
    for cell in bench.cells:
        # A loaded machine may take longer than a cell's time, even here.
        assert cell.status == "measured" or (cell.status == "skipped" and cell.reason)
        assert cell.wrong == "" and cell.error is not None and cell.error < 0.02
        if cell.status == "measured":
            assert 1 <= len(cell.rounds) <= measure.ROUNDS
    assert set(bench.passed_over) == set(UNAVAILABLE) | set(registry.import_failures())


def test_threads_are_restored_and_backends_no_longer_forced():
    before = _native.get_num_threads(), torch.get_num_threads()
    Bench(tiny(tokens=(1,), formats=("bf16",), threads=1)).run()
    assert (_native.get_num_threads(), torch.get_num_threads()) == before
    assert registry.forced_backend("moe") is None
    bench = Bench(tiny(tokens=(1,), formats=("bf16",), threads=3))

    def interrupt(*args: object) -> None:
        assert torch.get_num_threads() in (1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(interrupt)
    assert (_native.get_num_threads(), torch.get_num_threads()) == before


def test_what_would_take_minutes_is_skipped_with_a_reason():
    bench = Bench(tiny(backends=("reference",), formats=("bf16",), tokens=(1, 10**9)))
    small, huge = bench.cells
    assert small.status == "pending"
    assert huge.status == "skipped" and "estimated" in huge.reason


def test_a_call_longer_than_a_cells_time_is_skipped_with_a_reason(monkeypatch):
    bench = Bench(tiny(backends=("reference",), formats=("bf16",), tokens=(1,)))
    monkeypatch.setattr(bench, "_timed", lambda cell, call: (workload_output(call), 1.0))
    bench.run()
    assert bench.cells[0].status == "skipped" and "took 1.0 s" in bench.cells[0].reason
    assert bench.cells[0].rounds == []


def workload_output(call: workload.Call) -> torch.Tensor:
    return torch.zeros_like(call.inputs[0])


def test_a_format_that_a_backend_does_not_take_is_a_skipped_cell(monkeypatch):
    real = registry.implementations

    def only_bf16(name: str) -> tuple:
        return tuple(
            SimpleNamespace(
                op=i.op, formats=("bf16",), supports=i.supports, cost=i.cost, detail=i.detail
            )
            for i in real(name)
        )

    monkeypatch.setattr(registry, "implementations", only_bf16)
    bench = Bench(tiny(formats=("bf16", "int8"), tokens=(1,)))
    assert {c.status for c in bench.cells if c.format == "bf16"} == {"pending"}
    refused = [c for c in bench.cells if c.format == "int8"]
    assert len(refused) == len(BACKENDS)
    assert all(c.reason == "does not take this format" for c in refused)


def test_a_failing_call_fails_its_cell_alone(monkeypatch):
    def moe(x, experts, ids, weights):
        if experts.format.name == "int8" and len(x) == 5:
            raise RuntimeError("no luck")
        return ops.moe(x, experts, ids, weights)

    monkeypatch.setattr(workload, "ops", SimpleNamespace(moe=moe))
    bench = Bench(tiny(formats=("bf16", "int8"), seconds=5.0))
    bench.run()
    for cell in bench.cells:
        if (cell.format, cell.tokens) == ("int8", 5):
            assert (cell.status, cell.reason) == ("failed", "RuntimeError: no luck")
        else:
            assert cell.status == "measured"


@pytest.mark.parametrize(
    ("storage", "expected"),
    [("reference", Storage(True, False)), ("native", Storage(False, True))],
)
def test_weights_are_kept_in_the_forms_that_backends_need(storage, expected):
    names = ["reference"] if storage == "reference" else list(NATIVE)
    if not names:
        pytest.skip("no native backend can run here")
    with torch.no_grad():
        kind, packers = Bench._storage(make_workload("moe", SHAPE, "int8", 0, 0.0), names)
    assert kind == expected
    assert list(packers) == ([] if storage == "reference" else names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_those_of_the_form_that_is_read(backend, monkeypatch):
    sizes = []
    pack = measure.Workload.build

    def build(self, layers, prepare, *, release):
        pack(self, layers, prepare, release=release)
        sizes.extend((sum(p.nbytes for p in w.packed.values()), w.nbytes) for w in self.weights)

    monkeypatch.setattr(measure.Workload, "build", build)
    bench = Bench(tiny(backends=(backend,), formats=("q5_0",), tokens=(1,), seconds=5.0))
    bench.run()
    (cell,) = bench.cells
    one_expert = SHAPE.expert_weights * get_format("q5_0").bits / 8
    if backend == "reference":
        assert cell.read_ratio is None and cell.rounds[0].nbytes == 2 * one_expert
        return
    packed, stored = sizes[0]
    assert packed > 0 and cell.read_ratio == packed / stored
    assert cell.rounds[0].nbytes == pytest.approx(2 * one_expert * packed / stored)


def test_few_experts_are_materialised_where_memory_is_short():
    machine = probe.machine()
    memory = dataclasses.replace(machine.memory, available_bytes=2 * 6 * 3 * 64 * 32 * 2)
    with probe.override(dataclasses.replace(machine, memory=memory)):
        bench = Bench(tiny(backends=("reference",), formats=("bf16",), tokens=(1,), seconds=5.0))
        bench.run()
    assert bench.plan is not None and bench.plan.experts == 6
    assert any(note.startswith("6 of 8 experts are materialised") for note in bench.notes)
    assert any("may come from a cache" in note for note in bench.notes)
    assert bench.cells[0].status == "measured"


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "route"},
        {"formats": ()},
        {"formats": ("q9",)},
        {"tokens": (0,)},
        {"seconds": 0.0},
        {"seconds": math.nan},
        {"skew": -1.0},
        {"threads": 0},
        {"experts": 1},
        {"experts": 9},
        {"formats": ("int8", "q4_k")},  # whose rows are multiples of 256
    ],
)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).rstrip("s")):
        Bench(tiny(**changes))


# --------------------------------------------------------------------------------------- command


def bench_json(*arguments: str, capsys) -> tuple[int, dict, str]:
    status = _run(["bench", *arguments, "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


@pytest.mark.parametrize("op", measure.OPS)
def test_json_is_alone_on_standard_output_and_its_arithmetic_holds(op, capsys):
    arguments = ["--op", op, "--tokens", "1,5", "--seconds", "0.2", "--threads", "1"]
    status, data, err = bench_json(*SIZES, *arguments, capsys=capsys)
    assert status == 0
    assert (data["schema_version"], data["kind"]) == (1, "bench")
    assert data["machine"]["cpu"] and data["machine"]["memory_total_bytes"] > 0
    assert data["versions"]["torch"] == torch.__version__
    assert data["settings"]["threads"] == 1 and data["settings"]["model"] is None
    assert len(data["cells"]) == len(BACKENDS) * len(FORMATS) * 2
    assert all(name in err for name in BACKENDS)
    measured = [c for c in data["cells"] if c["status"] == "measured"]
    assert measured
    unit = 64 * 32 if op == "linear" else 3 * 64 * 32 * 2  # weights that a token uses
    for cell in measured:
        rounds = cell["rounds"]
        gbps = [r["bytes_per_call"] / r["ms"] / 1e6 for r in rounds]
        gops = [r["operations_per_call"] / r["ms"] / 1e6 for r in rounds]
        assert cell["ms"]["median"] == statistics.median(r["ms"] for r in rounds)
        assert cell["ms"]["min"] <= cell["ms"]["median"] <= cell["ms"]["max"]
        assert cell["tokens_per_second"] == pytest.approx(
            1e3 * cell["tokens"] / cell["ms"]["median"]
        )
        assert cell["gbps"]["median"] == pytest.approx(statistics.median(gbps))
        assert cell["gops"]["median"] == pytest.approx(statistics.median(gops))
        assert {r["operations_per_call"] for r in rounds} == {2 * unit * cell["tokens"]}
        if op == "linear" or cell["tokens"] == 1:
            wanted = unit * get_format(cell["format"]).bits / 8
            packed = cell["backend"] not in ("reference", "torch")
            # And a float32 scale a row, of bf16 where it is packed.
            if cell["format"] == "int8" or (cell["format"] == "bf16" and packed):
                wanted += 4 * (32 if op == "linear" else 2 * (32 + 32 + 64))
            assert {r["bytes_per_call"] for r in rounds} == {wanted}
        if _native.ext is None:
            assert cell["read_fraction"] is None
            continue
        assert cell["peak_kind"] == ("bf16" if cell["format"] == "bf16" else "int8")
        assert cell["peak_kind"] in data["limits"]["dot_gops"][cell["isa"]]
        reads = [g / r["read_gbps"] for g, r in zip(gbps, rounds, strict=True)]
        peaks = [g / r["peak_gops"] for g, r in zip(gops, rounds, strict=True)]
        assert cell["read_fraction"]["max"] == pytest.approx(max(reads))
        assert cell["peak_fraction"]["median"] == pytest.approx(statistics.median(peaks))


def test_files_are_written_and_the_table_printed(tmp_path, capsys):
    results, picture = tmp_path / "results.json", tmp_path / "roofline.png"
    arguments = ["--model", EMBEDDED.upper(), "--format", "int4", "--tokens", "1,4"]
    arguments += ["--threads", "1"]
    status = _run(
        ["bench", *arguments, "--seconds", "2", "--json", str(results), "--plot", str(picture)]
    )
    out, _ = capsys.readouterr()
    assert status == 0
    assert "int4_g32" in out and all(name in out for name in BACKENDS)
    data = json.loads(results.read_text())
    assert data["settings"]["model"] == EMBEDDED
    assert data["settings"]["formats"] == ["int4_g32"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "roofline.png"]
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    # The first format's blue is there, in markers and not just in a line or two.
    blue = torch.tensor([0x00, 0x72, 0xB2]) / 255
    near = (torch.from_numpy(pixels) - blue).abs().amax(-1) < 0.05
    assert near.sum() > 200


def test_a_failed_drawing_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    from matplotlib.figure import Figure

    picture = tmp_path / "old.png"
    picture.write_bytes(b"old")

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    assert _run(["bench", *SIZES, *ALONE, "--plot", str(picture)]) == 1
    assert "disk full" in capsys.readouterr().err
    assert picture.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [picture]


def test_wrong_results_are_said_and_fail_the_command(monkeypatch, capsys):
    wrong = SimpleNamespace(moe=lambda *a: ops.moe(*a) * 1.05)
    monkeypatch.setattr(workload, "ops", wrong)
    status, data, err = bench_json(*SIZES, *ALONE, capsys=capsys)
    assert status == 1
    assert "error: reference bf16, 1 token: relative error" in err
    assert data["cells"][0]["wrong"]
    assert data["cells"][0]["relative_error"] == pytest.approx(0.05, abs=0.005)


def test_results_that_are_no_numbers_still_make_valid_json(monkeypatch, capsys):
    monkeypatch.setattr(workload, "ops", SimpleNamespace(moe=lambda *a: ops.moe(*a) * math.nan))
    status, data, _ = bench_json(*SIZES, *ALONE, capsys=capsys)
    assert status == 1
    assert data["cells"][0]["relative_error"] is None and "nan" in data["cells"][0]["wrong"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mixtral"], "Did you mean Mixtral-8x7B"),
        (["--model", "kjv-moe", "--top-k", "2"], "cannot be combined"),
        (["--hidden-size", "64"], "--intermediate-size and --num-experts and --top-k missing"),
        (["--op", "linear", "--hidden-size", "64"], "--intermediate-size missing"),
        ([*SIZES[:-1], "9"], "top_k: expected at most num_experts, 8, got 9"),
        ([*SIZES, "--op", "softmax"], "expected one of moe, linear"),
        ([*SIZES, "--op", "linear", "--experts", "4"], "linear has no experts"),
        ([*SIZES, "--backend", "cuda99"], "there is no backend 'cuda99'; there are:"),
        ([*SIZES, "--format", "int5"], "unknown format 'int5'"),
        ([*SIZES, "--tokens", "1,x"], "expected counts of at least 1"),
        ([*SIZES, "--tokens", ""], "expected counts of at least 1"),
        ([*SIZES, "--tokens", "0"], "expected counts of at least 1"),
        ([*SIZES, "--seconds", "-1"], "seconds: expected more than 0"),
        ([*SIZES, "--threads", "0"], "--threads"),
        ([*SIZES, "--experts", "1"], "experts: expected 2"),
        ([*SIZES, "out.json"], "a FILE goes with --json"),
        ([*SIZES, "--plot", "nowhere/there.png"], "does not exist"),
        ([*SIZES, "--plot", "picture.xyz"], "expected a name ending in .png"),
        ([*SIZES, "--json", "/"], "is a folder"),
    ],
)
def test_wrong_command_lines_are_answered_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(Bench, "run", lambda *a: pytest.fail("it ran"))
    monkeypatch.setenv("COLUMNS", "1000")
    assert _run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_backend_that_cannot_run_is_an_error_that_says_what_is_missing(name, capsys):
    assert _run(["bench", *SIZES, "--backend", name]) == 1
    assert registry.why_not(name) in capsys.readouterr().err


def test_the_package_needs_no_extra():
    """The library part works without the packages of the `cli` extra."""
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'tokenizers'): sys.modules[name] = None\n"
        "from ktcore.bench import measure, plan, plot, presets, report, workload\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
