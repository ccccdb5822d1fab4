"""Pure functions on boxes. Every name says the format; every function works on any leading shape.

Legend: N, M boxes; xyxy = left, top, right, bottom; cxcywh = centre x, centre y, width, height.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] cxcywh -> [..., 4] xyxy, any unit."""
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] xyxy -> [..., 4] cxcywh, any unit."""
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _product(sides: Tensor) -> Tensor:
    """[..., 2] -> [...]. Not ``prod``: what that does in backward waits for a GPU, to look for zeros."""
    return sides[..., 0] * sides[..., 1]


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast against each other: [..., 4] and [..., 4] -> [...], in 0..1; two
    boxes without area have 0."""
    left_top = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    right_bottom = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    inner = _product((right_bottom - left_top).clamp(min=0))
    union = _area(a_xyxy) + _area(b_xyxy) - inner
    return inner / torch.where(union == 0, torch.ones_like(union), union)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast against each other: [..., 4] and [..., 4] -> [...], in (-1, 1].

    Pairwise costs come from ``giou(a[:, None], b[None])``, matched losses from ``giou(a, b)``: the [N, N] matrix of
    which only the diagonal is wanted is never built. Two boxes that are both a single point have no union and no
    enclosing area; their GIoU is defined as 0 - 0 = 0 here, where the plain formula is 0/0.
    Non-finite input gives non-finite output, never an error: the caller's finiteness check decides.

    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019.
    """
    left_top = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    right_bottom = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    inner = _product((right_bottom - left_top).clamp(min=0))
    union = _area(a_xyxy) + _area(b_xyxy) - inner
    outer_lt = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    outer_rb = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    outer = _product((outer_rb - outer_lt).clamp(min=0))
    safe_union = torch.where(union == 0, torch.ones_like(union), union)
    safe_outer = torch.where(outer == 0, torch.ones_like(outer), outer)
    return inner / safe_union - (outer - union) / safe_outer
