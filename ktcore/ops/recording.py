"""Calls of the operators, recorded once and made again without Python.

A decoder makes the same few hundred calls for every token, on the same memory. Each costs some
microseconds in Python, in which no weights are read; recorded, as CUDA graphs record kernels, they
follow each other at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ktcore import _native
from ktcore.dispatch import registry
from ktcore.ops import _direct

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class _Watch(TorchDispatchMode):
    """Sees what torch itself does: what it allocates is kept, what it computes is foreign."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []
        self.foreign: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first operator that it sees imports torch's compiler, which takes 0.6 s. (A newer
        # or older torch that does not ask is only slower.)
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.memory.append(out)
        elif not (func.is_view and _shares_memory(out, args[0])):
            self.foreign.append(str(func))
        return out


def _shares_memory(out: Tensor | list[Tensor], x: Tensor) -> bool:
    """Whether a view is one: what may be, such as `contiguous`, can also be a copy."""
    memory = x.untyped_storage().data_ptr()
    return all(
        view.untyped_storage().data_ptr() == memory
        for view in ([out] if isinstance(out, Tensor) else out)
    )


class Recording:
    """Calls of operators that can be made again: see `record`.

    Attributes:
        why_not: why they cannot, None if they can.
    """

    def __init__(self) -> None:
        self.why_not: str | None = None
        self._calls = None if _native.ext is None else _native.ext.Recording()
        self._memory: list[Tensor] = []

    def __len__(self) -> int:
        """How many calls there are."""
        return 0 if self._calls is None else len(self._calls)

    def run(self) -> None:
        """Make the calls again: they read and write the memory that they did when recorded.

        Raises RuntimeError if they cannot be, and what an operator raises.
        """
        self._must_run()
        self._calls.run()

    def time(self) -> list[tuple[str, float]]:
        """`run`, and say which operator each call was, and the seconds that it took."""
        self._must_run()
        return self._calls.time()

    def _must_run(self) -> None:
        if self.why_not is not None:
            raise RuntimeError(f"this cannot be made again: {self.why_not}")


def record(function: Callable[[], Any]) -> tuple[Any, Recording]:
    """Call a function, and record the operators that it calls on this thread.

    All that it computes must be done by operators of the native backends, on memory that is there
    when they are made again: what is allocated meanwhile, the recording keeps; the rest is the
    caller's to keep. Anything else that torch computes, or another backend, makes the recording
    one that cannot run (`Recording.why_not`), never one that leaves it out.

    Returns:
        What the function returns, and the recording.

    Raises:
        RuntimeError: a recording within a recording.
    """
    if getattr(_direct.recording, "active", False):
        raise RuntimeError("a recording is being made on this thread already")
    recording = Recording()
    if recording._calls is None:
        recording.why_not = _native.why
        return function(), recording
    watch, others = _Watch(), set()

    def see(chosen: registry.Implementation) -> None:
        if not chosen.recordable:
            others.add(f"{chosen.op} of {chosen.backend}")

    with registry.watch_choices(see):
        recording._calls.start()
        _direct.recording.active = True
        try:
            with watch:
                result = function()
        finally:
            _direct.recording.active = False
            recording._calls.stop()
    if watch.foreign or others:
        recording.why_not = "not recorded: " + ", ".join(sorted({*watch.foreign, *others}))
    recording._memory = watch.memory
    return result, recording
