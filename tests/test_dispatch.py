"""The registry: who serves a request and why, forcing, and backends that are broken or foreign."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktcore
import ktcore.backends
from ktcore import _native
from ktcore._settings import SettingError
from ktcore.backends.native import operators
from ktcore.dispatch import figures, probe, registry
from ktcore.dispatch.registry import Backend, BackendUnavailable, Implementation, Request
from ktcore.ops import linear, moe, route
from ktcore.weights import ExpertWeights, QuantTensor

needs_extension = pytest.mark.skipif(_native.ext is None, reason=str(_native.why))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing forced, and nothing remembered from or for other tests."""
    monkeypatch.delenv("KTCORE_BACKEND", raising=False)
    registry.use()
    registry.rediscover()
    yield
    registry.use()
    registry.rediscover()


def offer(
    name: str,
    *,
    ops=("moe",),
    formats=("bf16",),
    rank=10,
    cost=1.0,
    supports=lambda request, machine: None,
    missing=lambda machine: [],
    self_check=None,
    detail="",
) -> Backend:
    """A backend whose implementations return its name."""
    costs = cost if callable(cost) else lambda request, machine: cost
    return Backend(
        name=name,
        description="of a test",
        rank=rank,
        missing=missing,
        self_check=self_check,
        implementations=lambda: [
            Implementation(
                op,
                name,
                formats if op != "route" else (),
                lambda *args, **kwargs: name,
                costs,
                supports,
                lambda machine: detail,
            )
            for op in ops
        ],
    )


def entry(name: str, load) -> SimpleNamespace:
    return SimpleNamespace(name=name, load=load)


def put(patch: pytest.MonkeyPatch, *backends: Backend, entries=(), builtin=False) -> None:
    """Have these backends, by entry points, and no others unless `builtin`."""
    points = [entry(b.name, lambda b=b: b) for b in backends] + list(entries)
    patch.setattr(metadata, "entry_points", lambda *, group: points if "ktcore" in group else [])
    if not builtin:
        patch.setattr(ktcore.backends, "__path__", [])
    registry.rediscover()


@pytest.fixture
def install(monkeypatch):
    def install(*backends: Backend, **options) -> None:
        put(monkeypatch, *backends, **options)

    return install


MOE = Request("moe", "bf16", 1, 64, 32, 4, 2)


def chosen(request: Request = MOE) -> str:
    return registry.select(request).run()


def reasons(op: str = "moe", **fields) -> dict[str, str]:
    return {c.backend: c.reason for c in registry.explain(op, **fields).candidates}


# ------------------------------------------------------------------------------------- selection


def test_the_cheapest_that_can_is_chosen(install):
    install(
        offer("dear", cost=3.0, rank=99),
        offer("cheap", cost=1.0),
        offer("cheaper", cost=0.5, supports=lambda r, m: "not today"),
        offer("absent", cost=0.1, missing=lambda m: ["a rare device"]),
    )
    assert chosen() == "cheap"
    found = registry.explain("moe")
    assert found.chosen == "cheap" == found.candidates[0].backend
    assert reasons() == {
        "cheap": "chosen: lowest estimated cost",
        "dear": "can serve this, at a higher estimated cost",
        "cheaper": "not today",
        "absent": "this machine lacks a rare device",
    }


def test_rank_breaks_ties_of_cost(install):
    install(offer("low", rank=1), offer("high", rank=2), offer("middle", rank=1))
    assert chosen() == "high"
    assert next(iter(registry.backends())) == "high"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1.0, 2.0, 3.0]), st.integers(0, 2), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=6,
    )
)
def test_choice_is_predicate_then_cost_then_rank(specs):
    with pytest.MonkeyPatch.context() as patch:
        put(
            patch,
            *(
                offer(
                    f"b{i}",
                    cost=cost,
                    rank=rank,
                    supports=lambda r, m, ok=can: None if ok else "no",
                    missing=lambda m, ok=here: [] if ok else ["it"],
                )
                for i, (cost, rank, can, here) in enumerate(specs)
            ),
        )
        able = [(c, -r, f"b{i}") for i, (c, r, can, here) in enumerate(specs) if can and here]
        found = registry.explain("moe")
        assert {c.backend for c in found.candidates} == {f"b{i}" for i in range(len(specs))}
        assert {c.backend for c in found.candidates if c.accepted} == {a[2] for a in able}
        if not able:
            assert found.chosen is None
            with pytest.raises(BackendUnavailable, match="no backend serves moe in bf16 on cpu"):
                registry.select(MOE)
        else:
            best = min(able)
            mine = next(a for a in able if a[2] == chosen())
            assert mine[:2] == best[:2]
            assert found.chosen == chosen()


def test_decode_and_prefill_may_choose_differently(install):
    install(
        offer("lean", cost=lambda r, m: 1.0 + r.tokens),
        offer("heavy", cost=lambda r, m: 20.0 + 0.1 * r.tokens),
    )
    assert [registry.explain("moe", tokens=n).chosen for n in (1, 16, 64, 512)] == [
        "lean",
        "lean",
        "heavy",
        "heavy",
    ]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 99, 100, 101, 513, 1024, 1025])
def test_explain_tells_what_select_does(install, tokens):
    # A crossing at 100 tokens: calls of 65 to 128 tokens share one choice.
    install(offer("small", cost=lambda r, m: r.tokens), offer("large", cost=100.5))
    found = registry.explain("moe", tokens=tokens, num_experts=4)
    assert found.chosen == chosen(Request("moe", "bf16", tokens, num_experts=4))
    assert tokens <= found.judged_tokens < 2 * tokens
    assert found.to_dict()["judged_tokens"] == found.judged_tokens
    assert ("judged as" in str(found)) == (found.judged_tokens != tokens)


def test_a_choice_is_remembered_until_something_changes(install):
    asked = []
    install(offer("one", supports=lambda r, m: asked.append(r)))
    for _ in range(3):
        registry.select(MOE)
    assert len(asked) == 1
    registry.select(Request("moe", "bf16", 1, 64, 32, 4, 2, exact=True))
    assert len(asked) == 2 and asked[1].exact
    with registry.use("one"):
        registry.select(MOE)
    with probe.override():
        registry.select(MOE)
    assert len(asked) == 4


# --------------------------------------------------------------------------------------- explain


def test_explain_gives_each_kind_of_reason(install):
    def wrong():
        raise RuntimeError("1 + 1 came out as 3")

    def gone():
        raise ImportError("no library")

    install(
        offer("good", detail="wide"),
        offer("other_op", ops=("route",)),
        offer("other_format", formats=("int8", "int4_g32")),
        offer("wrong", self_check=wrong),
        entries=[entry("gone", gone)],
    )
    assert reasons() == {
        "good": "chosen: the only one",
        "other_op": "does not implement moe",
        "other_format": "does not take this format",
        "wrong": "self-check failed: RuntimeError: 1 + 1 came out as 3",
        "gone": "import failed: ImportError: no library",
    }
    with registry.use("good"):
        assert reasons()["good"] == "chosen: forced"
    text = str(registry.explain("moe", tokens=2))
    assert text.splitlines()[0] == "moe bf16, 2 token(s): good"
    assert "  * good (wide): chosen: the only one [about 1 s]" in text
    assert "  - gone: import failed" in text


def test_explain_as_a_dictionary_goes_through_json(install):
    install(offer("one", cost=2e-6), offer("two", supports=lambda r, m: "no"))
    found = registry.explain("moe", format="bfloat16", tokens=3, hidden_size=64).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["request"]["format"] == "bf16" and found["request"]["hidden_size"] == 64
    assert found["candidates"][0] == {
        "backend": "one",
        "accepted": True,
        "reason": "chosen: the only one",
        "cost_us": 2.0,
        "detail": "",
    }
    assert found["candidates"][1]["cost_us"] is None


@pytest.mark.parametrize(
    ("op", "format", "message"),
    [("mow", None, "unknown operator 'mow'"), ("moe", "int3", "unknown format 'int3'")],
)
def test_explain_rejects_unknown_names(op, format, message):
    with pytest.raises(ValueError, match=message):
        registry.explain(op, format=format)


def test_explain_is_public():
    assert ktcore.explain("route", num_experts=8, top_k=2).request.format is None


# ------------------------------------------------------------------------------------------- use


@pytest.fixture
def three(install):
    install(*(offer(n, ops=registry.OPS, cost=c) for n, c in (("a", 1.0), ("b", 2.0), ("c", 3.0))))


def both() -> str:
    """Who serves moe and who serves route."""
    return chosen() + chosen(Request("route", num_experts=4, top_k=2))


def test_use_as_a_setting(three):
    assert both() == "aa"
    registry.use("b")
    assert both() == "bb"
    registry.use(route="c")  # replaces, not adds
    assert both() == "ac"
    registry.use("b", route="c")
    assert both() == "bc"
    registry.use()
    assert both() == "aa"


def test_use_as_a_block(three):
    with registry.use("b"):
        assert both() == "bb"
        with registry.use(route="c"):  # adds
            assert both() == "bc"
            with registry.use("a"):  # replaces
                assert both() == "aa"
            with registry.use():  # lifts
                assert both() == "aa"
            assert both() == "bc"
        assert both() == "bb"
    assert both() == "aa"


def test_a_block_within_a_setting(three):
    registry.use("b")
    with registry.use(moe="c"):
        assert both() == "cb"
    with registry.use():
        assert both() == "aa"
    assert both() == "bb"


def test_a_block_ends_with_an_exception(three):
    with pytest.raises(KeyError), registry.use("b"):
        raise KeyError
    assert both() == "aa"


def test_a_block_can_be_entered_again_and_within_itself(three):
    block = registry.use("b")
    with block:
        with block:
            assert both() == "bb"
        assert both() == "bb"
    assert both() == "aa"
    registry.use("c")
    with block:
        assert both() == "bb"
    assert both() == "cc"


def test_blocks_that_are_made_at_the_same_time_leave_nothing_behind(three):
    """As two threads may: both make theirs before either enters it."""
    registry.use("a")
    first, second = registry.use("b"), registry.use("c")
    with first:
        assert both() == "bb"
    with second:
        assert both() == "cc"
    assert both() == "aa"
    for _ in range(20):
        registry.use("b")
    assert len(registry._settings) <= 2  # settings do not pile up
    assert both() == "bb"


def test_blocks_are_their_threads_own_and_settings_are_everyones(three):
    inside, go = threading.Barrier(3), threading.Barrier(3)
    seen: dict[str, list[str]] = {}

    def work(name: str | None) -> None:
        def look() -> None:
            inside.wait(10)
            seen.setdefault(str(name), []).append(both())
            go.wait(10)

        if name is None:
            look()
        else:
            with registry.use(name):
                look()
        seen[str(name)].append(both())

    registry.use("a")
    threads = [threading.Thread(target=work, args=(n,)) for n in ("b", "c", None)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert seen == {"b": ["bb", "aa"], "c": ["cc", "aa"], "None": ["aa", "aa"]}
    registry.use("c")
    thread = threading.Thread(target=work, args=(None,))
    inside, go = threading.Barrier(1), threading.Barrier(1)
    thread.start()
    thread.join(20)
    assert seen["None"][-1] == "cc"


def test_use_rejects_what_cannot_be_and_changes_nothing(install):
    install(offer("a"), offer("b", missing=lambda m: ["a left shoe", "a right shoe"]))
    registry.use("a")
    with pytest.raises(BackendUnavailable, match="there is no backend 'x'; there are: a, b"):
        registry.use("x")
    with pytest.raises(
        BackendUnavailable, match=r"backend 'b' cannot run: .* lacks a left shoe, a right shoe"
    ):
        registry.use(moe="b")
    with pytest.raises(ValueError, match="unknown operator 'mow'"):
        registry.use(mow="a")
    assert registry.forced_backend("moe") == ("a", "use")


def test_what_is_forced_but_does_not_serve_is_an_error(install):
    install(offer("a"), offer("b", formats=("int8",)))
    with registry.use("b"):
        with pytest.raises(BackendUnavailable, match="b: does not take this format"):
            registry.select(MOE)
        assert reasons() == {"b": "does not take this format", "a": "b is forced"}


# -------------------------------------------------------------------------------- KTCORE_BACKEND


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "aa"),
        ("b", "bb"),
        (" b ", "bb"),
        ("route=c", "ac"),
        ("b,route=c", "bc"),
        ("route = c , b,", "bc"),
        ("moe=b,route=c", "bc"),
    ],
)
def test_the_variable_forces(three, monkeypatch, text, expected):
    monkeypatch.setenv("KTCORE_BACKEND", text)
    assert both() == expected


def test_use_goes_before_the_variable(three, monkeypatch):
    monkeypatch.setenv("KTCORE_BACKEND", "b")
    assert registry.forced_backend("moe") == ("b", "KTCORE_BACKEND")
    with registry.use(route="c"):
        assert both() == "bc"
        assert registry.forced_backend("route") == ("c", "use")
    registry.use("c")
    assert both() == "cc"
    registry.use()
    assert both() == "bb"


@pytest.mark.parametrize("text", ["mow=b", "=b", "moe=", "moe=b,x=c", "a=b=c"])
def test_a_malformed_variable_is_an_error(three, monkeypatch, text):
    monkeypatch.setenv("KTCORE_BACKEND", text)
    with pytest.raises(SettingError, match="KTCORE_BACKEND: "):
        registry.select(MOE)
    with pytest.raises(ValueError, match="KTCORE_BACKEND: "):
        registry.explain("moe")


def test_a_variable_that_names_what_cannot_run_is_an_error(install, monkeypatch):
    install(offer("a"), offer("b", missing=lambda m: ["a left shoe"]))
    monkeypatch.setenv("KTCORE_BACKEND", "b")
    with pytest.raises(BackendUnavailable, match=r"KTCORE_BACKEND for moe: .* a left shoe"):
        registry.select(MOE)
    with pytest.raises(BackendUnavailable, match="a left shoe"):
        registry.explain("moe")
    monkeypatch.setenv("KTCORE_BACKEND", "moe=x")
    with pytest.raises(BackendUnavailable, match="there is no backend 'x'; there are: a, b"):
        registry.select(MOE)


# ------------------------------------------------------------- instruction sets this machine lacks


def experts(format: str = "bf16") -> ExpertWeights:
    torch.manual_seed(0)
    return ExpertWeights.from_dense(
        torch.randn(2, 32, 32), torch.randn(2, 32, 32), torch.randn(2, 32, 32), format
    )


@needs_extension
@pytest.mark.parametrize(("backend", "feature"), [("avx512", "avx512f"), ("avx2", "fma")])
def test_forcing_an_instruction_set_that_is_not_there(backend, feature):
    x, ids, weights = torch.randn(1, 32), torch.tensor([[0]]), torch.ones(1, 1)
    with probe.override(disable=(feature,)):
        with pytest.raises(BackendUnavailable, match=f"'{backend}' cannot run.*{feature}"):
            registry.use(backend)
        # Forced before the machine changed: the call itself must say it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KTCORE_BACKEND", backend)
            with pytest.raises(BackendUnavailable, match=feature):
                moe(x, experts(), ids, weights)
        assert moe(x, experts(), ids, weights).isfinite().all()


def unsupported() -> list[str]:
    return [i["name"] for i in _native.ext.isas() if not i["supported"]] if _native.ext else []


@needs_extension
@pytest.mark.parametrize("isa", unsupported() or ["none"])
def test_the_extension_refuses_instructions_that_would_fault(isa):
    if isa == "none":
        pytest.skip("this machine runs every instruction set there are kernels for")
    layout = _native.ext.WeightLayout("bf16")
    packed = _native.ext.PackedExperts(layout, layout, 1, 32, 32)
    zeros = torch.zeros(32, 32, dtype=torch.bfloat16)
    for projection in ("gate", "up", "down"):
        packed.pack(0, projection, zeros.data_ptr(), 0)
    x, out = torch.ones(1, 32), torch.empty(1, 32)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)

    def run(name: str) -> None:
        pointers = ids.data_ptr(), weights.data_ptr(), 1, 0, 0, 0, out.data_ptr()
        _native.ext.moe(name, packed, x.data_ptr(), 0, 1, 32, *pointers, 32, 0, False)

    with pytest.raises(RuntimeError, match=f"'{isa}' cannot run here: this machine lacks"):
        run(isa)
    with pytest.raises(RuntimeError, match="cannot run here"):
        _native.ext.measure_dot_peak(isa, "f32", 1)
    with pytest.raises(ValueError, match="unknown instruction set 'avx1024'"):
        run("avx1024")


@needs_extension
def test_a_machine_that_claims_too_much_is_found_out():
    """As with a hypervisor that misreports: the self-check sees to it that nothing is executed."""
    if not (lacking := unsupported()):
        pytest.skip("this machine runs every instruction set there are kernels for")
    from ktcore.dispatch.machine import Feature

    here = probe.machine()
    all_on = {name: Feature(True, True) for name in probe.FEATURES}
    from dataclasses import replace

    liar = replace(here, cpu=replace(here.cpu, features=all_on))
    with probe.override(liar):
        # Not every instruction set that it claims would be used: a slow one is passed over.
        names = {i["backend"] for i in _native.ext.isas()}
        deceived = [name for name in names if operators.instruction_set(name, liar) in lacking]
        if not deceived:
            pytest.skip("what this machine lacks would not be used")
        for name in deceived:
            assert "self-check failed: RuntimeError" in registry.why_not(name)
            with pytest.raises(BackendUnavailable, match="self-check failed"):
                registry.use(name)


# ------------------------------------------------------------------------------- broken backends


def test_a_failed_self_check_is_reported_and_skipped(install):
    runs = []

    def check():
        runs.append(1)
        raise RuntimeError("moe is off by 12 %")

    install(offer("wrong", cost=0.1, self_check=check), offer("right"))
    assert runs == []  # not before it is needed
    assert chosen() == "right"
    assert registry.why_not("wrong") == "self-check failed: RuntimeError: moe is off by 12 %"
    assert registry.implementations("wrong") == ()
    with pytest.raises(BackendUnavailable, match=r"'wrong' cannot run: self-check failed.*12 %"):
        registry.use("wrong")
    assert runs == [1]


def test_a_self_check_runs_once_and_only_where_the_hardware_is(install):
    runs = []
    install(
        offer("here", self_check=lambda: runs.append("here")),
        offer("elsewhere", missing=lambda m: ["it"], self_check=lambda: runs.append("elsewhere")),
    )
    for tokens in (1, 2, 64):
        registry.explain("moe", tokens=tokens)
    assert runs == ["here"]


def raising(*args):
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (offer("bad", missing=raising), "looking at the machine failed: ZeroDivisionError: oops"),
        (offer("bad", supports=raising), "cannot judge the request: ZeroDivisionError: oops"),
        (offer("bad", cost=raising), "cannot judge the request: ZeroDivisionError: oops"),
        (
            Backend("bad", "", 0, lambda m: [], raising),
            "import failed: ZeroDivisionError: oops",
        ),
        (
            Backend("bad", "", 0, lambda m: [], lambda: ["kernel"]),
            "implementations() gave a str, not an Implementation",
        ),
    ],
    ids=["missing", "supports", "cost", "implementations", "not implementations"],
)
def test_a_broken_backend_takes_nobody_down(install, broken, reason):
    install(broken, offer("good", cost=9.0))
    assert chosen() == "good"
    assert reasons()["bad"] == reason


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (raising, "import failed: ZeroDivisionError: oops"),
        (lambda: 5, "BACKEND is int, not a ktcore.dispatch.Backend"),
        (lambda: offer("good"), "the name 'good' is taken by another backend"),
    ],
    ids=["import", "type", "name"],
)
def test_a_backend_that_cannot_be_loaded(install, load, reason):
    install(offer("good"), entries=[entry("bad", load)])
    assert list(registry.backends()) == ["good"]
    assert registry.import_failures() == {"bad": reason}
    assert registry.why_not("bad") == reason
    assert chosen() == "good"
    with pytest.raises(BackendUnavailable) as error:
        registry.use("bad")
    assert reason in str(error.value)


# ------------------------------------------------------------------------------ foreign backends


def test_a_foreign_backend_serves_calls(install):
    seen = []

    def run(logits, top_k, **options):
        seen.append(options)
        ids = torch.zeros(len(logits), top_k, dtype=torch.int64)
        return ids, torch.full((len(logits), top_k), 0.25)

    foreign = Backend(
        "foreign",
        "",
        1,
        lambda m: [],
        lambda: [Implementation("route", "foreign", (), run, lambda r, m: 0.0)],
    )
    install(foreign, builtin=True)
    _, weights = route(torch.randn(3, 8), 2)
    assert weights.tolist() == [[0.25, 0.25]] * 3 and len(seen) == 1
    with registry.use("reference"):
        assert (route(torch.randn(3, 8), 2)[1] != 0.25).any()
    assert len(seen) == 1
    # What it does not implement goes where it went before.
    assert registry.explain("moe").chosen != "foreign"


def run_python(code: str, path: str | None = None, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KTCORE_")} | env
    if path is not None:
        environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


FOREIGN = """
import torch
from ktcore.dispatch.registry import Backend, Implementation

def run(x, weight, bias, *, exact):
    return torch.full((x.shape[0], weight.shape[0]), 7.0, dtype=x.dtype)

BACKEND = Backend(
    name="tiny",
    description="of a test",
    rank=5,
    missing=lambda machine: [],
    implementations=lambda: [
        Implementation("linear", "tiny", ("bf16",), run, lambda request, machine: 1.0)
    ],
)
"""


def test_a_package_on_the_path_adds_a_backend(tmp_path):
    (tmp_path / "tiny_backend.py").write_text(FOREIGN)
    info = tmp_path / "tiny_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ktcore.backends]\ntiny = tiny_backend:BACKEND\nbroken = no_such_module:BACKEND\n"
    )
    done = run_python(
        "import torch, ktcore\n"
        "from ktcore.dispatch import registry\n"
        "w = ktcore.ops.quantize(torch.randn(4, 32), 'bf16')\n"
        "x = torch.randn(2, 32)\n"
        "assert (ktcore.ops.linear(x, w) != 7).any()\n"  # it costs a second
        "with ktcore.use('tiny'):\n"
        "    assert (ktcore.ops.linear(x, w) == 7).all()\n"
        "print(registry.import_failures())\n",
        path=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "'broken': \"import failed: ModuleNotFoundError: No module named 'no_such_module'" in (
        done.stdout
    )


# ---------------------------------------------------------------------------- without the extension


def test_everything_works_without_the_extension():
    done = run_python(
        "import sys\n"
        "sys.modules['ktcore._C'] = None\n"
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, ktcore\n"
        "    from ktcore import ops\n"
        "    from ktcore.dispatch import registry\n"
        "mine = [w for w in caught if 'ktcore._C' in str(w.message)]\n"
        "assert len(mine) == 1 and mine[0].category is RuntimeWarning, mine\n"
        "print('WARNING', mine[0].message)\n"
        "r = torch.randn\n"
        "e = ktcore.ExpertWeights.from_dense(r(2, 16, 32), r(2, 16, 32), r(2, 32, 16), 'int8')\n"
        "ids, w = ops.route(r(3, 2), 2)\n"
        "assert ops.moe(r(3, 32), e, ids, w).shape == (3, 32)\n"
        "assert ops.linear(r(3, 32), ops.quantize(r(4, 32), 'int4')).shape == (3, 4)\n"
        "for op in registry.OPS:\n"
        "    assert ktcore.explain(op).chosen == 'reference', op\n"
        "print('EXPLAIN', ktcore.explain('moe'))\n"
        "try:\n"
        "    ktcore.use('avx2')\n"
        "except ktcore.BackendUnavailable as error:\n"
        "    print('FORCED', error)\n"
        "assert ktcore.get_num_threads() == 1\n"
        "ktcore.set_num_threads(2)\n"
        "from ktcore.cli import _run\n"
        "assert _run(['probe']) == 0\n"
    )
    assert done.returncode == 0, done.stderr
    for line in ("WARNING", "FORCED"):
        text = next(x for x in done.stdout.splitlines() if x.startswith(line))
        assert "ktcore._C cannot be loaded" in text
    assert "computes with plain torch (backend reference)" in done.stdout
    assert "- avx2: this machine lacks the native extension" in done.stdout
    assert "install a ktcore wheel for this platform" in " ".join(done.stdout.split())


def test_importing_ktcore_loads_nothing_slow():
    done = run_python(
        "import sys, ktcore\n"
        "slow = ('torch', 'numpy', 'transformers', 'triton', 'rich', 'typer', 'matplotlib')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_library_needs_no_package_of_the_commands():
    done = run_python(
        "import sys\n"
        "for name in ('rich', 'typer', 'click', 'tokenizers', 'matplotlib', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import ktcore, ktcore.ops\n"
        "print(ktcore.explain('moe').chosen is not None)"
    )
    assert done.stdout.strip() == "True", done.stderr


# ----------------------------------------------------------------------------------- real backends


@pytest.mark.parametrize("format", ["bf16", "int8", "int4_g32"])
def test_backends_that_run_here_agree(format):
    torch.manual_seed(1)
    x = torch.randn(5, 32)
    weight = QuantTensor.quantize(torch.randn(8, 32), format)
    runs = [name for name in registry.backends() if registry.why_not(name) is None]
    assert "reference" in runs
    results = {}
    for name in runs:
        with registry.use(name):
            assert registry.explain("linear", format=format).chosen == name
            results[name] = linear(x, weight)
    for name, result in results.items():
        error = (result - results["reference"]).norm() / results["reference"].norm()
        assert error <= weight.format.tolerance, name


@needs_extension
def test_every_instruction_set_says_how_it_was_verified():
    rungs = {"run on hardware", "run emulated", "compiled"}
    for isa in _native.ext.isas():
        module = importlib.import_module(f"ktcore.backends.{isa['backend']}")
        assert module.EVIDENCE[isa["name"]] in rungs
    for backend in registry.backends().values():
        assert backend.evidence_on(probe.machine()) in rungs
    bare = replace(probe.machine(), cpu=replace(probe.machine().cpu, features={}))
    assert registry.backends()["avx512"].evidence_on(bare) == "run on hardware"


@needs_extension
@pytest.mark.parametrize(
    ("brand", "bf16", "taken"),
    [
        ("Intel(R) Xeon(R)", None, False),
        ("AMD EPYC", None, True),
        ("AMD EPYC", 0.5, False),  # measured: what the brand suggests no longer counts
        ("Intel(R) Xeon(R)", 2.0, True),
    ],
)
def test_slow_bf16_dot_products_are_not_taken(monkeypatch, brand, bf16, taken):
    machine = probe.machine()
    isa = next(i for i in _native.ext.isas() if i["name"] == "avx512_bf16")
    if missing := machine.cpu.missing(*isa["requires"]):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    peaks = {
        "avx512_bf16": {"bf16": {"1": 100.0 * (bf16 or 1)}},
        "avx512_vnni": {"bf16": {"1": 100.0}},
    }
    known = None if bf16 is None else figures.Figures("", "", {}, peaks)
    monkeypatch.setattr(probe, "cpu_brand", lambda: brand)
    monkeypatch.setattr(figures, "load_cached", lambda machine: known)
    with probe.override():
        chosen = operators.instruction_set("avx512", probe.machine())
        assert chosen == ("avx512_bf16" if taken else "avx512_vnni")
        with operators.held_to("avx512_bf16"):
            assert operators.instruction_set("avx512", probe.machine()) == "avx512_bf16"
        assert operators.instruction_set("avx512", probe.machine()) == chosen
