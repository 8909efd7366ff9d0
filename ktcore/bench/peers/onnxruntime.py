"""ONNX Runtime's QMoE and MatMulNBits operators on the CPU, weights in blocks of 32.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ktcore.bench.peers import Peer, Session, Timed, each_matrix, timed
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call
from ktcore.formats import Codes, Format
from ktcore.weights import ExpertWeights, QuantTensor

BLOCK = 32
BITS = {"int4_g32": 4, "int8_g32": 8}
NEVER = -1e4  # the logit of an expert that is not to be chosen
EIGHT_BITS = 4  # of MatMulNBits: activations as int8, its quickest; QMoE has no such choice


class Layers(Session):
    """Models of one operator each."""

    def __init__(self, format: Format, shape: Shape, threads: int):
        self.bits, self.shape, self.threads = BITS[format.name], shape, threads
        self.layers: list[Any] = []

    def _add(
        self,
        operator: str,
        inputs: dict[str, int],
        weights: dict[str, Tensor],
        columns: int,
        **attributes: Any,
    ) -> None:
        """A model of an operator, whose inputs [tokens, ...] have these sizes. "" is one that is
        left out.
        """
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper

        node = helper.make_node(
            operator, [*inputs, *weights], ["y"], domain="com.microsoft", **attributes
        )

        def value(name: str, columns: int) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", columns])

        graph = helper.make_graph(
            [node],
            "layer",
            [value(name, size) for name, size in inputs.items()],
            [value("y", columns)],
            [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in weights.items() if n],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Threads that wait by spinning would take the cores from whatever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.layers.append(
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        )

    def _stored(self, weight: QuantTensor) -> tuple[Tensor, Tensor]:
        """Codes and scales as the operators take them: unsigned, in the middle of their range."""
        stored = weight.format.codes(weight.parts, weight.shape)
        assert isinstance(stored, Codes) and isinstance(stored.codes, Tensor)
        levels = (stored.levels.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        experts = []
        # One at a time: indices are integers of four bytes.
        for expert in each_matrix(stored.codes):
            codes = levels[expert.int()]
            experts.append(codes if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4)
        return torch.stack(experts), stored.scales

    def _timed(self, call: Call, inputs: dict[str, Any]) -> Timed:
        session = self.layers[call.layer]
        return timed(lambda: torch.from_numpy(session.run(None, inputs)[0]))


class QMoE(Layers):
    def add(self, weights: ExpertWeights) -> None:
        gate, up, down = (self._stored(w) for w in (weights.gate, weights.up, weights.down))
        # Rows of gate and up take turns.
        into = [torch.stack(pair, dim=2).flatten(1, 2) for pair in zip(gate, up, strict=True)]
        s = self.shape
        self._add(
            "QMoE",
            {"x": s.hidden_size, "logits": s.num_experts},
            dict(zip(("w1", "s1", "", "w2", "s2"), (*into, torch.empty(0), *down), strict=True)),
            s.hidden_size,
            k=s.top_k,
            activation_type="swiglu",
            activation_alpha=1.0,
            activation_beta=0.0,
            swiglu_fusion=1,
            normalize_routing_weights=1,
            expert_weight_bits=self.bits,
            block_size=BLOCK,
        )

    def run(self, call: Call) -> Timed:
        x, ids, topk_weights = call.inputs
        # It chooses experts itself, with weights that are the softmax over those chosen.
        logits = torch.full((len(x), self.shape.num_experts), NEVER)
        logits.scatter_(1, ids, topk_weights.log())
        return self._timed(call, {"x": x.float().numpy(), "logits": logits.numpy()})


class MatMulNBits(Layers):
    def add(self, weights: QuantTensor) -> None:
        (codes,), scales = self._stored(weights)
        s = self.shape
        self._add(
            "MatMulNBits",
            {"x": s.hidden_size},
            {"w": codes.unflatten(-1, (-1, BLOCK * self.bits // 8)), "s": scales.flatten()},
            s.intermediate_size,
            K=s.hidden_size,
            N=s.intermediate_size,
            bits=self.bits,
            block_size=BLOCK,
            accuracy_level=EIGHT_BITS,
        )

    def run(self, call: Call) -> Timed:
        return self._timed(call, {"x": call.inputs[0].float().numpy()})


class OnnxRuntime(Peer):
    name = "onnxruntime"
    ops = ("moe", "linear")
    formats = tuple(BITS)

    def missing(self) -> str:
        lacking = [n for n in ("onnxruntime", "onnx") if importlib.util.find_spec(n) is None]
        return f"{' and '.join(lacking)} not installed" if lacking else ""

    def version(self) -> str:
        return importlib.metadata.version("onnxruntime")

    def open(self, op: str, format: Format, shape: Shape, threads: int) -> Session:
        return (MatMulNBits if op == "linear" else QMoE)(format, shape, threads)


PEERS = [OnnxRuntime()]
