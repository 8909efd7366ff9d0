"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktcore.models.model import Model


def perplexity(
    model: Model, text: str | Sequence[int], window: int = 256, unscored: int = 0
) -> float:
    """exp of the mean negative log-likelihood of a token.

    Args:
        text: a text, or its token ids.
        window: tokens that are predicted from each other: the text is cut into consecutive windows
            of so many, and the first token of each is not counted.
        unscored: tokens of each window, after its first, that are only context: predicting them
            is hard and says little. llama.cpp's `llama-perplexity` counts as window // 2 does here,
            and leaves out a last window that is not full.

    Raises:
        ValueError: a window of less than 2 tokens or beyond the context, nothing of it scored, or
            too short a text.
    """
    if not 2 <= window <= model.config.context_length:
        raise ValueError(
            f"window: expected 2 to {model.config.context_length}, the model's context, "
            f"got {window}"
        )
    if not 0 <= unscored <= window - 2:
        raise ValueError(f"unscored: expected 0 to window - 2, {window - 2}, got {unscored}")
    ids = torch.tensor(
        model.tokenizer.encode(text) if isinstance(text, str) else list(text), dtype=torch.int64
    )
    total, count = 0.0, 0
    for piece in ids.split(window):
        if len(piece) > unscored + 1:
            logits = model(piece)[unscored:-1]
            total += F.cross_entropy(logits, piece[unscored + 1 :], reduction="sum").item()
            count += len(piece) - unscored - 1
    if count == 0:
        raise ValueError(f"text: expected at least {unscored + 2} tokens, got {len(ids)}")
    return math.exp(total / count)
