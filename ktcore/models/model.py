"""A loaded model: a decoder and what belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ktcore.dispatch import Request
from ktcore.formats import Format
from ktcore.models.config import DecoderConfig
from ktcore.models.decoder import Decoder
from ktcore.models.kv_cache import KVCache
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.source import Source
from ktcore.models.tokenizer import Tokenizer


class Model:
    """A language model, ready to compute logits.

    Attributes:
        path: the folder or file it came from.
        name: what to call it.
        model_type: as in Hugging Face configurations.
        decoder: layers and weights.
        parameters: number of weights.
        eos_token_ids: the tokens that end a text.
        chat_template: the Jinja template that turns a conversation into a prompt, None without.
    """

    def __init__(self, source: Source, decoder: Decoder, parameters: int):
        self.path, self.name, self.model_type = source.path, source.name, source.model_type
        self.decoder, self.parameters = decoder, parameters
        self.eos_token_ids, self.chat_template = source.eos_token_ids, source.chat_template
        self._make_tokenizer = source.tokenizer

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def expert_format(self) -> Format | None:
        """The format of the first layer's experts; None for a model that has none."""
        layers = (layer.mlp for layer in self.decoder.layers)
        return next((mlp.experts.format for mlp in layers if isinstance(mlp, MoeLayer)), None)

    @property
    def expert_formats(self) -> list[str]:
        """The names of all formats that experts are in, the first layer's first."""
        layers = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, MoeLayer)]
        pairs = [(mlp.experts.format.name, mlp.experts.down_format.name) for mlp in layers]
        return list(dict.fromkeys(name for pair in pairs for name in pair))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the model has no sound tokenizer, or none of a kind that is
        supported, ImportError if the package tokenizers is missing.
        """
        return self._make_tokenizer()

    def new_cache(self, dtype: torch.dtype = torch.float16) -> KVCache:
        """An empty KV cache, for one sequence, in float16, bfloat16 or float32."""
        return KVCache(self.config, dtype)

    def __call__(self, ids: Tensor, cache: KVCache | None = None, *, last: bool = False) -> Tensor:
        """Logits [T, vocab_size] of token ids [T]; see `Decoder`."""
        return self.decoder(ids, cache, last=last)

    def requests(self, tokens: int) -> Iterator[tuple[str, Request]]:
        """The distinct operator calls of a forward pass over so many tokens, with their purpose."""
        seen = set()
        for layer in self.decoder.layers:
            for name, request in layer.requests(tokens):
                if request not in seen:
                    seen.add(request)
                    yield name, request
        for head in self.decoder.head.requests(1):  # generation needs the last token's logits only
            yield "head", head

    def __repr__(self) -> str:
        stored = " + ".join(self.expert_formats) or "no"
        return (
            f"Model({self.name}, {self.model_type}, {self.parameters:,} weights, {stored} experts)"
        )
