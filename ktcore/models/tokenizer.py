"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ktcore.weights import CheckpointError

INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
CONTEXT = 8  # tokens that a piece of text is decoded after; what precedes can change spaces


def tokenizers_package() -> ModuleType:
    """The package tokenizers. Raises ImportError, saying how to get it, if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs the package tokenizers: pip install 'ktcore[cli]'") from error
    return tokenizers


class Tokenizer:
    """Text to token ids and back, by a tokenizer of the package tokenizers."""

    def __init__(self, tokenizer: Any):
        """tokenizer: a `tokenizers.Tokenizer`."""
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """That of a Hugging Face tokenizer.json.

        Raises:
            CheckpointError: the file is missing or not sound.
            ImportError: the package tokenizers is missing.
        """
        tokenizers = tokenizers_package()
        if not path.is_file():
            raise CheckpointError(
                path, "no such file: text needs the model's tokenizer.json; token ids do without"
            )
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except BaseException as error:
            # The package raises plain Exception; where its Rust code fails, an exception of a type
            # that it does not export.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(path, f"not a valid tokenizer.json: {error}") from None

    def to_json(self) -> str:
        """The content of a tokenizer.json for it."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer itself puts around a text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self, before: Iterable[int] = ()) -> StreamDecoder:
        """A decoder for tokens that come one by one after the tokens `before`."""
        return StreamDecoder(self, list(before)[-CONTEXT:])


class StreamDecoder:
    """Text of tokens as they come: each piece as soon as its last character is whole.

    The pieces, joined, are the text that decoding everything at once would give.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int]):
        self._tokenizer = tokenizer
        self._ids = before
        # Text of _ids that was given out, or came before.
        self._shown = tokenizer.decode(before)

    def push(self, token: int) -> str:
        """The text that this token completes; empty if it ends within a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(INCOMPLETE):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What is still held back: an incomplete character, as the replacement character."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._shown) :]
        # Old tokens are dropped where the text is whole, so that a step's work does not grow.
        if len(self._ids) > 2 * CONTEXT and not text.endswith(INCOMPLETE):
            self._ids = self._ids[-CONTEXT:]
            self._shown = self._tokenizer.decode(self._ids)
        else:
            self._shown = text
        return new
