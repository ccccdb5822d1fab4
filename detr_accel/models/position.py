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
        y = valid.cumsum(1).to(dtype)  # whole numbers: exact, and sums of floats have no fixed order on a GPU
        x = valid.cumsum(2).to(dtype)
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        channel = torch.arange(dim // 2, dtype=dtype, device=mask.device)
        period = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / (dim // 2))  # [D/2]
        angle = torch.stack((y, x), dim=-1).unsqueeze(-1) / period  # [B, h, w, 2, D/2]
        code = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1)  # [B, h, w, 2, D/4, 2]
        return code.flatten(3).flatten(1, 2)  # [B, N, D]


def grid_positions(
    height: int, width: int, dim: int, device: torch.device, temperature: float = 10000.0, dtype=torch.float64
) -> Tensor:
    """Code of each cell's row and column, counted from 0 whatever the padding: RT-DETR's.

    Quarters of the code: sine of y, cosine of y, sine of x, cosine of x. The original lists the cells column by column
    while the features go row by row, so that what it calls x is y. On a square that is only a matter of names, and this
    order is the one its weights have learned; on a rectangle it gives cells the places of others, and here it does not.

    Args:
        dim: width of the code, a multiple of 4.
    Returns:
        float64 [h * w, D], cells in row-major order.
    Source: Zhao et al. 2024 (He et al. 2022, MAE, for the order of the code).
    """
    period = temperature ** (torch.arange(dim // 4, dtype=dtype, device=device) / (dim // 4))  # [D/4]
    y = torch.arange(height, dtype=dtype, device=device)[:, None, None] / period  # [h, 1, D/4]
    x = torch.arange(width, dtype=dtype, device=device)[None, :, None] / period
    y, x = (t.expand(height, width, -1) for t in (y, x))
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), -1).flatten(0, 1)
