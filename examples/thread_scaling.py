#!/usr/bin/env python3
"""One expert layer with one, two, four ... threads, beside the read bandwidth of as many.

    python examples/thread_scaling.py
    python examples/thread_scaling.py --format bf16 --tokens 1 --tokens 512 --threads 1 --threads 16

The layer is that of Qwen3-30B-A3B (hidden size 2048, 128 experts of 768, top 8) with random
weights, two of them, which take turns; routing is random at every call. Prints medians in
microseconds and, in brackets, the share of the read bandwidth that the packed weights of the
experts in use come to. The last line is a layer so small that threads only hand over. Needs ktcore
with its extension.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
LAYERS = 2
DIFFERENT = 8  # experts; the others are copies, which packed are memory of their own


def layer(name: str):
    import ktcore
    from ktcore.weights import QuantTensor

    def matrix(rows: int, columns: int) -> QuantTensor:
        some = QuantTensor.quantize(torch.randn(DIFFERENT, rows, columns) * 0.02, name)
        parts = {
            key: part.repeat(EXPERTS // DIFFERENT, *[1] * (part.dim() - 1))
            for key, part in some.parts.items()
        }
        return QuantTensor(some.format, (EXPERTS, rows, columns), parts)

    gate, up = matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN)
    return ktcore.ExpertWeights(gate, up, matrix(HIDDEN, INTERMEDIATE))


def median(call: Callable[[], float], seconds: float) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(call())
    return statistics.median(taken)


def timed(x, experts, ids, weights) -> float:
    from ktcore import ops

    start = time.perf_counter()
    ops.moe(x, experts, ids, weights)
    return time.perf_counter() - start


def main(
    format: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="For each cell.")] = 0.5,
) -> None:
    """Measure how a layer's time falls with threads."""
    import ktcore
    from ktcore import _native
    from ktcore.formats import get_format

    most = _native.available_threads()
    counts = threads or sorted({1 << i for i in range(10) if 1 << i < most} | {most})
    batches = tokens or [1, 4, 16, 64, 512]
    torch.manual_seed(0)
    read = {n: _native.ext.measure_read_bandwidth(n, 1 << 30) for n in counts}
    print("| format | tokens |" + "".join(f" {n} |" for n in counts))
    print("| --- | ---: |" + " ---: |" * len(counts))
    print("| read, GB/s | |" + "".join(f" {read[n]:.1f} |" for n in counts))
    with torch.inference_mode():
        for name in format or ["int4", "q4_k", "int8", "bf16"]:
            layers = [layer(name) for _ in range(LAYERS)]
            expert_bytes = 3 * HIDDEN * INTERMEDIATE * get_format(name).bits / 8
            for batch in batches:
                x = torch.randn(batch, HIDDEN, dtype=torch.bfloat16)
                weights = torch.full((batch, TOP_K), 1 / TOP_K)
                in_use = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** batch)

                def call(x=x, weights=weights, layers=layers) -> float:
                    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(len(x))])
                    return timed(x, layers[int(torch.randint(LAYERS, (1,)))], ids, weights)

                row = []
                for n in counts:
                    ktcore.set_num_threads(n)
                    took = median(call, seconds)
                    share = in_use * expert_bytes / took / 1e9 / read[n]
                    row.append(f" {took * 1e6:.0f} ({share:.0%}) |")
                print(f"| {name} | {batch} |" + "".join(row), flush=True)
        small = ktcore.ExpertWeights.from_dense(*(torch.randn(8, 64, 64) for _ in range(3)), "int8")
        x, ids = torch.randn(1, 64), torch.arange(8)[None]
        row = []
        for n in counts:
            ktcore.set_num_threads(n)
            took = median(lambda: timed(x, small, ids, torch.full((1, 8), 1 / 8)), seconds)
            row.append(f" {took * 1e6:.1f} |")
        print("| 8 experts of 64 x 64, int8 | 1 |" + "".join(row))


if __name__ == "__main__":
    typer.run(main)
