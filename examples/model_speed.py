#!/usr/bin/env python3
"""Whole models, ktcore beside llama.cpp's llama-bench on the same GGUF file.

    python ci/llama_cpp.py                                       # builds llama-bench
    python examples/random_model.py small.gguf --layers 4
    python examples/model_speed.py small.gguf --depth 0 --depth 8192
    python examples/model_speed.py full.gguf --apart --rounds 2  # one at a time in memory

Measures tokens a second of a prompt (pp) and of text written after it (tg), each after so many
positions (depth), in rounds that alternate between the two, and what share of the read bandwidth,
measured in the same rounds, decoding reaches: all packed weights that a token reads, its experts
and keys and values included. Prints a table; --json keeps all figures. Linux, from a checkout.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "ci"))

BATCH = 512  # tokens of a prompt that are computed at once, by both


def llama_bench(model: Path, threads: int, prompt: int, generate: int, depth: int) -> dict:
    """One round: tokens a second by test."""
    import llama_cpp

    command = [
        str(llama_cpp.tools()["llama-bench"]), "-m", str(model), "-t", str(threads), "-r", "1",
        "-p", str(prompt), "-n", str(generate), "-d", str(depth), "-o", "json",
    ]  # fmt: skip
    rows = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {("pp" if row["n_prompt"] else "tg"): row["avg_ts"] for row in rows}


class Ours:
    """A loaded model, and a cache for each depth that is filled once."""

    def __init__(self, path: Path):
        from ktcore.models import load_model

        self.model = load_model(path)
        self.random = torch.Generator().manual_seed(0)
        self.caches: dict[int, Any] = {}

    def tokens(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.model.config.vocab_size, (count,), generator=self.random)

    def cache(self, depth: int) -> Any:
        if depth not in self.caches:
            self.caches[depth] = self.model.new_cache()
            for piece in self.tokens(depth).split(BATCH) if depth else ():
                self.model(piece, self.caches[depth], last=True)
        self.caches[depth].truncate(depth)
        return self.caches[depth]

    def round(self, prompt: int, generate: int, depth: int) -> dict[str, float]:
        """One round, as llama-bench makes it: random tokens, nothing chosen."""
        cache = self.cache(depth)
        pieces = self.tokens(prompt).split(BATCH)
        begin = time.perf_counter()
        for piece in pieces:
            self.model(piece, cache, last=True)
        middle = time.perf_counter()
        cache.truncate(depth)
        tokens = self.tokens(generate).split(1)
        self.model(self.tokens(1), cache)  # llama-bench begins with a token that does not count
        start = time.perf_counter()
        for token in tokens:
            self.model(token, cache)
        end = time.perf_counter()
        return {"pp": prompt / (middle - begin), "tg": generate / (end - start)}

    def bytes_per_token(self, depth: int) -> int:
        """Packed weights that a token reads, and keys and values after `depth` positions."""
        decoder, total = self.model.decoder, 0
        for layer in decoder.layers:
            for projection in layer.projections().values():
                for part in getattr(projection, "parts", [projection]):
                    total += sum(packed.nbytes for packed in part.stored.packed.values())
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None:
                packed = sum(each.nbytes for each in experts.packed.values())
                total += packed * layer.mlp.top_k // experts.num_experts
        total += sum(packed.nbytes for packed in decoder.head.stored.packed.values())
        c = self.model.config
        width = c.num_key_value_heads * c.head_dim * self.cache(depth).dtype.itemsize
        return total + 2 * depth * width * c.num_hidden_layers


def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file.", exists=True, dir_okay=False)],
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    generate: Annotated[int, typer.Option(help="Tokens written.", min=1)] = 128,
    depth: Annotated[list[int] | None, typer.Option(help="Positions before; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of both.", min=1)] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="All rounds of llama.cpp first: both need the memory.")
    ] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Where all figures go.")] = None,
) -> None:
    """Measure a model."""
    import llama_cpp

    import ktcore
    from ktcore import _native
    from ktcore.dispatch.probe import cpu_brand

    if threads is not None:
        ktcore.set_num_threads(threads)
    threads, depths = ktcore.get_num_threads(), depth or [0]
    found: dict[tuple[str, str, int], list[float]] = {}
    reads: dict[int, list[float]] = {d: [] for d in depths}

    def note(who: str, at: int, speeds: dict[str, float]) -> None:
        for test, speed in speeds.items():
            found.setdefault((who, test, at), []).append(speed)
            print(f"  {who:9} {test} at {at}: {speed:.2f} tokens/s", file=sys.stderr, flush=True)

    def theirs(at: int) -> None:
        note("llama.cpp", at, llama_bench(model, threads, prompt, generate, at))

    if apart:
        for at in depths * rounds:
            theirs(at)
    begin = time.perf_counter()
    ours = Ours(model)
    load = time.perf_counter() - begin
    for at in depths * rounds:
        if not apart:
            theirs(at)
        reads[at].append(_native.ext.measure_read_bandwidth(threads, 1 << 28))
        note("ktcore", at, ours.round(prompt, generate, at))
        reads[at].append(_native.ext.measure_read_bandwidth(threads, 1 << 28))
    rows = []
    for at in depths:
        read, nbytes = statistics.median(reads[at]), ours.bytes_per_token(at)
        for test in ("pp", "tg"):
            mine, other = (found[who, test, at] for who in ("ktcore", "llama.cpp"))
            row = {"test": f"{test}{prompt if test == 'pp' else generate}", "depth": at}
            row |= {"ktcore": statistics.median(mine), "llama.cpp": statistics.median(other)}
            row["ahead"] = row["ktcore"] / row["llama.cpp"]
            row["read"] = None if test == "pp" else row["ktcore"] * nbytes / read / 1e9
            row |= {"rounds": {"ktcore": mine, "llama.cpp": other}, "read_gb_s": reads[at]}
            rows.append(row)
    print("| test | depth | ktcore, tokens/s | llama.cpp, tokens/s | ahead | of read |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        read = "" if row["read"] is None else f"{row['read']:.0%}"
        print(
            f"| {row['test']} | {row['depth']} | {row['ktcore']:.1f} | {row['llama.cpp']:.1f} "
            f"| {row['ahead']:.2f} | {read} |"
        )
    if as_json:
        document = {
            "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["python", *(Path(part).name if "/" in part else part for part in sys.argv)],
            "cpu": cpu_brand(),
            "threads": threads,
            "ktcore": ktcore.__version__,
            "llama.cpp": f"of llama-cpp-python {llama_cpp.VERSION}",
            "layers": ours.model.config.num_hidden_layers,
            "bytes_per_token": {str(at): ours.bytes_per_token(at) for at in depths},
            "load_seconds": load,
            "rows": rows,
        }
        as_json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
