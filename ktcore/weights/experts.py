"""The routed experts of one layer."""

from __future__ import annotations

from torch import Tensor

from ktcore.formats import Format
from ktcore.weights.quant_tensor import QuantTensor, register


class ExpertWeights:
    """Gate, up and down projections of all experts of a layer.

    Args:
        gate: [num_experts, intermediate_size, hidden_size].
        up: the same shape.
        down: [num_experts, hidden_size, intermediate_size].

    Gate and up in one format, down in that or another (as GGUF files mix them), all on one device.
    `packed` holds what backends made of them, by layout.
    """

    def __init__(self, gate: QuantTensor, up: QuantTensor, down: QuantTensor):
        """Raises TypeError or ValueError, naming the projection that does not fit."""
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            if not isinstance(weight, QuantTensor):
                raise TypeError(f"{name}: expected a QuantTensor, got {type(weight).__name__}")
            if weight.device != gate.device:
                raise ValueError(
                    f"{name}: expected the device of gate, {gate.device}, got {weight.device}"
                )
        if len(gate.shape) != 3 or 0 in gate.shape:
            raise ValueError(
                "gate: expected shape [num_experts, intermediate_size, hidden_size], each at least "
                f"1, got {list(gate.shape)}"
            )
        if up.format is not gate.format:
            raise ValueError(
                f"up: expected the format of gate, {gate.format.name}, got {up.format.name}: they "
                "are read together"
            )
        experts, intermediate, hidden = gate.shape
        if up.shape != gate.shape:
            raise ValueError(f"up: expected the shape of gate, {gate.shape}, got {up.shape}")
        if down.shape != (experts, hidden, intermediate):
            raise ValueError(
                f"down: expected shape {(experts, hidden, intermediate)}, got {down.shape}"
            )
        self.gate, self.up, self.down = gate, up, down
        self.num_experts, self.intermediate_size, self.hidden_size = gate.shape
        self.format, self.down_format, self.device = gate.format, down.format, gate.device
        self.packed: dict[str, object] = {}
        self.handle = register(self)

    @classmethod
    def from_dense(
        cls, gate: Tensor, up: Tensor, down: Tensor, format: str | Format
    ) -> ExpertWeights:
        """Store float tensors with the format's reference quantiser."""
        return cls(*(QuantTensor.quantize(t, format) for t in (gate, up, down)))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts, released or not."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    def release(self) -> None:
        """Free the stored parts; a packed form must exist, and only it can be used from then on."""
        if not self.packed:
            raise RuntimeError("release: no packed form exists yet, the weights would be lost")
        for weight in (self.gate, self.up, self.down):
            weight.parts = {}

    def __repr__(self) -> str:
        formats = self.format.name
        if self.down_format is not self.format:
            formats += f" and {self.down_format.name}"
        return (
            f"ExpertWeights({formats}, num_experts={self.num_experts}, "
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )
