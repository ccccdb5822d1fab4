"""Multi-head attention without attention weights in memory. Legend: B batch, H heads, N queries, M keys, D width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models.autocast import within_half


class Attention(nn.Module):
    """nn.MultiheadAttention's parameters and arithmetic, through scaled_dot_product_attention.

    The original asks nn.MultiheadAttention for the averaged weights and throws them away, which keeps it from every
    fused kernel; the result is the same.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None = None) -> Tensor:
        """
        Args:
            query: [B, N, D]; key, value: [B, M, D]. The same tensor as query and key is projected in one go.
            key_valid: bool [B, 1, 1, M], True = may be attended to. At least one True in a row (see ``valid_keys``).
        Returns:
            [B, N, D]
        """
        dim = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:
            q, k = F.linear(query, weight[: 2 * dim], bias[: 2 * dim]).split(dim, dim=-1)
        else:
            q = F.linear(query, weight[:dim], bias[:dim])
            k = F.linear(key, weight[dim : 2 * dim], bias[dim : 2 * dim])
        v = F.linear(value, weight[2 * dim :], bias[2 * dim :])
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N or M, D/H]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_valid, dropout_p=dropout)
        return within_half(self.out_proj(out.transpose(1, 2).flatten(2)))  # [B, N, D]


def valid_keys(mask: Tensor) -> Tensor:
    """Padding mask bool [B, N] (True = padding) -> bool [B, 1, 1, N] for ``Attention``.

    A row without any valid key has no softmax: 0 / 0, which in the original is NaN for the image and, through the
    gradient, for the whole step. Such an image (an empty slot of a batch) attends to all its padding instead: finite,
    and as meaningless as it must be.
    """
    valid = ~mask
    return (valid | ~valid.any(-1, keepdim=True))[:, None, None, :]


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The padding of a feature map: a cell is padding where its first pixel is.

    As many cells are image as the image has on a canvas of its own. Taking the nearest pixel instead makes it one more
    or less, depending on how wide the canvas is.

    Args:
        mask: bool [B, H, W], True = padding.
        size: (h, w) of the map.
    Returns:
        bool [B, h, w]
    """
    strides = [2 ** math.ceil(math.log2(long / short)) for long, short in zip(mask.shape[1:], size, strict=True)]
    small = mask[:, :: strides[0], :: strides[1]]
    if small.shape[1:] == torch.Size(size):
        return small
    return F.interpolate(mask[None].float(), size=size)[0].bool()  # a stride that is no power of two
