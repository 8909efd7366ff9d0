"""Calling an operator's function without torch's dispatcher, where the dispatcher adds only time.

Through a Python custom operator a call costs about 18 us more than the function itself, as much as
a small layer's arithmetic; and the first such call of a process imports torch's compiler, which
takes seconds.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# `active`: whether this thread is making a recording (see recording.py).
recording = threading.local()


def direct(tensor: Tensor) -> bool:
    """Whether nothing has to see the call: no autograd, compiler, tracer, dispatch mode, tensor
    subclass or transform as vmap is at work, but for the mode that watches over a recording.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(tensor) is Tensor
        and (not torch._C._len_torch_dispatch_stack() or getattr(recording, "active", False))
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
