"""Frequencies of rotary position embeddings (arXiv 2104.09864), also beyond the positions that a
model was trained on (YaRN, arXiv 2309.00071), and the settings of files that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore.models.config import Fields, Yarn


def frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Radians per position of each pair of a head's columns, float32 [head_dim / 2]."""
    even = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32)
    wavelengths = theta ** (even / head_dim)
    if yarn is None:
        return 1.0 / wavelengths

    def column(turns: float) -> float:
        """The pair that makes so many turns over the positions trained on."""
        positions = min(yarn.original_length / (turns * 2 * math.pi), 1e300)
        return head_dim * math.log(positions) / (2 * math.log(theta))

    low, high = column(yarn.beta_fast), column(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # 1: turns often enough to be left alone, 0: seldom, slowed by the factor. (In transformers'
    # order, for the last bits count over many positions.)
    place = torch.arange(head_dim // 2, dtype=torch.float32)
    alone = 1 - ((place - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (yarn.factor * wavelengths) * (1 - alone) + 1.0 / wavelengths * alone


@dataclass(frozen=True)
class Rope:
    """What a file says of them.

    Attributes:
        theta: base of the frequencies.
        yarn: None where positions are taken as they come.
        context_length: positions that a sequence may have.
    """

    theta: float
    yarn: Yarn | None
    context_length: int


def read_rope(config: Fields) -> Rope:
    """Of a config.json: transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both
    in `rope_parameters`. Raises CheckpointError for what is not supported, naming the field."""
    theta, yarn = config.number("rope_theta", 10000.0), None
    length = config.integer("max_position_embeddings", 32768)
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.inner(name)
        if rope is None:
            continue
        kind = rope.text("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise rope.error(
                "rope_type", f"{kind[:80]!r} is not supported, only 'default' and 'yarn'"
            )
        if rope.number("partial_rotary_factor", 1.0) != 1.0:
            raise rope.error("partial_rotary_factor", "only 1 is supported")
        theta = rope.number("rope_theta", theta)
        if kind == "yarn":
            scale = None
            if rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None:
                factor = rope.number("factor")
                scale = _mscale(factor, rope.number("mscale"))
                scale /= _mscale(factor, rope.number("mscale_all_dim"))
            yarn = Yarn(
                factor=rope.number("factor"),
                original_length=rope.integer("original_max_position_embeddings", length),
                attention_factor=rope.number(
                    "attention_factor", _mscale(rope.number("factor")) if scale is None else scale
                ),
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                truncate=rope.flag("truncate", True),
            )
            _check(yarn, theta, rope, "factor", "beta_fast", "rope_theta")
    return Rope(theta, yarn, _context(length, yarn))


def read_gguf_rope(keys: Fields) -> Rope:
    """Of a GGUF file's keys, as llama.cpp reads them. Raises CheckpointError as `read_rope`."""
    theta, yarn = keys.number("rope.freq_base", 10000.0), None
    length = keys.integer("context_length", 32768)
    kind = keys.text("rope.scaling.type", "none")
    if kind not in ("none", "yarn"):
        raise keys.error(
            "rope.scaling.type", f"{kind[:80]!r} is not supported, only 'none' and 'yarn'"
        )
    if kind == "yarn":
        factor = keys.number("rope.scaling.factor")
        if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise keys.error("rope.scaling.yarn_ext_factor", "only 1 is supported")
        attention = keys.number("rope.scaling.attn_factor", 1.0)
        attention *= keys.number("rope.scaling.yarn_attn_factor", 1.0)
        yarn = Yarn(
            factor=factor,
            original_length=keys.integer("rope.scaling.original_context_length", length),
            attention_factor=attention * _mscale(factor),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        names = ("rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.freq_base")
        _check(yarn, theta, keys, *names)
    return Rope(theta, yarn, _context(length, yarn))


def rope_fields(theta: float, yarn: Yarn | None) -> dict[str, object]:
    """What `read_rope` reads, for both transformers 4 and 5, but for the length of the context."""
    fields: dict[str, object] = {"rope_theta": theta}
    if yarn is not None:
        fields["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "attention_factor": yarn.attention_factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
        }
    return fields


def gguf_rope_keys(theta: float, yarn: Yarn | None) -> dict[str, object]:
    """What `read_gguf_rope` reads, but for the length of the context. Raises ValueError for what
    llama.cpp cannot do."""
    keys: dict[str, object] = {"rope.freq_base": theta}
    if yarn is not None:
        if not yarn.truncate:
            raise ValueError("llama.cpp has no YaRN without rounding (truncate)")
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.original_context_length": yarn.original_length,
            "rope.scaling.attn_factor": yarn.attention_factor / _mscale(yarn.factor),
            "rope.scaling.yarn_beta_fast": yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": yarn.beta_slow,
        }
    return keys


def _mscale(factor: float, weight: float = 1.0) -> float:
    """What sharpens attention over more positions (section 3.4 of the paper)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _check(yarn: Yarn, theta: float, fields: Fields, factor: str, fast: str, base: str) -> None:
    if yarn.factor < 1:
        raise fields.error(factor, f"expected at least 1, got {yarn.factor}")
    if yarn.beta_fast <= yarn.beta_slow:
        raise fields.error(fast, f"expected more than {yarn.beta_slow}, got {yarn.beta_fast}")
    if theta <= 1:
        raise fields.error(base, f"expected more than 1, got {theta}")


def _context(stated: int, yarn: Yarn | None) -> int:
    """Many files state the length that was trained on, others that which the factor makes of it."""
    if yarn is None:
        return stated
    return max(stated, int(min(yarn.original_length * yarn.factor, 1 << 31)))
