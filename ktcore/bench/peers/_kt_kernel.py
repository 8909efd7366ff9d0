"""The program that runs kt-kernel; see `_process` for what it reads and answers.

python -m ktcore.bench.peers._kt_kernel THREADS FORMAT HIDDEN INTERMEDIATE EXPERTS TOP_K
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import time
from typing import Any

import torch
from torch import Tensor

# By stored format: the kernels that kt-kernel prefers, bits, columns of a group (0: none).
FORMATS = {
    "bf16": (("AMXBF16_MOE", "AVX2BF16_MOE"), 16, 0),
    "int4_g32": (("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), 4, 32),
}
MOST_TOKENS = 4096


def read_matrix(file: Any, experts: int, rows: int, columns: int, format: str) -> list[Tensor]:
    _, bits, group = FORMATS[format]
    sizes = [(columns * bits // 8, torch.uint8)]
    if group:
        sizes.append((columns // group, torch.bfloat16))
    found = []
    for width, dtype in sizes:
        t = torch.empty(experts, rows, width, dtype=dtype)
        if file.readinto(memoryview(t.view(torch.uint8).numpy()).cast("B")) != t.nbytes:
            raise SystemExit("weights are cut short")
        found.append(t)
    return found


def make_layer(
    ext: Any, engine: Any, path: str, format: str, hidden: int, intermediate: int, experts: int,
    top_k: int,
) -> Any:  # fmt: skip
    names, bits, group = FORMATS[format]
    config = ext.moe.MOEConfig(experts, top_k, hidden, intermediate, 0)
    config.max_len = MOST_TOKENS
    config.pool = engine.backend_
    if group:
        config.quant_config.bits = bits
        config.quant_config.group_size = group
        config.quant_config.zero_point = False
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden)}
    shapes["down"] = (hidden, intermediate)
    kept = []  # until the layer has taken its weights from their addresses
    with open(path, "rb") as file:
        for name, (rows, columns) in shapes.items():
            data, *scales = read_matrix(file, experts, rows, columns, format)
            setattr(config, f"{name}_proj", data.data_ptr())
            if scales:
                setattr(config, f"{name}_scale", scales[0].data_ptr())
            kept += [data, *scales]
    kernel = next(getattr(ext.moe, name) for name in names if hasattr(ext.moe, name))
    layer = kernel(config)
    order = torch.arange(experts, dtype=torch.int64)
    engine.submit(layer.load_weights_task(order.data_ptr()))
    engine.sync()
    return layer


def main() -> None:
    # Stopped, it would not see the end of its input: it dies with its parent (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    threads, format, *sizes = sys.argv[1:]
    hidden, intermediate, experts, top_k = map(int, sizes)
    # What the library prints must not get into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from kt_kernel import kt_kernel_ext as ext

    engine = ext.CPUInfer(int(threads))
    layers: list[Any] = []
    commands = sys.stdin.buffer

    def read(dtype: torch.dtype, *shape: int) -> Tensor:
        t = torch.empty(shape, dtype=dtype)
        if commands.readinto(memoryview(t.numpy()).cast("B")) != t.nbytes:
            raise SystemExit("input is cut short")
        return t

    while command := commands.read(1):
        if command == b"w":
            path = commands.readline().rstrip(b"\n").decode()
            layers.append(
                make_layer(ext, engine, path, format, hidden, intermediate, experts, top_k)
            )
            answers.write(b"+")
        else:
            number, tokens = struct.unpack("<ii", commands.read(8))
            x = read(torch.float32, tokens, hidden).to(torch.bfloat16)
            ids = read(torch.int32, tokens, top_k).to(torch.int64)
            weights = read(torch.float32, tokens, top_k)
            count, out = torch.tensor([tokens], dtype=torch.int32), torch.empty_like(x)
            addresses = (t.data_ptr() for t in (ids, weights, x, out))
            start = time.perf_counter()
            engine.submit(layers[number].forward_task(count.data_ptr(), top_k, *addresses, False))
            engine.sync()
            answers.write(struct.pack("<d", time.perf_counter() - start))
            answers.write(out.float().numpy().tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
