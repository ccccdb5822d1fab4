"""Where mixed precision must not reach."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off on this device, also on one that knows no autocast (meta)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def full_precision(x: Tensor) -> Tensor:
    """float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_autocast_would(x: Tensor) -> Tensor:
    """The cast that autocast makes before a convolution, for an autograd function that it cannot see into."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def within_half(x: Tensor) -> Tensor:
    """float16 ends at 65504: what has passed it comes back to the border instead of being infinite, without a gradient
    there. Other types, and NaN, stay as they are.

    A sum of a decoder's residuals is where DETR's half-precision training meets the border first.
    """
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit) if x.dtype is torch.float16 else x
