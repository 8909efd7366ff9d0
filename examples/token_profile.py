#!/usr/bin/env python3
"""Where the time of a token goes: the calls of a recorded decode step, operator by operator.

    python examples/random_model.py small.gguf --layers 4
    python examples/token_profile.py small.gguf --depth 512 --threads 2 --threads 16

Prints, for each number of threads, a table of the operators: how many calls a token makes, the
median microseconds of one, and its share of the token; then the median token as a user sees it,
from Python, and the read bandwidth that was measured meanwhile. Needs ktcore[cli] with its
extension.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer

TOKENS = 40


def profile(path: Path, depth: int, threads: int, model) -> None:
    import ktcore
    from ktcore import _native

    ktcore.set_num_threads(threads)
    cache = model.new_cache()
    if depth:
        model(torch.arange(depth) % model.config.vocab_size, cache, last=True)
    token = torch.tensor([1])
    model(token, cache)
    recording = cache.recorded.recording
    calls: list[list[float]] = [[] for _ in range(len(recording))]
    whole: list[float] = []
    read: list[float] = []
    names: list[str] = []
    for i in range(TOKENS):
        cache.reserve(1)
        cache.place(1)
        timed = recording.time()
        cache.advance(1)
        names = [name for name, _ in timed]
        for seconds, (_, taken) in zip(calls, timed, strict=True):
            seconds.append(taken)
        start = time.perf_counter()
        model(token, cache)
        whole.append(time.perf_counter() - start)
        if i % 8 == 0:
            read.append(_native.ext.measure_read_bandwidth(threads, 1 << 28))
    medians: dict[str, list[float]] = defaultdict(list)
    for name, seconds in zip(names, calls, strict=True):
        medians[name].append(statistics.median(seconds) * 1e6)
    total = sum(map(sum, medians.values()))
    print(f"\n{threads} threads, after {depth} positions\n")
    print("| operator | calls | us, smallest | us, largest | us a token | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, each in sorted(medians.items(), key=lambda item: -sum(item[1])):
        print(
            f"| {name} | {len(each)} | {min(each):.1f} | {max(each):.1f} | {sum(each):.0f} "
            f"| {sum(each) / total:.0%} |"
        )
    print(
        f"\nall calls {total:.0f} us; a token from Python {statistics.median(whole) * 1e6:.0f} us; "
        f"read bandwidth {statistics.median(read):.1f} GB/s"
    )


def main(
    model: Annotated[Path, typer.Argument(help="A model that `ktcore run` takes.")],
    depth: Annotated[int, typer.Option(min=0, help="Positions before.")] = 8,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
) -> None:
    """Profile the decode step of a model."""
    from ktcore import _native
    from ktcore.models import load_model

    torch.set_num_threads(1)
    loaded = load_model(model)
    with torch.inference_mode():
        for count in threads or [_native.available_threads()]:
            profile(model, depth, count, loaded)


if __name__ == "__main__":
    typer.run(main)
