#!/usr/bin/env python3
"""Attention of one layer, by every CPU backend that runs here, in turns.

    python examples/attention_speed.py
    python examples/attention_speed.py --pages bfloat16 --depth 8192 --tokens 1 --tokens 512

The layer is that of Qwen3-30B-A3B (32 heads that share 4 of keys and values, 128 columns) with
random numbers; `tokens` queries stand at the end of a sequence, behind `depth` positions. Prints
medians in milliseconds and, in brackets, billions of operations a second: four for every query,
head, column and position that it sees. Needs ktcore with its extension.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

HEADS, KV_HEADS, SIZE, PAGE = 32, 4, 128, 32


def call(depth: int, tokens: int, pages: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The tensors of one call, as `ktcore.ops.attention` takes them."""
    positions = depth + tokens
    count = -(-positions // PAGE)
    return (
        torch.randn(tokens, HEADS, SIZE, dtype=torch.bfloat16),
        torch.randn(count, KV_HEADS, SIZE, PAGE).to(pages),
        torch.randn(count, KV_HEADS, PAGE, SIZE).to(pages),
        torch.arange(count, dtype=torch.int32)[None],
        torch.tensor([positions]),
        torch.tensor([0, tokens]),
    )


def main(
    depth: Annotated[
        list[int] | None, typer.Option(min=0, help="Positions before the queries. Repeatable.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Queries. Repeatable.")] = None,
    pages: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    rounds: Annotated[int, typer.Option(help="Turns of each backend.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of a turn, at least.")] = 0.2,
) -> None:
    import ktcore
    from ktcore import ops
    from ktcore.dispatch import registry

    candidates = ktcore.explain("attention").candidates
    backends = sorted(c.backend for c in candidates if c.accepted and c.backend != "reference")
    print(f"| depth | tokens | {' | '.join(backends)} |")
    print("|" + " --- |" * (2 + len(backends)))
    for before in depth or (0, 2048):
        for count in tokens or (1, 8, 64, 512):
            tensors = call(before, count, getattr(torch, pages))
            taken: dict[str, list[float]] = {backend: [] for backend in backends}
            for _ in range(rounds):
                for backend in backends:
                    with registry.use(backend):
                        ops.attention(*tensors)
                        end = time.perf_counter() + seconds
                        while not taken[backend] or time.perf_counter() < end:
                            start = time.perf_counter()
                            ops.attention(*tensors)
                            taken[backend].append(time.perf_counter() - start)
            work = 4 * HEADS * SIZE * count * (before + (count + 1) / 2)
            cells = []
            for backend in backends:
                middle = statistics.median(taken[backend])
                cells.append(f"{middle * 1e3:.2f} ({work / middle / 1e9:.0f})")
            print(f"| {before} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
