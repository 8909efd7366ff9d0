"""Weights and calls to measure: what an operator sees in a model, without a model.

Weights are made in their stored form, memory-sized but cheap; every call gets fresh routing and
goes to weights that have not been used for long, so that they come from memory.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktcore import ops
from ktcore.bench.presets import Shape
from ktcore.formats import Format, Parts, get_format
from ktcore.testing import oracle
from ktcore.weights import ExpertWeights, QuantTensor

Weights = ExpertWeights | QuantTensor

DTYPE = torch.bfloat16  # of activations

# Rows that are really quantised. Odd, so that experts, whose rows are even in number, differ.
SAMPLE_ROWS = 61
TINY = 256  # of a trial call: the largest block of any format
# The oracle is slow: about this many weights at most, and not more tokens than this.
ORACLE_WEIGHTS = 200_000_000
ORACLE_TOKENS = 4


def sample_rows(format: Format, columns: int, generator: torch.Generator) -> Parts:
    """Stored parts of some random rows, with entries of about 1/sqrt(columns) where ktcore
    quantises to the format.
    """
    rows = torch.randn(SAMPLE_ROWS, columns, generator=generator) / math.sqrt(columns)
    try:
        return format.quantize(rows)
    except TypeError:  # a format that is only read
        return format.example((SAMPLE_ROWS, columns), generator)


def stored_by_rows(format: Format, columns: int) -> bool:
    """Whether every part of a matrix is one piece for each of its rows."""
    specs = format.part_specs((SAMPLE_ROWS, columns)).values()
    return all(shape[0] == SAMPLE_ROWS for shape, _ in specs)


def random_parts(format: Format, shape: tuple[int, ...], sample: Parts) -> Parts:
    """Stored parts of a weight [..., O, I], each filled with those of `sample_rows` over and over.

    Valid in any format, with codes and scales as real weights have them, at the speed of a copy.
    """
    parts: Parts = {}
    for name, (part_shape, dtype) in format.part_specs(shape).items():
        source = sample[name].reshape(-1)
        part = torch.empty(part_shape, dtype=dtype)
        flat = part.view(-1)
        whole = flat.numel() // source.numel()
        flat[: whole * source.numel()].view(whole, source.numel()).copy_(source)
        rest = flat.numel() - whole * source.numel()
        flat[flat.numel() - rest :].copy_(source[:rest])
        parts[name] = part
    return parts


def draw_routing(
    tokens: int, num_experts: int, top_k: int, skew: float, generator: torch.Generator
) -> Tensor:
    """Expert ids [tokens, top_k], distinct within a token.

    Expert r is drawn with probability proportional to 1 / (r + 1)^skew: evenly for 0.
    """
    popularity = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -skew
    # Events that arrive at these rates: the first k to come are a draw without replacement.
    arrival = torch.empty(tokens, num_experts, dtype=torch.float64).exponential_(
        generator=generator
    )
    return (arrival / popularity).topk(top_k, dim=-1, largest=False).indices


@dataclass(frozen=True)
class Call:
    """One call's inputs, made before it is timed.

    Attributes:
        layer: which of the workload's weights it uses.
        inputs: tensors, as the workload's `run` takes them.
        nbytes: stored bytes of the distinct weights that it touches.
        operations: arithmetic, a multiply-add counted as two.
    """

    layer: int
    inputs: tuple[Tensor, ...]
    nbytes: int
    operations: int


@dataclass(frozen=True)
class Check:
    """A call and what is right for some of its tokens, as `ktcore.testing.oracle` judges it."""

    call: Call
    positions: list[int]
    want: Tensor
    magnitude: Tensor

    def error(self, got: Tensor) -> float:
        """Relative L2 error of the known tokens, that of rounding to the output's type included."""
        deviation = got[self.positions].to(torch.float64) - self.want
        return (deviation.norm() / self.want.norm()).item()

    def problem(self, got: Tensor, tolerance: float) -> str:
        """What is wrong with the known tokens, the output type's rounding allowed for; or ""."""
        rows = got[self.positions]
        return oracle.judge(rows, self.want, tolerance, self.magnitude).problem


class Workload(abc.ABC):
    """The weights of one format and calls on them; `make_workload` builds one.

    Attributes:
        format: the stored format.
        weights: per layer, what the operator takes.
    """

    _sample: Call
    _exact: tuple[Tensor, Tensor]

    def __init__(self, format: str, seed: int):
        self.format = get_format(format)
        self.weights: list[Weights] = []
        self.generator = torch.Generator().manual_seed(seed)
        self._rows: dict[int, Tensor] = {}  # activations, by tokens
        self._samples: dict[int, Parts] = {}  # rows of weights, by columns
        self._next = 0

    def activations(self, tokens: int, width: int) -> Tensor:
        """Random activations [tokens, width], the same at every call: they come from a cache."""
        if tokens not in self._rows:
            self._rows[tokens] = torch.randn(tokens, width, generator=self.generator).to(DTYPE)
        return self._rows[tokens]

    def random_weight(self, *shape: int) -> QuantTensor:
        columns = shape[-1]
        if not stored_by_rows(self.format, columns):
            one = self.format.example(shape[-2:], self.generator)
            parts = {n: p.expand(*shape[:-2], *p.shape).contiguous() for n, p in one.items()}
            return QuantTensor(self.format, shape, parts)
        if columns not in self._samples:
            self._samples[columns] = sample_rows(self.format, columns, self.generator)
        parts = random_parts(self.format, shape, self._samples[columns])
        return QuantTensor(self.format, shape, parts)

    def build(
        self, layers: int, prepare: Callable[[Weights, Call], None], *, release: bool
    ) -> None:
        """Make the layers one by one and the known sample of `check`.

        `prepare` packs a layer, by a call on it; `release` then frees its stored parts.
        """
        for layer in range(layers):
            weights = self._layer_weights()
            if layer == 0:
                count = max(1, min(ORACLE_TOKENS, ORACLE_WEIGHTS // self._weights_per_token()))
                self._sample = self.draw(count, 0)
                self._exact = self._oracle(weights, self._sample)
            prepare(weights, self.draw(1, layer))
            if release and weights.packed:
                weights.release()
            self.weights.append(weights)

    def next_call(self, tokens: int) -> Call:
        """A call on the layer whose turn it is."""
        self._next = (self._next + 1) % len(self.weights)
        return self.draw(tokens, self._next)

    def check(self, tokens: int) -> Check:
        """A call with known results: tokens of the sample stand among others, first to last."""
        call = self.draw(tokens, 0)
        known = min(tokens, len(self._exact[0]))
        positions = torch.linspace(0, tokens - 1, known).round().long().tolist()
        inputs = tuple(t.clone() for t in call.inputs)
        for t, sample in zip(inputs, self._sample.inputs, strict=True):
            t[positions] = sample[:known]
        want, magnitude = self._exact
        return Check(replace(call, inputs=inputs), positions, want[:known], magnitude[:known])

    @abc.abstractmethod
    def tiny(self) -> Weights:
        """Weights of the same format, too small to take time: to try a backend with."""

    @abc.abstractmethod
    def tiny_call(self) -> Call:
        """A call on `tiny`."""

    @abc.abstractmethod
    def draw(self, tokens: int, layer: int) -> Call:
        """A call like those of a model in use."""

    @abc.abstractmethod
    def run(self, weights: Weights, call: Call) -> Tensor:
        """The call through the public operator."""

    @abc.abstractmethod
    def _oracle(self, weights: Weights, call: Call) -> tuple[Tensor, Tensor]:
        """A call's result in float64 and the scale of each token's error."""

    @abc.abstractmethod
    def _layer_weights(self) -> Weights: ...

    @abc.abstractmethod
    def _weights_per_token(self) -> int: ...


class MoeWorkload(Workload):
    """`moe` on random experts. `shape.num_experts` are materialised."""

    def __init__(self, shape: Shape, format: str, seed: int, skew: float):
        super().__init__(format, seed)
        self.shape, self.skew = shape, skew
        gate_up = (shape.num_experts, shape.intermediate_size, shape.hidden_size)
        self._expert_bytes = (
            2 * self.format.nbytes(gate_up)
            + self.format.nbytes((shape.num_experts, shape.hidden_size, shape.intermediate_size))
        ) // shape.num_experts
        self._order: dict[int, Tensor] = {}  # per layer its experts, the longest unused first

    def _experts(self, count: int, hidden_size: int, intermediate_size: int) -> ExpertWeights:
        return ExpertWeights(
            self.random_weight(count, intermediate_size, hidden_size),
            self.random_weight(count, intermediate_size, hidden_size),
            self.random_weight(count, hidden_size, intermediate_size),
        )

    def _layer_weights(self) -> ExpertWeights:
        s = self.shape
        return self._experts(s.num_experts, s.hidden_size, s.intermediate_size)

    def _weights_per_token(self) -> int:
        return self.shape.top_k * self.shape.expert_weights

    def tiny(self) -> ExpertWeights:
        return self._experts(2, TINY, TINY)

    def tiny_call(self) -> Call:
        x = torch.randn(1, TINY, generator=self.generator).to(DTYPE)
        return Call(0, (x, torch.tensor([[0, 1]]), torch.full((1, 2), 0.5)), 0, 0)

    def draw(self, tokens: int, layer: int) -> Call:
        s = self.shape
        ranks = draw_routing(tokens, s.num_experts, s.top_k, self.skew, self.generator)
        # How many experts a call touches, and how often each, is as drawn; which ones they are
        # goes round, or some would still be in a cache, as they are not in a whole model.
        used, index = ranks.unique(return_inverse=True)
        if layer not in self._order:
            self._order[layer] = torch.randperm(s.num_experts, generator=self.generator)
        taken, left = self._order[layer].split([len(used), s.num_experts - len(used)])
        self._order[layer] = torch.cat([left, taken])
        ids = taken[index]
        weights = torch.rand(tokens, s.top_k, generator=self.generator) + 0.1
        weights /= weights.sum(-1, keepdim=True)
        return Call(
            layer,
            (self.activations(tokens, s.hidden_size), ids, weights),
            used.numel() * self._expert_bytes,
            2 * s.expert_weights * tokens * s.top_k,
        )

    def run(self, weights: ExpertWeights, call: Call) -> Tensor:
        x, ids, topk_weights = call.inputs
        return ops.moe(x, weights, ids, topk_weights)

    def _oracle(self, weights: ExpertWeights, call: Call) -> tuple[Tensor, Tensor]:
        x, ids, topk_weights = call.inputs
        out = torch.zeros(x.shape, dtype=torch.float64)
        magnitude = torch.zeros(len(x), dtype=torch.float64)
        # One expert at a time, or the float64 copies would outgrow the weights by far.
        for e in ids.unique().tolist():
            one = ExpertWeights(*(w[e : e + 1] for w in (weights.gate, weights.up, weights.down)))
            only = torch.where(ids == e, 0, -1)
            y, norms = oracle.moe(x, one, only, topk_weights, "silu")
            out += y
            magnitude += norms
        return out, magnitude


class LinearWorkload(Workload):
    """`linear` on random matrices [intermediate_size, hidden_size]."""

    def __init__(self, hidden_size: int, intermediate_size: int, format: str, seed: int):
        super().__init__(format, seed)
        self.rows, self.columns = intermediate_size, hidden_size

    def _layer_weights(self) -> QuantTensor:
        return self.random_weight(self.rows, self.columns)

    def _weights_per_token(self) -> int:
        return self.rows * self.columns

    def tiny(self) -> QuantTensor:
        return self.random_weight(TINY, TINY)

    def tiny_call(self) -> Call:
        return Call(0, (torch.randn(1, TINY, generator=self.generator).to(DTYPE),), 0, 0)

    def draw(self, tokens: int, layer: int) -> Call:
        return Call(
            layer,
            (self.activations(tokens, self.columns),),
            self.format.nbytes((self.rows, self.columns)),
            2 * self.rows * self.columns * tokens,
        )

    def run(self, weights: QuantTensor, call: Call) -> Tensor:
        return ops.linear(*call.inputs, weights)

    def _oracle(self, weights: QuantTensor, call: Call) -> tuple[Tensor, Tensor]:
        return oracle.linear(call.inputs[0], weights, None)


def make_workload(op: str, shape: Shape, format: str, seed: int, skew: float) -> Workload:
    """The workload of an operator; `shape.num_experts` are materialised for moe."""
    if op == "linear":
        return LinearWorkload(shape.hidden_size, shape.intermediate_size, format, seed)
    return MoeWorkload(shape, format, seed, skew)
