"""The documents of `_report`, for people: at 80 columns, without colours when piped.

Texts are plain ASCII, and longer ones are folded, never cut off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktcore.cli._report import PHASES, SHAPE, size
from ktcore.dispatch.registry import WITHOUT_WEIGHTS

GOOD, BAD, WEAK, TITLE = "green", "bold red", "dim", "bold"
STATES = {
    "usable": "usable",
    "os_disabled": "OS disabled",
    "hidden": "hidden",
    "absent": "absent",
}
MOST_THREAD_COUNTS = 8  # columns of figures that fit
MOST_NAMES = 3  # of formats; the table above has them all
MOST_REASONS = 4  # per backend, before the reader is sent to --explain


def console() -> Console:
    """Standard output: `rich` drops colours where it is no terminal, and takes 80 columns."""
    return Console(markup=False, highlight=False, emoji=False)


def _section(out: Console, title: str) -> None:
    out.print()
    out.print(Text(title, TITLE))


def _grid(rows: Iterable[tuple[str | Text, ...]]) -> Table:
    """Columns without lines; all but the last keep their words whole."""
    rows = list(rows)
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for i in range(len(rows[0]) if rows else 0):
        last = i == len(rows[0]) - 1
        table.add_column(no_wrap=not last, overflow="fold")
    for first, *rest in rows:
        table.add_row(Text("  ").append(first), *rest)
    return table


def _list(words: Iterable[object]) -> str:
    return ", ".join(map(str, words)) or "none"


def _ranges(numbers: Iterable[int]) -> str:
    """(0, 1, 2, 5) as "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


# --------------------------------------------------------------------------------------- report


def report(out: Console, data: dict[str, Any]) -> None:
    software = data["software"]
    out.print(
        Text(f"ktcore {data['ktcore']}", TITLE).append(
            f"  Python {software['python']}, torch {software['torch']}, "
            f"{data['machine']['system']}",
            "not bold",
        )
    )
    _machine(out, data)
    _accelerators(out, data["machine"])
    _serves(out, data["serves"])
    _backends(out, data)
    _figures(out, data)
    _gains(out, data["gains"])


def _machine(out: Console, data: dict[str, Any]) -> None:
    cpu, memory = data["machine"]["cpu"], data["machine"]["memory"]
    quota = "no container quota" if cpu["quota"] is None else f"container quota {cpu['quota']:g}"
    limit = memory["limit_bytes"]
    rows: list[tuple[str | Text, ...]] = [
        ("processor", f"{cpu['brand']} ({cpu['architecture']})"),
        (
            "cores",
            f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical; this process: "
            f"CPUs {_ranges(cpu['affinity'])}, {quota}, "
            f"computes with {_plural(data['threads']['compute'], 'thread')}",
        ),
        ("caches", _caches(cpu["caches"])),
        (
            "NUMA nodes",
            "; ".join(
                f"{n['node']}: CPUs {_ranges(n['cpus']) or 'none'}, {size(n['memory_bytes'])}"
                for n in cpu["numa"]
            )
            or "unknown",
        ),
        (
            "memory",
            f"{size(memory['total_bytes'])}, {size(memory['available_bytes'])} available, "
            + ("no container limit" if limit is None else f"container limit {size(limit)}"),
        ),
    ]
    by_state: dict[str, list[str]] = {}
    for name, state in cpu["features"].items():
        by_state.setdefault(state, []).append(name)
    styles = {"usable": GOOD, "os_disabled": BAD, "hidden": BAD, "absent": WEAK}
    label = "features"
    for state, title in STATES.items():
        if names := by_state.get(state):
            rows.append((label, Text(f"{title}: ").append(" ".join(names), styles[state])))
            label = ""
    label = "kernels for"
    for isa in data["instruction_sets"]:
        needs = isa["missing"]
        verdict = Text(f"needs {_list(needs)}", WEAK) if needs else Text("runs", GOOD)
        rows.append((label, Text(f"{isa['name']}: ").append(verdict)))
        label = ""
    if not data["instruction_sets"]:
        why = data["software"]["extension_missing"] or "no instruction set of this architecture"
        rows.append((label, Text(why, BAD)))
    _section(out, "Machine")
    out.print(_grid(rows))


def _caches(caches: list[dict[str, Any]]) -> str:
    kinds = {"data": "d", "instruction": "i"}
    return _list(
        f"L{c['level']}{kinds.get(c['kind'], '')} {size(c['bytes'])}"
        + (f" (shared by {c['shared_by']})" if c["shared_by"] > 1 else "")
        for c in caches
    )


def _accelerators(out: Console, machine: dict[str, Any]) -> None:
    rows: list[tuple[str | Text, ...]] = []
    for d in machine["devices"]:
        detail = f", {d['detail']}" if d["detail"] else ""
        name = f"{d['name']}{detail}, {size(d['memory_bytes'])}"
        rows.append((f"{d['kind']}:{d['index']}", Text(name, GOOD)))
    rows += [(kind, Text(why, WEAK)) for kind, why in machine["no_devices"].items()]
    _section(out, "Accelerators")
    out.print(_grid(rows))


def _choice(row: dict[str, Any]) -> str:
    """The chosen backend; both where decode and prefill differ."""
    names = [row[phase]["backend"] or "NONE" for phase in PHASES]
    return names[0] if len(set(names)) == 1 else " / ".join(names)


def _serves(out: Console, serves: list[dict[str, Any]]) -> None:
    for device in dict.fromkeys(row["device"] for row in serves):
        mine = [row for row in serves if row["device"] == device]
        _section(out, f"Chosen backends on {device}, by weight format and operator")
        if any(" / " in _choice(row) for row in mine):
            phases = " / ".join(f"{p} ({_plural(n, 'token')})" for p, n in PHASES.items())
            out.print(Text(f"  {phases} where they differ", WEAK))
        by_format: dict[str, dict[str, str]] = {}
        for row in mine:
            by_format.setdefault(row["format"] or "", {})[row["op"]] = _choice(row)
        without = by_format.pop("", {})
        ops = list(dict.fromkeys(row["op"] for row in mine if row["format"]))
        # Formats that go the same way share a line.
        lines: dict[tuple[str, ...], list[str]] = {}
        for format, cells in by_format.items():
            lines.setdefault(tuple(cells[op] for op in ops), []).append(format)
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in ("formats", *ops):
            table.add_column(overflow="fold")
        table.add_row(*(Text(t, WEAK) for t in ("  formats", *ops)))
        names = [f"({i})" for i in range(1, len(lines) + 1)] if len(lines) > 1 else ["all"]
        for name, cells in zip(names, lines, strict=True):
            table.add_row(f"  {name}", *map(_coloured, cells))
        out.print(table)
        # Names of formats are many: they get the whole width.
        out.print(_grid([(n, " ".join(f)) for n, f in zip(names, lines.values(), strict=True)]))
        alike: dict[str, list[str]] = {}
        for op, choice in without.items():
            alike.setdefault(choice, []).append(op)
        for choice, names in alike.items():
            out.print(Text(f"  {', '.join(names)}: ").append_text(_coloured(choice)))


def _coloured(choice: str) -> Text:
    return Text(choice, BAD if "NONE" in choice else GOOD)


def _backends(out: Console, data: dict[str, Any]) -> None:
    rows: list[tuple[str | Text, ...]] = []
    for b in data["backends"]:
        variants = [v for v in b["variants"] if v != b["name"]]
        if b["reason"] is not None:
            state = Text(b["reason"], BAD if "failed" in b["reason"] else WEAK)
        else:
            state = Text("runs" + (f" as {_list(variants)}" if variants else ""), GOOD)
            for item in b["passed_over"][:MOST_REASONS]:
                where = _where(item["requests"], data["serves"])
                state.append(f"; not chosen for {where} ({item['reason']})", WEAK)
            if len(b["passed_over"]) > MOST_REASONS:
                state.append("; for more reasons see --explain", WEAK)
        rows.append((b["name"], b["evidence"], state))
    rows += [(name, "", Text(why, BAD)) for name, why in data["import_failures"].items()]
    _section(out, "Backends, and how each was verified")
    out.print(_grid(rows))
    demands: dict[tuple[str, str], list[str]] = {}
    for f in data["forced"]:
        demands.setdefault((f["source"], f["backend"]), []).append(f["op"])
    for (source, name), ops in demands.items():
        out.print(Text(f"  {source} demands {name} for {_list(ops)}", BAD))


def _where(requests: list[dict[str, Any]], serves: list[dict[str, Any]]) -> str:
    """Names a set of requests briefly: what holds for all of something is said once."""
    every = [row | {"phase": phase} for row in serves for phase in PHASES]
    if len(requests) == len(every):
        return "any request"
    several = len({row["device"] for row in serves}) > 1
    parts: list[str] = []
    for device, op in dict.fromkeys((r["device"], r["op"]) for r in requests):
        here, all_of_it = (
            [r for r in some if (r["device"], r["op"]) == (device, op)]
            for some in (requests, every)
        )
        words = [op]
        if len(here) < len(all_of_it):
            formats = list(dict.fromkeys(r["format"] for r in here if r["format"]))
            words += formats if len(formats) <= MOST_NAMES else [f"({len(formats)} formats)"]
            if len(phases := {r["phase"] for r in here}) < len(PHASES):
                words += phases
        if several:
            words.append(f"on {device}")
        parts.append(" ".join(words))
    # Operators without weights are many, and mostly go the same way.
    plain = [op for op in dict.fromkeys(r["op"] for r in every) if op in WITHOUT_WEIGHTS]
    if not several and len(plain) > 1 and set(plain) <= set(parts):
        parts = [part for part in parts if part not in plain] + ["what has no weights"]
    return _list(parts)


def _figures(out: Console, data: dict[str, Any]) -> None:
    figures = data["figures"]
    if figures is None:
        _section(out, "Measured limits: none yet (ktcore-probe --bench)")
        return
    _section(out, f"Measured limits, {figures['measured_at']}")
    counts = sorted(map(int, figures["read_gbps"]))
    while len(counts) > MOST_THREAD_COUNTS:
        del counts[1]  # the smaller ones tell least; --json has them all
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    for _ in counts:
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(t, WEAK) for t in ("  threads", *map(str, counts))))
    table.add_row("  read, GB/s", *_numbers(figures["read_gbps"], counts))
    for isa, kinds in figures["peak_gops"].items():
        for kind, values in kinds.items():
            table.add_row(f"  {isa} {kind}, Gop/s", *_numbers(values, counts))
    out.print(table)


def _numbers(values: dict[str, float], counts: list[int]) -> list[str]:
    shown = (values.get(str(n)) for n in counts)
    return ["-" if v is None else f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in shown]


def _gains(out: Console, gains: list[dict[str, str]]) -> None:
    _section(out, "What could be gained")
    if gains:
        out.print(_grid(("-", f"{g['what']}; {g['how']}") for g in gains))
    else:
        out.print("  nothing that ktcore knows of")


# ---------------------------------------------------------------------------------- explanation


def explanation(out: Console, data: dict[str, Any], measured_at: str | None) -> None:
    r = data["request"]
    what = " ".join(filter(None, (r["op"], r["format"])))
    exact = ", exact" if r["exact"] else ""
    head = Text(
        f"{what} on {r['device']}, {_plural(r['tokens'], 'token')}, {r['dtype']}{exact}: ", TITLE
    )
    chosen = data["chosen"]
    out.print(head.append(chosen or "nothing can serve this", GOOD if chosen else BAD))
    shape = ", ".join(f"{name} {r[name]}" for name in SHAPE)
    out.print(Text(f"  {shape}", WEAK))
    if data["judged_tokens"] != r["tokens"]:
        size_class = _plural(data["judged_tokens"], "token")
        out.print(Text(f"  judged, like all calls of about this size, as {size_class}", WEAK))
    out.print()
    rows: list[tuple[str | Text, ...]] = []
    for c in data["candidates"]:
        taken = c["accepted"] and c["backend"] == chosen
        detail = f" ({c['detail']})" if c["detail"] not in ("", c["backend"]) else ""
        cost = "" if c["cost_us"] is None else f"about {_time(c['cost_us'])}"
        style = GOOD if taken else ""
        mark = "*" if taken else "-"
        rows.append((f"{mark} {c['backend']}{detail}", cost, Text(c["reason"], style)))
    out.print(_grid(rows))
    out.print()
    source = (
        f"Times are estimated from the limits measured at {measured_at}."
        if measured_at
        else "Times are rough estimates: ktcore-probe --bench measures what they rest on."
    )
    out.print(Text(f"  {source}", WEAK))


def _time(us: float) -> str:
    value, unit = next(
        ((us / scale, unit) for scale, unit in ((1e6, "s"), (1e3, "ms")) if us >= scale), (us, "us")
    )
    return f"{value:.3g} {unit}"


# ------------------------------------------------------------------------------------ self-test


def selftest(out: Console, data: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    titles = ("backend", "operator", "format", "passed", "worst error", "tolerance", "")
    for title in titles:
        right = title in ("passed", "worst error", "tolerance")
        table.add_column(justify="right" if right else "left", overflow="fold")
    table.add_row(*(Text(t, WEAK) for t in titles))
    for s in data["summary"]:
        ok = s["passed"] == s["cases"]
        table.add_row(
            s["backend"],
            s["op"],
            s["format"] or "-",
            f"{s['passed']}/{s['cases']}",
            _error(s["worst_error"]),
            _error(s["tolerance"]),
            Text("ok" if ok else "FAILED", GOOD if ok else BAD),
        )
    out.print(table)
    failed = [r for r in data["results"] if not r["passed"]]
    if failed:
        _section(out, f"Failed: {len(failed)} of {_plural(len(data['results']), 'case')}")
        for r in failed:
            name = " ".join(filter(None, (r["backend"], r["op"], r["format"], r["case"])))
            error = f"error {_error(r['error'])}, tolerance {_error(r['tolerance'])}"
            told = r["message"] or error
            out.print(Text(f"  {name}: ", BAD).append(told, "not bold default"))
    elif not data["results"]:
        out.print(Text("no case was run: nothing is verified", BAD))
    else:
        out.print(Text(f"all {_plural(len(data['results']), 'case')} passed", GOOD))


def _error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
