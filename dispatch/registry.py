"""The operator registry: backends offer implementations, requests choose among them.

A backend is a module `ktcore.backends.<name>`, or an entry point of the group `ktcore.backends`,
that has a `BACKEND`. It says what hardware it needs and, once asked, which operators it implements
for which formats. A request goes to the cheapest implementation that supports it; `explain` tells
for each candidate why it was taken or passed over. A backend that fails to import or fails its
self-check is reported and skipped.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import pkgutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from ktcore import _native
from ktcore._settings import SettingError
from ktcore.dispatch import probe
from ktcore.dispatch.machine import Machine

if TYPE_CHECKING:
    from ktcore.weights.packed_cache import Layout

OPS = (
    *("moe", "linear", "dequantize", "quantize", "route"),
    *("rms_norm", "rotary", "store_kv", "attention", "store_latent", "mla_attention"),
)
WITHOUT_WEIGHTS = frozenset(OPS) - {"moe", "linear", "dequantize", "quantize"}
ENTRY_POINTS = "ktcore.backends"


class BackendUnavailable(RuntimeError):
    """A backend was asked for that does not exist or cannot run here."""


class Request(NamedTuple):
    """What an operator call needs: everything that the choice may depend on.

    `down_format` is that of `moe`'s down matrices where it is not `format`.
    """

    op: str
    format: str | None = None
    tokens: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    exact: bool = False
    down_format: str | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator.

    Attributes:
        op: name of the operator.
        backend: name of the backend that offers it.
        formats: stored weight formats it takes, of those known by name; empty for an operator
            without weights.
        run: the function, with the operator's arguments already checked.
        cost: estimated seconds of a request on a machine.
        supports: None where it can serve a request, else the reason why not.
        detail: which variant would run on a machine, for reports.
        takes: whether it takes a format, by name: also one that a file defined, with a group size
            that none of the named ones has. By default those in `formats`.
        packs: the layout that it packs weights into at first use; None if it reads them as stored.
        recordable: its calls can be recorded: see `ktcore.ops.recording`.
        prepare: given a generation of choices and the arguments of `run`, what serves calls like
            this one sooner: see `ktcore.ops._prepared`.
    """

    op: str
    backend: str
    formats: tuple[str, ...]
    run: Callable
    cost: Callable[[Request, Machine], float]
    supports: Callable[[Request, Machine], str | None] = lambda request, machine: None
    detail: Callable[[Machine], str] = lambda machine: ""
    takes: Callable[[str], bool] | None = None
    packs: Layout | None = None
    recordable: bool = False
    prepare: Callable | None = None


@dataclass(frozen=True)
class Backend:
    """A family of implementations for one kind of hardware.

    Attributes:
        name: what users force it by.
        description: one line for reports.
        rank: breaks ties of cost; higher wins.
        missing: what this machine lacks to run it; empty if it can.
        implementations: called once, when the backend can run.
        self_check: run once before first use; raises if a result is wrong.
        evidence: how it has been verified: "run on hardware", "run emulated" or "compiled"; a
            function where that depends on which of its instruction sets a machine has.
    """

    name: str
    description: str
    rank: int
    missing: Callable[[Machine], list[str]]
    implementations: Callable[[], list[Implementation]]
    self_check: Callable[[], None] | None = None
    evidence: str | Callable[[Machine], str] = "compiled"

    def evidence_on(self, machine: Machine) -> str:
        """How that which this machine runs of it has been verified."""
        return self.evidence if isinstance(self.evidence, str) else self.evidence(machine)


@dataclass(frozen=True)
class Candidate:
    """An implementation in the light of one request. `reason` is why it was taken or not."""

    backend: str
    accepted: bool
    reason: str
    cost: float | None = None
    detail: str = ""
    implementation: Implementation | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Explanation:
    """Every candidate for a request, the chosen one first."""

    request: Request
    chosen: str | None
    candidates: tuple[Candidate, ...]

    @property
    def judged_tokens(self) -> int:
        """The size class of the request, which all calls in it are chosen and estimated by."""
        return _bucket(self.request.tokens)

    def to_dict(self) -> dict:
        return {
            "request": self.request._asdict(),
            "judged_tokens": self.judged_tokens,
            "chosen": self.chosen,
            "candidates": [
                {
                    "backend": c.backend,
                    "accepted": c.accepted,
                    "reason": c.reason,
                    "cost_us": None if c.cost is None else c.cost * 1e6,
                    "detail": c.detail,
                }
                for c in self.candidates
            ],
        }

    def __str__(self) -> str:
        r = self.request
        formats = "+".join(filter(None, (r.format, r.down_format)))
        what = f"{r.op}" + (f" {formats}" if formats else "") + f", {r.tokens} token(s)"
        if self.judged_tokens != r.tokens:
            what += f" (judged as {self.judged_tokens})"
        lines = [f"{what}: {self.chosen or 'nothing can serve this'}"]
        for c in self.candidates:
            name = f"{c.backend} ({c.detail})" if c.detail else c.backend
            cost = "" if c.cost is None else f" [about {_seconds(c.cost)}]"
            lines.append(f"  {'*' if c.backend == self.chosen else '-'} {name}: {c.reason}{cost}")
        return "\n".join(lines)


def _seconds(t: float) -> str:
    return f"{t * 1e6:.3g} us" if t < 1e-3 else f"{t * 1e3:.3g} ms" if t < 1 else f"{t:.3g} s"


# -------------------------------------------------------------------------------------- discovery


@functools.lru_cache(maxsize=1)
def _discovered() -> tuple[dict[str, Backend], dict[str, str]]:
    """Backends by name, and for what failed to import the reason by name."""
    import ktcore.backends

    found: dict[str, Backend] = {}
    failed: dict[str, str] = {}

    def add(name: str, load: Callable[[], object]) -> None:
        try:
            backend = load()
        except Exception as error:  # a broken backend must not take the others down
            failed[name] = f"import failed: {type(error).__name__}: {error}"
            return
        if backend is None:
            return
        if not isinstance(backend, Backend):
            failed[name] = f"BACKEND is {type(backend).__name__}, not a ktcore.dispatch.Backend"
        elif backend.name in found:
            failed[name] = f"the name {backend.name!r} is taken by another backend"
        else:
            found[backend.name] = backend

    for module in pkgutil.iter_modules(ktcore.backends.__path__):
        path = f"{ktcore.backends.__name__}.{module.name}"
        add(module.name, lambda p=path: getattr(importlib.import_module(p), "BACKEND", None))
    for point in metadata.entry_points(group=ENTRY_POINTS):
        add(point.name, point.load)
    return found, failed


def backends() -> dict[str, Backend]:
    """All backends that could be imported, by name, best rank first."""
    found, _ = _discovered()
    return dict(sorted(found.items(), key=lambda item: -item[1].rank))


def import_failures() -> dict[str, str]:
    """Backends that could not be imported, with the reason."""
    return dict(_discovered()[1])


@functools.cache
def _implementations(name: str) -> tuple[Implementation, ...] | str:
    try:
        found = tuple(backends()[name].implementations())
    except Exception as error:
        return f"import failed: {type(error).__name__}: {error}"
    for item in found:
        if not isinstance(item, Implementation):
            return f"implementations() gave a {type(item).__name__}, not an Implementation"
    return found


@functools.cache
def _self_check_failure(name: str) -> str | None:
    check = backends()[name].self_check
    if check is None:
        return None
    try:
        check()
    except Exception as error:
        return f"self-check failed: {type(error).__name__}: {error}"
    return None


def why_not(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    if name not in backends():
        return import_failures().get(name, "there is no such backend")
    machine = probe.machine()
    try:
        missing = backends()[name].missing(machine)
    except Exception as error:
        return f"looking at the machine failed: {type(error).__name__}: {error}"
    if missing:
        return "this machine lacks " + ", ".join(missing)
    implementations = _implementations(name)
    if isinstance(implementations, str):
        return implementations
    return _self_check_failure(name)


def rediscover() -> None:
    """Look for backends afresh: a package came or went, or something was repaired."""
    _discovered.cache_clear()
    _implementations.cache_clear()
    forget_machine()


def forget_machine() -> None:
    """What was found out about backends on a machine no longer holds: it is another one now."""
    _self_check_failure.cache_clear()
    forget_choices()


def implementations(name: str) -> tuple[Implementation, ...]:
    """What a backend that can run here implements; empty for one that cannot."""
    if why_not(name) is not None:
        return ()
    found = _implementations(name)
    return found if isinstance(found, tuple) else ()


# ---------------------------------------------------------------------------------------- forcing

# Within a `use` block; where there is none, the last of the process-wide settings holds.
_forced: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "ktcore_forced", default=None
)
# The settings for the process, each with the `use` that made it: one that is entered as a block is
# taken out again, whatever other threads have set meanwhile. Replaced, never changed.
_settings: tuple[tuple[weakref.ref[use], Mapping[str, str]], ...] = ()
_settings_lock = threading.Lock()


def _parse(text: str, source: str) -> dict[str, str]:
    """`avx2` or `avx512,route=reference` as {operator or "*": backend}."""
    out = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, equals, backend = part.rpartition("=")
        op = op.strip() if equals else "*"
        if op != "*" and op not in OPS:
            raise SettingError(
                f"{source}: unknown operator {op!r}; expected one of {', '.join(OPS)}"
            )
        if not backend.strip():
            raise SettingError(f"{source}: expected BACKEND or OPERATOR=BACKEND, got {part!r}")
        out[op] = backend.strip()
    return out


def _environment() -> dict[str, str]:
    text = os.environ.get("KTCORE_BACKEND", "")
    return _parse(text, "KTCORE_BACKEND") if text else {}


def _used() -> Mapping[str, str]:
    """What `use` holds here, as {operator or "*": backend}."""
    block, settings = _forced.get(), _settings
    if block is not None:
        return block
    return settings[-1][1] if settings else {}


def forced_backend(op: str) -> tuple[str, str] | None:
    """The backend demanded for an operator, and what demands it: "use" or "KTCORE_BACKEND".

    Raises SettingError if the variable is malformed.
    """
    for source, setting in (("use", _used()), ("KTCORE_BACKEND", _environment())):
        if name := setting.get(op) or setting.get("*"):
            return name, source
    return None


def _demand(name: str, source: str) -> None:
    reason = why_not(name)
    if reason is None:
        return
    if name not in backends() and name not in import_failures():
        known = ", ".join(backends())
        raise BackendUnavailable(f"{source}: there is no backend {name!r}; there are: {known}")
    raise BackendUnavailable(f"{source}: backend {name!r} cannot run: {reason}")


class use(contextlib.AbstractContextManager):
    """Force a backend, for the process or for a block.

    ``ktcore.use("avx2")`` holds until the next call, ``with ktcore.use("avx2"):`` for the block (of
    this thread or task); ``use(moe="reference")`` for one operator; ``use()`` lifts what was
    forced. It goes before the variable KTCORE_BACKEND. In a block within a block, one operator's
    backend adds to what holds outside; a backend for all, or none, replaces it.

    Raises:
        BackendUnavailable: it does not exist or cannot run here; the message says what is missing.
    """

    def __init__(self, backend: str | None = None, **per_op: str):
        wanted = {} if backend is None else {"*": backend}
        for op, name in per_op.items():
            if op not in OPS:
                raise ValueError(f"use: unknown operator {op!r}; expected one of {', '.join(OPS)}")
            wanted[op] = name
        for name in wanted.values():
            _demand(name, "use")
        self._wanted = wanted
        self._tokens: list[contextvars.Token] = []
        global _settings
        with _settings_lock:
            # A setting whose `use` is gone can no longer become a block: it hides all before it.
            gone = [i for i, (made_by, _) in enumerate(_settings) if made_by() is None]
            _settings = (*_settings[gone[-1] if gone else 0 :], (weakref.ref(self), wanted))
        forget_choices()

    def __enter__(self) -> use:
        # A block is this thread's own: hand the process back what it had.
        global _settings
        with _settings_lock:
            _settings = tuple(s for s in _settings if s[0]() is not self)
        adds = self._wanted and "*" not in self._wanted
        self._tokens.append(_forced.set({**(_used() if adds else {}), **self._wanted}))
        forget_choices()
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._tokens.pop())
        forget_choices()


# -------------------------------------------------------------------------------------- selection

_choices: dict[tuple, Implementation] = {}
_generation = 0  # how often they were forgotten
_watcher: contextvars.ContextVar[Callable[[Implementation], None] | None] = contextvars.ContextVar(
    "ktcore_watcher", default=None
)

if _native.ext is not None:
    _native.ext.set_hindrances([_forced, _watcher])


def forget_choices() -> None:
    """Choose afresh: what is forced, or the machine, has changed."""
    global _generation
    _generation += 1
    _choices.clear()
    if _native.ext is not None:
        _native.ext.set_generation(_generation)


def generation() -> int | None:
    """Changes whenever `select` may answer otherwise; None where more than that decides: in a block
    of `use`, or while choices are watched."""
    return _generation if _forced.get() is None and _watcher.get() is None else None


def choices() -> tuple:
    """Equal as long as `select` answers as before."""
    return _generation, *_used().items()


@contextlib.contextmanager
def watch_choices(see: Callable[[Implementation], None]) -> Iterator[None]:
    """Within the block `see` is told of all that `select` chooses, on this thread or task."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


def _bucket(tokens: int) -> int:
    """Calls of similar size share a choice: exact to 16 tokens, then by powers of two."""
    return tokens if tokens <= 16 else 1 << (tokens - 1).bit_length()


def select(request: Request) -> Implementation:
    """The implementation that serves a request; remembered until something changes.

    Raises:
        BackendUnavailable: a forced backend cannot run or does not serve this, or nothing does.
    """
    judged = _judged(request, request.tokens)
    key = judged, tuple(_used().items())
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _choose(judged)
    if (see := _watcher.get()) is not None:
        see(chosen)
    return chosen


def _judged(request: Request, tokens: int) -> Request:
    """The request that stands for all with about so many tokens."""
    bucket = _bucket(tokens)
    return request if bucket == request.tokens else request._replace(tokens=bucket)


def _choose(request: Request) -> Implementation:
    candidates = _candidates(request, _demanded(request.op))
    if candidates and candidates[0].accepted:
        assert candidates[0].implementation is not None
        return candidates[0].implementation
    reasons = "; ".join(f"{c.backend}: {c.reason}" for c in candidates)
    formats = " and ".join(filter(None, (request.format, request.down_format)))
    what = f"{request.op}" + (f" in {formats}" if formats else "")
    raise BackendUnavailable(f"no backend serves {what} on {request.device}: {reasons}")


def _demanded(op: str) -> str | None:
    """The backend forced for an operator. Raises BackendUnavailable if it cannot run."""
    forced = forced_backend(op)
    if forced is None:
        return None
    name, source = forced
    _demand(name, f"{source} for {op}")
    return name


def _judge(
    i: Implementation, request: Request, machine: Machine
) -> tuple[str | None, float | None, str]:
    """Why an implementation cannot serve a request (None if it can), its cost, its variant."""
    try:
        detail = i.detail(machine)
        for format, which in ((request.format, "this"), (request.down_format, "down's")):
            if i.formats and format and not (i.takes(format) if i.takes else format in i.formats):
                return f"does not take {which} format", None, detail
        reason = i.supports(request, machine)
        return reason, None if reason else i.cost(request, machine), detail
    except Exception as error:  # a broken backend must not take the others down
        return f"cannot judge the request: {type(error).__name__}: {error}", None, ""


def _candidates(request: Request, forced: str | None) -> list[Candidate]:
    machine = probe.machine()
    out: list[Candidate] = [
        Candidate(name, False, reason) for name, reason in import_failures().items()
    ]
    for name in backends():
        reason = why_not(name)
        if reason is not None:
            out.append(Candidate(name, False, reason))
            continue
        mine = [i for i in implementations(name) if i.op == request.op]
        if not mine:
            out.append(Candidate(name, False, f"does not implement {request.op}"))
        for i in mine:
            reason, cost, detail = _judge(i, request, machine)
            if reason is None and forced is not None and forced != name:
                out.append(Candidate(name, False, f"{forced} is forced", cost, detail))
            elif reason is None:
                out.append(Candidate(name, True, "can serve this", cost, detail, i))
            else:
                out.append(Candidate(name, False, reason, cost, detail))
    rank = {name: b.rank for name, b in backends().items()}
    out.sort(key=lambda c: (not c.accepted, c.cost if c.accepted else 0, -rank.get(c.backend, 0)))
    if out and out[0].accepted:
        others = [c for c in out[1:] if c.accepted]
        why = "forced" if forced else "lowest estimated cost" if others else "the only one"
        out[0] = replace(out[0], reason=f"chosen: {why}")
        out[1:] = [
            replace(c, reason="can serve this, at a higher estimated cost") if c.accepted else c
            for c in out[1:]
        ]
    return out


def explain(
    op: str, *, format: str | None = None, tokens: int = 1, **fields: object
) -> Explanation:
    """Why an operator call would go where it goes.

    Args:
        op: one of `OPS`.
        format: stored weight format, by name or alias, for operators with weights.
        tokens: number of tokens of the call.
        fields: any other field of `Request`: down_format, hidden_size, intermediate_size,
            num_experts, top_k, dtype, device, exact.

    Raises:
        ValueError: unknown operator or format.
        BackendUnavailable: a forced backend does not exist or cannot run.
    """
    if op not in OPS:
        raise ValueError(f"op: unknown operator {op!r}; expected one of {', '.join(OPS)}")
    if format is not None:
        from ktcore.formats import get_format

        format = get_format(format).name
    elif op not in WITHOUT_WEIGHTS:
        format = "bf16"
    if fields.get("down_format") is not None:
        from ktcore.formats import get_format

        fields["down_format"] = get_format(fields["down_format"]).name
    if op in WITHOUT_WEIGHTS:
        format = None
    request = Request(op=op, format=format, tokens=tokens, **fields)
    # As `select` judges it: by size class.
    judged = _judged(request, tokens)
    candidates = tuple(_candidates(judged, _demanded(op)))
    chosen = candidates[0].backend if candidates and candidates[0].accepted else None
    return Explanation(request, chosen, candidates)
