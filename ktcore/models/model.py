"""A loaded model: a decoder and what belongs to its folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ktcore.dispatch import Request
from ktcore.formats import Format
from ktcore.models.config import DecoderConfig, JsonFile
from ktcore.models.decoder import Decoder, KVCache
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.tokenizer import Tokenizer


class Model:
    """A language model, ready to compute logits.

    Attributes:
        path: the folder it came from.
        model_type: as in config.json.
        decoder: layers and weights.
        parameters: number of weights.
    """

    def __init__(self, path: Path, model_type: str, decoder: Decoder, parameters: int):
        self.path, self.model_type = path, model_type
        self.decoder, self.parameters = decoder, parameters
        self.eos_token_ids = self._eos_token_ids()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def expert_format(self) -> Format | None:
        """The format of the experts; None for a model that has none."""
        layers = (layer.mlp for layer in self.decoder.layers)
        return next((mlp.experts.format for mlp in layers if isinstance(mlp, MoeLayer)), None)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the folder has no sound tokenizer.json, ImportError if the
        package tokenizers is missing.
        """
        return Tokenizer(self.path / "tokenizer.json")

    def _eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text: generation_config.json's word, else config.json's."""
        for name in ("generation_config.json", "config.json"):
            if name == "config.json" or (self.path / name).is_file():
                ids = JsonFile(self.path / name).integers("eos_token_id")
                if ids:
                    return frozenset(ids)
        return frozenset()

    def new_cache(self) -> KVCache:
        """An empty KV cache, for one sequence."""
        return KVCache(self.config)

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
        head = self.decoder.head.request(1)  # generation needs the last token's logits only
        if head is not None:
            yield "head", head

    def __repr__(self) -> str:
        stored = self.expert_format.name if self.expert_format else "no"
        return (
            f"Model({self.name}, {self.model_type}, {self.parameters:,} weights, {stored} experts)"
        )
