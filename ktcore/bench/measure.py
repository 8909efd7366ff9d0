"""Running cells (backend, format, tokens) in interleaved rounds, beside the machine's limits.

Machines are shared and their speed drifts. So every round measures every cell and every limit once,
in shuffled order, and a cell is compared with the limits of the same round.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ktcore import _native
from ktcore.bench.peers import Session, Timed, peers, timed
from ktcore.bench.plan import Plan, Storage, layer_bytes, make_plan, rotation_bytes
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call, Weights, Workload, make_workload
from ktcore.dispatch import figures, probe, registry
from ktcore.formats import get_format

OPS = ("moe", "linear")
ROUNDS = 5
MAX_CALLS = 1000  # of a cell in a round
# A cell whose call is estimated to take this many times a cell's seconds is not even tried.
HOPELESS = 2
# A peer whose result is off by more computes something else.
ANOTHER = 0.1


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        backends: names; empty for every backend that can run here.
        seconds: time that a cell may take, over all rounds.
        skew: exponent of the Zipf distribution of routing, 0 for even routing.
        experts: how many experts to materialise; None for all, or as many as fit.
        peers: names of other implementations to measure as well.
    """

    shape: Shape
    op: str = "moe"
    backends: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("bf16", "int8", "int4_g32")
    tokens: tuple[int, ...] = (1, 16, 512)
    threads: int = 1
    seconds: float = 2.0
    seed: int = 0
    skew: float = 0.0
    experts: int | None = None
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """A cell in one round: milliseconds (median) and work (mean) of a call, and the limits then.

    `nbytes` counts weights in the form that the backend reads.
    """

    number: int
    calls: int
    ms: float
    nbytes: float
    operations: float
    read_gbps: float | None = None
    peak_gops: float | None = None

    @property
    def gbps(self) -> float:
        return self.nbytes / self.ms / 1e6

    @property
    def gops(self) -> float:
        return self.operations / self.ms / 1e6

    @property
    def read_fraction(self) -> float | None:
        return self.gbps / self.read_gbps if self.read_gbps else None

    @property
    def peak_fraction(self) -> float | None:
        return self.gops / self.peak_gops if self.peak_gops else None


@dataclass
class Cell:
    """One combination.

    Attributes:
        backend: its name, or a peer's.
        is_peer: whether it is a peer's.
        isa: instruction set whose dot-product peak it is held against; "" if there is none.
        kind: of dot product.
        status: "pending", then "measured", "skipped" or "failed", the latter two with a `reason`.
        error: relative L2 error of a few tokens of a call against float64 arithmetic.
        wrong: what the check found wrong; empty if nothing.
        seconds: of a call, as known so far.
        read_ratio: bytes of the backend's packed layout for each stored byte; None where it reads
            the stored form.
    """

    backend: str
    format: str
    tokens: int
    isa: str
    kind: str
    status: str = "pending"
    reason: str = ""
    error: float | None = None
    wrong: str = ""
    seconds: float = 0.0
    read_ratio: float | None = None
    rounds: list[Round] = field(default_factory=list)
    is_peer: bool = False

    def __str__(self) -> str:
        return f"{self.backend} {self.format}, {self.tokens} token{'s' * (self.tokens > 1)}"


@dataclass(frozen=True)
class Limits:
    """What the machine reached in one round."""

    read_gbps: float | None
    dot_gops: dict[tuple[str, str], float]  # by instruction set and kind


Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Within the block, both ktcore and torch compute with this many threads."""
    before = _native.get_num_threads(), torch.get_num_threads()
    try:
        _native.set_num_threads(threads)
        torch.set_num_threads(threads)
        yield
    finally:
        _native.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def best_isa() -> str:
    """The most capable instruction set of the extension that this machine runs; "" for none."""
    machine = probe.machine()
    usable = [
        isa["name"]
        for isa in (_native.ext.isas() if _native.ext is not None else ())
        if isa["supported"] and not machine.cpu.missing(*isa["requires"])
    ]
    return usable[-1] if usable else ""


class Bench:
    """A benchmark: made, then `run` once.

    Attributes:
        settings: with names made canonical and `backends` filled in.
        cells: every combination, whatever becomes of it.
        plan: what is materialised; None before `run`.
        limits: per round.
        notes: what a reader of the numbers must know.
        passed_over: backends that cannot run here, with the reason.
        load_average: of the last minute before, None where the system does not tell.

    Raises:
        BackendUnavailable: a backend that was asked for cannot run here, or none can; a peer that
            was asked for lacks something.
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, settings: Settings):
        _check(settings)
        self.passed_over: dict[str, str] = dict(registry.import_failures())
        self.settings = replace(
            settings,
            formats=tuple(dict.fromkeys(get_format(f).name for f in settings.formats)),
            tokens=tuple(dict.fromkeys(settings.tokens)),
            backends=self._backends(settings),
            peers=self._peers(settings),
        )
        self.notes: list[str] = []
        self.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.plan: Plan | None = None
        self.limits: list[Limits] = []
        self.cells = self._cells()
        self._workloads: dict[str, Workload] = {}
        self._sessions: dict[tuple[str, str], Session] = {}  # by peer and format

    def _backends(self, settings: Settings) -> tuple[str, ...]:
        if settings.backends:
            for name in settings.backends:
                with registry.use(name):  # raises for what cannot run
                    pass
            return tuple(dict.fromkeys(settings.backends))
        able = []
        for name in registry.backends():
            reason = registry.why_not(name)
            if reason is None and any(i.op == settings.op for i in registry.implementations(name)):
                able.append(name)
            else:
                self.passed_over[name] = reason or f"does not implement {settings.op}"
        return tuple(able)

    @staticmethod
    def _peers(settings: Settings) -> tuple[str, ...]:
        for name in settings.peers:
            if name not in peers():
                raise ValueError(f"peers: there is no {name!r}; there are: {', '.join(peers())}")
            if why := peers()[name].missing():
                raise registry.BackendUnavailable(f"{name}: {why}")
            if settings.op not in peers()[name].ops:
                raise ValueError(f"peers: {name} has no {settings.op}")
        return tuple(dict.fromkeys(settings.peers))

    def _cells(self) -> list[Cell]:
        s = self.settings
        cells = [
            self._cell(backend, format, tokens)
            for format in s.formats
            for backend in s.backends
            for tokens in s.tokens
        ]
        return cells + [
            Cell(name, format, tokens, best_isa(), get_format(format).dot_kind, is_peer=True)
            for format in s.formats
            for name in s.peers
            for tokens in s.tokens
            if format in peers()[name].formats
        ]

    def _cell(self, backend: str, format: str, tokens: int) -> Cell:
        """A cell, skipped if the backend does not serve it or would take minutes."""
        s, machine = self.settings, probe.machine()
        mine = [i for i in registry.implementations(backend) if i.op == s.op]
        known = {isa["name"] for isa in (_native.ext.isas() if _native.ext is not None else ())}
        detail = mine[0].detail(machine) if mine else ""
        isa = detail if detail in known else best_isa()
        cell = Cell(backend, format, tokens, isa, get_format(format).dot_kind)
        request = registry.Request(
            op=s.op,
            format=format,
            tokens=tokens,
            hidden_size=s.shape.hidden_size,
            intermediate_size=s.shape.intermediate_size,
            num_experts=s.shape.num_experts if s.op == "moe" else 0,
            top_k=s.shape.top_k if s.op == "moe" else 0,
        )
        reasons, costs = [], []
        for i in mine:
            if i.formats and format not in i.formats:
                reasons.append("does not take this format")
            elif why := i.supports(request, machine):
                reasons.append(why)
            else:
                costs.append(i.cost(request, machine))
        if not costs:
            _skip(cell, "; ".join(reasons) or f"does not implement {s.op}")
        elif min(costs) > HOPELESS * s.seconds:
            _skip(
                cell,
                f"one call is estimated at {min(costs):.1f} s, a cell may take {s.seconds:g} s "
                "(--seconds)",
            )
        return cell

    # ------------------------------------------------------------------------------------- running

    def run(self, progress: Progress = lambda what, done, total: None) -> None:
        """Measure. `progress` is told what is done next, how much is done, and of how much.

        Raises:
            DoesNotFit: the weights take more than half of the available memory.
        """
        with use_threads(self.settings.threads), torch.inference_mode():
            try:
                # Copying needs no second thread of torch's, and such threads wait badly for a busy
                # CPU.
                torch.set_num_threads(1)
                self._prepare(progress)
                torch.set_num_threads(self.settings.threads)
                self._check_cells(progress)
                self._rounds(progress)
            finally:
                for session in self._sessions.values():
                    session.close()
                self._sessions.clear()
                self._workloads.clear()

    def _active(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "pending"]

    def _prepare(self, progress: Progress) -> None:
        """Make the weights of every format that a cell needs, packed for those that pack."""
        s = self.settings
        storage: dict[str, Storage] = {}
        packers: dict[str, dict[str, set[str]]] = {}
        for name in dict.fromkeys(cell.format for cell in self._active()):
            cells = [c for c in self._active() if c.format == name]
            users = dict.fromkeys(c.backend for c in cells if not c.is_peer)
            copies = len({c.backend for c in cells if c.is_peer})
            trial = make_workload(s.op, s.shape, name, s.seed, s.skew)
            kind, packers[name] = self._storage(trial, list(users))
            storage[name] = replace(kind, peers=copies)
        self.plan = self._plan(storage)
        shape = replace(s.shape, num_experts=self.plan.experts) if s.op == "moe" else s.shape
        for done, (name, kind) in enumerate(storage.items()):
            layers = self.plan.layers[name]
            progress(f"making weights: {name}", done, len(storage))
            workload = make_workload(s.op, shape, name, s.seed, s.skew)

            sessions = self._open(name, shape)

            def pack(
                weights: Weights, call: Call, name=name, workload=workload, sessions=sessions
            ) -> None:
                for peer, session in sessions.items():
                    try:
                        session.add(weights)
                    except Exception as error:
                        self._fail_all(peer, name, error)
                for backend, layouts in packers[name].items():
                    try:
                        with registry.use(backend):
                            workload.run(weights, call)
                    except Exception as error:
                        self._fail_all(backend, name, error)
                        continue
                    packed = sum(getattr(weights.packed[key], "nbytes", 0) for key in layouts)
                    for cell in self._of(backend, name) if packed else ():
                        cell.read_ratio = packed / weights.nbytes

            workload.build(layers, pack, release=not kind.stored)
            self._workloads[name] = workload

    def _of(self, backend: str, format: str) -> list[Cell]:
        return [c for c in self._active() if (c.backend, c.format) == (backend, format)]

    def _fail_all(self, backend: str, format: str, error: Exception) -> None:
        for cell in self._of(backend, format):
            _fail(cell, error)

    def _open(self, format: str, shape: Shape) -> dict[str, Session]:
        """The peers that are to compute in a format, ready to take weights."""
        opened = {}
        for name in dict.fromkeys(c.backend for c in self._active() if c.is_peer):
            if not self._of(name, format):
                continue
            try:
                session = peers()[name].open(
                    self.settings.op, get_format(format), shape, self.settings.threads
                )
            except Exception as error:
                self._fail_all(name, format, error)
                continue
            self._sessions[name, format] = opened[name] = session
        return opened

    @staticmethod
    def _storage(workload: Workload, users: list[str]) -> tuple[Storage, dict[str, set[str]]]:
        """In which forms a format's users need its weights, and which of them pack, in which
        layouts; by trying.
        """
        stored, packers = False, {}
        call = workload.tiny_call()
        for backend in users:
            weights = workload.tiny()
            try:
                with registry.use(backend):
                    workload.run(weights, call)
                    if weights.packed:
                        packers[backend] = set(weights.packed)
                    weights.release()
                    workload.run(weights, call)
            except Exception:  # it wants the stored form, or fails: then the real call will say how
                stored = True
        return Storage(stored, bool(packers)), packers

    def _plan(self, storage: dict[str, Storage]) -> Plan:
        s, machine = self.settings, probe.machine()
        of = layer_bytes(s.op, s.shape.hidden_size, s.shape.intermediate_size)
        experts = 1 if s.op == "linear" else s.experts or s.shape.num_experts
        rotation = rotation_bytes(machine)
        plan = make_plan(
            of,
            storage,
            experts=experts,
            least_experts=1 if s.op == "linear" else s.shape.top_k,
            rotation=rotation,
            budget=machine.memory.available_bytes // 2,
            fixed_experts=s.experts is not None,
        )
        if s.op == "moe" and plan.experts < s.shape.num_experts:
            fit = f"as many as fit in {plan.budget / 1e9:.1f} GB, half of what is available"
            why = "as asked" if s.experts else fit
            self.notes.append(
                f"{plan.experts} of {s.shape.num_experts} experts are materialised, {why}: batches "
                "touch fewer experts, and more tokens share one, than in the whole model"
            )
        for name, layers in plan.layers.items():
            size = layers * plan.experts * of(name)
            if size < rotation:
                self.notes.append(
                    f"{name}: calls rotate over only {size / 1e6:.0f} MB of weights "
                    f"({rotation / 1e6:.0f} MB wanted): some may come from a cache"
                )
        return plan

    def _check_cells(self, progress: Progress) -> None:
        """Call every cell once on known inputs: is it right, and how long does it take?"""
        checks = {}
        active = self._active()
        for done, cell in enumerate(active):
            progress(f"checking {cell}", done, len(active))
            workload = self._workloads[cell.format]
            key = cell.format, cell.tokens
            if key not in checks:
                checks[key] = workload.check(cell.tokens)
            check = checks[key]
            limit = self.settings.seconds
            try:
                got, cell.seconds = self._timed(cell, check.call)
                if limit < cell.seconds <= HOPELESS * limit:  # a first call may be unlucky
                    cell.seconds = min(cell.seconds, self._timed(cell, check.call)[1])
            except Exception as error:
                _fail(cell, error)
                continue
            cell.error = check.error(got)
            # Peers round as they do: no tolerance was promised for them.
            if not cell.is_peer:
                cell.wrong = check.problem(got, workload.format.tolerance)
            elif not cell.error < ANOTHER:
                _fail(cell, ValueError(f"not the same work: the result is off by {cell.error:.0%}"))
                continue
            if cell.seconds > limit:
                _skip(
                    cell,
                    f"one call took {cell.seconds:.1f} s, a cell may take {limit:g} s (--seconds)",
                )

    @contextlib.contextmanager
    def _runner(self, cell: Cell) -> Iterator[Callable[[Call], Timed]]:
        """What computes and times a cell's calls, its backend forced within the block."""
        if cell.is_peer:
            yield self._sessions[cell.backend, cell.format].run
            return
        workload = self._workloads[cell.format]
        with registry.use(cell.backend):
            yield lambda call: timed(lambda: workload.run(workload.weights[call.layer], call))

    def _timed(self, cell: Cell, call: Call) -> Timed:
        with self._runner(cell) as run:
            return run(call)

    def _rounds(self, progress: Progress) -> None:
        order = random.Random(self.settings.seed)
        peaks = sorted({(c.isa, c.kind) for c in self._active() if c.isa})
        if not peaks:
            self.notes.append(f"no limits were measured: {_native.why or 'nothing to compare'}")
        for number in range(ROUNDS):
            measured: dict[object, float] = {}
            found: dict[int, Round] = {}
            # Everything that a round measures, in an order of its own.
            steps: list[Cell | tuple[str, ...]] = [
                c for c in self._active() if self._takes_part(c, number)
            ]
            steps += [("read",), *peaks] if peaks else []
            order.shuffle(steps)
            for done, step in enumerate(steps):
                what = str(step) if isinstance(step, Cell) else f"the machine: {' '.join(step)}"
                at = number * len(steps) + done
                progress(f"round {number + 1}: {what}", at, ROUNDS * len(steps))
                if isinstance(step, Cell):
                    if (one := self._measure(step, number)) is not None:
                        found[id(step)] = one
                elif step == ("read",):
                    measured[step] = self._read_bandwidth()
                else:
                    measured[step] = _native.ext.measure_dot_peak(*step, self.settings.threads)
            read = measured.pop(("read",), None)
            self.limits.append(Limits(read, dict(measured)))
            for cell in self.cells:
                if id(cell) in found:
                    peak = measured.get((cell.isa, cell.kind))
                    one = replace(found[id(cell)], read_gbps=read, peak_gops=peak)
                    cell.rounds.append(one)
        for cell in self._active():
            cell.status = "measured"

    def _read_bandwidth(self) -> float:
        size = figures.read_bytes(probe.machine())
        return _native.ext.measure_read_bandwidth(self.settings.threads, size)

    def _takes_part(self, cell: Cell, number: int) -> bool:
        """A cell whose calls are long takes part in as many rounds as its seconds allow."""
        rounds = max(1, min(ROUNDS, int(self.settings.seconds / cell.seconds)))
        return (number + 1) * rounds // ROUNDS > number * rounds // ROUNDS

    def _measure(self, cell: Cell, number: int) -> Round | None:
        """A round of a cell; None if it failed."""
        share = self.settings.seconds / ROUNDS
        count = max(1, min(MAX_CALLS, int(share / cell.seconds)))
        workload = self._workloads[cell.format]
        calls = [workload.next_call(cell.tokens) for _ in range(count)]
        times: list[float] = []
        try:
            with self._runner(cell) as run:
                if count > 1:  # threads awake, the choice of implementation made
                    run(workload.next_call(cell.tokens))
                times += [run(call)[1] for call in calls]
        except Exception as error:
            _fail(cell, error)
            return None
        cell.seconds = statistics.median(times)
        return Round(
            number,
            count,
            cell.seconds * 1e3,
            statistics.fmean(c.nbytes for c in calls) * (cell.read_ratio or 1.0),
            statistics.fmean(c.operations for c in calls),
        )


def _check(s: Settings) -> None:
    if s.op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {s.op!r}")
    if not s.formats:
        raise ValueError("formats: expected at least one")
    if not s.tokens or any(n < 1 for n in s.tokens):
        raise ValueError(f"tokens: expected counts of at least 1, got {s.tokens}")
    if s.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {s.threads}")
    if not 0 < s.seconds < float("inf"):
        raise ValueError(f"seconds: expected more than 0, got {s.seconds}")
    if not 0 <= s.skew < float("inf"):
        raise ValueError(f"skew: expected at least 0, got {s.skew}")
    if s.experts is not None and not s.shape.top_k <= s.experts <= s.shape.num_experts:
        raise ValueError(
            f"experts: expected {s.shape.top_k} (top_k) to {s.shape.num_experts} (num_experts), "
            f"got {s.experts}"
        )
    nbytes = layer_bytes(s.op, s.shape.hidden_size, s.shape.intermediate_size)
    for name in (get_format(format).name for format in s.formats):
        try:
            nbytes(name)
        except ValueError as error:
            raise ValueError(f"format: {name} cannot store these sizes: {error}") from None


def _skip(cell: Cell, reason: str) -> None:
    cell.status, cell.reason = "skipped", reason


def _fail(cell: Cell, error: Exception) -> None:
    cell.status, cell.reason = "failed", f"{type(error).__name__}: {error}"
