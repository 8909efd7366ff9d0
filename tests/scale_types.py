"""What a type of scales holds."""

from __future__ import annotations

import torch

from ktcore.formats.base import E8M0


def fits(scales: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether scales, of which none is a NaN, are numbers of a type."""
    if dtype != E8M0:
        return torch.equal(scales.to(dtype).to(torch.float32), scales)
    mantissa, exponent = torch.frexp(scales)
    return bool(((mantissa == 0.5) & (exponent >= -126) & (exponent <= 128)).all())
