"""llama.cpp: the graph that it builds for a layer of Qwen3-MoE, or one product, on its CPU backend.

A program of its own computes it, linked with llama.cpp's libraries: `ci/peers.py` builds it from
`ci/peers/ggml_layer.cpp`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ktcore.bench.peers import Peer, Session, each_matrix
from ktcore.bench.peers._process import Process, why_not
from ktcore.bench.presets import Shape
from ktcore.formats import Codes, Format
from ktcore.weights import QuantTensor

FOLDER = "KTCORE_PEERS"  # the environment variable that says where ci/peers.py built it
PROGRAM = "ggml-layer"
# What llama.cpp calls the formats, and those that it stores otherwise, number by number the same.
TYPES = {
    "f32": "f32", "f16": "f16", "bf16": "bf16",
    "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0",
    "q2_k": "q2_K", "q3_k": "q3_K", "q4_k": "q4_K", "q5_k": "q5_K", "q6_k": "q6_K",
    "iq1_s": "iq1_s", "iq1_m": "iq1_m", "iq2_xxs": "iq2_xxs", "iq2_xs": "iq2_xs",
    "iq2_s": "iq2_s", "iq3_xxs": "iq3_xxs", "iq3_s": "iq3_s", "iq4_nl": "iq4_nl",
    "iq4_xs": "iq4_xs", "tq1_0": "tq1_0", "tq2_0": "tq2_0", "gguf_mxfp4": "mxfp4",
    "int4_g32": "q4_0", "int8_g32": "q8_0",
}  # fmt: skip


def program() -> Path | None:
    """Where it is; None where it was not built."""
    folder = os.environ.get(FOLDER)
    path = Path(folder if folder else ".ktcore-peers") / PROGRAM
    return path.absolute() if path.is_file() else None


def as_blocks(weight: QuantTensor) -> Tensor:
    """The weight as GGUF stores it.

    Raises:
        ValueError: its scales are not float16 numbers.
    """
    if weight.format.name not in ("int4_g32", "int8_g32"):
        return weight.parts["data"]
    stored = weight.format.codes(weight.parts, weight.shape)
    assert isinstance(stored, Codes) and isinstance(stored.codes, Tensor)
    scales = stored.scales.to(torch.float16)
    if not torch.equal(scales.float(), stored.scales):
        raise ValueError(f"{weight.format.name}: scales beyond float16, which llama.cpp stores")
    experts = []
    # One at a time: indices are integers of four bytes.
    for expert, of in zip(each_matrix(stored.codes), each_matrix(scales), strict=True):
        codes = stored.levels[expert.int()].unflatten(-1, (-1, 32))
        if weight.format.name == "int4_g32":
            first, second = (codes + 8).view(torch.uint8).chunk(2, dim=-1)
            codes = first | second << 4
        experts.append(
            torch.cat((of[..., None].view(torch.uint8), codes.view(torch.uint8)), dim=-1)
        )
    return torch.stack(experts)


class LlamaCpp(Peer):
    name = "llama.cpp"
    ops = ("moe", "linear")
    formats = tuple(TYPES)

    def missing(self) -> str:
        if why := why_not():
            return why
        if program() is None:
            return (
                f"{PROGRAM} is not built (python ci/peers.py), or {FOLDER} does not name its folder"
            )
        return ""

    def version(self) -> str:
        name = (program().parent / "llama.cpp-version").read_text("utf-8").strip()
        return f"of llama-cpp-python {name}"

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        command = (program(), op, threads, TYPES[format.name])
        return Process(command, shape, lambda weight: [as_blocks(weight)], op)


PEERS = [LlamaCpp()]
