"""The decoder that model families share: pre-normalised layers of GQA attention and an MLP or MoE.

Activations and the KV cache are float32 whatever the weights are stored as: on a CPU decoding is
bound by the bytes of the weights, and rounding activations would save none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcore.dispatch import Request
from ktcore.models.config import DecoderConfig, Yarn
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.projection import Embedding, Projection, SideBySide
from ktcore.models.rope import frequencies
from ktcore.weights import ExpertWeights, QuantTensor

CHUNK = 256  # positions; the KV cache is allocated in multiples of it

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
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    As x / hypot(|x|, sqrt(n eps)) * (sqrt(n) weight): four torch operators where the plain form
    takes six, which counts when a token's whole arithmetic takes as long as calling them.
    """

    def __init__(self, weight: Tensor, eps: float):
        """weight [..., n], broadcast against x."""
        size = weight.shape[-1]
        self.weight = weight.to(torch.float32) * size**0.5
        self.floor = torch.tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / norm.hypot_(self.floor)).mul_(self.weight)


class Rotary:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other.

    cos and sin [positions, head_dim] are computed for as many positions as were needed so far.
    """

    def __init__(self, head_dim: int, theta: float, yarn: Yarn | None = None):
        self.frequencies = frequencies(head_dim, theta, yarn)
        self.scale = 1.0 if yarn is None else yarn.attention_factor
        self.cos = self.sin = torch.empty(0)

    def tables(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions begin to end; sin with the sign of the rotation."""
        if end > len(self.cos):
            size = -(-end // CHUNK) * CHUNK
            angles = torch.outer(torch.arange(size, dtype=torch.float32), self.frequencies)
            cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
            self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return self.cos[begin:end], self.sin[begin:end]

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """x [..., T, head_dim], rotated, to `out`, which must not overlap x."""
        turned = x.roll(x.shape[-1] // 2, -1).mul_(sin)
        torch.addcmul(turned, x, cos, out=out)


class KVCache:
    """Keys and values of one sequence, [1, 2 * kv_heads, capacity, head_dim] a layer, keys first.

    Attributes:
        length: positions that are filled.
    """

    def __init__(self, config: DecoderConfig):
        self.length = 0
        self.capacity = 0
        self._limit = config.context_length
        self._heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._layers = [
            torch.empty(1, 2 * self._heads, 0, self._head_dim)
        ] * config.num_hidden_layers

    def reserve(self, tokens: int) -> None:
        """Make room for so many more positions.

        Raises:
            ValueError: that is more than the model's context.
        """
        needed = self.length + tokens
        if needed > self._limit:
            raise ValueError(
                f"{needed} tokens do not fit into the model's context of {self._limit} tokens"
            )
        if needed <= self.capacity:
            return
        # By half as much again, so that copying stays a small part of generating.
        chunks = -(-max(needed, self.capacity * 3 // 2) // CHUNK)
        self.capacity = min(chunks * CHUNK, self._limit)
        for i, old in enumerate(self._layers):
            grown = torch.empty(1, 2 * self._heads, self.capacity, self._head_dim)
            grown[:, :, : self.length] = old[:, :, : self.length]
            self._layers[i] = grown

    def append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Store kv [1, 2 * kv_heads, T, head_dim] after `length`; all keys and all values so far,
        each [1, kv_heads, length + T, head_dim]. `advance` moves on once every layer has stored.
        """
        tokens = kv.shape[2]
        stored = self._layers[layer]
        stored.narrow(2, self.length, tokens).copy_(kv)
        filled = stored.narrow(2, 0, self.length + tokens)
        return filled.narrow(1, 0, self._heads), filled.narrow(1, self._heads, self._heads)

    def advance(self, tokens: int) -> None:
        self.length += tokens


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys.

    Args:
        qkv: hidden_size to (heads + 2 * kv_heads) * head_dim.
        norm: of queries and keys together, weight [heads + kv_heads, 1, head_dim].
        o: heads * head_dim to hidden_size.
    """

    def __init__(
        self,
        config: DecoderConfig,
        qkv: Projection | SideBySide,
        norm: RmsNorm,
        o: Projection,
    ):
        self.qkv, self.norm, self.o = qkv, norm, o
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        """x [T, H] to [T, H]; mask [T, positions] or None."""
        tokens = x.shape[0]
        states = self.qkv(x).view(1, tokens, -1, self.head_dim).transpose(1, 2)
        queries_keys = states.narrow(1, 0, self.heads + self.kv_heads)
        Rotary.rotate(self.norm(queries_keys), cos, sin, out=queries_keys)
        keys, values = cache.append(layer, states.narrow(1, self.heads, 2 * self.kv_heads))
        mixed = F.scaled_dot_product_attention(
            states.narrow(1, 0, self.heads),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o(mixed.transpose(1, 2).reshape(tokens, -1))


class Mlp:
    """A gated MLP (arXiv 2002.05202); its gate and up projections are one matrix."""

    def __init__(self, gate_up: Projection | SideBySide, down: Projection):
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up))

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
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.yarn)
        self._largest_dense = max(p.torch_weights for p in self._projections())

    def _projections(self) -> Iterator[Projection | SideBySide]:
        yield self.head
        for layer in self.layers:
            yield from layer.projections().values()

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
        begin, end = cache.length, cache.length + tokens
        cos, sin = self.rotary.tables(begin, end)
        mask = None
        if begin and tokens > 1:  # a later part of a prompt sees all before it, and itself causally
            mask = torch.ones(tokens, end, dtype=torch.bool).tril_(begin)
        attention = 2 * end * self.config.num_attention_heads * self.config.head_dim
        work = tokens * max(attention, self._largest_dense)
        with one_torch_thread(work < PARALLEL_WORK):
            x = self.embedding(ids)
            for i, layer in enumerate(self.layers):
                x = x + layer.attention(layer.attention_norm(x), cos, sin, mask, cache, i)
                x = x.add_(layer.mlp(layer.mlp_norm(x)))
            cache.advance(tokens)
            return self.head(self.norm(x[-1:] if last else x))
