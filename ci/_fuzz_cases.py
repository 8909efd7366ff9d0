"""Damaged model files for ci/fuzz.py. Standard library only, and the same for the same seed.

A model is a dict from file name to content; None stands for a folder of that name. `case` takes a
sound model, damages it in one to six ways and says which file or folder ("" is the one that holds
all) is to be opened. Damage knows the formats: it changes a count, a length, a type, an offset, a
JSON value, so that the rest still reads as before and the reader gets as far as it can. Plain
damage to bytes is among it, too.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from random import Random

Model = dict[str, bytes | None]

INTEGERS = (
    0, 1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 1000, 4096, 65535, 65536,
    2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**61, 2**62, 2**63 - 1, 2**63,
    2**64 - 32, 2**64 - 1,
)  # fmt: skip
BYTES = (0, 1, 2, 7, 8, 9, 10, 32, 34, 44, 58, 91, 92, 93, 123, 125, 127, 128, 192, 237, 254, 255)


# -------------------------------------------------------------------------------------- any bytes


def _flip(rng: Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _byte(rng: Random, data: bytearray, at: int) -> None:
    data[at] = rng.choice(BYTES) if rng.random() < 0.7 else rng.randrange(256)


def _integer(rng: Random, data: bytearray, at: int) -> None:
    width = rng.choice((2, 4, 8))
    value = rng.choice(INTEGERS) % (1 << (8 * width))
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "little", "big")))


def _cut(rng: Random, data: bytearray, at: int) -> None:
    del data[at:]


def _remove(rng: Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.choice((1, 2, 4, 8, 32, 500))]


def _repeat(rng: Random, data: bytearray, at: int) -> None:
    begin = rng.randrange(len(data))
    data[at:at] = data[begin : begin + rng.choice((1, 2, 4, 8, 32, 500))]


def _noise(rng: Random, data: bytearray, at: int) -> None:
    count = rng.choice((1, 2, 4, 16, 256, 4096))
    noise = rng.choice((b"\xff" * count, bytes(count), b"\0\x7c" * count, rng.randbytes(count)))
    data[at : at + count] = noise[:count]


BYTE_DAMAGE = (_flip, _byte, _byte, _integer, _integer, _cut, _remove, _repeat, _noise)


def damage_bytes(rng: Random, content: bytes, head: int, other: bytes = b"") -> bytes:
    """Damage anywhere, in the first `head` bytes mostly; `other` is spliced in now and then."""
    data = bytearray(content)
    if not data:
        return rng.randbytes(rng.choice((1, 8, 24, 64)))
    if other and rng.random() < 0.1:
        return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]
    span = min(len(data), head) if rng.random() < 0.8 else len(data)
    rng.choice(BYTE_DAMAGE)(rng, data, rng.randrange(max(1, span)))
    return bytes(data)


# ------------------------------------------------------------------------------------------- JSON


class Raw(str):
    """A text that stands in a JSON file as it is."""


def dumps(value: object) -> str:
    """JSON of a value that may hold `Raw` texts, and lists of pairs as `Pairs`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value) + "}"
    if isinstance(value, dict):
        return dumps(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


class Pairs(list):
    """A JSON object's names and values, in which a name may appear twice."""


# What else a configuration may say, for the sake of the code that reads it.
NAMES = (
    "rope_scaling", "rope_parameters", "rope_type", "type", "rope_theta", "partial_rotary_factor",
    "use_sliding_window", "num_experts", "num_local_experts", "mlp_only_layers",
    "decoder_sparse_step", "attention_bias", "tie_word_embeddings", "quantization_config",
    "quant_method", "quant_algo", "bits", "group_size", "sym", "desc_act", "checkpoint_format",
    "version", "weight_block_size", "block_structure", "config_groups", "targets", "weights",
    "num_bits", "strategy", "symmetric", "format", "ignore", "modules_to_not_convert",
    "ignored_layers", "exclude_modules", "text_config", "eos_token_id", "architectures",
    "chat_template", "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata",
    "num_hidden_layers", "head_dim", "hidden_act", "max_position_embeddings", "model_type",
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\ud800", "\x1b[31m", "a" * 5000, "../model.safetensors", "/etc/hostname",
    "model.safetensors", ".", "..", "F32", "F16", "BF16", "F8_E4M3", "F64", "I64", "I32", "I8",
    "U8", "BOOL", "F4", "qwen3_moe", "silu", "gelu", "gptq", "awq", "fp8", "mxfp4", "modelopt",
    "compressed-tensors", "gemm", "FP8", "NVFP4", "group", "channel", "tensor", "block", "Linear",
    "re:(a|a)*b", "re:(", "re:" + "(" * 3000, "*" * 40 + "b", "pack-quantized", "float-quantized",
    "int-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", "int", "float", "default", "yarn",
)  # fmt: skip


def odd_value(rng: Random) -> object:
    what = rng.random()
    if what < 0.45:
        value = rng.choice(INTEGERS)
        return -value if rng.random() < 0.25 else value
    if what < 0.6:
        return rng.choice(TEXTS)
    if what < 0.75:
        return rng.choice((None, True, False, [], {}, [[]], [0], [-1], [1, 2], [2**64], {"": None}))
    numbers = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e30", "1e-400", "0.5", "-0.0")
    if what < 0.9:
        return Raw(rng.choice((*numbers, "1.0", "-1", "9" * 400, "9" * 5000)))
    depth = rng.choice((3, 200, 2000, 100_000))
    return Raw(rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))


def _places(value: object, found: list[tuple[object, object]]) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list) and not isinstance(value, Pairs):
        keys = range(min(len(value), 50))
    else:
        return found
    for key in keys:
        found.append((value, key))
        _places(value[key], found)
    return found


def damage_json(rng: Random, content: bytes) -> bytes:
    """A JSON file with a few values changed, else with damage to its text."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return damage_bytes(rng, content, 1 << 20)
    for _ in range(rng.choice((1, 1, 2, 3))):
        root = _damage_value(rng, root)
    try:
        text = dumps(root)
    except RecursionError:  # a part that stands in two places has been put into itself
        return damage_bytes(rng, content, 1 << 20)
    what = rng.random()
    if what < 0.9:
        return text.encode()
    if what < 0.93:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-le")))
    if what < 0.96:
        return text.encode() + rng.choice((b"\0", b"x", b"{}", b"\xff"))
    return damage_bytes(rng, text.encode(), 1 << 20)


def _damage_value(rng: Random, root: object) -> object:
    places = _places(root, [])
    if not places or rng.random() < 0.02:
        return odd_value(rng)
    holder, key = rng.choice(places)
    what = rng.random()
    if what < 0.4:
        holder[key] = odd_value(rng)
    elif what < 0.5:
        del holder[key]
    elif what < 0.6:
        other, at = rng.choice(places)
        if not _holds(holder[key], other) and not _holds(other[at], holder):
            holder[key], other[at] = other[at], holder[key]
    elif what < 0.7 and isinstance(holder, dict):
        new = rng.choice((rng.choice(NAMES), rng.choice(list(holder)), rng.choice(TEXTS)))
        holder[new] = holder.pop(key)
    elif what < 0.8 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = odd_value(rng)
    elif what < 0.85 and isinstance(holder[key], dict):
        pairs = Pairs(holder[key].items())
        holder[key] = Pairs(pairs + pairs[:1])
    elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = rng.choice((holder[key] + rng.choice((-1, 1)), holder[key] * 2, -holder[key]))
    elif isinstance(holder[key], list):
        holder[key] = rng.choice((holder[key] * 2, holder[key][::-1], holder[key][:-1]))
    elif isinstance(holder[key], bool):
        holder[key] = not holder[key]
    else:
        holder[key] = [holder[key]]
    return root


def _holds(value: object, wanted: object) -> bool:
    """Whether a container is, or holds, another: exchanging the two would make a circle."""
    return value is wanted or any(holder is wanted for holder, _ in _places(value, []))


# ------------------------------------------------------------------------------------ safetensors


def _split_safetensors(content: bytes) -> tuple[dict, bytes] | None:
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def _joined_safetensors(rng: Random, header: bytes, data: bytes) -> bytes:
    length = len(header)
    if rng.random() < 0.05:
        length = rng.choice((length + rng.choice((-8, -1, 1, 8)), rng.choice(INTEGERS)))
    return (length % 2**64).to_bytes(8, "little") + header + data


SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
         "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip


def damage_safetensors(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """A safetensors file with damage to its header, its data or its bytes."""
    parsed = _split_safetensors(content)
    what = rng.random()
    if parsed is None or what < 0.15:
        return damage_bytes(rng, content, 8 + int.from_bytes(content[:8], "little"), other)
    header, data = parsed
    if what < 0.45:
        return _joined_safetensors(rng, damage_json(rng, json.dumps(header).encode()), data)
    entries = {n: e for n, e in header.items() if isinstance(e, dict) and "shape" in e}
    names = [n for n, e in entries.items() if isinstance(e.get("data_offsets"), list)]
    names = [n for n in names if isinstance(entries[n]["shape"], list)]
    if not names or what < 0.6:
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4, 50))):
            if damaged:
                _noise(rng, damaged, rng.randrange(len(damaged)))
        return _joined_safetensors(rng, json.dumps(header).encode(), bytes(damaged[: len(data)]))
    name = rng.choice(names)
    entry, second = entries[name], entries[rng.choice(names)]
    if what < 0.7:  # another type, the bytes as they are
        size = SIZES.get(str(entry.get("dtype")), 0)
        entry["dtype"] = rng.choice([d for d, n in SIZES.items() if n == size] or list(SIZES))
    elif what < 0.8:  # another shape of as many elements
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0, *shape]))
    elif what < 0.85:
        entry["data_offsets"] = second["data_offsets"]
    elif what < 0.9:
        shift = rng.choice((-1, 1, 4, -4, 2**62, -(2**62), len(data)))
        entry["data_offsets"] = [o + shift for o in entry["data_offsets"] if isinstance(o, int)]
    elif what < 0.95:
        header[rng.choice(names)], header[name] = entry, second
    else:
        header.pop(name)
    return _joined_safetensors(rng, json.dumps(header).encode(), data)


# ------------------------------------------------------------------------------------------- GGUF

STRING, ARRAY, BOOL = 8, 9, 7
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """A GGUF file in parts, from which any file can be made.

    Attributes:
        keys: [name, number of the type, value as bytes].
        tensors: [name, sizes with the innermost first, number of the type, offset].
        claims: counts in place of the true ones: (tensors, keys), None where true.
        order: "<" or ">" for all numbers outside values.
    """

    def __init__(self, keys: list[list], tensors: list[list], data: bytes):
        self.magic, self.version, self.alignment, self.order = b"GGUF", 3, 32, "<"
        self.keys, self.tensors, self.data = keys, tensors, data
        self.claims: list[int | None] = [None, None]

    def copy(self) -> Gguf:
        out = Gguf([k[:] for k in self.keys], [[t[0], t[1][:], *t[2:]] for t in self.tensors], b"")
        out.data, out.alignment = self.data, self.alignment
        return out

    def number(self, code: str, value: int) -> bytes:
        width = struct.calcsize("<" + code)
        return (value % (1 << (8 * width))).to_bytes(
            width, "big" if self.order == ">" else "little"
        )

    def text(self, value: bytes) -> bytes:
        return self.number("Q", len(value)) + value

    def content(self) -> bytes:
        true = (len(self.tensors), len(self.keys))
        claims = [n if said is None else said for n, said in zip(true, self.claims, strict=True)]
        out = [self.magic, self.number("I", self.version), *(self.number("Q", n) for n in claims)]
        for name, kind, value in self.keys:
            out += [self.text(name), self.number("I", kind), value]
        for name, sizes, kind, offset in self.tensors:
            out += [self.text(name), self.number("I", len(sizes))]
            out += [self.number("Q", size) for size in sizes]
            out += [self.number("I", kind), self.number("Q", offset)]
        head = b"".join(out)
        return head + bytes(-len(head) % self.alignment) + self.data


def value(kind: int, content: object) -> bytes:
    """A key's value as bytes."""
    if kind == STRING:
        return struct.pack("<Q", len(content)) + content
    if kind == ARRAY:
        inner, elements = content
        return struct.pack("<IQ", inner, len(elements)) + b"".join(
            value(inner, e) for e in elements
        )
    return struct.pack("<" + CODES[kind], content)


def parse_gguf(content: bytes) -> Gguf:
    """The parts of a sound file."""
    at = 4

    def take(code: str) -> int:
        nonlocal at
        at += struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, content, at - struct.calcsize("<" + code))[0]

    def text() -> bytes:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at]

    def skip(kind: int) -> None:
        if kind == STRING:
            text()
        elif kind == ARRAY:
            inner = take("I")
            for _ in range(take("Q")):
                skip(inner)
        else:
            take(CODES[kind])

    take("I")
    tensor_count, key_count = take("Q"), take("Q")
    keys, tensors = [], []
    for _ in range(key_count):
        name, kind, begin = text(), take("I"), at
        skip(kind)
        keys.append([name, kind, content[begin:at]])
    for _ in range(tensor_count):
        name, sizes = text(), [take("Q") for _ in range(take("I"))]
        tensors.append([name, sizes, take("I"), take("Q")])
    return Gguf(keys, tensors, content[-(-at // 32) * 32 :])


_parsed = functools.lru_cache(maxsize=256)(parse_gguf)

KEYS = tuple(
    name.encode()
    for name in (
        "general.architecture", "general.alignment", "split.no", "split.count",
        "split.tensors.count", "qwen3moe.block_count", "qwen3moe.context_length",
        "qwen3moe.embedding_length", "qwen3moe.feed_forward_length",
        "qwen3moe.attention.head_count", "qwen3moe.attention.head_count_kv",
        "qwen3moe.attention.key_length", "qwen3moe.attention.value_length",
        "qwen3moe.rope.dimension_count", "qwen3moe.rope.scaling.type", "qwen3moe.rope.freq_base",
        "qwen3moe.attention.layer_norm_rms_epsilon", "qwen3moe.expert_count",
        "qwen3moe.expert_used_count", "qwen3moe.expert_feed_forward_length",
        "qwen3moe.expert_weights_norm", "tokenizer.ggml.model", "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token", "tokenizer.chat_template", "", "a", "\0", "x" * 70_000,
    )
)  # fmt: skip
KEY_TEXTS = (
    b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"qwen3moe", b"llama", b"gpt2", b"qwen2", b"gpt-2",
    b"none", b"yarn", b"\x1b[2J", b"x" * 3000, b"a b", b"<|endoftext|>", b" ", "\u0120".encode(),
)  # fmt: skip


def _odd_key_value(rng: Random) -> tuple[int, bytes]:
    kind = rng.choice((*CODES, STRING, STRING, ARRAY, ARRAY))
    if kind == ARRAY:
        inner = rng.choice((*CODES, STRING))
        if rng.random() < 0.2:  # counts and types that do not hold
            claimed = rng.choice(INTEGERS)
            return ARRAY, struct.pack("<IQ", rng.choice((inner, ARRAY, 13, 99)), claimed) + bytes(9)
        elements = [_odd_scalar(rng, inner) for _ in range(rng.choice((0, 1, 2, 5, 300)))]
        return ARRAY, value(ARRAY, (inner, elements))
    return kind, value(kind, _odd_scalar(rng, kind))


def _odd_scalar(rng: Random, kind: int) -> object:
    if kind == STRING:
        return rng.choice(KEY_TEXTS)
    code = CODES[kind]
    if code in "fd":
        return rng.choice((0.0, -1.0, 0.5, 1e-6, 1e30, 1e38, float("inf"), float("nan")))
    number = rng.choice(INTEGERS) % (1 << (8 * struct.calcsize("<" + code)))
    if code.islower():
        number -= 1 << (8 * struct.calcsize("<" + code) - 1)
    return number % 3 if kind == BOOL else number


def _counts(rng: Random, file: Gguf) -> None:
    file.claims[rng.randrange(2)] = rng.choice(
        (*INTEGERS, len(file.keys) + 1, len(file.keys) - 1, len(file.tensors) - 1)
    )


def _head(rng: Random, file: Gguf) -> None:
    what = rng.randrange(3)
    if what == 0:
        file.magic = rng.choice((b"FUGG", b"GGML", b"ggjt", b"\0\0\0\0", b"GGUE", b"PK\3\4"))
    elif what == 1:
        file.version = rng.choice((0, 1, 2, 4, 1 << 24, 2 << 24, 3 << 24, 2**32 - 1))
    else:
        file.order = ">"


def _key(rng: Random, file: Gguf) -> None:
    """Change, add, rename, drop or repeat a key."""
    what = rng.random()
    if what < 0.3 or not file.keys:
        kind, content = _odd_key_value(rng)
        name = rng.choice(KEYS)
        same = [k for k in file.keys if k[0] == name]
        if same and rng.random() < 0.9:
            same[0][1:] = kind, content
        else:
            file.keys.append([name, kind, content])
        return
    key = rng.choice(file.keys)
    if what < 0.55:
        key[1:] = _odd_key_value(rng)
    elif what < 0.7 and key[1] in CODES:  # another number of the same type
        key[2] = value(key[1], _odd_scalar(rng, key[1]))
    elif what < 0.78:
        key[1] = rng.choice((*CODES, STRING, ARRAY, 13, 2**31, 2**32 - 1))
    elif what < 0.84:
        file.keys.remove(key)
    elif what < 0.88:
        file.keys.append(key[:])
    elif what < 0.92:
        key[0] = rng.choice((*KEYS, b"\xff", key[0] + b"x"))
    elif key[2]:
        data = bytearray(key[2])
        rng.choice((_flip, _byte, _integer, _cut, _remove, _repeat))(
            rng, data, rng.randrange(min(len(data), rng.choice((12, 12, len(data)))))
        )
        key[2] = bytes(data)


def _alignment(rng: Random, file: Gguf) -> None:
    size = rng.choice((0, 1, 3, 8, 16, 64, 4096, 2**24, 2**25, 2**31, 2**32 - 1))
    kind = rng.choice((4, 4, 4, 5, 10, 6, 7))
    content = value(kind, (size % 2**31) if kind != BOOL else 1)
    file.keys.append([b"general.alignment", kind, content])
    if size in (1, 8, 16, 64, 4096) and rng.random() < 0.5:
        file.alignment = size


def _tensor(rng: Random, file: Gguf) -> None:
    """Change, drop, repeat or exchange tensors."""
    if not file.tensors:
        return
    tensor, other = rng.choice(file.tensors), rng.choice(file.tensors)
    name, sizes, _, offset = tensor
    what = rng.random()
    if what < 0.2 and sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice(INTEGERS)
    elif what < 0.3:
        tensor[1] = rng.choice((sizes[::-1], [*sizes, 1], [1, *sizes], sizes[:-1], sizes * 2, []))
    elif what < 0.35 and sizes:  # a product that overflows to something small
        products = ([2**32] * 2, [2**63, 2], [2**62, 4], [2**31, 2**31, 4], [2**59, 32])
        tensor[1] = list(rng.choice(products))
    elif what < 0.55:
        tensor[2] = rng.choice((*range(45), 2**31, 2**32 - 1))
    elif what < 0.75:
        tensor[3] = rng.choice(
            (*INTEGERS, offset + 1, offset + 32, offset - 32, other[3], len(file.data))
        )
    elif what < 0.8:
        file.tensors.remove(tensor)
    elif what < 0.85:
        file.tensors.append([name, sizes[:], *tensor[2:]])
    elif what < 0.93:
        tensor[0] = rng.choice((other[0], b"", b"\xff\xfe", b"n" * 2000, name + b"\0", name[:-1]))
    else:
        tensor[1:], other[1:] = other[1:], tensor[1:]


def _data(rng: Random, file: Gguf) -> None:
    damaged = bytearray(file.data)
    for _ in range(rng.choice((1, 4, 50))):
        if damaged:
            _noise(rng, damaged, rng.randrange(len(damaged)))
    file.data = bytes(damaged[: len(file.data)])
    if rng.random() < 0.2:
        file.data = file.data[: rng.randrange(len(file.data) + 1)]


def _splits(rng: Random, file: Gguf) -> None:
    for key in rng.sample(
        (b"split.no", b"split.count", b"split.tensors.count"), rng.choice((1, 2))
    ):
        number = rng.choice((0, 1, 2, 3, 4, 7, 65535))
        file.keys = [k for k in file.keys if k[0] != key] if rng.random() < 0.8 else file.keys
        if rng.random() < 0.9:
            kind = rng.choice((2, 2, 4, 5, 10))
            file.keys.append([key, kind, value(kind, number)])


GGUF_DAMAGE: tuple[Callable[[Random, Gguf], None], ...] = (
    _counts, _head, _key, _key, _key, _key, _alignment, _tensor, _tensor, _tensor, _data, _splits,
)  # fmt: skip


def damage_gguf(rng: Random, content: bytes, other: bytes = b"", times: int = 1) -> bytes:
    """A sound GGUF file with damage to its parts, then now and then to its bytes."""
    file = _parsed(content).copy()
    head = len(content) - len(file.data)
    if rng.random() < 0.25:
        out = content
        for _ in range(times):
            out = damage_bytes(rng, out, head, other)
        return out
    for _ in range(times):
        rng.choice(GGUF_DAMAGE)(rng, file)
    out = file.content()
    return damage_bytes(rng, out, head, other) if rng.random() < 0.05 else out


# ------------------------------------------------------------------------------------------ cases


def _damage_names(rng: Random, model: Model) -> None:
    """Files that are missing, empty, exchanged, or folders."""
    if not model:
        return
    name = rng.choice(sorted(model))
    what = rng.random()
    if what < 0.3:
        del model[name]
    elif what < 0.45:
        model[name] = b""
    elif what < 0.6:
        model[name] = None
    else:
        other = rng.choice(sorted(model))
        if what < 0.8:
            model[name] = model[other]
        else:
            model[name], model[other] = model[other], model[name]


def _damage_folder(rng: Random, model: Model, other: bytes) -> None:
    """A file of a Hugging Face folder."""
    weights = {"config.json": 4, "tokenizer.json": 2, "model.safetensors.index.json": 3}
    names = sorted(n for n, content in model.items() if content is not None)
    if not names:
        return
    each = [weights.get(n, 5 if n.endswith(".safetensors") else 1) for n in names]
    name = rng.choices(names, each)[0]
    content = model[name] or b""
    if name.endswith(".safetensors"):
        model[name] = damage_safetensors(rng, content, other)
    elif name.endswith(".json") and rng.random() < 0.93:
        model[name] = damage_json(rng, content)
    else:
        model[name] = damage_bytes(rng, content, 1 << 20, other)


def case(seeds: dict[str, Model], seed: int, number: int) -> tuple[str, Model, str]:
    """Case `number` of a run: the sound model's name, the damaged one, and what is to be opened."""
    rng = Random(f"{seed}:{number}")
    kind = rng.choice(("gguf", "hf"))
    name = rng.choice([n for n in sorted(seeds) if n.startswith(kind)])
    model = dict(seeds[name])
    other = rng.choice(list(seeds[rng.choice(sorted(seeds))].values())) or b""
    times = rng.choice((1, 1, 1, 1, 2, 3, 6))
    if name.startswith("gguf"):
        damaged = rng.choice(sorted(model))
        model[damaged] = damage_gguf(rng, model[damaged], other, times)
        opened = rng.choice((*sorted(model), damaged, damaged, ""))
        if len(model) > 1 and rng.random() < 0.15:
            _damage_names(rng, model)
    else:
        for _ in range(times):
            if rng.random() < 0.06:
                _damage_names(rng, model)
            else:
                _damage_folder(rng, model, other)
        opened = "" if rng.random() < 0.97 else "model.safetensors"
    return name, model, opened
