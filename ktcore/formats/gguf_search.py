"""Searches for the scales of GGUF's block types: least squares over a few trials.

The procedure of llama.cpp's `ggml-quants.c` (`make_qx_quants`, `make_qkx2_quants`), for all groups
at once: round with a trial scale, project the weights onto the integers found, keep the best.
Squared errors are weighed by an importance of the shape of x, where one is given.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ktcore.formats._packing import total
from ktcore.formats.gguf_blocks import look_up, rounded

# Groups that are all below this are stored as zeros; far below what float16 scales can express.
SMALLEST = 1e-20


class Levels:
    """A sorted set of integers that weights are rounded to."""

    def __init__(self, values: Iterable[int]):
        self.values = tuple(values)
        self.first, self.last = self.values[0], self.values[-1]
        self._consecutive = len(self.values) == self.last - self.first + 1

    def index(self, y: Tensor) -> Tensor:
        """Which level is nearest."""
        if self._consecutive:
            return y.round().clamp(self.first, self.last).to(torch.int64) - self.first
        # Levels meet at multiples of 1/2, so half a step decides: faster than a search.
        levels = torch.tensor(self.values, dtype=torch.float32, device=y.device)
        halves = torch.arange(2 * self.first, 2 * self.last + 1, device=y.device) / 2 + 0.25
        nearest = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)
        at = (2 * y).floor().clamp(2 * self.first, 2 * self.last) - 2 * self.first
        return look_up(nearest, at.to(torch.int32))

    def nearest(self, y: Tensor) -> Tensor:
        """The nearest level itself, in the type of y."""
        if self._consecutive:
            return y.round().clamp(self.first, self.last)
        table = torch.tensor(self.values, dtype=y.dtype, device=y.device)
        return look_up(table, self.index(y))

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """Indices of the levels nearest to x [..., n] / scale [..., 1]; to zero for scale zero."""
        usable = (scale != 0) & scale.isfinite()
        inverse = torch.where(usable, 1 / scale, 0.0)
        return self.index((x * inverse).clamp(-1e6, 1e6))


def symmetric(
    x: Tensor, levels: Levels, targets: Iterable[float], importance: Tensor | None = None
) -> Tensor:
    """The scales [..., 1] of x [..., n] with the least squared error found.

    Args:
        x: groups of weights.
        levels: what they are rounded to.
        targets: each trial maps the largest weight of a group, with its sign, to one of these.
    """
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    usable = extreme.abs() >= SMALLEST
    safe = torch.where(usable, extreme, 1.0)
    unit = x / safe  # so that sums of squares stay within range
    best = torch.zeros_like(safe)
    best_gain = torch.zeros_like(safe)
    for target in targets:
        q = levels.nearest(unit * target)
        dot, norm = total(unit * q, importance), total(q * q, importance)
        scale = torch.where(norm > 0, dot / norm, 0.0)
        gain = scale * dot
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, scale, best)
    return torch.where(usable, best * safe, 0.0)


def affine(
    x: Tensor,
    highest: int,
    *,
    positive_offset: bool,
    steps: Iterable[float],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales >= 0 and offsets [..., 1] for x [..., n] as scale * q + offset, q in 0..highest.

    Args:
        x: groups of weights.
        highest: the largest code.
        positive_offset: whether the offset may be above zero; K-quants store its negative unsigned.
        steps: each trial maps the range of a group to 0..highest + step.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if not positive_offset:
        low = low.clamp(max=0)
    size = torch.maximum(high - low, low.abs())
    usable = size >= SMALLEST
    safe = torch.where(usable, size, 1.0)
    x, low, spread = x / safe, low / safe, (high - low) / safe
    flat = spread < 1e-6  # all weights alike: the offset is enough
    spread = torch.where(flat, 1.0, spread)
    n = x.shape[-1] if importance is None else importance.sum(-1, keepdim=True)
    sum_x = total(x, importance)
    best_scale = torch.where(flat, 0.0, spread / highest)
    best_offset = low.clone()
    plain = ((x - low) / spread * highest).round().clamp(0, highest)
    best_error = total((best_scale * plain + low - x).square(), importance)
    for step in steps:
        q = ((x - low) * ((highest + step) / spread)).round().clamp(0, highest)
        sum_q, sum_qq = total(q, importance), total(q * q, importance)
        sum_xq = total(x * q, importance)
        determinant = n * sum_qq - sum_q * sum_q
        solvable = (determinant > 0) & ~flat
        determinant = torch.where(solvable, determinant, 1.0)
        scale = (n * sum_xq - sum_x * sum_q) / determinant
        offset = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        if not positive_offset:
            above = offset > 0
            scale = torch.where(above & (sum_qq > 0), sum_xq / sum_qq, scale)
            offset = offset.clamp(max=0)
        error = total((scale * q + offset - x).square(), importance)
        better = solvable & (scale >= 0) & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
    safe = torch.where(usable, size, 0.0)
    return best_scale * safe, best_offset * safe


def encode_affine(x: Tensor, scale: Tensor, offset: Tensor, highest: int) -> Tensor:
    """Codes 0..highest of x [..., n] with the scales and offsets as they are stored [..., 1]."""
    usable = (scale != 0) & scale.isfinite() & offset.isfinite()
    q = (x - torch.where(usable, offset, 0.0)) * torch.where(usable, 1 / scale, 0.0)
    return q.round().clamp(0, highest).to(torch.uint8)


def refit(
    x: Tensor, multiple: Tensor, fallback: Tensor, importance: Tensor | None = None
) -> Tensor:
    """The factor [N, 1] that makes factor * multiple [N, ...] nearest to x; else the fallback."""
    x, multiple = x.flatten(1), multiple.flatten(1)
    importance = None if importance is None else importance.flatten(1)
    norm = total(multiple * multiple, importance)
    factor = torch.where(norm > 0, total(x * multiple, importance) / norm, 0.0)
    return torch.where(factor.abs() >= SMALLEST, factor, fallback)


def nested_symmetric(
    x: Tensor,
    levels: Levels,
    targets: Iterable[float],
    lowest: int,
    highest: int,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, G, n] as d * scale * level, with one d a block and one integer scale a group.

    Returns:
        d float32 [N, 1] as float16 stores it, scales int64 [N, G] in lowest..highest, indices of
        levels [N, G, n].
    """
    ideal = symmetric(x, levels, targets, importance).squeeze(-1)
    d = ideal.gather(-1, ideal.abs().argmax(-1, keepdim=True)) / lowest
    inverse = torch.where(d.abs() >= SMALLEST, 1 / d, 0.0)
    scales = (ideal * inverse).round().clamp(lowest, highest)
    values = levels.nearest((x / _nonzero(d * scales)[..., None]).clamp(-1e6, 1e6))
    d = rounded(refit(x, scales[..., None] * values, d, importance))
    return d, scales.to(torch.int64), levels.encode(x, (d * scales)[..., None])


def nested_affine(
    x: Tensor,
    highest: int,
    steps: Iterable[float],
    largest_scale: int,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, G, n] as d * scale * q - dmin * m, with d, dmin a block, integer scale, m a group.

    Returns:
        d and dmin float32 [N, 1] as float16 stores them, scales and mins int64 [N, G], codes uint8
        [N, G, n].
    """
    found = affine(x, highest, positive_offset=False, steps=steps, importance=importance)
    scale, offset = (t.squeeze(-1) for t in found)
    d, scales = _shared(scale, largest_scale)
    dmin, mins = _shared(-offset, largest_scale)
    q = encode_affine(x, (d * scales)[..., None], (-dmin * mins)[..., None], highest)
    both = _refit_both(x, scales[..., None] * q, mins, d, dmin, importance)
    d, dmin = (rounded(t) for t in both)
    q = encode_affine(x, (d * scales)[..., None], (-dmin * mins)[..., None], highest)
    return d, dmin, scales.to(torch.int64), mins.to(torch.int64), q


def _shared(ideal: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Factors [N, G] >= 0 as one factor a block [N, 1] times integers up to the largest."""
    factor = ideal.amax(-1, keepdim=True) / largest
    inverse = torch.where(factor >= SMALLEST, 1 / factor, 0.0)
    return factor, (ideal * inverse).round().clamp(0, largest)


def _refit_both(
    x: Tensor,
    multiple: Tensor,
    mins: Tensor,
    d: Tensor,
    dmin: Tensor,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d and dmin [N, 1] that make d * multiple - dmin * mins nearest to x; else those given."""
    a, b, x = multiple.flatten(1), mins[..., None].expand_as(x).flatten(1), x.flatten(1)
    weights = None if importance is None else importance.flatten(1)
    aa, ab, bb = (total(s * t, weights) for s, t in ((a, a), (a, b), (b, b)))
    ax, bx = total(a * x, weights), total(b * x, weights)
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-3 * aa * bb
    determinant = torch.where(sound, determinant, 1.0)
    better, better_min = (ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant
    sound = sound & (better > 0) & (better_min > 0)
    return torch.where(sound, better, d), torch.where(sound, better_min, dmin)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, float("inf"), scale)
