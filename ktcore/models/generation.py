"""Writing on from a prompt, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ktcore.models.decoder import one_torch_thread
from ktcore.models.model import Model
from ktcore.weights import CheckpointError


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Generation:
    """Continue a prompt. The prompt is computed in one batch, then token after token.

    Args:
        prompt_ids: token ids, at least one.
        max_new_tokens: stop after so many; 0 gives none.
        temperature: 0 takes the likeliest token each time; otherwise logits are divided by it.
        top_k: choose among the k likeliest; 0 for all.
        top_p: choose among the likeliest that together have this probability (arXiv 1904.09751).
        seed: makes the choice repeatable; None for a fresh one.

    Returns:
        A `Generation`: an iterator of token ids that ends before a token that ends the text, after
        `max_new_tokens`, or where the model's context is full.

    Raises:
        ValueError, TypeError: an argument does not fit, or the prompt is longer than the context.
        CheckpointError: while it goes on: the weights are such that no number comes of them.
    """
    return Generation(model, prompt_ids, max_new_tokens, Sampler(temperature, top_k, top_p, seed))


class Sampler:
    """Chooses a token by its logits."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int | None):
        """Raises ValueError, naming the argument that is out of range."""
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected 0 (all) or a positive number, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [vocab_size] to a token id."""
        if self.temperature == 0:
            return int(logits.numpy().argmax())  # of 150,000, in a tenth of torch's time
        ids = None
        if 0 < self.top_k < logits.shape[0]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True)
        # Shifted first: a small temperature must not make infinities.
        probabilities = ((logits - logits.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            # Those before which less than top_p lies: always the first.
            before = probabilities.cumsum(-1).sub_(probabilities)
            probabilities.masked_fill_(before >= self.top_p, 0)
        choice = torch.multinomial(probabilities, 1, generator=self.generator)
        return int(choice if ids is None else ids[choice])


class Generation(Iterator[int]):
    """Tokens as they are made.

    Attributes:
        tokens: those made so far.
        finish_reason: None while it goes on, then "eos", "length" (max_new_tokens) or "context".
        prefill_seconds: for the prompt and the first token.
        decode_steps, decode_seconds: passes over one token after that, the one that finds the end
            included.
    """

    def __init__(
        self, model: Model, prompt_ids: Sequence[int], max_new_tokens: int, sampler: Sampler
    ):
        vocabulary, limit = model.config.vocab_size, model.config.context_length
        if len(prompt_ids) == 0:
            raise ValueError("prompt_ids: expected at least 1 token, got none")
        for i, token in enumerate(prompt_ids):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"prompt_ids[{i}]: expected 0 to {vocabulary - 1}, the model's vocabulary, "
                    f"got {token}"
                )
        if len(prompt_ids) > limit:
            raise ValueError(
                f"prompt_ids: {len(prompt_ids)} tokens do not fit into the model's context of "
                f"{limit} tokens"
            )
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
        self._model, self._sampler = model, sampler
        self._max_new_tokens = max_new_tokens
        self._next = torch.tensor(list(prompt_ids), dtype=torch.int64)
        self._cache = model.new_cache()
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self.decode_steps = 0

    def __next__(self) -> int:
        if self.finish_reason is None:
            if len(self.tokens) >= self._max_new_tokens:
                self.finish_reason = "length"
            elif self._cache.length + len(self._next) > self._model.config.context_length:
                self.finish_reason = "context"
        if self.finish_reason is not None:
            raise StopIteration
        begin = time.perf_counter()
        token = self._step()
        seconds = time.perf_counter() - begin
        if self.tokens:
            self.decode_steps += 1
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        if token in self._model.eos_token_ids:
            self.finish_reason = "eos"
            raise StopIteration
        self.tokens.append(token)
        return token

    @torch.inference_mode()
    def _step(self) -> int:
        logits = self._model(self._next, self._cache, last=True)[0]
        with one_torch_thread(True):  # its other threads would spin where ktcore's want to run
            if not math.isfinite(logits.numpy().max()):  # NaN if any is
                raise CheckpointError(
                    self._model.path,
                    "the model computes no finite numbers (logits are NaN or infinite): its "
                    "weights are damaged; download it again",
                )
            token = self._sampler(logits)
            self._next = torch.tensor([token])
        return token
