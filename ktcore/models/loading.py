"""From a model's files to a `Model`, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ktcore import ops
from ktcore.formats import Format, get_format
from ktcore.models.decoder import Attention, Decoder, Layer, Mlp, RmsNorm, one_torch_thread
from ktcore.models.model import Model
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.projection import Projection, SideBySide, joined
from ktcore.models.source import Source, open_source
from ktcore.weights import CheckpointError, ExpertWeights, GgufFile, QuantTensor
from ktcore.weights.gguf_file import unsupported
from ktcore.weights.gguf_header import GgufTensorInfo
from ktcore.weights.quantization import QuantInfo, stack
from ktcore.weights.safetensors_file import TensorInfo

EMBEDDED = Path(__file__).parent.parent / "data" / "kjv-moe"
FLOATS = (torch.bfloat16, torch.float32, torch.float16)

# Below this many bytes of checkpoint the stored weights are kept beside the packed ones, so that
# any backend can be tried on a loaded model; above, memory matters more.
KEEP_STORED_BELOW = 1 << 30

# Experts of a stack that are quantised anew at a time, so that their float32 form stays small.
EXPERTS_AT_ONCE = 8

Progress = Callable[[int, int], None]


def load_model(
    path: str | Path | None = None,
    format: str | Format | None = None,
    *,
    release: bool | None = None,
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
            be switched to afterwards. None: for checkpoints of 1 GiB and more.
        progress: called with (layers done, layers in all).

    Returns:
        The `Model`. Weights are packed for the backend that would serve them now.

    Raises:
        CheckpointError: a file or folder is missing, no model or not a supported one.
        ValueError: unknown format.
    """
    wanted = None if format is None else get_format(format)
    source = open_source(EMBEDDED if path is None else Path(path))
    reader = _Reader(source, wanted)
    reader.check()
    if release is None:
        release = reader.nbytes() >= KEEP_STORED_BELOW
    with torch.inference_mode():
        decoder = reader.decoder(release, progress)
    return Model(source, decoder, reader.parameters())


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
        self.stated_in, self.format = source.stated_in, format
        layer = self._first_moe_layer()
        self.stacked = self._name("stacked_down", layer) in self.checkpoint
        self.gate_up_apart = self.names.stacked_gate is not None and (
            self._name("stacked_gate", layer) in self.checkpoint
        )

    def _first_moe_layer(self) -> int:
        layers = range(self.config.num_hidden_layers)
        return next((i for i in layers if i not in self.config.dense_layers), 0)

    def _name(self, role: str, layer: int = 0, expert: int = 0) -> str:
        return getattr(self.names, role).format(layer=layer, expert=expert)

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
                yield from self._expected_experts(layer)

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

    def _expected_experts(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        c = self.config
        inner, hidden = c.moe_intermediate_size, c.hidden_size
        if self.gate_up_apart or self.stacked:
            if self.gate_up_apart:
                yield self._name("stacked_gate", layer), (c.num_experts, inner, hidden)
                yield self._name("stacked_up", layer), (c.num_experts, inner, hidden)
            else:
                yield self._name("stacked_gate_up", layer), (c.num_experts, 2 * inner, hidden)
            yield self._name("stacked_down", layer), (c.num_experts, hidden, inner)
            return
        for e in range(c.num_experts):
            yield self._name("expert_gate", layer, e), (inner, hidden)
            yield self._name("expert_up", layer, e), (inner, hidden)
            yield self._name("expert_down", layer, e), (hidden, inner)

    def parameters(self) -> int:
        """Weights of the model, a tied head counted once."""
        return sum(math.prod(shape) for _, shape in self.expected())

    def nbytes(self) -> int:
        infos = (self.checkpoint.info(name) for name, _ in self.expected())
        return sum(info.end - info.begin for info in infos)

    # ------------------------------------------------------------------------- making parts

    def decoder(self, release: bool, progress: Progress | None) -> Decoder:
        c = self.config
        layers = []
        for i in range(c.num_hidden_layers):
            if progress:
                progress(i, c.num_hidden_layers)
            layer = self._layer(i)
            layer.prepare(release)
            layers.append(layer)
        embedding = self._tensor("embedding")
        head = Projection(_shared(embedding) if c.tie_word_embeddings else self._tensor("head"))
        head.prepare(release)
        if progress:
            progress(c.num_hidden_layers, c.num_hidden_layers)
        return Decoder(c, embedding, layers, self._norm("final_norm"), head)

    def _tensor(self, role: str, layer: int = 0) -> Tensor | QuantTensor:
        return self.checkpoint.tensor(self._name(role, layer))

    def _norm(self, role: str, layer: int = 0) -> RmsNorm:
        return RmsNorm(self._tensor(role, layer), self.config.rms_norm_eps)

    def _projection(
        self, roles: tuple[str, ...], layer: int, bias: bool = False
    ) -> Projection | SideBySide:
        """Several projections of the same input as one."""

        def tensors(part: str) -> list:
            names = [f"{self._name(role, layer)}.{part}" for role in roles]
            return [self.checkpoint.tensor(name) for name in names]

        return joined(tensors("weight"), tensors("bias") if bias else None)

    def _layer(self, i: int) -> Layer:
        c = self.config
        qk_norm = torch.cat(
            (
                self._tensor("q_norm", i).expand(c.num_attention_heads, -1),
                self._tensor("k_norm", i).expand(c.num_key_value_heads, -1),
            )
        )
        attention = Attention(
            c,
            self._projection(("q", "k", "v"), i, c.attention_bias),
            RmsNorm(qk_norm[:, None], c.rms_norm_eps),
            self._projection(("o",), i, c.attention_bias),
        )
        if i in c.dense_layers:
            mlp = Mlp(
                self._projection(("mlp_gate", "mlp_up"), i), self._projection(("mlp_down",), i)
            )
        else:
            mlp = MoeLayer(
                Projection(self.checkpoint.tensor(f"{self._name('router', i)}.weight"), exact=True),
                self._experts(i),
                c.top_k,
                renormalize=c.renormalize,
                activation=c.activation,
            )
        return Layer(self._norm("attention_norm", i), attention, self._norm("mlp_norm", i), mlp)

    def _experts(self, layer: int) -> ExpertWeights:
        if self.gate_up_apart:
            roles = ("stacked_gate", "stacked_up", "stacked_down")
            names = [self._name(role, layer) for role in roles]
            if self.format is None:
                self._check_alike(*names[:2])
            return ExpertWeights(*map(self._stored_stack, names))
        if self.stacked:
            gate_up = self._tensor("stacked_gate_up", layer)
            inner = self.config.moe_intermediate_size
            gate, up = (_rows(gate_up, begin, begin + inner) for begin in (0, inner))
            down = self._tensor("stacked_down", layer)
            return ExpertWeights(*map(self._store, (gate, up, down)))
        roles = ("expert_gate", "expert_up", "expert_down")
        try:
            return ExpertWeights(*(self._stack(role, layer) for role in roles))
        except CheckpointError:
            raise
        except ValueError as error:  # unlike each other
            raise CheckpointError(
                self.checkpoint.path,
                f"experts of layer {layer}: {error}; format= (ktcore run --format) quantises them "
                "anew",
            ) from error

    def _check_alike(self, gate: str, up: str) -> None:
        """Raises CheckpointError if two tensors are of different types."""
        types = [self.checkpoint.info(name).type.name for name in (gate, up)]
        if types[0] != types[1]:
            raise CheckpointError(
                self.checkpoint.path,
                f"tensor {gate!r} is {types[0]}, but {up!r} is {types[1]}: gate and up must be "
                "stored alike; format= (ktcore run --format) quantises them anew",
            )

    def _stored_stack(self, name: str) -> QuantTensor:
        """The experts of a GGUF tensor [num_experts, O, I], as stored unless a format is wanted."""
        file = self.checkpoint
        assert isinstance(file, GgufFile)
        if self.format is None or file.info(name).type.format == self.format.name:
            weight = file.tensor(name)
            if isinstance(weight, QuantTensor):
                return weight
            return QuantTensor(file.info(name).type.format, weight.shape, {"data": weight})
        shape = file.info(name).shape
        parts = {
            part: torch.empty(size, dtype=dtype)
            for part, (size, dtype) in self.format.part_specs(shape).items()
        }
        for begin in range(0, shape[0], EXPERTS_AT_ONCE):
            rows = slice(begin, begin + EXPERTS_AT_ONCE)
            weight = file.tensor(name, rows=rows)
            some = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            for part, stored in self._store(some).parts.items():
                parts[part][rows] = stored
        return QuantTensor(self.format, shape, parts)

    def _stack(self, role: str, layer: int) -> QuantTensor:
        """One projection of all experts, [num_experts, O, I]."""
        names = [self._name(role, layer, e) for e in range(self.config.num_experts)]
        if any(isinstance(self.checkpoint.info(name), QuantInfo) for name in names):
            return stack((self._store(self.checkpoint.tensor(name)) for name in names), len(names))
        dense = None
        for e, name in enumerate(names):
            tensor = self.checkpoint.tensor(name)
            if dense is None:
                dense = torch.empty((len(names), *tensor.shape), dtype=tensor.dtype)
            with one_torch_thread(True):  # more only wait for each other over a copy
                dense[e] = tensor
        return self._store(dense)

    def _store(self, weight: Tensor | QuantTensor) -> QuantTensor:
        if isinstance(weight, QuantTensor):
            if self.format in (None, weight.format):
                return weight
            weight = weight.dequantize(torch.float32)
        format = self.format or get_format("bf16")
        if format.name == "bf16":
            return QuantTensor.quantize(weight.contiguous(), format)
        return ops.quantize(weight, format)


def _rows(weight: Tensor | QuantTensor, begin: int, end: int) -> Tensor | QuantTensor:
    """Some rows of each matrix of a stack [num_experts, O, I]."""
    if not isinstance(weight, QuantTensor):
        return weight[:, begin:end]
    parts = {name: part[:, begin:end].contiguous() for name, part in weight.parts.items()}
    return QuantTensor(weight.format, (weight.shape[0], end - begin, weight.shape[2]), parts)


def _shared(weight: Tensor | QuantTensor) -> Tensor | QuantTensor:
    """The same stored numbers, for another to use: what one releases, the other keeps."""
    if isinstance(weight, QuantTensor):
        return QuantTensor(weight.format, weight.shape, weight.parts)
    return weight
