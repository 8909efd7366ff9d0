"""What GGUF's block types share: rows of fixed-size blocks, each decoded on its own.

A row of I weights is stored as I / block_size blocks of type_size bytes, exactly the file's bytes.
The layouts are those of llama.cpp's `ggml-common.h` and `ggml-quants.c`, as `gguf.quants` of its
gguf-py reads them; the tests hold every type against the latter.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcore.formats._packing import column_weights
from ktcore.formats.base import BlockCodes, Codes, Field, Format, Parts, Shape

# Weights quantised at a time: bounds the memory of the searches for scales, and keeps it in the
# second-level cache, which doubles their speed.
CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class Scales:
    """The scales and offsets of N blocks, as in `Codes`.

    Attributes:
        scales: float32 [N, 1].
        inner_scales: [N, block_size / group_size], small integers, or None.
        offsets: float32 [N, 1], or None.
        inner_offsets: as inner_scales.
    """

    scales: Tensor
    inner_scales: Tensor | None = None
    offsets: Tensor | None = None
    inner_offsets: Tensor | None = None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets of every group, [N, block_size / group_size] or [N, 1]."""
        scales = self.scales.to(dtype)
        if self.inner_scales is not None:
            scales = scales * self.inner_scales
        offsets = self.offsets
        if offsets is not None:
            offsets = offsets.to(dtype)
            if self.inner_offsets is not None:
                offsets = offsets * self.inner_offsets
        return scales, offsets


class BlockFormat(Format):
    """A GGUF block type. Parts: data uint8 [..., O, I / block_size * type_size].

    A type says how a block is taken apart (`code_fields` or `unpack_codes`, and
    `unpack_scales`) and, where users quantise to it, put together (`pack`). All arithmetic is here:
    value = scale * levels[codes] + offset. A scale is a float16 times a small integer and a level a
    small integer, so their product has at most 24 bits and float32 rounds once, where an offset is
    added.

    Attributes:
        type_size: bytes of a block.
        code_fields: where the codes are; empty for a type that numbers the entries of a codebook.
        levels: the integer that each code stands for.
        inner_bits: as of `Codes`.
        scale_dtype: what the scales and offsets of a block fit without loss.
        halves: where a block has float16 scales and offsets: byte offset, and about how large that
            number is relative to the first for values that are centred. For `example`.
    """

    type_size: int
    group_size: int
    code_fields: tuple[Field, ...] = ()
    levels: tuple[int, ...]
    inner_bits = 8
    scale_dtype = torch.float16
    halves: tuple[tuple[int, float], ...]
    arithmetic = "int16"
    tolerance = 0.008

    def __init__(self) -> None:
        self.aliases = (self.name.upper(),)
        self.bits = self.type_size * 8 / self.block_size

    def unpack_codes(self, blocks: Tensor) -> Tensor:
        """The codes uint8 [N, block_size] of blocks uint8 [N, type_size]."""
        first, *others = (
            fields(blocks[:, f.at : f.at + f.size], f.bits, f.run) << f.shift
            for f in self.code_fields
        )
        for other in others:
            first |= other
        return first

    @abc.abstractmethod
    def unpack_scales(self, blocks: Tensor) -> Scales:
        """The scales and offsets of blocks uint8 [N, type_size]."""

    def pack(self, x: Tensor, importance: Tensor | None) -> Tensor:
        """The blocks uint8 [N, type_size] nearest to x float32 [N, block_size], all finite;
        squared errors weighed by importance [N, block_size], if there is one."""
        raise TypeError(
            f"format: quantising to {self.name} is not offered; it is read from GGUF files that "
            f"llama.cpp made"
        )

    def part_specs(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        if shape[-1] % self.block_size:
            raise ValueError(
                f"shape: rows of {self.name} are blocks of {self.block_size} weights, expected a "
                f"multiple of that, got rows of {shape[-1]} in {tuple(shape)}"
            )
        size = shape[-1] // self.block_size * self.type_size
        return {"data": ((*shape[:-1], size), torch.uint8)}

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Parts:
        """Searches for scales by least squares, as llama.cpp does.

        A block with a NaN or an infinity gets NaN scales; one whose scales are beyond float16 gets
        infinite ones, one whose scales are below becomes zero.
        """
        specs = self.part_specs(tuple(weight.shape))
        weights = column_weights(importance, tuple(weight.shape))
        # Contiguous: the order of a sum would otherwise depend on the strides.
        x = weight.to(torch.float32).reshape(-1, self.block_size).contiguous()
        blocks = x.new_empty((len(x), self.type_size), dtype=torch.uint8)
        step = CHUNK_WEIGHTS // self.block_size
        for start in range(0, max(1, len(x)), step):  # once for no rows: it may raise
            part = x[start : start + step]
            sound = part.isfinite().all(-1, keepdim=True)
            part_weights = None
            if weights is not None:
                part_weights = self._of_blocks(weights, weight.shape, start, len(part))
            packed = self.pack(torch.where(sound, part, 0.0), part_weights)
            blocks[start : start + step] = torch.where(sound, packed, self._spoilt(packed))
        return {"data": blocks.reshape(specs["data"][0])}

    def _of_blocks(self, weights: Tensor, shape: Shape, start: int, count: int) -> Tensor:
        """What the columns [..., I] of a weight [..., O, I] have, for some of its blocks."""
        in_row = shape[-1] // self.block_size
        at = torch.arange(start, start + count, device=weights.device)
        matrix, column = at // (in_row * shape[-2]), at % in_row
        return weights.reshape(-1, self.block_size)[matrix * in_row + column]

    def _spoilt(self, blocks: Tensor) -> Tensor:
        """The same blocks with scales that are NaN."""
        blocks = blocks.clone()
        for at, _ in self.halves:
            set_half(blocks, at, torch.full((len(blocks), 1), float("nan"), device=blocks.device))
        return blocks

    def dequantize(self, parts: Parts, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = self._blocks(parts)
        levels = torch.tensor(self.levels, dtype=wide, device=blocks.device)
        values = look_up(levels, self.unpack_codes(blocks).to(torch.int32))
        values = values.unflatten(-1, (-1, self.group_size))
        scales, offsets = self.unpack_scales(blocks).factors(wide)
        values *= scales[..., None]
        if offsets is not None:
            values += offsets[..., None]
        return values.reshape(shape).to(dtype)

    def codes(self, parts: Parts, shape: Shape, *, blocks: bool = False) -> Codes:
        stored = self._blocks(parts)
        scales = self.unpack_scales(stored)
        if blocks and self.code_fields:
            codes = BlockCodes(parts["data"], self.code_fields, self.block_size, self.type_size)
        else:
            codes = self.unpack_codes(stored).reshape(shape)

        def of_rows(values: Tensor | None, size: int) -> Tensor | None:
            return None if values is None else values.reshape(*shape[:-1], shape[-1] // size)

        def inner(values: Tensor | None) -> Tensor | None:
            return None if values is None else of_rows(values.to(torch.int8), self.group_size)

        return Codes(
            codes=codes,
            levels=torch.tensor(self.levels, dtype=torch.int8, device=stored.device),
            scales=of_rows(scales.scales, self.block_size),
            offsets=of_rows(scales.offsets, self.block_size),
            group_size=self.group_size,
            scale_size=self.block_size,
            inner_scales=inner(scales.inner_scales),
            inner_offsets=inner(scales.inner_offsets),
            inner_bits=self.inner_bits,
        )

    def exact_scale_dtype(self) -> torch.dtype:
        return self.scale_dtype

    def _blocks(self, parts: Parts) -> Tensor:
        return parts["data"].reshape(-1, self.type_size)

    def example(self, shape: Shape, generator: torch.Generator) -> Parts:
        """Random bytes, which are every code, with scales that make values of about unit size."""
        (size, dtype) = self.part_specs(shape)["data"]
        blocks = torch.randint(0, 256, size, generator=generator).to(dtype)
        blocks = blocks.reshape(-1, self.type_size)
        signed = torch.rand(len(blocks), 1, generator=generator) - 0.5
        self.set_scales(blocks, (signed.abs() + 0.75).copysign(signed), generator)
        return {"data": blocks.reshape(size)}

    def set_scales(self, blocks: Tensor, size: Tensor, generator: torch.Generator) -> None:
        """Make the values of random blocks about as large as size [N, 1]."""
        one = torch.ones(1, 1)
        probe = torch.randint(0, 256, (64, self.type_size), generator=generator).to(torch.uint8)
        for at, ratio in self.halves:
            set_half(probe, at, one * ratio)
        unit = self.dequantize({"data": probe}, (64, self.block_size)).std()
        for at, ratio in self.halves:
            set_half(blocks, at, size * ratio / unit)


# ---------------------------------------------------------------------------------- taking apart


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], by the fastest of torch's ways."""
    return table.index_select(0, index.flatten()).view(index.shape)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte offset of each block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def set_half(blocks: Tensor, at: int, value: Tensor) -> None:
    """Store value [N or 1, 1] as the float16 at a byte offset of each block."""
    blocks[:, at : at + 2] = half_bytes(value)


def half_bytes(value: Tensor) -> Tensor:
    """value [N, 1] as float16: uint8 [N, 2]."""
    return value.to(torch.float16).flatten().contiguous().view(torch.uint8).view(-1, 2)


def rounded(value: Tensor) -> Tensor:
    """value as float16 stores it."""
    return value.to(torch.float16).to(torch.float32)


def fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Small unsigned integers [N, M * 8 / bits] out of bytes uint8 [N, M]: see `Field`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    runs = packed.unflatten(-1, (-1, 1, run)) >> shifts[:, None]
    return (runs & ((1 << bits) - 1)).flatten(-3)


def unfields(values: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `fields`: bytes uint8 [N, M] out of integers [N, M * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    runs = values.to(torch.uint8).unflatten(-1, (-1, 8 // bits, run)) << shifts[:, None]
    return runs.sum(-2, dtype=torch.uint8).flatten(-2)


def words(packed: Tensor, size: int) -> Tensor:
    """Little-endian integers of 2 or 4 bytes as int64 [N, M / size], out of bytes [N, M]."""
    parts = packed.unflatten(-1, (-1, size)).to(torch.int64)
    return (parts << torch.arange(0, 8 * size, 8, device=packed.device)).sum(-1)
