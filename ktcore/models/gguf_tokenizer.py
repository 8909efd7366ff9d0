"""The tokenizer and the chat template that a GGUF file holds.

Byte-level BPE is supported, which llama.cpp calls "gpt2". The file names the rule that cuts a text
into words; what is known of the rules here is what the models' own tokenizer.json files say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktcore.models.config import Fields
from ktcore.models.gguf import keys_of
from ktcore.models.tokenizer import Tokenizer, tokenizers_package
from ktcore.weights import GgufFile

SECTION = "tokenizer.ggml"
CHAT_TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types that matter here

# Tokens that end a text: the file's own word for them, and those that it may name no key for, as
# llama.cpp, too, knows them by their text.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"}
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut into words before merges apply.

    Attributes:
        pattern: a regular expression, None for GPT-2's own.
        nfc: whether the text is brought into Unicode's composed form first.
        whole_words: whether a word that is a token is taken as it is, whatever the merges say.
    """

    pattern: str | None = None
    nfc: bool = False
    whole_words: bool = False


def _words(digits: str) -> str:
    """The pattern of most models since 2023, which differ in how many digits make a word."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_QWEN2 = PreTokenizer(_words(r"\p{N}"), nfc=True)
_LLAMA3 = PreTokenizer(_words(r"\p{N}{1,3}"), whole_words=True)

# By `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def read_tokenizer(file: GgufFile, vocab_size: int) -> Tokenizer:
    """The tokenizer of a file whose model knows `vocab_size` tokens.

    Raises:
        CheckpointError: there is none, it is not sound or of a kind that is not supported.
        ImportError: the package tokenizers is missing.
    """
    keys = keys_of(file, SECTION)
    kind = keys.text("model")
    if kind != "gpt2":
        raise keys.error("model", f"{kind[:80]!r} is not supported, only 'gpt2' (byte-level BPE)")
    rule = keys.text("pre")
    pre = PRE_TOKENIZERS.get(rule)
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise keys.error("pre", f"{rule[:80]!r} is not supported; supported: {known}")
    vocabulary = _vocabulary(keys, vocab_size)
    merges = _merges(keys, vocabulary)
    types = _types(keys, len(vocabulary))
    package = tokenizers_package()
    try:
        return Tokenizer(_assembled(package, pre, keys, vocabulary, merges, types))
    except Exception as error:  # the package raises plain Exception
        raise keys.error("tokens", f"no sound tokenizer: {error}") from None


def _assembled(
    package: Any,
    pre: PreTokenizer,
    keys: Fields,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    types: list[int],
) -> Any:
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = package.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words)
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if pre.pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(package.Regex(pre.pattern), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokens = list(vocabulary)
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                package.AddedToken(text, special=special, normalized=False)
                for text, found in zip(tokens, types, strict=True)
                if found == kind and text
            ]
        )
    around = {
        end: _token_id(keys, f"{end}_token_id", tokens)
        for end in ("bos", "eos")
        if keys.flag(f"add_{end}_token", False)
    }
    if around:
        names = {end: tokens[i] for end, i in around.items()}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([names["bos"]] if "bos" in names else []), "$A",
                    *([names["eos"]] if "eos" in names else [])],
            special_tokens=list({names[end]: i for end, i in around.items()}.items()),
        )  # fmt: skip
    return tokenizer


def _texts(keys: Fields, name: str) -> list[str]:
    value = keys.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise keys.error(name, "expected a list of strings")
    return value


def _vocabulary(keys: Fields, size: int) -> dict[str, int]:
    tokens = _texts(keys, "tokens")
    if len(tokens) > size:
        raise keys.error("tokens", f"{len(tokens)} tokens, but the model knows {size}")
    vocabulary = {text: i for i, text in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(text for i, text in enumerate(tokens) if vocabulary[text] != i)
        raise keys.error("tokens", f"{twice[:80]!r} appears twice")
    return vocabulary


def _merges(keys: Fields, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens; where they join, a token must come of it."""
    merges = []
    for i, text in enumerate(_texts(keys, "merges")):
        space = text.find(" ", 1)  # the first part may itself begin with one
        left, right = text[:space], text[space + 1 :]
        if space < 0 or not {left, right, left + right} <= vocabulary.keys():
            raise keys.error("merges", f"merge {i}, {text[:80]!r}, is not one of two tokens")
        merges.append((left, right))
    return merges


def _types(keys: Fields, count: int) -> list[int]:
    types = keys.get("token_type")
    if types is None:
        return [NORMAL] * count
    if not isinstance(types, list) or len(types) != count:
        raise keys.error("token_type", f"expected a list of {count}, one for each token")
    return types


def _token_id(keys: Fields, name: str, tokens: list[str]) -> int:
    return keys.integer(name, least=0, most=len(tokens) - 1)


def end_token_ids(file: GgufFile) -> frozenset[int]:
    """The tokens that end a text. Raises CheckpointError if the file's word is no token id."""
    keys = keys_of(file, SECTION)
    found = {keys.integer(name, least=0) for name in END_KEYS if keys.get(name) is not None}
    tokens, types = keys.get("tokens"), keys.get("token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        found |= {i for i, (text, kind) in pairs if kind == CONTROL and text in END_TEXTS}
    return frozenset(found)


def chat_template(file: GgufFile) -> str | None:
    """The Jinja template that turns a conversation into a prompt, None without."""
    found = file.metadata.get(CHAT_TEMPLATE)
    return found if isinstance(found, str) else None
