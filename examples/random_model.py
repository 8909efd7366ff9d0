#!/usr/bin/env python3
"""Write a Qwen3-MoE model of a published one's shapes with random weights: what it takes to load,
and how fast it runs, are those of the real one; what it writes is noise.

    python examples/random_model.py model.gguf               # as llama.cpp's Q4_K_M
    python examples/random_model.py model-folder             # int4 safetensors (compressed-tensors)
    python examples/random_model.py small.gguf --layers 2    # cut short
    ktcore run model.gguf -n 64

The full Qwen3-30B-A3B takes about 18 GB on disk. Tensors are written one after the other, so memory
holds little of it, and the result appears whole or not at all. Entries are normal with variance
1 / columns, as initialised models have them; matrices repeat some random rows, only routers are
random throughout. Needs ktcore[test] from a checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

if TYPE_CHECKING:
    from ktcore.bench.presets import Shape
    from ktcore.formats import Parts

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

SEED = 0
INT4 = "ct4_g32"
UNUSED = 5  # llama.cpp's type of such tokens
RESERVE = 1 << 30  # bytes of the disk that stay free

# Of Qwen/Qwen3-30B-A3B's config.json, and for all shapes alike.
LAYERS, VOCABULARY = 48, 151936
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
ROPE_THETA, EPSILON, CONTEXT = 1000000.0, 1e-6, 40960

Progress = Callable[[str, int, int], None]


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


@dataclass(frozen=True)
class Matrix:
    """A tensor to be written, by its place in a model.

    Attributes:
        name: by llama.cpp's names.
        shape: as torch orders it.
        format: stored; "f32" for what tools leave alone.
    """

    name: str
    shape: tuple[int, ...]
    format: str


# --------------------------------------------------------------------------------------- contents


def more_bits(layer: int, layers: int) -> bool:
    """Whether Q4_K_M stores a layer's v and down as Q6_K, as llama.cpp's `use_more_bits`: the
    first and the last eighth, and every third between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def layer_matrices(shape: Shape, i: int, layers: int) -> list[Matrix]:
    """A layer's tensors in Q4_K_M."""
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    mixed = "q6_k" if more_bits(i, layers) else "q4_k"
    named = [
        ("attn_norm", (hidden,), "f32"),
        ("attn_q", (HEADS * HEAD_DIM, hidden), "q4_k"),
        ("attn_k", (KV_HEADS * HEAD_DIM, hidden), "q4_k"),
        ("attn_v", (KV_HEADS * HEAD_DIM, hidden), mixed),
        ("attn_q_norm", (HEAD_DIM,), "f32"),
        ("attn_k_norm", (HEAD_DIM,), "f32"),
        ("attn_output", (hidden, HEADS * HEAD_DIM), "q4_k"),
        ("ffn_norm", (hidden,), "f32"),
        ("ffn_gate_inp", (experts, hidden), "f32"),
        ("ffn_gate_exps", (experts, inner, hidden), "q4_k"),
        ("ffn_up_exps", (experts, inner, hidden), "q4_k"),
        ("ffn_down_exps", (experts, hidden, inner), mixed),
    ]
    return [Matrix(f"blk.{i}.{name}.weight", size, format) for name, size, format in named]


def outer_matrices(shape: Shape, embedding: str, head: str) -> list[Matrix]:
    """What stands around the layers."""
    size = (VOCABULARY, shape.hidden_size)
    return [
        Matrix("token_embd.weight", size, embedding),
        Matrix("output_norm.weight", (shape.hidden_size,), "f32"),
        Matrix("output.weight", size, head),
    ]


class Contents:
    """Makes the stored parts of tensors."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(SEED)
        self.samples: dict[tuple[str, int], Parts] = {}

    def parts(self, matrix: Matrix) -> Parts:
        from ktcore.bench.workload import random_parts, sample_rows
        from ktcore.formats import get_format

        format = get_format(matrix.format)
        if len(matrix.shape) == 1:
            return {"data": torch.ones(matrix.shape)}
        columns = matrix.shape[-1]
        if "ffn_gate_inp" in matrix.name:
            values = torch.randn(matrix.shape, generator=self.generator)
            return {"data": values / columns**0.5}
        key = (format.name, columns)
        if key not in self.samples:
            self.samples[key] = sample_rows(format, columns, self.generator)
        return random_parts(format, matrix.shape, self.samples[key])


def nbytes(matrices: list[Matrix]) -> int:
    """Bytes of all. Raises Refused if a matrix does not fit its format."""
    from ktcore.formats import get_format

    try:
        return sum(get_format(m.format).nbytes(m.shape) for m in matrices)
    except ValueError as error:
        raise Refused(f"--model: its sizes do not fit the format: {error}") from None


def unused_tokens(known: int) -> list[str]:
    return [f"<unused{i}>" for i in range(known, VOCABULARY)]


# ----------------------------------------------------------------------------------- GGUF, Q4_K_M


def metadata(shape: Shape, layers: int) -> dict[str, Any]:
    import gguf_models

    keys = gguf_models.embedded_metadata()
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    unused = unused_tokens(len(tokens))
    section = "qwen3moe"
    return keys | {
        "general.name": "random weights",
        f"{section}.block_count": layers,
        f"{section}.context_length": CONTEXT,
        f"{section}.embedding_length": shape.hidden_size,
        f"{section}.feed_forward_length": shape.intermediate_size,
        f"{section}.attention.head_count": HEADS,
        f"{section}.attention.head_count_kv": KV_HEADS,
        f"{section}.attention.key_length": HEAD_DIM,
        f"{section}.attention.value_length": HEAD_DIM,
        f"{section}.attention.layer_norm_rms_epsilon": EPSILON,
        f"{section}.rope.freq_base": ROPE_THETA,
        f"{section}.expert_count": shape.num_experts,
        f"{section}.expert_used_count": shape.top_k,
        f"{section}.expert_feed_forward_length": shape.intermediate_size,
        "tokenizer.ggml.tokens": [*tokens, *unused],
        "tokenizer.ggml.token_type": [*types, *[UNUSED] * len(unused)],
    }


def write_gguf(path: Path, shape: Shape, layers: int, progress: Progress) -> None:
    """A file as llama.cpp's Q4_K_M of a Qwen3-MoE model."""
    import gguf
    import gguf_models

    from ktcore.bench.report import replacing

    matrices = outer_matrices(shape, "q4_k", "q6_k")
    matrices += [m for i in range(layers) for m in layer_matrices(shape, i, layers)]
    need_space(path.parent, nbytes(matrices))
    contents = Contents()
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), "qwen3moe")
        try:
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
            gguf_models.add_metadata(writer, metadata(shape, layers))
            for m in matrices:
                kind = gguf.GGMLQuantizationType[m.format.upper()]
                if m.format == "f32":
                    size, dtype = m.shape, "float32"
                else:  # the writer wants the shape in bytes
                    size, dtype = gguf.quant_shape_to_byte_shape(m.shape, kind), "uint8"
                writer.add_tensor_info(m.name, size, gguf_dtype(dtype), nbytes([m]), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, m in enumerate(matrices):
                progress(m.name, done, len(matrices))
                writer.write_tensor_data(contents.parts(m)["data"].numpy())
        finally:
            writer.close()


def gguf_dtype(name: str) -> Any:
    import numpy

    return numpy.dtype(name)


# ------------------------------------------------------------------------------ safetensors, int4


def config(shape: Shape, layers: int) -> dict[str, Any]:
    from ktcore.models.loading import EMBEDDED

    embedded = json.loads((EMBEDDED / "config.json").read_text("utf-8"))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return embedded | {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", r"re:.*mlp\.gate$"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": True}}
            },
        },
    }


def write_tokenizer(folder: Path) -> None:
    """The embedded model's, with unused tokens up to the size of the vocabulary."""
    from ktcore.models.loading import EMBEDDED

    document = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    known = len(vocabulary)
    vocabulary |= {text: known + i for i, text in enumerate(unused_tokens(known))}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")


def folder_names() -> dict[str, str]:
    """Hugging Face's names of a layer's tensors, by llama.cpp's."""
    import gguf_models

    names = {theirs: ours for ours, theirs in gguf_models.LAYER_NAMES.items()}
    return names | {t: f"mlp.experts.{{}}.{o}" for o, t in gguf_models.EXPERT_NAMES.items()}


def int4_tensors(base: str, shape: tuple[int, ...], parts: Parts) -> dict[str, Tensor]:
    """A matrix, or with {} in its name a stack, as compressed-tensors writes it."""
    if len(shape) == 2:
        return {f"{base}.{n}": p for n, p in parts.items()} | {
            f"{base}.weight_shape": torch.tensor(shape)
        }
    out = {}
    for e in range(shape[0]):  # clones: the package refuses tensors that share memory
        one = {name: part[e].clone() for name, part in parts.items()}
        out |= int4_tensors(base.format(e), shape[1:], one)
    return out


def write_folder(folder: Path, shape: Shape, layers: int, progress: Progress) -> None:
    """A folder as llm-compressor writes it: int4 in groups of 32, a file for each layer."""
    from safetensors.torch import save_file

    outer = outer_matrices(shape, "bf16", "bf16")
    inner = [
        [
            Matrix(m.name, m.shape, "f32" if m.format == "f32" else INT4)
            for m in layer_matrices(shape, i, layers)
        ]
        for i in range(layers)
    ]
    need_space(folder.parent, nbytes([m for part in (outer, *inner) for m in part]))
    names = folder_names()
    outer_names = dict(
        zip(
            (m.name for m in outer),
            ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
            strict=True,
        )
    )
    contents, where, total = Contents(), {}, 0
    with replacing_folder(folder) as temporary:
        for i, matrices in enumerate((outer, *inner)):
            file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
            progress(file, i, layers + 1)
            tensors: dict[str, Tensor] = {}
            for m in matrices:
                parts = contents.parts(m)
                if m.name in outer_names:
                    tensors[outer_names[m.name]] = parts["data"].to(torch.bfloat16)
                    continue
                role = m.name.removesuffix(".weight").rpartition(".")[2]
                base = f"model.layers.{i - 1}.{names[role]}"
                if m.format == "f32":
                    tensors[f"{base}.weight"] = parts["data"].to(torch.bfloat16)
                else:
                    tensors |= int4_tensors(base, m.shape, parts)
            save_file(tensors, temporary / file)
            where |= dict.fromkeys(tensors, file)
            total += sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        (temporary / "config.json").write_text(json.dumps(config(shape, layers), indent=2), "utf-8")
        write_tokenizer(temporary)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside; it becomes `folder`, which must not exist, if the block ends well."""
    if folder.exists():
        raise Refused(f"{folder} exists; name a folder that does not, or remove it")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it for its owner alone
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size + RESERVE > free:
        raise Refused(
            f"{folder}: the model takes {size / 1e9:.1f} GB and {RESERVE / 1e9:.1f} GB are to stay "
            f"free, but {free / 1e9:.1f} GB are free there"
        )


# --------------------------------------------------------------------------------------- command


@contextmanager
def shown() -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    screen = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def main(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A name ending in .gguf, or of a new folder.", show_default=False
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose experts' shapes: a preset of ktcore bench. All else is Qwen3-30B-A3B's.",
        ),
    ] = "Qwen3-30B-A3B",
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="How many layers.")] = LAYERS,
) -> None:
    """Write a model of random weights at real shapes: OUT.gguf in Q4_K_M, or a folder in int4."""
    from ktcore.bench.presets import find_preset

    try:
        shape = find_preset(model).shape
        if not out.absolute().parent.is_dir():
            raise Refused(f"{out}: the folder {out.absolute().parent} does not exist")
        with shown() as progress:
            if out.suffix == ".gguf":
                write_gguf(out, shape, layers, progress)
            else:
                write_folder(out, shape, layers, progress)
    except (Refused, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    files = [out] if out.is_file() else list(out.iterdir())
    print(f"{out}: {sum(f.stat().st_size for f in files) / 1e9:.2f} GB, {layers} layers")


if __name__ == "__main__":
    typer.run(main)
