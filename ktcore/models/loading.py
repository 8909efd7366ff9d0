"""From a model's files to a `Model`, layer by layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ktcore._settings import flag
from ktcore.dispatch import probe
from ktcore.formats import Format, define, get_format
from ktcore.models.decoder import Attention, Decoder, Layer, Mlp, RmsNorm
from ktcore.models.expert_layout import ExpertLayout, ExpertReader
from ktcore.models.memory import Locker, trim_heap
from ktcore.models.model import Model
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.packing import ModelCache, Packed, Restored, chosen_folder, warn
from ktcore.models.projection import Projection, SideBySide, beside, joined
from ktcore.models.source import Source, open_source
from ktcore.weights import CheckpointError, ExpertWeights, QuantTensor
from ktcore.weights.gguf_file import unsupported
from ktcore.weights.gguf_header import GgufTensorInfo
from ktcore.weights.packed_cache import CacheError
from ktcore.weights.quantization import QuantInfo
from ktcore.weights.safetensors_file import TensorInfo

EMBEDDED = Path(__file__).parent.parent / "data" / "kjv-moe"
FLOATS = (torch.bfloat16, torch.float32, torch.float16)

# Below this many bytes of checkpoint the stored weights are kept beside the packed ones, so that
# any backend can be tried on a loaded model; above, memory matters more.
KEEP_STORED_BELOW = 1 << 30

Progress = Callable[[int, int], None]


def load_model(
    path: str | Path | None = None,
    format: str | Format | None = None,
    *,
    release: bool | None = None,
    cache: bool | str | Path | None = None,
    mlock: bool | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model for inference on the CPU.

    Args:
        path: a local folder with config.json, safetensors and tokenizer.json, as Hugging Face lays
            it out, or a GGUF file (any part of one that was split), which needs nothing else; None
            for the small model that ktcore ships.
        format: quantise the experts to this format while loading, layer by layer; None takes them
            as stored. Everything else stays as stored.
        release: free each layer's stored weights once a backend has packed them, so that the peak
            is the packed size and one layer. Backends that read the stored form (reference) cannot
            be switched to afterwards. None: for checkpoints of 1 GiB and more, and with a cache.
        cache: keep the packed weights in a file, and take them from there the next time, without
            reading or packing the stored ones: True for the folder ``packed`` where ktcore keeps
            what it may lose (KTCORE_CACHE_DIR, else the system's convention), or a folder. None:
            as KTCORE_PACKED_CACHE says (1 or 0), by default no, for it takes as much disk as the
            model. What is wrong with the file or the disk is a RuntimeWarning, never an error.
        mlock: have the system keep the packed weights in memory; a RuntimeWarning says so if it
            refuses. None: as KTCORE_MLOCK says (1 or 0), by default no.
        progress: called with (layers done, layers in all).

    Returns:
        The `Model`. Weights are packed for the backend that would serve them now.

    Raises:
        CheckpointError: a file or folder is missing, no model or not a supported one.
        ValueError: unknown format; a cache is wanted, but nothing is to be released.
        SettingError: a variable of the environment is malformed.
    """
    wanted = None if format is None else get_format(format)
    if cache and release is False:
        raise ValueError("cache: weights from a cache have no stored form to keep: release=False")
    folder = None if release is False else chosen_folder(cache)
    lock = Locker() if (flag("KTCORE_MLOCK") if mlock is None else mlock) else None
    source = open_source(EMBEDDED if path is None else Path(path))
    reader = _Reader(source, wanted)
    reader.check()
    nbytes = reader.nbytes()
    # Where files and packed weights do not both fit, files must not push weights out of memory.
    source.checkpoint.keep_cached = 2 * nbytes < probe.machine().memory.available_bytes
    if release is None:
        release = folder is not None or nbytes >= KEEP_STORED_BELOW
    make = functools.partial(reader.decoder, release, progress, lock)
    with torch.inference_mode():
        if folder is None:
            decoder = make()
        else:
            decoder = _cached(
                make, ModelCache(folder, source, wanted, source.checkpoint.keep_cached)
            )
    return Model(source, decoder, reader.parameters())


def _cached(make: Callable[..., Decoder], cache: ModelCache) -> Decoder:
    """The decoder from a cache file, or else from the model's files into it."""
    restored = cache.restored()
    if restored is not None:
        try:
            return make(restored=restored)
        except CacheError as error:
            warn(f"{error}; it is made anew")
    with cache.storing() as store:
        return make(store=store)


def why_not_loadable(path: Path) -> str | None:
    """Why `load_model` would refuse a folder or file, None if it would not; only headers are read.

    A tokenizer is not looked at: token ids do without.
    """
    try:
        _Reader(open_source(path), None).check()
    except CheckpointError as error:
        return str(error)
    return None


def needed_tensors(source: Source) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a model is made of.

    Raises:
        CheckpointError: one is missing, has another shape or a type that is not supported.
    """
    reader = _Reader(source, None)
    reader.check()
    return list(reader.expected())


def expert_layout(source: Source) -> ExpertLayout:
    """How a model's files hold its experts."""
    return _Reader(source, None).experts.layout


def _why_not(info: TensorInfo | GgufTensorInfo) -> str | None:
    """Why a tensor cannot be used as a weight, None if it can."""
    if isinstance(info, GgufTensorInfo) and (why := unsupported(info)):
        return why
    if info.dtype is not None and info.dtype not in FLOATS:
        return f"is {info.dtype}, expected bfloat16, float32 or float16"
    return None


class _Reader:
    """Makes the parts of a decoder from a checkpoint's tensors."""

    def __init__(self, source: Source, format: Format | None):
        self.checkpoint, self.config, self.names = source.checkpoint, source.config, source.names
        self.stated_in = source.stated_in
        self.restored: Restored | None = None
        self.experts = ExpertReader(
            self.checkpoint,
            self.names.experts,
            self._first_moe_layer(),
            self.config.num_experts,
            self.config.moe_intermediate_size,
            self.config.hidden_size,
            format,
        )

    def _first_moe_layer(self) -> int:
        layers = range(self.config.num_hidden_layers)
        return next((i for i in layers if i not in self.config.dense_layers), 0)

    def _name(self, role: str, layer: int = 0) -> str:
        return getattr(self.names, role).format(layer=layer)

    # ------------------------------------------------------------------ what there must be

    def check(self) -> None:
        """Raises CheckpointError unless every tensor is there, in its shape and a usable type.

        Before anything is allocated: sizes in config.json are believed only where files bear them
        out.
        """
        for name, shape in self.expected():
            info = self.checkpoint.info(name)
            if info.shape != shape:
                raise CheckpointError(
                    self.checkpoint.path,
                    f"tensor {name!r} has shape {list(info.shape)}, but {self.stated_in} makes it "
                    f"{list(shape)}",
                )
            if (why := _why_not(info)) is not None:
                raise CheckpointError(self.checkpoint.path, f"tensor {name!r} {why}")
            if isinstance(info, QuantInfo):
                define(info.format)

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that the configuration implies."""
        c = self.config
        yield self._name("embedding"), (c.vocab_size, c.hidden_size)
        yield self._name("final_norm"), (c.hidden_size,)
        if not c.tie_word_embeddings:
            yield self._name("head"), (c.vocab_size, c.hidden_size)
        for layer in range(c.num_hidden_layers):
            yield from self._expected_attention(layer)
            if layer in c.dense_layers:
                size = c.intermediate_size
                yield f"{self._name('mlp_gate', layer)}.weight", (size, c.hidden_size)
                yield f"{self._name('mlp_up', layer)}.weight", (size, c.hidden_size)
                yield f"{self._name('mlp_down', layer)}.weight", (c.hidden_size, size)
            else:
                yield f"{self._name('router', layer)}.weight", (c.num_experts, c.hidden_size)
                yield from self.experts.expected(layer)

    def _expected_attention(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        c = self.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        yield self._name("attention_norm", layer), (c.hidden_size,)
        yield self._name("mlp_norm", layer), (c.hidden_size,)
        yield self._name("q_norm", layer), (c.head_dim,)
        yield self._name("k_norm", layer), (c.head_dim,)
        for role, rows, columns in (
            ("q", queries, c.hidden_size),
            ("k", keys, c.hidden_size),
            ("v", keys, c.hidden_size),
            ("o", c.hidden_size, queries),
        ):
            yield f"{self._name(role, layer)}.weight", (rows, columns)
            if c.attention_bias:
                yield f"{self._name(role, layer)}.bias", (rows,)

    def parameters(self) -> int:
        """Weights of the model, a tied head counted once."""
        return sum(math.prod(shape) for _, shape in self.expected())

    def nbytes(self) -> int:
        infos = (self.checkpoint.info(name) for name, _ in self.expected())
        return sum(info.end - info.begin for info in infos)

    # ------------------------------------------------------------------------- making parts

    def decoder(
        self,
        release: bool,
        progress: Progress | None,
        lock: Locker | None,
        restored: Restored | None = None,
        store: Packed | None = None,
    ) -> Decoder:
        """All of it, layer by layer, with the weights packed for the backends that serve them.

        What is in `restored` is taken from there; `store` is called with each packed weight.
        """
        c, self.restored = self.config, restored
        layers = []

        def prepare(name: str, part: Layer | Projection) -> None:
            part.prepare(release)
            for weight_name, request, weight in part.packed_weights(name):
                if store is not None:
                    store(weight_name, request, weight)
                if lock is not None:
                    lock(weight)

        for i in range(c.num_hidden_layers):
            if progress:
                progress(i, c.num_hidden_layers)
            layers.append(self._layer(i))
            prepare(f"layers.{i}", layers[-1])
            if release:
                trim_heap()
        embedding = self._tensor("embedding")
        head = self._matrices("head")
        if head is None:
            head = [_shared(embedding) if c.tie_word_embeddings else self._tensor("head")]
        head = Projection(head[0])
        prepare("head", head)
        if progress:
            progress(c.num_hidden_layers, c.num_hidden_layers)
        return Decoder(c, embedding, layers, self._norm("final_norm"), head)

    def _tensor(self, role: str, layer: int = 0) -> Tensor | QuantTensor:
        return self.checkpoint.tensor(self._name(role, layer))

    def _norm(self, role: str, layer: int = 0) -> RmsNorm:
        return RmsNorm(self._tensor(role, layer), self.config.rms_norm_eps)

    def _matrices(self, name: str) -> list[QuantTensor] | None:
        """A projection's weights as they were packed once, None if they must be read."""
        return None if self.restored is None else self.restored.matrices(name)

    def _projection(
        self, name: str, roles: tuple[str, ...], layer: int, bias: bool = False
    ) -> Projection | SideBySide:
        """Several projections of the same input as one; `name` is what `Layer` calls it."""

        def tensors(part: str) -> list:
            names = [f"{self._name(role, layer)}.{part}" for role in roles]
            return [self.checkpoint.tensor(name) for name in names]

        biases = tensors("bias") if bias else None
        packed = self._matrices(f"layers.{layer}.{name}")
        if packed is not None:
            return beside(packed, None if biases is None else torch.cat(biases))
        return joined(tensors("weight"), biases)

    def _layer(self, i: int) -> Layer:
        c = self.config
        attention = Attention(
            c,
            self._projection("qkv", ("q", "k", "v"), i, c.attention_bias),
            self._norm("q_norm", i),
            self._norm("k_norm", i),
            self._projection("output", ("o",), i, c.attention_bias),
        )
        if i in c.dense_layers:
            mlp = Mlp(
                self._projection("gate and up", ("mlp_gate", "mlp_up"), i),
                self._projection("down", ("mlp_down",), i),
            )
        else:
            router = self._matrices(f"layers.{i}.router")
            if router is None:
                router = [self.checkpoint.tensor(f"{self._name('router', i)}.weight")]
            mlp = MoeLayer(
                Projection(router[0], exact=True),
                self._experts(i),
                c.top_k,
                renormalize=c.renormalize,
                activation=c.activation,
            )
        return Layer(self._norm("attention_norm", i), attention, self._norm("mlp_norm", i), mlp)

    def _experts(self, layer: int) -> ExpertWeights:
        if self.restored is not None:
            # Like norms and the attention's biases, theirs are in the model's files only.
            biases = self.experts.biases(layer)
            packed = self.restored.experts(f"layers.{layer}.experts", biases)
            if packed is not None:
                return packed
        return self.experts.read(layer)


def _shared(weight: Tensor | QuantTensor) -> Tensor | QuantTensor:
    """The same stored numbers, for another to use: what one releases, the other keeps."""
    if isinstance(weight, QuantTensor):
        return QuantTensor(weight.format, weight.shape, weight.parts)
    return weight
