#!/usr/bin/env python3
"""How far ahead weights are best asked for: one expert layer at several distances.

    python examples/prefetch_distance.py
    python examples/prefetch_distance.py --format q4_k --distance 4096,8192,2 --distance 8192,8192,2
    python examples/prefetch_distance.py --tokens 512 --rounds 2 --distance 0,0,1 --distance 0,0,2

A distance is that for the first-level cache and that for the second, in bytes, with few tokens,
and of how many lines one is asked for with many; -1,-1,-1 is what ktcore takes for this
processor. The layer is that of examples/thread_scaling.py. Distances take
turns, each after some calls that do not count; prints medians in microseconds and, in brackets,
times over that of the first distance in the same round. Needs ktcore with its extension.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from thread_scaling import EXPERTS, HIDDEN, LAYERS, TOP_K, layer, timed

BEST = "-1,-1,-1"
DISTANCES = [BEST, "0,0,1", "4096,4096,2", "8192,8192,2", "2048,8192,1", "4096,8192,2"]
WARM, CALLS = 5, 30  # of a turn; fewer with more than 16 tokens, whose calls are long


def main(
    format: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    distance: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Measure a layer at several distances."""
    from ktcore import _native

    distances = [tuple(int(n) for n in d.split(",")) for d in distance or DISTANCES]
    if any(len(d) != 3 for d in distances):
        raise typer.BadParameter(
            "expected three numbers, such as 4096,8192,2", param_hint="--distance"
        )
    calls = max(3, CALLS * 16 // max(16, tokens))
    warm = min(WARM, calls)
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
    weights = torch.full((tokens, TOP_K), 1 / TOP_K)
    print("| format |" + "".join(f" {a}, {b}, {c} |" for a, b, c in distances))
    print("| --- |" + " ---: |" * len(distances))
    with torch.inference_mode():
        for name in format or ["int4", "q4_k", "q6_k", "int8", "bf16"]:
            layers = [layer(name) for _ in range(LAYERS)]
            times: list[list[float]] = [[] for _ in distances]
            for _ in range(rounds):
                for at, bytes_ahead in enumerate(distances):
                    _native.ext.set_prefetch(*bytes_ahead)
                    taken = []
                    for call in range(warm + calls):
                        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
                        taken.append(timed(x, layers[call % LAYERS], ids, weights))
                    times[at].append(statistics.median(taken[warm:]))
            cells = (
                f" {statistics.median(one) * 1e6:.0f} "
                f"({statistics.median(a / b for a, b in zip(one, times[0], strict=True)):.2f}) |"
                for one in times
            )
            print(f"| {name} |" + "".join(cells), flush=True)
    _native.ext.set_prefetch(*(int(n) for n in BEST.split(",")))


if __name__ == "__main__":
    typer.run(main)
