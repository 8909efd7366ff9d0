"""Calling an operator's function without torch's dispatcher, where the dispatcher adds only time.

Through a Python custom operator a call costs about 18 us more than the function itself, as much as
a small layer's arithmetic; and the first such call of a process imports torch's compiler, which
takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def direct(tensor: Tensor) -> bool:
    """Whether nothing has to see the call: in inference mode there is no autograd, and no compiler,
    tracer, dispatch mode or tensor subclass is at work either.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and type(tensor) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
    )
