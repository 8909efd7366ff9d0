#!/usr/bin/env python3
"""Perplexity of the embedded model with its experts in every format, beside llama.cpp's, and the
table in docs/perplexity.md.

    python examples/perplexity_table.py

builds llama.cpp's tools first (ci/llama_cpp.py; --no-llama-cpp does without), writes the model as
a GGUF file for every type, and lets both programs score the same tokens of the held-out text in
the same windows, as llama-perplexity does: windows of 512 tokens, the second half of each counted.
Figures are kept in docs/benchmarks/perplexity.json row by row. Needs ktcore[test] from a checkout.

The model's rows are 192 and 64 weights long, and K-quants store blocks of 256, so it is first made
wider with zeros, such that it computes the same (see `widened`).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

if TYPE_CHECKING:
    from ktcore.formats import Format
    from ktcore.models import Model

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "ci"), str(ROOT / "examples")]

PAGE = ROOT / "docs" / "perplexity.md"
RESULTS = ROOT / "docs" / "benchmarks" / "perplexity.json"
BEGIN, END = "<!-- table: examples/perplexity_table.py -->", "<!-- end of table -->"

WINDOW = 512
BLOCK = 256  # the largest block of any type: rows must be a multiple of it
SEED = 0
CALIBRATION_WINDOWS = 16
TRIES = 5  # of llama-perplexity
# llama.cpp's own mixtures, made by llama-quantize: every matrix of the model, each in its type.
MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")

Tensors = dict[str, Tensor]
Row = dict[str, Any]


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


# ------------------------------------------------------------------------------------ the model


def _grown(t: Tensor, axis: int, size: int) -> Tensor:
    """Zeros appended along an axis."""
    shape = list(t.shape)
    shape[axis] = size - shape[axis]
    return torch.cat((t, t.new_zeros(shape)), axis)


def _grown_heads(t: Tensor, axis: int, head_dim: int, groups: int, heads: int) -> Tensor:
    """Zero heads appended to each group of query heads that share a key head."""
    apart = t.unflatten(axis, (groups, -1, head_dim))
    return _grown(apart, axis + 1, heads // groups).flatten(axis, axis + 2)


def widened(tensors: Tensors, keys: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A Qwen3-MoE model, by llama.cpp's names, of which every matrix row is a multiple of 256
    weights, and which computes the same but for rounding.

    The columns added are zero: of the hidden state, of the experts' inner one, and as query heads
    of their own. Only RMS norms over the hidden state see them: the mean of squares falls by the
    ratio of the sizes, which epsilon follows, and the norms' weights make up for.
    """
    section = "qwen3moe"
    hidden = keys[f"{section}.embedding_length"]
    inner = keys[f"{section}.expert_feed_forward_length"]
    heads = keys[f"{section}.attention.head_count"]
    groups = keys[f"{section}.attention.head_count_kv"]
    head_dim = keys[f"{section}.attention.key_length"]
    whole = BLOCK // math.gcd(BLOCK, head_dim)  # heads in a block
    more_hidden, more_inner = (-(-n // BLOCK) * BLOCK for n in (hidden, inner))
    more_heads = -(-heads // math.lcm(whole, groups)) * math.lcm(whole, groups)
    ratio = hidden / more_hidden
    out = {}
    for name, t in tensors.items():
        role = name.removesuffix(".weight").rpartition(".")[2]
        if role in ("attn_norm", "ffn_norm", "output_norm"):
            t = _grown(t * math.sqrt(ratio), 0, more_hidden)
        elif role == "attn_output":
            t = _grown(_grown_heads(t, 1, head_dim, groups, more_heads), 0, more_hidden)
        elif role == "ffn_down_exps":
            t = _grown(_grown(t, 2, more_inner), 1, more_hidden)
        elif not role.endswith("_norm"):
            t = _grown(t, t.dim() - 1, more_hidden)
            if role == "attn_q":
                t = _grown_heads(t, 0, head_dim, groups, more_heads)
            elif role in ("ffn_gate_exps", "ffn_up_exps"):
                t = _grown(t, 1, more_inner)
        out[name] = t.contiguous()
    epsilon = f"{section}.attention.layer_norm_rms_epsilon"
    changed = {
        f"{section}.embedding_length": more_hidden,
        f"{section}.expert_feed_forward_length": more_inner,
        f"{section}.attention.head_count": more_heads,
        epsilon: keys[epsilon] * ratio,
    }
    return out, keys | changed


def write(path: Path, tensors: Tensors, keys: dict[str, Any], format: Format) -> None:
    """A GGUF file with the experts in a format and all else in float32."""
    import gguf
    import gguf_models

    writer = gguf.GGUFWriter(str(path), keys["general.architecture"])
    gguf_models.add_metadata(writer, keys)
    for name, t in tensors.items():
        kind, data = "F32", t
        if "_exps" in name and format.name != "f32":
            kind, data = file_type(format), format.quantize(t)["data"]
        if data.dtype == torch.bfloat16:
            data = data.view(torch.uint8)
        writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_type(format: Format) -> str:
    """What llama.cpp calls a format."""
    return format.name.removeprefix("gguf_").upper()


def is_file_type(format: Format) -> bool:
    import gguf

    is_own = format.name in ("mxfp4", "nvfp4")  # other layouts, of the same name
    return not is_own and file_type(format) in gguf.GGMLQuantizationType.__members__


# ---------------------------------------------------------------------------------- both programs


class LlamaCpp:
    """llama.cpp's tools, with everything but the weights in float32."""

    def __init__(self, programs: dict[str, Path], folder: Path, threads: int):
        self.programs, self.folder, self.threads = programs, folder, threads

    def run(self, tool: str, *arguments: object) -> str:
        command = [str(self.programs[tool]), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            raise Refused(f"{' '.join(command)} failed:\n{output[-3000:]}")
        return output

    def perplexity(self, model: Path, text: Path) -> float:
        for _ in range(TRIES):
            output = self.run(
                "llama-perplexity", "-m", model, "-f", text, "-c", WINDOW, "-b", WINDOW,
                "-t", self.threads, "-ctk", "f32", "-ctv", "f32", "-fa", "off",
            )  # fmt: skip
            found = estimate(output)
            if found is not None:
                return found
        raise Refused(f"llama-perplexity gave no estimate:\n{output[-3000:]}")

    def tokens(self, model: Path, text: Path) -> list[int]:
        output = self.run("llama-tokenize", "-m", model, "-f", text, "--ids", "--log-disable")
        return json.loads(output[output.rindex("[") :])

    def importance(self, model: Path, text: Path) -> Path:
        """How much each column matters, which llama-quantize must know for the smallest types."""
        out = self.folder / "importance.gguf"
        self.run("llama-imatrix", "-m", model, "-f", text, "-o", out, "-c", WINDOW,
                 "-t", self.threads)  # fmt: skip
        return out

    def quantize(self, model: Path, out: Path, kind: str, importance: Path | None) -> None:
        """A whole model in one of llama.cpp's mixtures."""
        known = () if importance is None else ("--imatrix", importance)
        self.run("llama-quantize", *known, model, out, kind, self.threads)

    def quantize_experts(self, model: Path, out: Path, kind: str, importance: Path) -> None:
        """A model with its experts in a type, all else as it is."""
        self.run(
            "llama-quantize", "--pure", "--imatrix", importance, "--token-embedding-type", "f32",
            "--tensor-type", "attn=f32", model, out, kind, self.threads,
        )  # fmt: skip


def estimate(output: str) -> float | None:
    """The result that llama-perplexity prints; None where it ended before it had printed it, as it
    may: its log has a thread of its own, which it does not wait for.
    """
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", output)
    return None if found is None else float(found[1])


def score(model: Model, ids: list[int]) -> float:
    """Perplexity as llama-perplexity counts it."""
    from ktcore.models import perplexity

    whole = len(ids) // WINDOW * WINDOW
    return perplexity(model, ids[:whole], WINDOW, unscored=WINDOW // 2)


def rounded(path: Path, format: Format) -> Model:
    """A model with its experts rounded to GPTQ's or AWQ's integers, without their calibration."""
    from ktcore.formats._grouped import GroupedInteger
    from ktcore.models import load_model
    from ktcore.weights import ExpertWeights, QuantTensor

    model = load_model(path)
    for layer in model.decoder.layers:
        old = layer.mlp.experts
        layer.mlp.experts = ExpertWeights(
            *(
                QuantTensor(format, w.shape, GroupedInteger.quantize(format, w.dequantize()))
                for w in (old.gate, old.up, old.down)
            )
        )
    return model


def bits_of(path: Path) -> float:
    """Stored bits for each weight of a GGUF file's matrices."""
    import gguf

    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)


def calibration(model: Model) -> str:
    """Text that the model writes itself: the held-out one must not be looked at beforehand."""
    from ktcore.models import generate

    text = ""
    for i in range(CALIBRATION_WINDOWS):
        start = model.tokenizer.encode("And")
        ids = generate(model, start, WINDOW, temperature=1.0, seed=SEED + i)
        text += model.tokenizer.decode([*start, *ids]) + "\n"
    return text


# --------------------------------------------------------------------------------------- the rows


def rows(
    formats: list[Format],
    mixtures: list[str],
    text: Path,
    folder: Path,
    peer: LlamaCpp | None,
    done: Callable[[Row], None],
) -> None:
    """Compute a row for each format and mixture, and hand it over."""
    import gguf_models

    from ktcore.formats import get_format
    from ktcore.models import load_model

    tensors, keys = widened(gguf_models.embedded_tensors(), gguf_models.embedded_metadata())
    plain = folder / "f32.gguf"
    write(plain, tensors, keys, get_format("f32"))
    whole = load_model(plain)
    ids = whole.tokenizer.encode(text.read_text("utf-8"))
    if peer is not None and (theirs := peer.tokens(plain, text)) != ids:
        raise Refused(
            f"llama.cpp makes {len(theirs)} other tokens of {text} than ktcore, {len(ids)}"
        )
    importance = None

    def known() -> Path:
        nonlocal importance
        if importance is None:
            assert peer is not None
            own = folder / "calibration.txt"
            own.write_text(calibration(whole), "utf-8")
            importance = peer.importance(plain, own)
        return importance

    def of_file(path: Path, row: Row) -> Row:
        row["ktcore"] = score(load_model(path), ids)
        row["llama_cpp"] = None if peer is None else peer.perplexity(path, text)
        return row

    for format in formats:
        row: Row = {"name": format.name, "kind": "format", "bits": format.bits, "note": ""}
        path = folder / "model.gguf"
        if not is_file_type(format):
            try:
                row["ktcore"] = score(load_model(plain, format.name), ids)
            except TypeError:  # ktcore does not offer to quantise to what others calibrate
                row["ktcore"] = score(rounded(plain, format), ids)
                row["note"] = "rounded to nearest, not calibrated"
            done(row | {"llama_cpp": None})
            continue
        try:
            write(path, tensors, keys, format)
        except TypeError:
            row["note"] = "quantised by llama-quantize"
            if peer is None:
                done(row | {"ktcore": None, "llama_cpp": None})
                continue
            peer.quantize_experts(plain, path, file_type(format), known())
        done(of_file(path, row))
    for name in mixtures if peer is not None else ():
        path = folder / "model.gguf"
        peer.quantize(plain, path, name, known())
        done(of_file(path, {"name": name, "kind": "mixture", "bits": bits_of(path), "note": ""}))


def markdown(found: list[Row], formats: list[Format]) -> str:
    """The tables; rows that were not computed say so."""
    from format_table import line

    by_key = {(row["kind"], row["name"]): row for row in found}
    base = by_key.get(("format", "bf16"), {}).get("ktcore")
    head = ["", "bits", "ktcore", "of bf16's", "llama.cpp", "ktcore - llama.cpp", ""]
    lines = []
    wanted = [
        ("Experts in a format", "format", [(f.name, f.bits) for f in formats]),
        ("llama.cpp's mixtures", "mixture", [(name, None) for name in MIXTURES]),
    ]
    for title, kind, names in wanted:
        lines += [f"{title}:", "", line(head), line(["---", *["---:"] * 5, "---"])]
        for name, bits in names:
            row = by_key.get((kind, name))
            if row is None:
                lines.append(
                    line([f"`{name}`", "" if bits is None else f"{bits:.2f}", "not run", *[""] * 4])
                )
                continue
            ours, theirs = row["ktcore"], row["llama_cpp"]
            lines.append(
                line(
                    [
                        f"`{name}`",
                        f"{row['bits']:.2f}",
                        "—" if ours is None else f"{ours:.4f}",
                        "—" if None in (ours, base) else f"{(ours / base - 1) * 100:+.2f} %",
                        "—" if theirs is None else f"{theirs:.4f}",
                        "—" if None in (ours, theirs) else f"{ours - theirs:+.4f}",
                        row["note"],
                    ]
                )
            )
        lines.append("")
    return "\n".join(lines[:-1])


# --------------------------------------------------------------------------------------- command


def main(
    format: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this format, or mixture of llama.cpp's (all)."),
    ] = None,
    llama_cpp: Annotated[
        bool, typer.Option(help="Build llama.cpp and run it beside; without, its cells stay empty.")
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads (all the CPUs that may be used)."),
    ] = None,
) -> None:
    """Score the embedded model in every format, with llama.cpp beside, and write the table."""
    import format_table
    import llama_cpp as build
    from _environment import SetupError

    from ktcore import _native
    from ktcore.bench.report import replacing
    from ktcore.formats import format_names, get_format
    from ktcore.models.loading import EMBEDDED

    try:
        every = [get_format(name) for name in format_names()]
        asked = format or [*(f.name for f in every), *MIXTURES]
        mixtures = [name for name in asked if name in MIXTURES]
        formats = [get_format(name) for name in asked if name not in MIXTURES]
        kept = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []
        by_key = {(row["kind"], row["name"]): row for row in kept}

        def done(row: Row) -> None:
            numbers = [row["ktcore"], row["llama_cpp"]]
            shown = ", ".join("-" if n is None else f"{n:.4f}" for n in numbers)
            print(f"{row['name']}: {shown} {row['note']}", file=sys.stderr, flush=True)
            by_key[row["kind"], row["name"]] = row | {"date": time.strftime("%Y-%m-%d")}
            content = {"kind": "perplexity", "window": WINDOW, "rows": list(by_key.values())}
            with replacing(RESULTS) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

        count = threads or _native.available_threads()
        _native.set_num_threads(count)
        programs = build.tools() if llama_cpp else None
        with tempfile.TemporaryDirectory() as name:
            peer = None if programs is None else LlamaCpp(programs, Path(name), count)
            rows(formats, mixtures, EMBEDDED / "heldout.txt", Path(name), peer, done)
        text = markdown(list(by_key.values()), every)
        format_table.put(PAGE, text, BEGIN, END)
    except (Refused, format_table.Refused, SetupError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
