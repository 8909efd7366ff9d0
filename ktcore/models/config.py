"""What a decoder is made of, and reading it from a config.json that may say anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktcore.weights import CheckpointError
from ktcore.weights.safetensors_file import read_json

_REQUIRED = object()
MAX_NUMBER = 1e30  # of any setting that makes sense; also keeps huge integers from overflowing


@dataclass(frozen=True)
class Yarn:
    """How rotary embeddings reach beyond the positions trained on (arXiv 2309.00071).

    Attributes:
        factor: how many times as far.
        original_length: positions trained on.
        attention_factor: what rotated queries and keys are multiplied by.
        beta_fast, beta_slow: turns over `original_length` from which on a frequency is left alone,
            and up to which it is slowed by the whole factor.
        truncate: whether the columns where that is so are rounded outwards.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and settings of a decoder, in the terms of Hugging Face configurations.

    Attributes:
        top_k: experts per token (`num_experts_per_tok`).
        renormalize: whether a token's expert weights are divided by their sum (`norm_topk_prob`).
        dense_layers: layers with one MLP of `intermediate_size` in place of experts.
        context_length: most positions a sequence may have (`max_position_embeddings`).
        yarn: how it was made longer than that trained on, None if it was not.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    renormalize: bool
    dense_layers: frozenset[int]
    activation: str
    rms_norm_eps: float
    rope_theta: float
    context_length: int
    attention_bias: bool
    tie_word_embeddings: bool
    yarn: Yarn | None = None


class Fields:
    """Settings of a file, read one by one; what is wrong is a CheckpointError that names it.

    Attributes:
        path: the file.
        fields: values by name.
        prefix: what error messages put before a name.
    """

    def __init__(self, path: Path, fields: dict, prefix: str = ""):
        self.path, self.fields, self.prefix = path, fields, prefix

    def inner(self, name: str) -> Fields | None:
        """An object within the object, None where it is absent or null."""
        fields = self.get(name)
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise self.error(name, f"expected an object, got {_kind(fields)}")
        return Fields(self.path, fields, f"{self.prefix}{name}.")

    def error(self, name: str, what: str) -> CheckpointError:
        where = f"{self.prefix}{name}"  # names of inner objects are a file's, so may be anything
        if len(where) > 200 or not where.isprintable():
            where = repr(where[:200])
        return CheckpointError(self.path, f"{where}: {what}")

    def get(self, name: str, default: object = None) -> object:
        """A field's value; `default` where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def _expected(self, name: str, default: object, what: str) -> object:
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.error(name, f"missing; expected {what}")
        return value

    def integer(
        self, name: str, default: object = _REQUIRED, least: int = 1, most: int = 1 << 31
    ) -> int:
        what = f"an integer from {least} to {most}"
        value = self._expected(name, default, what)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(name, f"expected {what}, got {_kind(value)}")
        return value

    def number(self, name: str, default: object = _REQUIRED) -> float:
        value = self._expected(name, default, "a positive number")
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 < value <= MAX_NUMBER:
            raise self.error(name, f"expected a positive number, got {_kind(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {_kind(value)}")
        return value

    def text(self, name: str, default: object = _REQUIRED) -> str:
        value = self._expected(name, default, "a string")
        if not isinstance(value, str):
            raise self.error(name, f"expected a string, got {_kind(value)}")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers from 0, or one integer as a list of itself; empty where absent."""
        value = self.get(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise self.error(name, f"expected integers of at least 0, got {_kind(value)}")
        return values


class JsonFile(Fields):
    """A JSON object."""

    def __init__(self, path: Path):
        """Raises CheckpointError if the file is missing, unreadable or not a JSON object."""
        try:
            fields = read_json(path)
        except FileNotFoundError:
            raise CheckpointError(
                path,
                "no such file: a model folder holds config.json, safetensors files and "
                "tokenizer.json, as downloaded from Hugging Face",
            ) from None
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"not valid JSON: {error}; download it again") from None
        if not isinstance(fields, dict):
            raise CheckpointError(path, f"expected a JSON object, got {_kind(fields)}")
        super().__init__(path, fields)


def _kind(value: object) -> str:
    """A value as an error message shows it: short whatever it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
