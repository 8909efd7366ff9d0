"""ONNX Runtime's QMoE operator on the CPU, weights in blocks of 32.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QMoE
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ktcore.bench.peers import Peer, Session, Timed, timed
from ktcore.bench.presets import Shape
from ktcore.bench.workload import Call
from ktcore.formats import Codes, Format
from ktcore.weights import ExpertWeights, QuantTensor

BLOCK = 32
BITS = {"int4_g32": 4, "int8_g32": 8}
NEVER = -1e4  # the logit of an expert that is not to be chosen


class QMoE(Session):
    def __init__(self, format: Format, shape: Shape, threads: int):
        self.bits, self.shape, self.threads = BITS[format.name], shape, threads
        self.layers: list[Any] = []

    def add(self, weights: ExpertWeights) -> None:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper

        gate, up, down = (self._stored(w) for w in (weights.gate, weights.up, weights.down))
        # Rows of gate and up take turns.
        into = [torch.stack(pair, dim=2).flatten(1, 2) for pair in zip(gate, up, strict=True)]
        tensors = dict(zip(("w1", "s1", "w2", "s2"), (*into, *down), strict=True))
        node = helper.make_node(
            "QMoE",
            ["x", "logits", "w1", "s1", "", "w2", "s2", ""],
            ["y"],
            domain="com.microsoft",
            k=self.shape.top_k,
            activation_type="swiglu",
            activation_alpha=1.0,
            activation_beta=0.0,
            swiglu_fusion=1,
            normalize_routing_weights=1,
            expert_weight_bits=self.bits,
            block_size=BLOCK,
        )
        hidden, experts = self.shape.hidden_size, self.shape.num_experts

        def value(name: str, columns: int) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", columns])

        graph = helper.make_graph(
            [node],
            "layer",
            [value("x", hidden), value("logits", experts)],
            [value("y", hidden)],
            [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()],
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
        """Codes and scales as the operator takes them: unsigned, in the middle of their range."""
        stored = weight.format.codes(weight.parts, weight.shape)
        assert isinstance(stored, Codes) and isinstance(stored.codes, Tensor)
        levels = (stored.levels.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        experts = []
        for expert in stored.codes:  # one at a time: indices are integers of four bytes
            codes = levels[expert.int()]
            experts.append(codes if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4)
        return torch.stack(experts), stored.scales

    def run(self, call: Call) -> Timed:
        x, ids, topk_weights = call.inputs
        # It chooses experts itself, with weights that are the softmax over those chosen.
        logits = torch.full((len(x), self.shape.num_experts), NEVER)
        logits.scatter_(1, ids, topk_weights.log())
        inputs = {"x": x.float().numpy(), "logits": logits.numpy()}
        session = self.layers[call.layer]
        return timed(lambda: torch.from_numpy(session.run(None, inputs)[0]))


class OnnxRuntime(Peer):
    name = "onnxruntime"
    formats = tuple(BITS)

    def missing(self) -> str:
        lacking = [n for n in ("onnxruntime", "onnx") if importlib.util.find_spec(n) is None]
        return f"{' and '.join(lacking)} not installed" if lacking else ""

    def version(self) -> str:
        return importlib.metadata.version("onnxruntime")

    def open(self, format: Format, shape: Shape, threads: int) -> Session:
        return QMoE(format, shape, threads)


PEERS = [OnnxRuntime()]
