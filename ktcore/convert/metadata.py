"""What goes with the weights: config.json and a tokenizer's files, or the keys of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ktcore.convert.errors import ConversionError
from ktcore.convert.targets import Target
from ktcore.models.config import JsonFile
from ktcore.models.family import families
from ktcore.models.gguf_tokenizer import (
    CHAT_TEMPLATE,
    CONTROL,
    END_TEXTS,
    NORMAL,
    PRE_TOKENIZERS,
    SECTION,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
)
from ktcore.models.source import Source, open_source
from ktcore.weights import CheckpointError, GgufFile

# What a folder of a model holds beside weights is copied: everything but what is larger, hidden,
# or one of these.
LARGEST_COPIED = 64 << 20
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "conversion.json")

# The parts of a GGUF file's metadata that are of the old file, not of the model.
OLD_FILE = ("split.", "quantize.imatrix.", "general.file_type", "general.quantization_version")

# Texts that two tokenizers must cut alike to be taken for the same.
SAMPLES = (
    "In the beginning God created the heaven and the earth.",
    "We've  three   spaces\n\n\tand a tab; 1234567 + 89 = 1,234,656!  ",
    "Gr\u00fc\u00dfe, \u4f60\u597d\uff0c\u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600 e\u0301",
    "def f(x):\n    return {'a': x**2}  # I'M HERE\r\n",
)


# ---------------------------------------------------------------------------------------- folders


def folder_files(
    source: Source, target: Target, quantization: dict | None
) -> tuple[dict[str, bytes], list[str]]:
    """The files beside the weights, by name, and what is to be said about them."""
    if isinstance(source.checkpoint, GgufFile):
        return _files_of_gguf(source, target, quantization)
    folder = source.path
    config = dict(JsonFile(folder / "config.json").fields)
    config.pop("quantization_config", None)
    if target.name == "bf16":
        config |= {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}
    files = {"config.json": _json(_with(config, quantization))}
    for path in sorted(folder.iterdir()):
        name = path.name
        skipped = name in NOT_COPIED or name.startswith(".") or name.endswith(WEIGHT_FILES)
        if not skipped and path.is_file() and path.stat().st_size <= LARGEST_COPIED:
            files[name] = path.read_bytes()
    return files, []


def _files_of_gguf(
    source: Source, target: Target, quantization: dict | None
) -> tuple[dict[str, bytes], list[str]]:
    family = families()[source.model_type]
    if family.write_config is None:
        raise ConversionError(
            f"{source.path}: a config.json for {source.model_type} cannot be written, so a GGUF "
            "file of that kind can only be converted to GGUF"
        )
    file = source.checkpoint
    assert isinstance(file, GgufFile)
    ends = sorted(source.eos_token_ids)
    eos = file.metadata.get(f"{SECTION}.eos_token_id")
    ends = [i for i in ends if i == eos] + [i for i in ends if i != eos]  # its own word first
    special = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    bos = file.metadata.get(f"{SECTION}.bos_token_id")
    if isinstance(bos, int):
        special["bos_token_id"] = bos
    config = {**family.write_config(source.config), **special, "torch_dtype": "bfloat16"}
    files = {
        "config.json": _json(_with(config, quantization)),
        "generation_config.json": _json(special),
    }
    if source.chat_template is not None:
        files["chat_template.jinja"] = source.chat_template.encode()
    try:
        files["tokenizer.json"] = source.tokenizer().to_json().encode()
    except CheckpointError as error:
        return files, [f"the output has no tokenizer: {error}"]
    tokens = file.metadata[f"{SECTION}.tokens"]
    assert isinstance(tokens, list)
    names = {"eos_token": ends[0] if ends else None, "bos_token": bos}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.context_length,
    }
    settings |= {k: tokens[i] for k, i in names.items() if isinstance(i, int) and i < len(tokens)}
    files["tokenizer_config.json"] = _json(settings)
    return files, []


def _with(config: dict, quantization: dict | None) -> dict:
    return config if quantization is None else {**config, "quantization_config": quantization}


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------ GGUF


def gguf_metadata(
    source: Source, target: Target, imatrix: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], list[str]]:
    """Keys, the types of those that are known, and what is to be said about them."""
    notes: list[str] = []
    kinds: dict[str, tuple[int, ...]] = {}
    if isinstance(source.checkpoint, GgufFile):
        file = source.checkpoint
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith(OLD_FILE)}
        kinds = {k: v for k, v in file.kinds.items() if k in metadata}
    else:
        metadata, notes = _keys_of_folder(source)
    metadata |= {"general.quantization_version": 2, "general.file_type": target.file_type}
    metadata |= {f"quantize.imatrix.{k}": v for k, v in imatrix.items()}
    return metadata, kinds, notes


def _keys_of_folder(source: Source) -> tuple[dict[str, Any], list[str]]:
    architecture = families()[source.model_type].gguf
    if architecture is None or architecture.write_keys is None:
        raise ConversionError(
            f"{source.path}: {source.model_type} has no GGUF form that ktcore can write"
        )
    try:
        keys = architecture.write_keys(source.config)
    except ValueError as error:
        raise ConversionError(f"{source.path}: cannot become a GGUF file: {error}") from None
    metadata = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": source.name,
        **{f"{architecture.name}.{key}": value for key, value in keys.items()},
    }
    if not (source.path / "tokenizer.json").is_file():
        return metadata, ["the output has no tokenizer: the model's folder has no tokenizer.json"]
    metadata |= {f"{SECTION}.{k}": v for k, v in _tokenizer_keys(source).items()}
    if source.chat_template is not None:
        metadata[CHAT_TEMPLATE] = source.chat_template
    return metadata, []


def _tokenizer_keys(source: Source) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json as llama.cpp's converter writes it.

    Raises:
        ConversionError: it is of another kind, or cuts texts by a rule that GGUF has no name for.
    """
    path = source.path / "tokenizer.json"
    content = JsonFile(path).fields
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not _byte_level(content):
        raise ConversionError(f"{path}: only byte-level BPE tokenizers can be written to GGUF")
    by_id = {i: text for text, i in model["vocab"].items()}
    added = {t["id"]: t for t in content.get("added_tokens") or []}
    by_id |= {i: t["content"] for i, t in added.items()}
    size = source.config.vocab_size
    tokens, types = [], []
    for i in range(size):
        if i not in by_id:
            # Rows of the embedding without a token, which padding made.
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
            continue
        tokens.append(by_id[i])
        special = added.get(i, {}).get("special")
        types.append(NORMAL if i not in added else CONTROL if special else USER_DEFINED)
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": _pre_tokenizer(path, content),
        "tokens": tokens,
        "token_type": types,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
    }
    return keys | _special_keys(source, tokens)


def _byte_level(content: dict) -> bool:
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _pre_tokenizer(path: Path, content: dict) -> str:
    """GGUF's name for the rule by which a tokenizer.json cuts texts into words."""
    pre = content.get("pre_tokenizer") or {}
    pattern = None
    for step in pre.get("pretokenizers") or [pre]:
        if step.get("type") == "Split":
            pattern = (step.get("pattern") or {}).get("Regex")
    normalizer = content.get("normalizer") or {}
    found = PreTokenizer(
        pattern=pattern,
        nfc=normalizer.get("type") == "NFC",
        whole_words=bool((content.get("model") or {}).get("ignore_merges")),
    )
    for name, rule in PRE_TOKENIZERS.items():
        if rule == found:
            return name
    raise ConversionError(
        f"{path}: cuts texts into words by a rule that has no name in GGUF files; known are those "
        f"of {', '.join(PRE_TOKENIZERS)}"
    )


def _special_keys(source: Source, tokens: list[str]) -> dict[str, Any]:
    """Which tokens begin and end a text, and whether the tokenizer itself puts them around one."""
    path = source.path / "tokenizer_config.json"
    settings = JsonFile(path).fields if path.is_file() else {}
    config = JsonFile(source.path / "config.json")
    where = {text: i for i, text in enumerate(tokens)}

    def named(name: str) -> int | None:
        value = settings.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if text in where:
            return where[text]
        ids = config.integers(f"{name}_token_id")
        return ids[0] if ids else None

    ends = source.eos_token_ids
    found = {"bos": named("bos"), "eos": named("eos"), "padding": named("pad")}
    others = [
        i for i in sorted(ends - {found["eos"]}) if tokens[i : i + 1] and tokens[i] not in END_TEXTS
    ]
    found["eot"] = others[0] if others else None
    keys: dict[str, Any] = {f"{k}_token_id": i for k, i in found.items() if i is not None}
    around = source.tokenizer().encode("")
    keys["add_bos_token"] = found["bos"] is not None and around[:1] == [found["bos"]]
    if found["eos"] is not None and around[-1:] == [found["eos"]] and not keys["add_bos_token"]:
        keys["add_eos_token"] = True
    return keys


def check_tokenizer(source: Source, path: Path) -> None:
    """Raises ConversionError if the tokenizer of what a model was converted to cuts otherwise."""
    made = open_source(path)
    if isinstance(made.checkpoint, GgufFile) == isinstance(source.checkpoint, GgufFile):
        return  # it was copied
    try:
        ours, theirs = made.tokenizer(), source.tokenizer()
    except CheckpointError:  # there is none, as a note says
        return
    for text in SAMPLES:
        if ours.encode(text) != theirs.encode(text):
            raise ConversionError(
                f"{source.path}: its tokenizer cannot be stored there unchanged: {text!r} would be "
                "cut otherwise"
            )
