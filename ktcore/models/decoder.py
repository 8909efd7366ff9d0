"""The decoder that model families share: pre-normalised layers of GQA attention and an MLP or MoE.

Activations are float32 whatever the weights are stored as: on a CPU decoding is bound by the bytes
of the weights, and rounding activations would save none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore import ops
from ktcore.dispatch import Request, registry
from ktcore.models.config import DecoderConfig
from ktcore.models.kv_cache import KVCache
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.projection import Embedding, Projection, SideBySide
from ktcore.models.rope import frequencies
from ktcore.ops.recording import Recording, record
from ktcore.weights import ExpertWeights, QuantTensor

# Multiply-adds of one torch operator from which on torch may use all its threads. Below, its OpenMP
# workers cost more than they bring: they spin after each operator, on the cores where ktcore's own
# workers want to run, and a step waits for the one that a busy neighbour keeps from its core.
PARALLEL_WORK = 1 << 25


@contextlib.contextmanager
def one_torch_thread(wanted: bool) -> Iterator[None]:
    """Within the block torch computes on the calling thread alone, if that is wanted."""
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RmsNorm:
    """`ktcore.ops.rms_norm` with a weight."""

    def __init__(self, weight: Tensor, eps: float):
        """weight [N]."""
        self.weight = weight.to(torch.float32).contiguous()
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, normalised; and that sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class Rotary:
    """Tables of `ktcore.ops.rotary`.

    Attributes:
        frequencies: radians per position, [head_dim / 2].
        scale: multiplies what is rotated.
        cos, sin: [positions, head_dim / 2].
    """

    def __init__(self, positions: int, frequencies: Tensor, scale: float = 1.0):
        self.frequencies, self.scale = frequencies, scale
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        self.cos, self.sin = angles.cos() * scale, angles.sin() * scale

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        return ops.rotary(x, self.cos, self.sin, positions)


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys.

    Args:
        qkv: hidden_size to (heads + 2 * kv_heads) * head_dim.
        q_norm, k_norm: of each head's queries and keys.
        o: heads * head_dim to hidden_size.
    """

    def __init__(
        self,
        config: DecoderConfig,
        qkv: Projection | SideBySide,
        q_norm: RmsNorm,
        k_norm: RmsNorm,
        o: Projection,
    ):
        self.qkv, self.q_norm, self.k_norm, self.o = qkv, q_norm, k_norm, o
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.sizes = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]

    def __call__(self, x: Tensor, rotary: Rotary, cache: KVCache, layer: int) -> Tensor:
        """x [T, H], of the tokens that the cache has placed, to [T, H]."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(x, self.sizes)
        )
        q = rotary(self.q_norm(q), cache.positions)
        k = rotary(self.k_norm(k), cache.positions)
        return self.o(cache.attend(layer, q, k, v).flatten(1))


class Mlp:
    """A gated MLP (arXiv 2002.05202); its gate and up projections are one matrix."""

    def __init__(self, gate_up: Projection | SideBySide, down: Projection):
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.split(x, [self.down.shape[1]] * 2)
        return self.down(F.silu(gate) * up)

    def projections(self) -> dict[str, Projection | SideBySide]:
        """Its dense weights, by what they are for."""
        return {"gate and up": self.gate_up, "down": self.down}


class Layer:
    """One decoder layer."""

    def __init__(
        self,
        attention_norm: RmsNorm,
        attention: Attention,
        mlp_norm: RmsNorm,
        mlp: Mlp | MoeLayer,
    ):
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def projections(self) -> dict[str, Projection | SideBySide]:
        """Its dense weights, by what they are for."""
        attention = {"qkv": self.attention.qkv, "output": self.attention.o}
        return {**attention, **self.mlp.projections()}

    def prepare(self, release: bool) -> None:
        """Have backends pack the weights now; with `release`, keep only what they packed."""
        for projection in self.projections().values():
            projection.prepare(release)
        if isinstance(self.mlp, MoeLayer):
            self.mlp.prepare(release)

    def packed_weights(
        self, name: str
    ) -> Iterator[tuple[str, Request, QuantTensor | ExpertWeights]]:
        """What backends may have packed, by name, with the operator calls that read it."""
        for purpose, projection in self.projections().items():
            yield from projection.packed_weights(f"{name}.{purpose}")
        if isinstance(self.mlp, MoeLayer):
            yield from self.mlp.packed_weights(name)

    def requests(self, tokens: int) -> Iterator[tuple[str, Request]]:
        """The operator calls for so many tokens, each with what it is for."""
        for name, projection in self.projections().items():
            for request in projection.requests(tokens):
                yield name, request
        if isinstance(self.mlp, MoeLayer):
            yield from self.mlp.requests(tokens)


class Decoder:
    """Token ids to logits.

    Args:
        embedding: [vocab_size, hidden_size], any floating dtype or a `QuantTensor`.
        layers: one `Layer` for each of config.num_hidden_layers.
        norm: before the head.
        head: hidden_size to vocab_size.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Tensor | QuantTensor,
        layers: list[Layer],
        norm: RmsNorm,
        head: Projection,
    ):
        self.config, self.embedding, self.layers = config, Embedding(embedding), layers
        self.norm, self.head = norm, head
        self.rotary = Rotary(
            0,
            frequencies(config.head_dim, config.rope_theta, config.yarn),
            1.0 if config.yarn is None else config.yarn.attention_factor,
        )

        # Where plain torch computes, it multiplies by the largest of these.
        dense = [head, *(p for layer in layers for p in layer.projections().values())]
        self._largest = max(projection.numel for projection in dense)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache | None = None, *, last: bool = False) -> Tensor:
        """Logits of the tokens `ids` [T] that follow those in `cache`, which they are added to.

        Returns:
            [T, vocab_size] float32; with `last`, [1, vocab_size] for the last token alone.

        Raises:
            ValueError: no token, or more than the context holds.
            IndexError: an id is not in the vocabulary.
        """
        tokens = ids.shape[0]
        if tokens == 0:
            raise ValueError("ids: expected at least 1 token, got none")
        cache = KVCache(self.config) if cache is None else cache
        cache.reserve(tokens)
        if cache.capacity > len(self.rotary.cos):
            self.rotary = Rotary(cache.capacity, self.rotary.frequencies, self.rotary.scale)
        cache.place(tokens)
        width = self.config.num_attention_heads * self.config.head_dim
        work = tokens * max(2 * (cache.length + tokens) * width, self._largest)
        with one_torch_thread(tokens == 1 or work < PARALLEL_WORK):
            x = self.embedding(ids)
            logits = self._one(x, cache) if tokens == 1 else self._compute(x, cache, last)
        cache.advance(tokens)
        return logits

    def _compute(self, x: Tensor, cache: KVCache, last: bool) -> Tensor:
        """Embedded tokens [T, H], which the cache has placed, to logits."""
        norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        h = self.layers[0].attention_norm(x) if self.layers else self.norm(x)
        for i, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            h, x = layer.mlp_norm.added(layer.attention(h, self.rotary, cache, i), x)
            h, x = next_norm.added(layer.mlp(h), x)
        return self.head(h[-1:] if last else h)

    def _one(self, x: Tensor, cache: KVCache) -> Tensor:
        """`_compute` of one token: recorded the first time, where that can be."""
        step = cache.recorded
        if not isinstance(step, Step) or not step.fits(self):
            step = Step(self, x)
            logits, step.recording = record(lambda: self._compute(step.x, cache, True))
            step.logits, cache.recorded = logits, step
        elif step.recording.why_not is not None:
            return self._compute(x, cache, True)
        else:
            step.x.copy_(x)
            step.recording.run()
        # Not `clone`: it wakes torch's own threads, which go on spinning while the next step
        # wants their cores.
        return torch.from_numpy(step.logits.numpy().copy())


class Step:
    """A decoder's computation of one token on a cache, recorded.

    Attributes:
        x, logits: what it reads and what it writes.
    """

    recording: Recording
    logits: Tensor

    def __init__(self, decoder: Decoder, x: Tensor):
        self.x = x.clone()
        self._depends = self._state(decoder)

    @staticmethod
    def _state(decoder: Decoder) -> tuple:
        """What the recorded calls depend on, beside the memory that they keep."""
        return decoder, decoder.rotary, registry.choices()

    def fits(self, decoder: Decoder) -> bool:
        """Whether the decoder would make the same calls."""
        return self._depends == self._state(decoder)
