"""Weights in the order in which the native kernels read them (see csrc/common/packed.h).

Packed once, at first use, and kept on the weights object; all CPU instruction sets share it.
"""

from __future__ import annotations

import threading

from torch import Tensor

from ktcore import _native
from ktcore.weights import ExpertWeights, QuantTensor

LAYOUT = "native"

_lock = threading.Lock()


def _addresses(weight: QuantTensor) -> tuple[Tensor, Tensor | None]:
    parts = weight.parts
    scales = parts.get("scales")
    return parts["data"].contiguous(), None if scales is None else scales.contiguous()


def packed_experts(experts: ExpertWeights) -> object:
    """The packed form of a layer's experts; made at the first call."""
    packed = experts.packed.get(LAYOUT)
    if packed is not None:
        return packed
    with _lock:
        if LAYOUT not in experts.packed:
            packed = _native.ext.PackedExperts(
                experts.format.name,
                experts.num_experts,
                experts.hidden_size,
                experts.intermediate_size,
            )
            for projection in ("gate", "up", "down"):
                data, scales = _addresses(getattr(experts, projection))
                for e in range(experts.num_experts):
                    scale = 0 if scales is None else scales[e].data_ptr()
                    packed.pack(e, projection, data[e].data_ptr(), scale)
            experts.packed[LAYOUT] = packed
    return experts.packed[LAYOUT]


def packed_matrix(weight: QuantTensor) -> object:
    """The packed form of a matrix [O, I]; made at the first call."""
    packed = weight.packed.get(LAYOUT)
    if packed is not None:
        return packed
    with _lock:
        if LAYOUT not in weight.packed:
            packed = _native.ext.PackedMatrix(weight.format.name, *weight.shape)
            data, scales = _addresses(weight)
            packed.pack(data.data_ptr(), 0 if scales is None else scales.data_ptr())
            weight.packed[LAYOUT] = packed
    return weight.packed[LAYOUT]
