"""Sine position codes. Legend: B batch, h w feature size, N = h * w tokens, D width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detr_accel.models.autocast import no_autocast


def sine_positions(mask: Tensor, dim: int, dtype: torch.dtype = torch.float32, temperature: float = 10000.0) -> Tensor:
    """Code of each cell's place inside the un-padded part of its image.

    The first half of the code is y, the second x; even channels are sines, odd ones cosines. Computed with autocast
    off: bfloat16 cannot tell neighbouring cells apart.

    Args:
        mask: bool [B, h, w], True = padding.
        dim: width of the code, a multiple of 4.
        dtype: float32, or float64 for a model in double precision.
    Returns:
        [B, N, D], tokens in row-major order.
    Source: Carion et al. 2020 (Vaswani et al. 2017, on two axes, normalised to 2 pi).
    """
    with no_autocast(mask.device):
        valid = ~mask
        y = valid.cumsum(1, dtype=dtype)
        x = valid.cumsum(2, dtype=dtype)
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        channel = torch.arange(dim // 2, dtype=dtype, device=mask.device)
        period = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / (dim // 2))  # [D/2]
        angle = torch.stack((y, x), dim=-1).unsqueeze(-1) / period  # [B, h, w, 2, D/2]
        code = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1)  # [B, h, w, 2, D/4, 2]
        return code.flatten(3).flatten(1, 2)  # [B, N, D]
