"""What a model is loaded from: a folder as downloaded from Hugging Face, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ktcore.models.config import DecoderConfig, JsonFile
from ktcore.models.family import TensorNames, find_family
from ktcore.models.gguf import gguf_architecture
from ktcore.models.gguf_tokenizer import chat_template, end_token_ids, read_tokenizer
from ktcore.models.tokenizer import Tokenizer
from ktcore.weights import Checkpoint, CheckpointError, GgufFile
from ktcore.weights.gguf_file import find_gguf
from ktcore.weights.gguf_header import is_gguf
from ktcore.weights.quantization import QuantizedCheckpoint


@dataclass(frozen=True)
class Source:
    """A model's files, read so far as to know what it is.

    Attributes:
        path: the folder or file.
        name: what to call the model.
        model_type: as in Hugging Face configurations.
        config: its sizes.
        names: what its tensors are called in `checkpoint`.
        checkpoint: its tensors.
        stated_in: the file that says what sizes they have.
        eos_token_ids: the tokens that end a text.
        chat_template: the Jinja template that turns a conversation into a prompt, None without.
        tokenizer: makes its tokenizer; see `Model.tokenizer` for what it raises.
    """

    path: Path
    name: str
    model_type: str
    config: DecoderConfig
    names: TensorNames
    checkpoint: Checkpoint | QuantizedCheckpoint | GgufFile
    stated_in: str
    eos_token_ids: frozenset[int]
    chat_template: str | None
    tokenizer: Callable[[], Tokenizer]


def open_source(path: Path) -> Source:
    """Raises CheckpointError if `path` is no model, or not a supported one."""
    if path.is_dir():
        if not (path / "config.json").exists() and (found := find_gguf(path)) is not None:
            return open_gguf(found)
        return open_folder(path)
    if is_gguf(path):
        return open_gguf(path)
    what = "is not a folder, nor a GGUF file" if path.exists() else "no such folder or file"
    raise CheckpointError(
        path,
        f"{what}; expected a model folder with config.json and safetensors files, or a .gguf file",
    )


def open_gguf(path: Path) -> Source:
    """A GGUF file: everything is in it."""
    file = GgufFile(path)
    family, architecture, keys = gguf_architecture(file)
    config = architecture.read_config(keys, file)
    return Source(
        path=path,
        name=path.stem,
        model_type=family.model_types[0],
        config=config,
        names=architecture.names,
        checkpoint=file,
        stated_in="its metadata",
        eos_token_ids=end_token_ids(file),
        chat_template=chat_template(file),
        tokenizer=lambda: read_tokenizer(file, config.vocab_size),
    )


def open_folder(folder: Path) -> Source:
    """A folder with config.json, safetensors files and tokenizer.json."""
    file = JsonFile(folder / "config.json")
    family = find_family(file)
    return Source(
        path=folder,
        name=folder.resolve().name,
        model_type=file.text("model_type"),
        config=family.read_config(file),
        names=family.names,
        checkpoint=open_checkpoint(folder, file),
        stated_in="config.json",
        eos_token_ids=_folder_eos(folder),
        chat_template=folder_chat_template(folder),
        tokenizer=lambda: Tokenizer.from_file(folder / "tokenizer.json"),
    )


def open_checkpoint(folder: Path, config: JsonFile) -> Checkpoint | QuantizedCheckpoint:
    """The tensors of a folder, as its configuration says that they are stored."""
    checkpoint, settings = Checkpoint(folder), config.inner("quantization_config")
    return checkpoint if settings is None else QuantizedCheckpoint(checkpoint, settings)


def _folder_eos(folder: Path) -> frozenset[int]:
    """generation_config.json's word, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if name == "config.json" or (folder / name).is_file():
            ids = JsonFile(folder / name).integers("eos_token_id")
            if ids:
                return frozenset(ids)
    return frozenset()


def folder_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    found = JsonFile(path).get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
