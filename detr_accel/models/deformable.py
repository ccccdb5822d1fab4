"""Deformable attention over several feature maps, in plain PyTorch: it exports, and runs wherever PyTorch does.

Legend: B batch, Q queries, D width, H heads, L levels (feature maps, finest first), N tokens of all levels, P sampling
points of a head over all levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models.attention import shrink_mask
from detr_accel.models.autocast import full_precision, no_autocast, within_half


@dataclass(frozen=True)
class Levels:
    """Where the tokens of several feature maps lie.

    Args:
        sizes: (h, w) of each level.
        valid: bool [B, N], True = image; None where no image is padded.
        ratios: [B, L, 2], the (x, y) share of each level's canvas that is image; None likewise.
    """

    sizes: tuple[tuple[int, int], ...]
    valid: Tensor | None = None
    ratios: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [h * w for h, w in self.sizes]


def levels_of(maps: Sequence[Tensor], mask: Tensor) -> Levels:
    """
    Args:
        maps: feature maps [B, D, h, w].
        mask: bool [B, H, W], True = padding; [B, 0, 0] where nothing is padded.
    """
    sizes = tuple((m.shape[-2], m.shape[-1]) for m in maps)
    if not mask.numel():
        return Levels(sizes)
    small = [~shrink_mask(mask, size) for size in sizes]
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    extent = [torch.stack((v[:, 0].to(dtype).mean(1), v[:, :, 0].to(dtype).mean(1)), -1) for v in small]  # [B, 2]
    return Levels(sizes, torch.cat([v.flatten(1) for v in small], 1), torch.stack(extent, 1))


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its reference box, in every level, with learned offsets and weights.

    Args:
        num_points: sampling points of a head, for each level.
        sampling: ``bilinear``; ``discrete`` takes the nearest cell, which needs no grid_sample and lets no gradient
            into the offsets (RT-DETRv2's option for deployment).
        offset_scale: how far an offset of 1 leads, in sizes of the reference box.
    Source: Zhu et al., Deformable DETR, ICLR 2021; Lv et al., RT-DETRv2, 2024 (points for each level, discrete).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: Sequence[int],
        sampling: str = "bilinear",
        offset_scale: float = 0.5,
    ):
        super().__init__()
        assert sampling in ("bilinear", "discrete"), sampling
        self.num_heads, self.num_points, self.sampling = num_heads, tuple(num_points), sampling
        self.offset_scale = offset_scale
        total = num_heads * sum(self.num_points)
        self.sampling_offsets = nn.Linear(dim, 2 * total)
        self.attention_weights = nn.Linear(dim, total)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """Points start on rays around the reference, one ray a head, one step further each; all weigh the same."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ray = torch.stack((angle.cos(), angle.sin()), -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # [H, 2]
        steps = torch.cat([torch.arange(1, n + 1) for n in self.num_points])  # [P]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_((ray[:, None] * steps[None, :, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        if self.sampling == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def forward(self, query: Tensor, reference_boxes: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """
        Args:
            query: [B, Q, D], positions added.
            reference_boxes: [B, Q, 4] cxcywh in 0..1 of the un-padded image, float32 or better.
            memory: [B, N, D], the levels' tokens one after the other.
        Returns:
            [B, Q, D]
        """
        value = self.value_proj(memory)
        if levels.valid is not None:
            value = value * levels.valid[..., None].to(value.dtype)
        value = value.unflatten(-1, (self.num_heads, -1))  # [B, N, H, D/H]
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))  # [B, Q, H, P]
        with no_autocast(query.device):  # half precision would round a place to whole cells
            offsets = F.linear(
                full_precision(query),
                full_precision(self.sampling_offsets.weight),
                full_precision(self.sampling_offsets.bias),
            )
            places = self._places(offsets, reference_boxes, levels)
            sampled = self._sample(full_precision(value), places, levels)  # [B*H, D/H, Q, P]
            weights = full_precision(weights).softmax(-1).transpose(1, 2).flatten(0, 1)  # [B*H, Q, P]
            out = (sampled * weights[:, None]).sum(-1)  # [B*H, D/H, Q]
        out = out.unflatten(0, (len(query), -1)).flatten(1, 2).transpose(1, 2)  # [B, Q, D]
        return within_half(self.output_proj(out.to(query.dtype)))

    def _places(self, offsets: Tensor, reference_boxes: Tensor, levels: Levels) -> list[Tensor]:
        """Where to look in each level, [B, Q, H, p, 2] as (x, y) in 0..1 of the canvas."""
        offsets = offsets.unflatten(-1, (self.num_heads, -1, 2)).split(self.num_points, 3)
        boxes = reference_boxes.to(offsets[0].dtype)[:, :, None, None]
        # a number per level, not a tensor of them: making one on a GPU would wait for everything before it
        places = [
            boxes[..., :2] + part * (self.offset_scale / n) * boxes[..., 2:]
            for part, n in zip(offsets, self.num_points, strict=True)
        ]
        if levels.ratios is None:
            return places
        ratios = levels.ratios.to(places[0].dtype)[:, :, None, None, None]  # [B, L, 1, 1, 1, 2]
        return [place * ratios[:, i] for i, place in enumerate(places)]

    def _sample(self, value: Tensor, places: list[Tensor], levels: Levels) -> Tensor:
        """value [B, N, H, D/H], places of each level [B, Q, H, p, 2] -> [B*H, D/H, Q, P]."""
        maps = value.permute(0, 2, 3, 1).flatten(0, 1).split(levels.lengths, -1)  # each [B*H, D/H, h*w]
        places = [place.transpose(1, 2).flatten(0, 1) for place in places]  # each [B*H, Q, p, 2]
        take = _nearest if self.sampling == "discrete" else _bilinear
        pairs = zip(maps, places, levels.sizes, strict=True)
        return torch.cat([take(m.unflatten(-1, size), place) for m, place, size in pairs], -1)


_in_order = False  # a plain global: compilers read it


@contextmanager
def reads_in_order(yes: bool) -> Iterator[None]:
    """Read as a GPU does under ``deterministic: true``, wherever the tensors are: what that takes can be counted."""
    global _in_order
    before, _in_order = _in_order, yes
    try:
        yield
    finally:
        _in_order = before


def _bilinear(features: Tensor, places: Tensor) -> Tensor:
    """features [M, C, h, w], places [M, Q, p, 2] -> [M, C, Q, p]; outside of the map is 0."""
    if _in_order or (features.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()):
        return _bilinear_in_order(features, places)
    return F.grid_sample(features, 2 * places - 1, mode="bilinear", padding_mode="zeros", align_corners=False)


def _bilinear_in_order(features: Tensor, places: Tensor) -> Tensor:
    """As ``_bilinear``, of four reads; slower. grid_sample has no backward on a GPU whose sums have a fixed order."""
    h, w = features.shape[-2:]
    x, y = places[..., 0] * w - 0.5, places[..., 1] * h - 0.5  # [M, Q, p], in cells, 0 in the middle of the first
    left, top = x.detach().floor(), y.detach().floor()
    flat, total = features.flatten(2), 0.0
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            # whole before clamped, which lets NaN through
            index = row.to(torch.int64).clamp(0, h - 1) * w + column.to(torch.int64).clamp(0, w - 1)
            index = index.flatten(1)[:, None].expand(-1, features.shape[1], -1)  # [M, C, Q*p]
            weight = torch.where(inside, down * across, 0.0)
            total = total + flat.gather(2, index).unflatten(-1, places.shape[1:3]) * weight[:, None]
    return total


def _nearest(features: Tensor, places: Tensor) -> Tensor:
    """As ``_bilinear``, one cell each; a place outside takes the border's: the canvas's, which is padding where there
    is any."""
    h, w = features.shape[-2:]
    x = (places[..., 0] * w + 0.5).to(torch.int64).clamp(0, w - 1)
    y = (places[..., 1] * h + 0.5).to(torch.int64).clamp(0, h - 1)
    index = (y * w + x).flatten(1)[:, None].expand(-1, features.shape[1], -1)  # [M, C, Q*p]
    return features.flatten(2).gather(2, index).unflatten(-1, places.shape[1:3])
