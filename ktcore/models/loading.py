"""From a model folder to a `Model`, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ktcore import ops
from ktcore.formats import Format, get_format
from ktcore.models.config import DecoderConfig, JsonFile
from ktcore.models.decoder import Attention, Decoder, Layer, Mlp, RmsNorm, one_torch_thread
from ktcore.models.family import TensorNames, find_family
from ktcore.models.model import Model
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.projection import Projection
from ktcore.weights import Checkpoint, CheckpointError, ExpertWeights, QuantTensor

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
    progress: Progress | None = None,
) -> Model:
    """Load a model for inference on the CPU.

    Args:
        path: a local folder with config.json, safetensors and tokenizer.json, as Hugging Face lays
            it out; None for the small model that ktcore ships.
        format: quantise the experts to this format while loading, layer by layer; None takes them
            as stored. Everything else stays as stored.
        release: free each layer's stored weights once a backend has packed them, so that the peak
            is the packed size and one layer. Backends that read the stored form (reference) cannot
            be switched to afterwards. None: for checkpoints of 1 GiB and more.
        progress: called with (layers done, layers in all).

    Returns:
        The `Model`. Weights are packed for the backend that would serve them now.

    Raises:
        CheckpointError: the folder, or a file in it, is no model or not a supported one.
        ValueError: unknown format.
    """
    folder = EMBEDDED if path is None else Path(path)
    wanted = None if format is None else get_format(format)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(
            folder, f"{what}; expected a model folder with config.json and safetensors files"
        )
    file = JsonFile(folder / "config.json")
    family = find_family(file)
    config = family.read_config(file)
    reader = _Reader(Checkpoint(folder), config, family.names, wanted)
    reader.check()
    if release is None:
        release = reader.nbytes() >= KEEP_STORED_BELOW
    with torch.inference_mode():
        decoder = reader.decoder(release, progress)
    return Model(folder, file.text("model_type"), decoder, reader.parameters())


class _Reader:
    """Makes the parts of a decoder from a checkpoint's tensors."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        names: TensorNames,
        format: Format | None,
    ):
        self.checkpoint, self.config, self.names, self.format = checkpoint, config, names, format
        self.stacked = self._name("stacked_down", self._first_moe_layer()) in checkpoint

    def _first_moe_layer(self) -> int:
        layers = range(self.config.num_hidden_layers)
        return next((i for i in layers if i not in self.config.dense_layers), 0)

    def _name(self, role: str, layer: int = 0, expert: int = 0) -> str:
        return getattr(self.names, role).format(layer=layer, expert=expert)

    # ------------------------------------------------------------------ what there must be

    def check(self) -> None:
        """Raises CheckpointError unless every tensor is there, in its shape and a float dtype.

        Before anything is allocated: sizes in config.json are believed only where files bear them
        out.
        """
        for name, shape in self.expected():
            info = self.checkpoint.info(name)
            if info.shape != shape:
                raise CheckpointError(
                    self.checkpoint.path,
                    f"tensor {name!r} has shape {list(info.shape)}, but config.json makes it "
                    f"{list(shape)}",
                )
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    self.checkpoint.path,
                    f"tensor {name!r} is {info.dtype}, expected bfloat16, float32 or float16",
                )

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that config.json implies."""
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
        if self.stacked:
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
        head = Projection(embedding if c.tie_word_embeddings else self._tensor("head"))
        head.prepare(release)
        if progress:
            progress(c.num_hidden_layers, c.num_hidden_layers)
        return Decoder(c, embedding, layers, self._norm("final_norm"), head)

    def _tensor(self, role: str, layer: int = 0) -> Tensor:
        return self.checkpoint.tensor(self._name(role, layer))

    def _norm(self, role: str, layer: int = 0) -> RmsNorm:
        return RmsNorm(self._tensor(role, layer), self.config.rms_norm_eps)

    def _projection(self, roles: tuple[str, ...], layer: int, bias: bool = False) -> Projection:
        """Several projections of the same input as one."""

        def joined(part: str) -> Tensor:
            names = [f"{self._name(role, layer)}.{part}" for role in roles]
            tensors = [self.checkpoint.tensor(name) for name in names]
            return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

        return Projection(joined("weight"), joined("bias") if bias else None)

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
        if self.stacked:
            gate_up = self._tensor("stacked_gate_up", layer)
            gate, up = gate_up.split(self.config.moe_intermediate_size, dim=1)
            down = self._tensor("stacked_down", layer)
            return ExpertWeights(*map(self._store, (gate, up, down)))
        roles = ("expert_gate", "expert_up", "expert_down")
        return ExpertWeights(*(self._store(self._stack(role, layer)) for role in roles))

    def _stack(self, role: str, layer: int) -> Tensor:
        """One projection of all experts, [num_experts, O, I]."""
        stack = None
        for e in range(self.config.num_experts):
            tensor = self.checkpoint.tensor(self._name(role, layer, e))
            if stack is None:
                stack = torch.empty((self.config.num_experts, *tensor.shape), dtype=tensor.dtype)
            with one_torch_thread(True):  # more only wait for each other over a copy
                stack[e] = tensor
        return stack

    def _store(self, weight: Tensor) -> QuantTensor:
        format = self.format or get_format("bf16")
        if format.name == "bf16":
            return QuantTensor.quantize(weight.contiguous(), format)
        return ops.quantize(weight, format)
