"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktcore.models.model import Model


def perplexity(model: Model, text: str | Sequence[int], window: int = 256) -> float:
    """exp of the mean negative log-likelihood of a token.

    Args:
        text: a text, or its token ids.
        window: tokens that are predicted from each other: the text is cut into consecutive windows
            of so many, and the first token of each is not counted.

    Raises:
        ValueError: a window of less than 2 tokens or beyond the context, or too short a text.
    """
    if not 2 <= window <= model.config.context_length:
        raise ValueError(
            f"window: expected 2 to {model.config.context_length}, the model's context, "
            f"got {window}"
        )
    ids = torch.tensor(
        model.tokenizer.encode(text) if isinstance(text, str) else list(text), dtype=torch.int64
    )
    total, count = 0.0, 0
    for piece in ids.split(window):
        if len(piece) > 1:
            logits = model(piece)[:-1]
            total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    if count == 0:
        raise ValueError(f"text: expected at least 2 tokens, got {len(ids)}")
    return math.exp(total / count)
