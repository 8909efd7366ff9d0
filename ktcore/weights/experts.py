"""The routed experts of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.formats import Format
from ktcore.weights.quant_tensor import QuantTensor, register


class ExpertWeights:
    """Gate, up and down projections of all experts of a layer.

    Args:
        gate: [num_experts, intermediate_size, hidden_size].
        up: the same shape.
        down: [num_experts, hidden_size, intermediate_size].
        gate_bias, up_bias: [num_experts, intermediate_size], of any floating-point type; held as
            float32. None: zeros.
        down_bias: [num_experts, hidden_size].

    Gate and up in one format, down in that or another (as GGUF files mix them), all on one device.
    `packed` holds what backends made of them, by layout; biases are no part of it. `prepared` is
    what the last call found out, for the next like it.
    """

    def __init__(
        self,
        gate: QuantTensor,
        up: QuantTensor,
        down: QuantTensor,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ):
        """Raises TypeError or ValueError, naming the argument that does not fit."""
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
        self.gate_bias = self._bias(gate_bias, "gate_bias", intermediate)
        self.up_bias = self._bias(up_bias, "up_bias", intermediate)
        self.down_bias = self._bias(down_bias, "down_bias", hidden)
        self.packed: dict[str, object] = {}
        self.prepared: object = None
        self.handle = register(self)

    def _bias(self, bias: Tensor | None, name: str, size: int) -> Tensor | None:
        if bias is None:
            return None
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if tuple(bias.shape) != (self.num_experts, size):
            raise ValueError(
                f"{name}: expected shape {(self.num_experts, size)}, got {tuple(bias.shape)}"
            )
        if bias.device != self.device:
            raise ValueError(
                f"{name}: expected the device of gate, {self.device}, got {bias.device}"
            )
        return bias.detach().to(torch.float32).contiguous()

    @classmethod
    def from_dense(
        cls, gate: Tensor, up: Tensor, down: Tensor, format: str | Format, **biases: Tensor | None
    ) -> ExpertWeights:
        """Store float tensors with the format's reference quantiser; biases by their names."""
        return cls(*(QuantTensor.quantize(t, format) for t in (gate, up, down)), **biases)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts, released or not, and of the biases."""
        biases = sum(b.nbytes for b in self.biases.values())
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes + biases

    @property
    def biases(self) -> dict[str, Tensor]:
        """Those that there are, by the names of the arguments."""
        names = ("gate_bias", "up_bias", "down_bias")
        return {name: bias for name in names if (bias := getattr(self, name)) is not None}

    def release(self) -> None:
        """Free the stored parts but the biases; a packed form must exist, and only it can be used
        from then on."""
        if not self.packed:
            raise RuntimeError("release: no packed form exists yet, the weights would be lost")
        for weight in (self.gate, self.up, self.down):
            weight.parts = {}

    def __repr__(self) -> str:
        formats = self.format.name
        if self.down_format is not self.format:
            formats += f" and {self.down_format.name}"
        if self.biases:
            formats += " with biases"
        return (
            f"ExpertWeights({formats}, num_experts={self.num_experts}, "
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )
