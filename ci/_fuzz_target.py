"""A worker of ci/fuzz.py: makes the sound models, or runs a range of cases on ktcore.

Prints a line for every case, `number<tab>name of the sound model<tab>outcome`; an outcome is
"loaded", "refused" or what is wrong. A case lies in the scratch folder while it runs, so that it is
there if this process dies.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import _fuzz_cases
from _fuzz_cases import ARRAY, BOOL, STRING, Gguf, Model

TESTS = Path(__file__).resolve().parent.parent / "tests"
PAGE = 4096
LONGEST_MESSAGE = 12_000  # beside the path; a name of 1024 characters, escaped, is most of it
TEXT = "In the beginning\n\u00e9\u4e16 42 <|endoftext|> 's  x"
RENDER_EVERY = 16  # cases whose inspection is shown, too

# ------------------------------------------------------------------------------------ sound models

LAYERS, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM = 1, 2, 1, 2, 1, 32
VOCABULARY = 300  # with 256 columns more weights than torch multiplies by itself (SMALL)
MERGES = ("i n", "t h", "th e", "\u0120 the", "a n", "an d", "e r", "o u")
END = "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2's encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {b: 256 + i for i, b in enumerate(b for b in range(256) if b not in plain)}
    return [chr(shifted.get(b, b)) for b in range(256)]


def tokens() -> list[str]:
    out = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    return [*out, *(f"<unused{i}>" for i in range(VOCABULARY - len(out) - 1)), END]


def tensors(hidden: int, inner: int, tied: bool = False):
    """Float weights of a small model, by llama.cpp's names."""
    import torch

    rng = torch.Generator().manual_seed(1)

    def random(*shape: int):
        return torch.randn(shape, generator=rng) / 16

    out = {"token_embd.weight": random(VOCABULARY, hidden), "output_norm.weight": random(hidden)}
    if not tied:
        out["output.weight"] = random(VOCABULARY, hidden)
    for i in range(LAYERS):
        out |= {
            f"blk.{i}.attn_norm.weight": random(hidden),
            f"blk.{i}.ffn_norm.weight": random(hidden),
            f"blk.{i}.attn_q_norm.weight": random(HEAD_DIM),
            f"blk.{i}.attn_k_norm.weight": random(HEAD_DIM),
            f"blk.{i}.attn_q.weight": random(HEADS * HEAD_DIM, hidden),
            f"blk.{i}.attn_k.weight": random(KV_HEADS * HEAD_DIM, hidden),
            f"blk.{i}.attn_v.weight": random(KV_HEADS * HEAD_DIM, hidden),
            f"blk.{i}.attn_output.weight": random(hidden, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_gate_inp.weight": random(EXPERTS, hidden),
            f"blk.{i}.ffn_gate_exps.weight": random(EXPERTS, inner, hidden),
            f"blk.{i}.ffn_up_exps.weight": random(EXPERTS, inner, hidden),
            f"blk.{i}.ffn_down_exps.weight": random(EXPERTS, hidden, inner),
        }
    return out


def gguf_keys(hidden: int, inner: int) -> list[list]:
    u32, f32 = 4, 6
    sizes = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": hidden,
        "feed_forward_length": inner, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "expert_count": EXPERTS, "expert_used_count": TOP_K,
        "expert_feed_forward_length": inner,
    }  # fmt: skip
    names = [t.encode() for t in tokens()]
    keys = [
        ("general.architecture", STRING, b"qwen3moe"),
        ("general.name", STRING, b"small"),
        *((f"qwen3moe.{name}", u32, size) for name, size in sizes.items()),
        ("qwen3moe.attention.layer_norm_rms_epsilon", f32, 1e-6),
        ("qwen3moe.rope.freq_base", f32, 1e4),
        ("tokenizer.ggml.model", STRING, b"gpt2"),
        ("tokenizer.ggml.pre", STRING, b"qwen2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, names)),
        ("tokenizer.ggml.token_type", ARRAY, (5, [1] * (VOCABULARY - 1) + [3])),
        ("tokenizer.ggml.merges", ARRAY, (STRING, [m.encode() for m in MERGES])),
        ("tokenizer.ggml.bos_token_id", u32, VOCABULARY - 1),
        ("tokenizer.ggml.eos_token_id", u32, VOCABULARY - 1),
        ("tokenizer.ggml.add_bos_token", BOOL, 1),
        ("tokenizer.chat_template", STRING, b"{{ messages[0].content }}"),
    ]
    return [[name.encode(), kind, _fuzz_cases.value(kind, v)] for name, kind, v in keys]


def _stored(tensor, number: int) -> tuple[bytes, int]:
    """A tensor's bytes in a type, or in f32 where its rows are no whole blocks."""
    import torch

    from ktcore.formats import get_format
    from ktcore.weights.gguf_header import TENSOR_TYPES

    kind = TENSOR_TYPES[number]
    if tensor.dim() == 1 or tensor.shape[-1] % kind.block or tensor.shape[-2] == EXPERTS:
        number, kind = 0, TENSOR_TYPES[0]
    if kind.dtype is not None:
        data = tensor.to(kind.dtype).contiguous().view(torch.uint8)
    else:
        # The codebook types search long for their codes: a few rows, again and again.
        flat = tensor.flatten(0, -2)
        try:
            some = get_format(kind.format).quantize(flat[:4].contiguous())["data"]
        except TypeError:  # a type that is only read
            some = _any_codes(kind, flat.shape[-1])
        data = some.repeat(-(-flat.shape[0] // 4), 1)[: flat.shape[0]].contiguous()
    return data.numpy().tobytes(), number


def _any_codes(kind, columns: int):
    """Four rows of random codes, with scales that make finite weights of them."""
    import torch

    from ktcore.formats import get_format

    rng = torch.Generator().manual_seed(2)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    while True:
        size = (4, columns // kind.block, kind.nbytes)
        some = torch.randint(0, 256, size, dtype=torch.uint8, generator=rng)
        some[..., :2] = scale  # where nearly all types have theirs
        some = some.flatten(1)
        weight = get_format(kind.format).dequantize({"data": some}, (4, columns), torch.float32)
        if weight.isfinite().all():
            return some


def gguf(number: int, hidden: int, inner: int, splits: int = 1) -> Model:
    """A model stored in a type, as one file or several."""
    found = list(tensors(hidden, inner, tied=number == 1).items())
    model: Model = {}
    for part in range(splits):
        mine = found[part::splits]
        entries, data = [], b""
        for name, tensor in mine:
            content, kind = _stored(tensor, number)
            entries.append([name.encode(), list(tensor.shape[::-1]), kind, len(data)])
            data += content + bytes(-len(content) % 32)
        keys = gguf_keys(hidden, inner) if part == 0 else []
        if splits > 1:
            numbers = {"split.no": (2, part), "split.count": (2, splits)}
            numbers["split.tensors.count"] = (5, len(found))
            for key, (kind, value) in numbers.items():
                keys.append([key.encode(), kind, _fuzz_cases.value(kind, value)])
        name = "m.gguf" if splits == 1 else f"m-{part + 1:05}-of-{splits:05}.gguf"
        model[name] = Gguf(keys, entries, data).content()
    return model


def hf_config(hidden: int, inner: int, **more: object) -> dict:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": inner,
        "moe_intermediate_size": inner, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": True,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None,
        "max_position_embeddings": 512, "attention_bias": False, "tie_word_embeddings": False,
        "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "eos_token_id": VOCABULARY - 1, **more,
    }  # fmt: skip


def hf_tokenizer() -> dict:
    names = tokens()
    last = VOCABULARY - 1
    added = {"id": last, "content": END, "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added],
        "normalizer": {"type": "NFC"}, "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": {**level, "use_regex": True}, "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate(names[:-1])}, "merges": list(MERGES),
        },
    }  # fmt: skip


def hf_tensors(hidden: int, inner: int):
    """The weights in bf16, by Hugging Face's names, each expert's apart."""
    import gguf_models
    import torch

    own = {ours: theirs for theirs, ours in gguf_models.LAYER_NAMES.items()}
    experts = {ours: theirs for theirs, ours in gguf_models.EXPERT_NAMES.items()}
    out = {}
    for name, tensor in tensors(hidden, inner).items():
        tensor = tensor.to(torch.bfloat16)
        part, _, rest = name.removesuffix(".weight").partition(".")
        if part != "blk":
            theirs = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
            out[f"{theirs.get(part, 'lm_head')}.weight"] = tensor
            continue
        layer, _, kind = rest.partition(".")
        if kind in experts:
            for e in range(EXPERTS):
                out[f"model.layers.{layer}.mlp.experts.{e}.{experts[kind]}.weight"] = tensor[e]
        else:
            out[f"model.layers.{layer}.{own[kind]}.weight"] = tensor
    return out


def hf(weights: dict, config: dict, shards: int = 1) -> Model:
    """A Hugging Face folder of tensors."""
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    model: Model = {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": json.dumps(hf_tokenizer()).encode(),
    }
    if shards == 1:
        return model | {"model.safetensors": save(weights, {"format": "pt"})}
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = dict(list(weights.items())[i::shards])
        where |= dict.fromkeys(mine, name)
        model[name] = save(mine)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    generation = {"eos_token_id": [VOCABULARY - 1, 0], "temperature": 0.6}
    template = {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    return model | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "generation_config.json": json.dumps(generation).encode(),
        "tokenizer_config.json": json.dumps(template).encode(),
        "chat_template.jinja": b"{{ messages[0].content }}",
    }


def _stacked(weights: dict, format: str | None) -> dict:
    """All experts of a layer in one tensor, as transformers 5 and gpt-oss have them."""
    import torch

    from ktcore.formats import get_format

    out = {name: t for name, t in weights.items() if ".experts." not in name}
    for i in range(LAYERS):
        base = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            torch.stack([weights[f"{base}.{e}.{p}.weight"] for e in range(EXPERTS)])
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        for name, w in (("gate_up_proj", torch.cat([gate, up], 1)), ("down_proj", down)):
            if format is None:
                out[f"{base}.{name}"] = w
            else:
                for part, tensor in get_format(format).quantize(w).items():
                    out[f"{base}.{name}_{part}"] = tensor
    return out


def _dense(weights: dict) -> dict:
    """One MLP in place of experts, and biases."""
    import torch

    base = "model.layers.0"
    out = {n: t for n, t in weights.items() if ".experts." not in n and "mlp.gate." not in n}
    for part in ("gate_proj", "up_proj", "down_proj"):
        out[f"{base}.mlp.{part}.weight"] = weights[f"{base}.mlp.experts.0.{part}.weight"]
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows = out[f"{base}.self_attn.{part}.weight"].shape[0]
        out[f"{base}.self_attn.{part}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    return out


def sound_models() -> dict[str, Model]:
    """One model for every way of storing one."""
    from ktcore.formats import format_names
    from ktcore.weights.gguf_header import TENSOR_TYPES

    sys.path.insert(0, str(TESTS))
    import requantized

    out = {}
    for number, kind in TENSOR_TYPES.items():
        if kind.name in ("F32", "F16", "BF16") or kind.format in format_names():
            size = 256 if kind.block == 256 else 128
            out[f"gguf {kind.name}"] = gguf(number, size, size)
    out["gguf split"] = gguf(8, 64, 64, splits=3)
    out["gguf split mixed"] = gguf(2, 64, 96, splits=2)
    weights, config = hf_tensors(64, 64), hf_config(64, 64)
    out["hf bf16"] = hf(hf_tensors(256, 64), hf_config(256, 64))
    out["hf shards"] = hf(weights, config, shards=3)
    out["hf stacked"] = hf(_stacked(weights, None), config)
    gpt_oss = {"quant_method": "mxfp4"}
    out["hf blocks"] = hf(_stacked(weights, "mxfp4"), config | {"quantization_config": gpt_oss})
    dense = config | {"mlp_only_layers": [0], "attention_bias": True}
    out["hf dense"] = hf(_dense(weights), dense)
    for scheme, (store, settings) in requantized.SCHEMES.items():
        stored = {}
        for name, tensor in weights.items():
            base = name.removesuffix(".weight")
            stored |= store(base, tensor) if requantized.is_linear(name) else {name: tensor}
        out[f"hf {scheme}"] = hf(stored, config | {"quantization_config": settings})
    return out


def sound_files() -> dict[str, Model]:
    """Small files with a tensor of every type, and some of a model's keys: for headers alone."""
    from ktcore.weights.gguf_header import TENSOR_TYPES
    from ktcore.weights.safetensors_file import DTYPES

    def file(kinds: list[int], keys: list[list]) -> Gguf:
        entries, data = [], b""
        for number in kinds:
            kind = TENSOR_TYPES[number]
            entries.append([kind.name.encode(), [kind.block, 2], number, len(data)])
            data += bytes(range(2 * kind.nbytes % 256)) + bytes(2 * kind.nbytes // 256 * 256)
            data += bytes(-len(data) % 32)
        return Gguf(keys, entries, data)

    keys = [key for key in gguf_keys(64, 64) if b"ggml" not in key[0]]
    numbers = list(TENSOR_TYPES)
    model = {"m.gguf": file(numbers, keys).content()}
    out: dict[str, Model] = {"gguf": model, "gguf split": {}}
    for part in range(3):
        split = {"split.no": part, "split.count": 3, "split.tensors.count": len(numbers)}
        own = [[key.encode(), 2, _fuzz_cases.value(2, n)] for key, n in split.items()]
        name = f"m-{part + 1:05}-of-00003.gguf"
        out["gguf split"][name] = file(numbers[part::3], keys[: 9 * (part == 0)] + own).content()
    entries, data = {}, b""
    for name, dtype in DTYPES.items():
        begin = len(data)
        data += bytes(range(6 * dtype.itemsize))
        entries[name] = {"dtype": name, "shape": [2, 3], "data_offsets": [begin, len(data)]}
    header = json.dumps(entries).encode()
    whole = len(header).to_bytes(8, "little") + header + data
    config = json.dumps(hf_config(64, 64)).encode()
    out["hf"] = {"config.json": config, "model.safetensors": whole}
    where = {name: ("a" if i % 2 else "b") for i, name in enumerate(DTYPES)}
    index = {"metadata": {}, "weight_map": where}
    out["hf shards"] = {"config.json": config, "a": whole, "b": whole}
    out["hf shards"]["model.safetensors.index.json"] = json.dumps(index).encode()
    return out


# ------------------------------------------------------------------------------------------ files


def write(model: Model, folder: Path) -> None:
    """A model's files into a folder that holds nothing else afterwards."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in model.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def read(folder: Path) -> Model:
    return {p.name: p.read_bytes() if p.is_file() else None for p in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------- the target


class Wrong(Exception):
    """What ktcore did is not what it promises."""


def _attempt(folder: Path, call, *arguments):
    """The result of a call, or the CheckpointError that refuses the file: a message that helps."""
    from ktcore.weights import CheckpointError

    try:
        return call(*arguments)
    except CheckpointError as error:
        message = str(error)
        if str(folder) not in message:
            raise Wrong(f"the message does not name the file: {message[:300]!r}") from error
        rest = message.replace(str(folder), "")
        if len(rest) > LONGEST_MESSAGE:
            raise Wrong(f"a message of {len(rest)} characters: {rest[:300]!r}") from error
        if not rest.isprintable():
            raise Wrong(f"a message that a terminal would obey: {rest[:300]!r}") from error
        return error


def exercise(folder: Path, path: Path, render: bool = False) -> str:
    """All that becomes of a user's files; "loaded" or "refused".

    Raises:
        Wrong, or whatever ktcore raises that is no CheckpointError.
    """
    from ktcore.cli._inspect import inspect
    from ktcore.models import load_model

    shown = _attempt(folder, inspect, path, True)
    if isinstance(shown, dict):
        json.dumps(shown, allow_nan=False)
        if render:
            _show(shown)
    model = _attempt(folder, load_model, path)
    if isinstance(model, Exception):
        if isinstance(shown, dict):
            _read_tensors(folder, path)
        return "refused"
    if isinstance(shown, Exception):
        raise Wrong(f"inspect refuses what load_model takes: {shown}")
    if shown["loads"]["reason"] is not None:
        raise Wrong(f"inspect says that load_model would refuse it: {shown['loads']['reason']}")
    _compute(folder, model)
    return "loaded"


def exercise_header(folder: Path, path: Path) -> str:
    """Reading alone: every tensor, and what makes a model of them."""
    from ktcore.models.loading import why_not_loadable

    _attempt(folder, why_not_loadable, path)
    found = _attempt(folder, _read_tensors, folder, path)
    return "refused" if isinstance(found, Exception) else "loaded"


def _show(shown: dict) -> None:
    from rich.console import Console

    from ktcore.cli import inspect as command

    out = io.StringIO()
    command._render(Console(file=out, width=100), shown)
    out.getvalue().encode()


def _read_tensors(folder: Path, path: Path) -> None:
    """Every tensor of a file that is no model."""
    from ktcore.cli._inspect import _gguf_in
    from ktcore.weights import Checkpoint, GgufFile

    found = _gguf_in(path)
    file = Checkpoint(path) if found is None else GgufFile(found)
    for name in file.names():
        tensor = _attempt(folder, file.tensor, name)
        if not isinstance(tensor, Exception) and tuple(tensor.shape) != file.info(name).shape:
            raise Wrong(f"tensor {name!r} is {tuple(tensor.shape)}, not {file.info(name).shape}")


def _compute(folder: Path, model) -> None:
    """Logits, tokens and text."""
    import torch

    from ktcore.models import generate

    config = model.config
    ids = [0, config.vocab_size - 1, config.vocab_size // 2][: config.context_length]
    logits = model(torch.tensor(ids))
    if logits.shape != (len(ids), config.vocab_size):
        raise Wrong(f"logits are {tuple(logits.shape)}")
    made = _attempt(folder, list, generate(model, ids, 2, temperature=0.7, seed=0))
    if isinstance(made, list) and not all(0 <= i < config.vocab_size for i in made):
        raise Wrong(f"tokens {made} of a vocabulary of {config.vocab_size}")
    tokenizer = _attempt(folder, lambda: model.tokenizer)
    if isinstance(tokenizer, Exception):
        return
    encoded = tokenizer.encode(TEXT)
    tokenizer.decode(encoded)
    stream = tokenizer.stream(encoded[:3])
    "".join([stream.push(token) for token in encoded[3:]] + [stream.finish()]).encode()


# ------------------------------------------------------------------------------------- the worker


def _memory() -> tuple[int, int]:
    """Bytes of addresses in use, and most bytes of memory so far."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * PAGE, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _one(folder: Path, path: Path, headers: bool, render: bool) -> str:
    try:
        return exercise_header(folder, path) if headers else exercise(folder, path, render)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:300]!a}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", type=Path, help="write the sound models to this folder, and end")
    parser.add_argument("--headers", action="store_true", help="only read files, which are small")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--replay", help="what to open in the scratch folder, as it is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--end", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--extension")
    options = parser.parse_args()
    faulthandler.enable()  # also says where it was when ci/fuzz.py aborts it
    if options.extension:
        import _extension

        _extension.use(options.extension)
    import torch

    torch.set_num_threads(1)
    if options.make:
        for name, model in (sound_files() if options.headers else sound_models()).items():
            (options.make / name).mkdir()
            write(model, options.make / name)
        return 0
    import ktcore

    ktcore.set_num_threads(2)  # so that the pool works, too
    folder = options.scratch.resolve()
    if options.replay is not None:
        print(
            f"0\treplay\t{_one(folder, folder / options.replay, options.headers, True)}", flush=True
        )
        return 0
    models = {path.name: read(path) for path in sorted(options.models.iterdir())}
    for name in sorted(models):  # imports, and what is allocated once, is none of a case's
        write(models[name], folder)
        sound = folder / sorted(models[name])[0] if "gguf" in name else folder
        exercise_header(folder, sound) if options.headers else exercise(folder, sound)
    addresses, before = _memory()
    allowed = options.megabytes << 20
    if not options.extension:  # a sanitizer reserves terabytes of addresses
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (addresses + 2 * allowed,) * 2)
    for number in range(options.begin, options.end):
        name, model, opened = _fuzz_cases.case(models, options.seed, number)
        write(model, folder)
        (folder.parent / f"{folder.name}.case").write_text(f"{number}\t{name}\t{opened}")
        render = number % RENDER_EVERY == 0
        outcome = _one(folder, folder / opened, options.headers, render)
        peak = _memory()[1] - before
        if peak > allowed:
            outcome = f"took {peak >> 20} MB of memory ({outcome})"
        os.write(1, f"{number}\t{name}\t{outcome}\n".encode())
        if peak > allowed:
            return 0  # the peak stays: the next case needs a process of its own
    return 0


if __name__ == "__main__":
    sys.exit(main())
