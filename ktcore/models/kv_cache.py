"""Keys and values of one sequence, in pages (see `ktcore.ops.attention`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore import ops
from ktcore.models.config import DecoderConfig
from ktcore.ops.attention import PAGE

CHUNK = 8  # pages; their number grows by multiples of it


class KVCache:
    """Keys and values of one sequence, every layer's in pages of its own.

    What the operators are told of the sequence is in tensors that stay where they are, so that a
    recorded step can be made again for the next token.

    Attributes:
        length: positions that are filled.
        capacity: positions that there is memory for.
        positions, slots: [T] int64, of the tokens that are being computed.
        page_table, lengths, query_begin: see `ktcore.ops.attention`.
        moved: how often pages have moved to other memory.
        recorded: a decoder's step of one token on this cache.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype = torch.float16):
        """dtype: of keys and values, float16, bfloat16 or float32.

        float16 rounds them by 0.02 %, less than integer weights round activations; float32 reads
        twice the bytes at every token.
        """
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
        self.dtype, self.length, self.capacity, self.moved = dtype, 0, 0, 0
        self.recorded: object | None = None
        self._limit = config.context_length
        self._heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._pages = [self._allocate(0) for _ in range(config.num_hidden_layers)]
        self.positions = self.slots = torch.empty(0, dtype=torch.int64)
        self._one = torch.empty(1, dtype=torch.int64)  # what both are for a single token
        self.page_table = torch.empty(1, 0, dtype=torch.int32)
        self.lengths = torch.zeros(1, dtype=torch.int64)
        self.query_begin = torch.zeros(2, dtype=torch.int64)

    def _allocate(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = (pages, self._heads)
        return (
            torch.empty(*shape, self._head_dim, PAGE, dtype=self.dtype),
            torch.empty(*shape, PAGE, self._head_dim, dtype=self.dtype),
        )

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
        wanted = min(max(needed, self.capacity * 3 // 2), self._limit)
        pages = -(-wanted // (CHUNK * PAGE)) * CHUNK
        for i, old in enumerate(self._pages):
            self._pages[i] = self._allocate(pages)
            for new, stored in zip(self._pages[i], old, strict=True):
                new[: len(stored)] = stored
        self.capacity = min(pages * PAGE, self._limit)
        self.moved += 1
        self.recorded = None  # it reads the old pages
        self.page_table = torch.arange(pages, dtype=torch.int32)[None]

    def place(self, tokens: int) -> None:
        """Say that the next so many positions, which there is room for, are being computed."""
        if tokens == 1:
            self.positions = self.slots = self._one.fill_(self.length)
        else:
            # A sequence's pages are in order, so that a slot is the position.
            self.positions = self.slots = torch.arange(self.length, self.length + tokens)
        self.lengths.fill_(self.length + tokens)
        self.query_begin[1] = tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the tokens' keys and values, and attend to all so far: [T, heads, head_dim]."""
        key_pages, value_pages = self._pages[layer]
        ops.store_kv(key, value, key_pages, value_pages, self.slots)
        return ops.attention(
            query, key_pages, value_pages, self.page_table, self.lengths, self.query_begin
        )

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, those filled, got {length}")
        self.length = length
