"""The native kernels' threads: shared, resized in flight, forked, and asleep when idle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import ktcore
from ktcore import _native
from ktcore.testing.cases import inputs

pytestmark = pytest.mark.skipif(_native.ext is None, reason=str(_native.why))


@pytest.fixture
def call(rng):
    experts = inputs.experts("int8", 8, 256, 160)
    x = torch.randn(33, 256, generator=rng)
    ids = torch.randint(8, (33, 2), generator=rng)
    weights = torch.rand(33, 2, generator=rng)
    return lambda: ktcore.ops.moe(x, experts, ids, weights)


def _in_threads(count, work):
    """Run work(i) in threads; what one raises is raised here."""
    errors = []

    def run(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 2 * (os.cpu_count() or 1) + 1])
def test_any_number_of_threads(call, threads):
    ktcore.set_num_threads(1)
    want = call()
    ktcore.set_num_threads(threads)
    assert ktcore.get_num_threads() == threads
    for _ in range(5):
        assert torch.equal(call(), want)


def test_calls_from_several_python_threads(call):
    ktcore.set_num_threads(2)
    want = call()

    def work(i):
        for _ in range(20):
            assert torch.equal(call(), want)

    _in_threads(4, work)


def test_several_python_threads_pack_the_same_weights_at_once(rng):
    dense = [torch.randn(4, *s, generator=rng) for s in ((48, 65), (48, 65), (65, 48))]
    experts = ktcore.ExpertWeights.from_dense(*dense, "int4")
    x, ids = torch.randn(4, 65, generator=rng), torch.tensor([[0], [1], [2], [3]])
    out = [None] * 4

    def work(i):
        out[i] = ktcore.ops.moe(x, experts, ids, torch.ones(4, 1))

    _in_threads(4, work)
    assert all(torch.equal(o, out[0]) for o in out)


def test_resizing_while_another_thread_computes(call):
    want = call()
    done = threading.Event()

    def work(i):
        if i == 0:
            try:
                for _ in range(60):
                    assert torch.equal(call(), want)
            finally:
                done.set()
        else:
            sizes = 0
            while not done.is_set():
                ktcore.set_num_threads(1 + sizes % 4)
                sizes += 1
                time.sleep(0.001)

    _in_threads(2, work)


def test_backends_forced_in_one_thread_do_not_reach_another(call):
    barrier = threading.Barrier(2, timeout=30)
    seen = {}

    def work(i):
        name = ("reference", None)[i]
        if name:
            with ktcore.use(name):
                barrier.wait()
                seen[i] = ktcore.explain("moe", format="int8", tokens=4).chosen
                barrier.wait()
        else:
            barrier.wait()
            seen[i] = ktcore.explain("moe", format="int8", tokens=4).chosen
            barrier.wait()

    free = ktcore.explain("moe", format="int8", tokens=4).chosen
    _in_threads(2, work)
    assert seen == {0: "reference", 1: free}


def _script(text: str, timeout: float = 60) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


PRELUDE = """
    import os, sys, time, torch, ktcore
    torch.set_num_threads(1)
    torch.manual_seed(0)
    w = ktcore.ExpertWeights.from_dense(
        torch.randn(4, 96, 256), torch.randn(4, 96, 256), torch.randn(4, 256, 96), "int8")
    x, ids = torch.randn(16, 256), torch.arange(16).reshape(16, 1) % 4
    def call():
        return ktcore.ops.moe(x, w, ids, torch.ones(16, 1))
    ktcore.set_num_threads(3)
    want = call()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes(call):
    """The parent's threads do not exist in the child; the child must make its own, and exit."""
    out = _script(
        PRELUDE
        + """
    pid = os.fork()
    if pid == 0:
        ok = torch.equal(call(), want) and ktcore.get_num_threads() == 3
        ktcore.set_num_threads(2)
        ok = ok and torch.equal(call(), want)
        os._exit(0 if ok else 3)
    deadline = time.time() + 30
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.time() > deadline:
            os.kill(pid, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert torch.equal(call(), want)
    print("child", os.waitstatus_to_exitcode(status))
    """
    )
    assert out.strip() == "child 0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forking_while_a_thread_computes():
    _script(
        PRELUDE
        + """
    import threading
    stop = False
    def busy():
        while not stop:
            call()
    thread = threading.Thread(target=busy)
    thread.start()
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if torch.equal(call(), want) else 3)
        deadline = time.time() + 30
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.time() > deadline:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                stop = True
                sys.exit("the child hangs")
            time.sleep(0.01)
        if done[1]:
            stop = True
            sys.exit(f"the child ended with {done[1]}")
    stop = True
    thread.join()
    """
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no such call")
def test_cpus_are_taken_away_and_given_back(call):
    """As `taskset -p`, a container's cpuset or a scheduler does it to a process that computes."""
    ktcore.set_num_threads(2)
    want, allowed = call(), os.sched_getaffinity(0)

    def allow(cpus):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cpus)

    try:
        for cpus in ({min(allowed)}, allowed, {max(allowed)}, allowed):
            allow(cpus)
            for _ in range(10):
                assert torch.equal(call(), want)
    finally:
        allow(allowed)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such signals")
def test_signals_during_calls():
    """What a handler raises arrives after the call, and the pool goes on."""
    _script(
        PRELUDE
        + """
    import signal
    hits = 0
    def count(*_):
        global hits
        hits += 1
    def fail(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    want = call()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert torch.equal(call(), want)
    assert hits > 20, hits
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, fail)
    for _ in range(3):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.003)  # once: none may come outside of `try`
            while True:
                call()
        except KeyboardInterrupt:
            pass
    assert torch.equal(call(), want)
    """
    )


def test_busy_neighbours(call):
    """Processes that take the cores cost time alone."""
    ktcore.set_num_threads(2)
    want = call()
    code = "while True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    try:
        for _ in range(20):
            assert torch.equal(call(), want)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_an_idle_process_uses_no_cpu_time():
    out = _script(
        PRELUDE
        + """
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    print(time.process_time() - before)
    """
    )
    # A single spinning thread would have used all of the half second it got on its core.
    assert float(out) < 0.1


def test_a_process_that_has_computed_exits():
    _script(PRELUDE + "    print('end')")


@pytest.mark.parametrize(("end", "daemon"), [("sys.exit(0)", False), ("os._exit(0)", True)])
def test_exit_while_threads_compute(end, daemon):
    """The main thread goes while others are in calls. (Daemon threads that the interpreter ends in
    an operator of torch make torch abort the process, whoever computes.)"""
    _script(
        PRELUDE
        + f"""
    import threading
    def busy():
        for _ in range(300):
            call()
    for _ in range(3):
        threading.Thread(target=busy, daemon={daemon}).start()
    time.sleep(0.02)
    {end}
    """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_workers_of_a_data_loader_compute():
    out = _script(
        PRELUDE
        + """
    from torch.utils.data import DataLoader, Dataset
    class Layers(Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, index):
            return call()
    loader = DataLoader(Layers(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for batch in loader:
            assert all(torch.equal(one, want) for one in batch)
            assert torch.equal(call(), want)
    print("end")
    """
    )
    assert out.strip() == "end"


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", None, True])
def test_nonsense_is_no_thread_count(threads):
    before = ktcore.get_num_threads()
    with pytest.raises(ValueError, match="threads"):
        ktcore.set_num_threads(threads)
    assert ktcore.get_num_threads() == before
