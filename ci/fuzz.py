"""Fuzz what reads model files: damage small sound models in every way and see what becomes of them.

    python3 ci/fuzz.py --count 200000

Every case is a sound model (each GGUF type, split files, safetensors in shards, each
quantization_config) with damage to its headers, its JSON files or its data. It then goes all the
way of a user's file: inspect, load_model, a few tokens, the tokenizer. It must work, or be refused
with a CheckpointError that names the file; another exception, a crash, too much time or memory is
a finding. With --headers files are small and only read, which is ten times as fast.

Cases are numbered: the same seed and number give the same case. A finding is kept with
its files in the folder of --out, and runs again with --replay.

The Python is the one that runs this if it has ktcore and what the tests need, else that of
.ktcore-env, which ci/test.py makes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import _check_python  # noqa: F401
import _environment

CI = Path(__file__).resolve().parent
TARGET = CI / "_fuzz_target.py"
NEEDED = "import gguf, ktcore.cli.inspect, pytest, safetensors, tokenizers, torch"
BATCH, HEADERS_BATCH = 2000, 20_000  # cases of one process
START_SECONDS = 300  # for imports and the sound models, with sanitizers on a busy machine


class Worker:
    """One process at a time, batch after batch."""

    def __init__(self, fuzzer, index):
        self.fuzzer = fuzzer
        self.scratch = fuzzer.folder / f"scratch-{index}"
        self.scratch.mkdir()
        self.process = None
        self.latest = 0.0  # when the process last showed that it is alive

    def run(self):
        while (batch := self.fuzzer.next_batch()) is not None:
            begin, end = batch
            while begin < end and not self.fuzzer.stopped():
                begin = self.one_process(begin, end)

    def one_process(self, begin, end):
        """Run cases from `begin`; the first that is still to be run."""
        log = self.scratch.with_suffix(".log")
        options = ["--models", self.fuzzer.models, "--seed", self.fuzzer.options.seed]
        options += ["--begin", begin, "--end", end, "--megabytes", self.fuzzer.options.megabytes]
        with log.open("wb") as errors:
            self.process = self.fuzzer.start(self.scratch, options, errors)
            self.latest = time.monotonic() + START_SECONDS
            watch = threading.Thread(target=self.watch, daemon=True)
            watch.start()
            for line in self.process.stdout:
                number, model, outcome = line.decode().rstrip("\n").split("\t")
                self.latest = time.monotonic()
                begin = int(number) + 1
                self.fuzzer.count(outcome)
                if outcome not in ("loaded", "refused"):
                    self.fuzzer.found(int(number), model, outcome, errors=log)
            status = self.process.wait()
        watch.join()
        if status == 0 or self.fuzzer.stopped():
            return begin
        case = self.scratch.parent / f"{self.scratch.name}.case"
        if not case.exists():
            tail = log.read_text(errors="replace")[-3000:]
            raise _environment.SetupError(f"the fuzzer's process does not start:\n{tail}")
        what = (
            f"hangs: more than {self.fuzzer.options.seconds} s" if self.hung else "the process died"
        )
        number, model, opened = case.read_text().split("\t")
        if int(number) != begin:  # it died between two cases, so of no fault of ktcore's
            tail = log.read_text(errors="replace")[-3000:]
            raise _environment.SetupError(f"the fuzzer failed before case {begin}:\n{tail}")
        self.fuzzer.count("crashed")
        self.fuzzer.found(
            int(number), model, f"{what} (exit status {status})", log, self.scratch, opened
        )
        return int(number) + 1

    def watch(self):
        """End a process that makes no progress; it says where it was."""
        self.hung = False
        while self.process.poll() is None:
            time.sleep(0.2)
            if self.fuzzer.stopped():
                self.process.terminate()
            elif time.monotonic() > self.latest + self.fuzzer.options.seconds:
                self.hung = True
                self.process.send_signal(signal.SIGABRT)
                time.sleep(5)
                self.process.kill()


class Fuzzer:
    """The run: what is to be done, and what was found.

    Attributes:
        python: the interpreter of the workers.
        extension: a build of the extension in place of the installed one, or None.
        variables: environment variables of the workers.
    """

    def __init__(self, options, python, extension=None, variables=None):
        self.options, self.python, self.extension = options, python, extension
        self.variables = {**os.environ, **(variables or {})}
        self.out = Path(options.out)
        self.lock = threading.Lock()
        self.outcomes = {}
        self.findings = {}
        self.next = options.begin
        self.begun = time.monotonic()
        self.failure = None

    def command(self, scratch, arguments):
        command = [self.python, str(TARGET), "--scratch", str(scratch), *map(str, arguments)]
        if self.options.headers:
            command.append("--headers")
        if self.extension:
            command += ["--extension", str(self.extension)]
        return command

    def start(self, scratch, arguments, errors):
        return subprocess.Popen(
            self.command(scratch, arguments),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=self.variables,
        )  # fmt: skip

    def stopped(self):
        limit = self.options.minutes
        late = limit is not None and time.monotonic() - self.begun > 60 * limit
        return late or self.failure is not None

    def next_batch(self):
        with self.lock:
            last = self.options.begin + self.options.count
            if self.next >= last or self.stopped():
                return None
            batch = HEADERS_BATCH if self.options.headers else BATCH
            begin, self.next = self.next, min(self.next + batch, last)
            return begin, self.next

    def count(self, outcome):
        known = outcome if outcome in ("loaded", "refused", "crashed") else "wrong"
        with self.lock:
            self.outcomes[known] = self.outcomes.get(known, 0) + 1

    def found(self, number, model, outcome, errors, scratch=None, opened=None):
        """Keep a finding; of those that look the same, the first few."""
        text = errors.read_bytes()[-20_000:].decode(errors="replace")
        with self.lock:
            kind = outcome if "died" not in outcome else f"{outcome}: {text[-200:]}"
            same = self.findings.setdefault(kind, [])
            same.append(number)
            if len(same) > 3:
                return
        folder = self.out / f"{self.options.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "files").mkdir(parents=True)
        if scratch is None:
            opened = self.again(number, folder / "files")
        else:
            shutil.copytree(scratch, folder / "files", dirs_exist_ok=True)
        about = {
            "seed": self.options.seed, "number": number, "model": model, "opened": opened,
            "outcome": outcome, "log": text,
        }  # fmt: skip
        (folder / "finding.json").write_text(json.dumps(about, indent=1))
        print(f"\nfinding {folder}: {model}: {outcome[:200]}", file=sys.stderr, flush=True)

    def again(self, number, folder):
        """Make a case's files once more; what is to be opened of them."""
        sys.path.insert(0, str(CI))
        import _fuzz_cases

        models = {
            path.name: {p.name: p.read_bytes() for p in sorted(path.iterdir())}
            for path in sorted(self.models.iterdir())
        }
        _, model, opened = _fuzz_cases.case(models, self.options.seed, number)
        for name, content in model.items():
            if content is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(content)
        return opened

    def progress(self):
        done = sum(self.outcomes.values())
        seconds = time.monotonic() - self.begun
        shares = ", ".join(f"{k} {100 * n / done:.1f} %" for k, n in sorted(self.outcomes.items()))
        return (
            f"{done:,} of {self.options.count:,} cases, {done / seconds:.0f}/s, "
            f"{sum(map(len, self.findings.values()))} findings; {shares}"
        )

    def run(self):
        """All cases; the result as a dict."""
        shared = Path("/dev/shm")
        place = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="ktcore-fuzz-", dir=place) as folder:
            self.folder = Path(folder)
            self.models = self.folder / "models"
            self.models.mkdir()
            made = subprocess.run(
                self.command(folder, ["--make", self.models])[: -2 if self.extension else None],
                capture_output=True,
                check=False,
            )
            if made.returncode:
                raise _environment.SetupError(made.stderr.decode(errors="replace")[-3000:])
            self.begun = time.monotonic()
            workers = [Worker(self, i) for i in range(self.options.jobs)]
            threads = [threading.Thread(target=self.guarded, args=(w,)) for w in workers]
            for thread in threads:
                thread.start()
            self.watch(threads)
        if self.failure is not None:
            raise self.failure
        seconds = time.monotonic() - self.begun
        return {
            "seed": self.options.seed,
            "cases": sum(self.outcomes.values()),
            "seconds": round(seconds, 1),
            "outcomes": self.outcomes,
            "findings": [
                {"outcome": kind, "cases": len(numbers), "numbers": numbers[:20]}
                for kind, numbers in self.findings.items()
            ],
        }

    def guarded(self, worker):
        try:
            worker.run()
        except BaseException as error:
            self.failure = error

    def watch(self, threads):
        live = sys.stderr.isatty()
        shown = time.monotonic()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.5)
                if self.outcomes and (live or time.monotonic() - shown >= 20):
                    shown = time.monotonic()
                    line = self.progress()
                    print(f"\r{line}" if live else line, end="" if live else "\n", file=sys.stderr)
                    sys.stderr.flush()
        except KeyboardInterrupt as error:
            self.failure = error
            for thread in threads:
                thread.join()
        if live:
            print(file=sys.stderr)


def find_python():
    """A Python that has ktcore and what the tests need."""
    running = subprocess.run([sys.executable, "-c", NEEDED], capture_output=True, check=False)
    return sys.executable if running.returncode == 0 else _environment.ready("test")


def parser():
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--count", type=int, default=20_000, help="cases to run (20000)")
    out.add_argument("--headers", action="store_true", help="small files, which are only read")
    out.add_argument("--seed", type=int, default=0, help="of all randomness (0)")
    out.add_argument("--begin", type=int, default=0, help="number of the first case (0)")
    out.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    out.add_argument("--minutes", type=float, help="stop after so long, whatever is left")
    out.add_argument("--seconds", type=float, default=20, help="that a case may take (20)")
    out.add_argument("--megabytes", type=int, default=512, help="that a case may need (512)")
    out.add_argument(
        "--out", default=str(_environment.ROOT / "build" / "fuzz"), help="where findings are kept"
    )
    out.add_argument("--replay", metavar="FINDING", help="run a kept finding again, by its folder")
    out.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return out


def replay(fuzzer, folder):
    """Run a finding's files again; 0 if all is well now."""
    about = json.loads((folder / "finding.json").read_text())
    with tempfile.TemporaryDirectory(prefix="ktcore-fuzz-") as scratch:
        shutil.copytree(folder / "files", scratch, dirs_exist_ok=True)
        command = fuzzer.command(scratch, ["--replay", about["opened"]])
        done = subprocess.run(command, env=fuzzer.variables, capture_output=True, check=False)
    sys.stderr.write(done.stderr.decode(errors="replace"))
    outcome = done.stdout.decode().rstrip("\n").rpartition("\t")[2]
    print(outcome or f"the process died (exit status {done.returncode})")
    return 0 if outcome in ("loaded", "refused") else 1


def report(fuzzer, as_json):
    """Run all cases and print what came of it; 0 without findings."""
    result = fuzzer.run()
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print(fuzzer.progress())
        for finding in result["findings"]:
            print(f"  {finding['cases']} x {finding['outcome'][:300]}: {finding['numbers'][:5]}")
    return 1 if result["findings"] else 0


def main(arguments):
    options = parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    fuzzer = Fuzzer(options, find_python())
    if options.replay:
        return replay(fuzzer, Path(options.replay))
    return report(fuzzer, options.json)


if __name__ == "__main__":
    sys.exit(_environment.run(main, parser().format_help()))
