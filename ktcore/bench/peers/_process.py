"""Peers in processes of their own, which time themselves.

Between calls such a process is stopped, so that threads that wait by spinning take no core from
whatever is measured next; and what it dies of is an error here, not an end.

The program reads commands, little-endian, and answers them:

    'w' path '\\n'                      a layer's gate, up and down are in the file, or the one
                                       matrix [I, H] of `linear`; answer: '+'
    'r' layer tokens x ids weights     int32, int32, f32 [T, H], int32 and f32 [T, K], the latter
                                       two not for `linear`;
                                       answer: seconds f64, result f32 [T, H], of `linear` [T, I]
"""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ktcore.bench.peers import Session, Timed, matrices_of
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call, Weights
from ktcore.weights import QuantTensor


def why_not() -> str:
    """What this system lacks for such processes; "" if nothing."""
    return "" if hasattr(signal, "SIGSTOP") else "needs a system on which processes can be stopped"


class Process(Session):
    """A program at work.

    Args:
        command: the program and its first arguments; the shape's sizes follow.
        shape: of the layers.
        stored: what goes into the file for a matrix [E, O, I], of `linear` [O, I], one tensor
            after the other.
        op: the operator, whose arguments are sent and whose result comes back.
    """

    def __init__(
        self,
        command: Sequence[object],
        shape: Shape,
        stored: Callable[[QuantTensor], list[Tensor]],
        op: str = "moe",
    ):
        self.stored = stored
        self.width = shape.intermediate_size if op == "linear" else shape.hidden_size
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
        self.name = Path(str(command[0])).name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [str(part) for part in (*command, *sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def add(self, weights: Weights) -> None:
        with tempfile.NamedTemporaryFile(prefix="ktcore-peer-") as file:
            for weight in matrices_of(weights):
                for t in self.stored(weight):
                    file.write(memoryview(t.contiguous().view(-1).view(torch.uint8).numpy()))
            file.flush()
            self._ask(b"w" + file.name.encode() + b"\n", 1)

    def run(self, call: Call) -> Timed:
        tokens = len(call.inputs[0])
        values = [v.float() if v.is_floating_point() else v.to(torch.int32) for v in call.inputs]
        data = b"".join(v.contiguous().numpy().tobytes() for v in values)
        head = b"r" + struct.pack("<ii", call.layer, tokens)
        answer = self._ask(head + data, 8 + 4 * tokens * self.width)
        (seconds,) = struct.unpack_from("<d", answer)
        return torch.frombuffer(answer, dtype=torch.float32, offset=8).view(tokens, -1), seconds

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._said):
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, command: bytes, count: int) -> bytearray:
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(command)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer = bytearray(self.process.stdout.read(count))
        if len(answer) < count:
            raise self._died()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def _died(self) -> RuntimeError:
        status = self.process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return RuntimeError(f"{self.name} ended with {how}{': ' + said[-1] if said else ''}")
