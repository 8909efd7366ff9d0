#!/usr/bin/env python3
"""Measure every stored weight format on every instruction set; write the table in docs/formats.md.

    python examples/format_table.py

measures on this machine and keeps the figures in docs/benchmarks/formats-NAME.json, one file a
machine; where the processor lacks AVX-512 it then builds the AVX-512 kernels over AVX2 for the
errors alone (docs/benchmarks/formats-emulated.json); and puts all machines' figures into the
table. Figures are kept format by format: a run that was stopped, or one with --format, loses
nothing that is there. Needs ktcore[cli] from a checkout, and a compiler for the emulation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ktcore.formats import Format
    from ktcore.testing.variants import Variant
    from ktcore.weights import ExpertWeights

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "formats.md"
RESULTS = ROOT / "docs" / "benchmarks"
EMULATED = "emulated"  # the name of the machine that has AVX-512 in name only
BEGIN, END = "<!-- table: examples/format_table.py -->", "<!-- end of table -->"

SCHEMA_VERSION = 1
DECODE, PREFILL = 1, 512  # tokens of a call
SEED = 0

Entry = dict[str, Any]
Results = dict[str, Any]


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


# ---------------------------------------------------------------------------------------- measuring


def experts_of(format: Format) -> ExpertWeights:
    """Small experts in a format: normal random weights, or what files may hold where ktcore does
    not quantise to it.
    """
    import torch

    from ktcore.weights import ExpertWeights, QuantTensor

    hidden, inner, experts = 512, 256, 8
    generator = torch.Generator().manual_seed(SEED)

    def weight(*shape: int) -> QuantTensor:
        values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        try:
            parts = format.quantize(values)
        except TypeError:  # a format that is only read
            parts = format.example(shape, generator)
        return QuantTensor(format, shape, parts)

    return ExpertWeights(
        weight(experts, inner, hidden),
        weight(experts, inner, hidden),
        weight(experts, hidden, inner),
    )


def errors(format: Format, variants: Iterable[Variant]) -> dict[str, float]:
    """By instruction set, the relative L2 error of `moe` against float64 arithmetic on the same
    stored weights; activations and result are float32, so that it is the kernel's alone.

    A variant that does not serve the format has no entry.
    """
    import torch

    from ktcore import ops
    from ktcore.bench.workload import draw_routing
    from ktcore.dispatch import registry
    from ktcore.testing import oracle

    experts, tokens, top_k = experts_of(format), 16, 4
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(tokens, experts.hidden_size, generator=generator)
    ids = draw_routing(tokens, experts.num_experts, top_k, 0.0, generator)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    want, _ = oracle.moe(x, experts, ids, weights, "silu")
    out = {}
    for variant in variants:
        with variant.forced(), contextlib.suppress(registry.BackendUnavailable):
            got = ops.moe(x, experts, ids, weights)
            out[variant.name] = ((got - want).norm() / want.norm()).item()
    return out


def speeds(
    format: Format, variant: Variant, model: str, threads: int, seconds: float, experts: int | None
) -> Entry:
    """Decode and prefill of one layer, each beside the machine's limits in the same rounds."""
    from ktcore.bench.measure import Bench, Settings
    from ktcore.bench.plan import layer_bytes
    from ktcore.bench.presets import find_preset
    from ktcore.bench.report import spread

    with variant.forced():
        bench = Bench(
            Settings(
                shape=find_preset(model).shape,
                backends=(variant.backend,),
                formats=(format.name,),
                tokens=(DECODE, PREFILL),
                threads=threads,
                seconds=seconds,
                seed=SEED,
                experts=experts,
            )
        )
        bench.run()
    shape = bench.settings.shape
    stored = layer_bytes("moe", shape.hidden_size, shape.intermediate_size)(format.name)
    out: Entry = {}
    for name, cell in zip(("decode", "prefill"), bench.cells, strict=True):
        if cell.wrong or cell.status == "failed":
            raise Refused(f"{cell}: {cell.wrong or cell.reason}")
        found: Entry = {"status": cell.status, "reason": cell.reason}
        if cell.status == "measured":
            found["ms"] = spread(r.ms for r in cell.rounds)
            found["gbps"] = spread(r.gbps for r in cell.rounds)
            found["read_fraction"] = spread(r.read_fraction for r in cell.rounds)
            found["gops"] = spread(r.gops for r in cell.rounds)
            found["peak_fraction"] = spread(r.peak_fraction for r in cell.rounds)
        out[name] = found
        if cell.read_ratio is not None:
            out["packed_bits"] = cell.read_ratio * stored * 8 / shape.expert_weights
    return out


def running_variants(backends: list[str]) -> list[Variant]:
    """The instruction sets of this machine, of some backends or of all."""
    from ktcore.dispatch import registry
    from ktcore.testing.variants import all_variants

    known = registry.backends()
    for name in backends:
        if name not in known:
            raise Refused(f"--backend: there is no {name!r}; there are: {', '.join(known)}")
    return [
        v for v in all_variants() if v.why_not is None and (not backends or v.backend in backends)
    ]


# ------------------------------------------------------------------------------------ what is kept


def results_file(name: str) -> Path:
    return RESULTS / f"formats-{name}.json"


def load(path: Path) -> Results:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise Refused(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != "formats":
        raise Refused(f"{path}: not written by this script; move it away")
    if found["schema_version"] != SCHEMA_VERSION:
        raise Refused(
            f"{path}: schema_version {found['schema_version']}, expected {SCHEMA_VERSION}; measure "
            "anew: move it away"
        )
    return found


def opened(path: Path, settings: dict[str, Any]) -> Results:
    """What a file holds already, to add to, or an empty one for this machine."""
    from ktcore.dispatch import probe

    if not path.exists():
        machine = {"cpu": probe.cpu_brand(), "system": probe.machine().system}
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "formats",
            "machine": machine,
            "settings": settings,
            "isas": [],
            "entries": [],
        }
    found = load(path)
    for key, value in settings.items():
        if found["settings"].get(key) != value:
            raise Refused(
                f"{path}: holds figures with {key} {found['settings'].get(key)}, these would have "
                f"{value}: figures of a file must be comparable. Use another --name, or move it "
                "away"
            )
    return found


def keep(path: Path, results: Results, entries: Iterable[Entry]) -> None:
    """Put entries in the place of those that they replace, and write the file, whole or not."""
    import ktcore
    from ktcore.bench.report import replacing

    stamp = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": ktcore.__version__,
    }
    by_key = {(e["format"], e["isa"]): e for e in results["entries"]}
    for entry in entries:
        by_key[entry["format"], entry["isa"]] = entry | stamp
    results["entries"] = list(by_key.values())
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", "utf-8")


def measure(
    path: Path,
    formats: list[Format],
    variants: list[Variant],
    settings: dict[str, Any],
    progress: Callable[[str, int, int], None],
    *,
    timed: bool,
) -> None:
    """Measure formats on variants and keep each in the file as soon as it is complete.

    Speed is that of each backend's most capable variant, the one that it is used with.
    """
    results = opened(path, settings)
    mine = [v.name for v in variants]
    results["isas"] = [n for n in results["isas"] if n not in mine] + mine
    fastest = {v.backend: v.name for v in variants}.values()  # they come in ascending order
    total = len(formats) * len(variants)
    for i, format in enumerate(formats):
        found = errors(format, variants)
        entries = []
        for j, variant in enumerate(variants):
            progress(f"{format.name} on {variant.name}", i * len(variants) + j, total)
            entry: Entry = {
                "format": format.name,
                "backend": variant.backend,
                "isa": variant.name,
                "stored_bits": format.bits,
                "error": found.get(variant.name),
            }
            if timed and variant.name in found and variant.name in fastest:
                entry |= speeds(format, variant, **settings)
            entries.append(entry)
        keep(path, results, entries)


# -------------------------------------------------------------------------------------- emulation


def emulating_extension() -> Path:
    """Build the extension whose AVX-512 kernels run over AVX2; the path of its file."""
    import pybind11

    build = ROOT / "build" / "emulated-avx512"
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or shutil.which("cmake")
    if cmake is None:
        raise Refused("no cmake: `pip install cmake`, or --no-emulation")
    options = (
        *("-S", str(ROOT / "csrc"), "-B", str(build), "-DSKBUILD=ON"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DKTCORE_EMULATE_AVX512=ON"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    for command in (options, ("--build", str(build), "--parallel", "2", "--target", "_C")):
        done = subprocess.run((cmake, *command), capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"the emulation did not build:\n{done.stdout[-3000:]}{done.stderr}")
    (found,) = (p for p in build.glob("_C*") if p.suffix in (".so", ".pyd"))
    return found


def use_extension(path: Path) -> None:
    """Make `import ktcore` take its extension from here; before the first import."""
    spec = importlib.util.spec_from_file_location("ktcore._C", path)
    if spec is None or spec.loader is None:
        raise Refused(f"--extension: {path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ktcore._C"] = module
    spec.loader.exec_module(module)


# ----------------------------------------------------------------------------------------- table


def percent(value: float, digits: int = 2) -> str:
    """Of a fraction, with so many significant digits and never in powers of ten."""
    text = f"{value * 100:.{digits}g}"
    return (f"{float(text):.8f}".rstrip("0").rstrip(".") if "e" in text else text) + " %"


def speed_cell(entry: Entry, call: str, amount: str, share: str) -> str:
    found = entry.get(call)
    if found is None:
        return "—"
    if found["status"] != "measured":
        return "too slow"
    text = f"{found[amount]['median']:.3g}"
    if found[share] is not None:
        text += f" ({found[share]['median']:.0%})".replace("%", " %")
    return text


def cells_of(entry: Entry | None) -> list[str]:
    """Decode, prefill and error of a format in a column group."""
    if entry is None:
        return ["not measured"] * 3
    if entry["error"] is None:
        return ["not served"] * 3
    return [
        speed_cell(entry, "decode", "gbps", "read_fraction"),
        speed_cell(entry, "prefill", "gops", "peak_fraction"),
        percent(entry["error"]),
    ]


TITLES = {"avx2": "AVX2", "avx512": "AVX-512"}


def groups_of(files: dict[str, Results]) -> list[tuple[str, dict[str, Entry]]]:
    """Title and entries by format of each column group: a backend on a machine that has it, with
    its most capable instruction set; emulated where no machine has it.
    """
    found: dict[str, list[tuple[str, str, dict[str, Entry]]]] = {}
    for name, results in sorted(files.items()):
        for isa in results["isas"]:
            entries = {e["format"]: e for e in results["entries"] if e["isa"] == isa}
            if not entries:
                continue
            backend = next(iter(entries.values()))["backend"]
            mine = [g for g in found.setdefault(backend, []) if g[0] != name]
            where = EMULATED if name == EMULATED else results["machine"]["cpu"]
            title = TITLES.get(backend, backend)
            features = isa.removeprefix(backend).replace("_", " ").upper().strip()
            if features:
                title += f" with {features}"
            found[backend] = [*mine, (name, f"{title}, {where}", entries)]
    out = []
    for backend in (*TITLES, *(b for b in found if b not in TITLES)):
        groups = found.get(backend, [])
        real = [g for g in groups if g[0] != EMULATED]
        out += [(title, entries) for _, title, entries in real or groups]
        if not groups:
            out.append((f"{TITLES[backend]}, no such machine", {}))
    return out


def markdown(files: dict[str, Results], formats: list[Format]) -> str:
    """The tables: speeds and errors, then the errors by instruction set."""
    packed: dict[str, float] = {}
    for results in files.values():
        for e in results["entries"]:
            if "packed_bits" in e:
                packed[e["format"]] = e["packed_bits"]
    groups = groups_of(files)
    head = ["format", "bits in the file", "bits packed"]
    for title, _ in groups:
        head += [f"{title}: decode, GB/s", "prefill, Gop/s", "error"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for format in formats:
        bits = f"{packed[format.name]:.2f}" if format.name in packed else "—"
        row = [f"`{format.name}`", f"{format.bits:.2f}", bits]
        for _, entries in groups:
            row += cells_of(entries.get(format.name))
        rows.append(row)
    lines = [*described(files), "", *map(line, rows), "", "Relative error by instruction set:", ""]
    return "\n".join([*lines, *map(line, error_rows(files, formats))])


def line(row: list[str]) -> str:
    return f"| {' | '.join(row)} |"


def described(files: dict[str, Results]) -> list[str]:
    """Where and how the figures were measured, a line for each machine."""
    out = []
    for name, results in sorted(files.items()):
        s, days = results["settings"], sorted(e["date"][:10] for e in results["entries"])
        if not days:
            continue
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        what = f"[{results['machine']['cpu']}](benchmarks/formats-{name}.json)"
        if name == EMULATED:
            out.append(f"- AVX-512 emulated over AVX2 on {what}, errors alone, {when}")
            continue
        layer = f"a layer of {s['model']}"
        if s["experts"]:
            layer += f" with {s['experts']} experts"
        threads = f"{s['threads']} thread{'s' * (s['threads'] > 1)}"
        out.append(f"- {what}, {threads}, {layer}, {s['seconds']:g} s a cell, {when}")
    return out


def error_rows(files: dict[str, Results], formats: list[Format]) -> list[list[str]]:
    found: dict[tuple[str, bool], dict[str, float | None]] = {}
    for name, results in sorted(files.items()):
        for isa in results["isas"]:
            column = found.setdefault((isa, name == EMULATED), {})
            for e in results["entries"]:
                if e["isa"] == isa:
                    column.setdefault(e["format"], e["error"])
    shown = [key for key in found if not key[1] or (key[0], False) not in found]
    head = [f"{isa}{', emulated' * emulated}" for isa, emulated in shown]
    rows = [["format", *head], ["---"] + ["---:"] * len(head)]
    for format in formats:
        row = [f"`{format.name}`"]
        for key in shown:
            if format.name not in found[key]:
                row.append("not measured")
            else:
                error = found[key][format.name]
                row.append("not served" if error is None else percent(error))
        rows.append(row)
    return rows


def put(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the page's markers."""
    from ktcore.bench.report import replacing

    before = page.read_text("utf-8")
    if before.count(begin) != 1 or before.count(end) != 1:
        raise Refused(f"{page}: expected the lines {begin!r} and {end!r} once each")
    pattern = re.escape(begin) + r".*" + re.escape(end)
    after = re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", before, flags=re.DOTALL)
    with replacing(page) as temporary:
        temporary.write_text(after, "utf-8")


# --------------------------------------------------------------------------------------- command


@contextlib.contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line for each step elsewhere, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield lambda what, done, total: screen.print(f"{done + 1}/{total} {what}", markup=False)
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def main(
    format: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this format (all); repeatable."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this backend (all that run here); repeatable."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of this machine's file (after its processor)."),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Whose layer: a preset of ktcore bench.")
    ] = "Qwen3-30B-A3B",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads (all the CPUs that may be used)."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Time for each decode and each prefill.")
    ] = 3.0,
    experts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only so many experts of the layer (all)."),
    ] = None,
    emulation: Annotated[
        bool, typer.Option(help="Where AVX-512 is missing, measure its errors emulated.")
    ] = True,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Measure nothing; write the table anew.")
    ] = False,
    page: Annotated[
        Path, typer.Option(metavar="FILE", help="The page with the table.", show_default=False)
    ] = PAGE,
    extension: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every stored format on every instruction set; write the table."""
    try:
        if extension is not None:
            use_extension(extension)
        from ktcore import _native
        from ktcore.formats import format_names, get_format

        every = [get_format(n) for n in format_names()]
        chosen = [get_format(n) for n in format] if format else every
        if extension is not None:
            wanted = [v for v in running_variants(["avx512"])]
            with shown() as progress:
                measure(results_file(EMULATED), chosen, wanted, {}, progress, timed=False)
            return
        if not table_only:
            settings = {
                "model": model,
                "threads": threads or _native.available_threads(),
                "seconds": seconds,
                "experts": experts,
            }
            variants = running_variants(backend or [])
            path = results_file(name or _slug())
            with shown() as progress:
                measure(path, chosen, variants, settings, progress, timed=True)
            if emulation and _native.ext is not None and not _has_avx512():
                arguments = [a for f in chosen for a in ("--format", f.name)]
                command = (sys.executable, __file__, "--extension", str(emulating_extension()))
                if subprocess.run((*command, *arguments)).returncode:
                    raise Refused("the emulated run failed, see above")
        files = {p.stem.removeprefix("formats-"): load(p) for p in RESULTS.glob("formats-*.json")}
        put(page, markdown(files, every))
    except (Refused, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _has_avx512() -> bool:
    from ktcore.dispatch import registry

    return registry.why_not("avx512") is None


def _slug() -> str:
    from ktcore.dispatch import probe

    return re.sub(r"[^a-z0-9]+", "-", probe.cpu_brand().lower()).strip("-")


if __name__ == "__main__":
    typer.run(main)
