"""Quantising on all processors, and what it costs in precision."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

import ktcore
from ktcore.convert.weights import Stored
from ktcore.formats import Format, Parts
from ktcore.formats.floating import Plain
from ktcore.models.decoder import one_torch_thread
from ktcore.weights import QuantTensor

# Weights that a thread takes at a time: what a search for scales does with them stays in the cache.
TASK = 1 << 17


@dataclass
class Error:
    """Squared errors, summed up piece by piece.

    Attributes:
        worst: the relative error of the worst expert.
    """

    error: float = 0.0
    size: float = 0.0
    weighted_error: float = 0.0
    weighted_size: float = 0.0
    worst: float = 0.0

    def add(self, other: Error) -> None:
        self.error += other.error
        self.size += other.size
        self.weighted_error += other.weighted_error
        self.weighted_size += other.weighted_size

    @property
    def relative(self) -> float:
        return _ratio(self.error, self.size)

    @property
    def weighted(self) -> float:
        """With each column weighed by its importance."""
        return _ratio(self.weighted_error, self.weighted_size)


def _ratio(error: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / size)


def taken_over(stored: Stored, format: Format) -> Parts | None:
    """The stored numbers themselves, where the format stays what it is."""
    if isinstance(stored, QuantTensor):
        return stored.parts if stored.format is format else None
    return {"data": stored} if isinstance(format, Plain) and stored.dtype == format.dtype else None


def quantize(
    values: Tensor,
    format: Format,
    importance: Tensor | None,
    total: Error,
    taken: Parts | None = None,
) -> Parts:
    """The parts that store values in a format, whose error is added to `total`.

    Args:
        values: float32 [O, I], [num_experts, O, I] or, for a plain format, [n].
        format: one whose parts are `by_rows`.
        importance: of the columns, [I] or [num_experts, I].
        taken: parts that are to be stored, which need only be measured.

    The result does not depend on the number of threads: rows are quantised on their own.
    """
    if taken is not None or values.dim() == 1:
        parts = format.quantize(values) if taken is None else taken
        total.add(_measured(values, format.dequantize(parts, tuple(values.shape)), None))
        return parts
    *lead, rows, columns = values.shape
    matrices = values.reshape(-1, rows, columns)
    weights = None if importance is None else importance.reshape(-1, columns)
    parts = {
        part: torch.empty((len(matrices), *size[len(lead) :]), dtype=dtype)
        for part, (size, dtype) in format.part_specs(tuple(values.shape)).items()
    }
    step = max(1, TASK // columns)
    tasks = [
        (m, b, min(b + step, rows)) for m in range(len(matrices)) for b in range(0, rows, step)
    ]

    def work(task: tuple[int, int, int]) -> Error:
        m, begin, end = task
        mine, columns_of = matrices[m, begin:end], None if weights is None else weights[m]
        found = format.quantize(mine, columns_of)
        for part, data in found.items():
            parts[part][m, begin:end] = data
        return _measured(mine, format.dequantize(found, tuple(mine.shape)), columns_of)

    experts = [Error() for _ in matrices]
    # torch's own threads would wait for each other after every one of many small steps.
    with one_torch_thread(True), ThreadPoolExecutor(ktcore.get_num_threads()) as pool:
        for (m, _, _), error in zip(tasks, pool.map(work, tasks), strict=True):
            experts[m].add(error)
    for error in experts:
        total.add(error)
        total.worst = max(total.worst, error.relative)
    return {part: data.reshape(*lead, *data.shape[1:]) for part, data in parts.items()}


def _measured(wanted: Tensor, got: Tensor, importance: Tensor | None) -> Error:
    error, size = ((t.to(torch.float64)).square() for t in (got - wanted, wanted))
    found = Error(float(error.sum()), float(size.sum()))
    if importance is not None:
        weights = importance.to(torch.float64)
        found.weighted_error = float((error * weights).sum())
        found.weighted_size = float((size * weights).sum())
    return found
