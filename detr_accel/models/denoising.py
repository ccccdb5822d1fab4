"""Contrastive denoising: true boxes, disturbed, go through the decoder beside the queries, and are to be found again.

Legend: B images, M slots (most boxes of an image in the window), G groups, Dn = 2 * G * M denoising queries: each group
has M slightly disturbed boxes, then M strongly disturbed ones that are to be told "nothing".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detr_accel.structures import Targets


@dataclass(frozen=True)
class DenoisingSize:
    """The window's own, so that neither the cut into micro-batches nor the number of processes changes a gradient.

    The original takes M from the images that happen to lie on one process.
    """

    num_groups: int
    num_slots: int

    @classmethod
    def of(cls, most_boxes: int, num_denoising: int) -> DenoisingSize | None:
        """
        Args:
            most_boxes: of an image in the window, over all processes.
            num_denoising: disturbed boxes wanted; 0: none.
        """
        if not most_boxes or not num_denoising:
            return None
        return cls(max(1, num_denoising // most_boxes), most_boxes)

    @property
    def num_queries(self) -> int:
        return 2 * self.num_groups * self.num_slots


@dataclass(frozen=True)
class DenoisingQueries:
    """What one micro-batch asks the decoder to undo.

    Args:
        labels: int64 [B, Dn], some of them wrong; C in empty slots.
        boxes_cxcywh: float [B, Dn, 4] in 0..1; zeros in empty slots.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    size: DenoisingSize

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenoisingQueries:
        labels, boxes = (t.to(device, non_blocking=non_blocking) for t in (self.labels, self.boxes_cxcywh))
        return replace(self, labels=labels, boxes_cxcywh=boxes)

    def only(self, image: int) -> DenoisingQueries:
        """Those of one image, as a batch of one."""
        return replace(self, labels=self.labels[image, None], boxes_cxcywh=self.boxes_cxcywh[image, None])

    def may_see(self, num_queries: int) -> Tensor:
        """bool [1, 1, Dn + Q, Dn + Q]: groups do not know each other, and the queries know of no group."""
        n, device = self.size.num_queries, self.labels.device
        group = torch.arange(n, device=device) // (2 * self.size.num_slots)
        group = torch.cat((group, torch.full((num_queries,), -1, device=device)))
        return ((group[:, None] == group[None]) | (group[None] == -1))[None, None]


@dataclass(frozen=True)
class Noise:
    """How boxes and labels are disturbed.

    Args:
        num_denoising: about how many disturbed boxes an image gets; 0 switches denoising off.
        label: half of it is the share of labels that are drawn anew.
        box: how far a corner moves, in halves of the box's sides: up to this, or from this up to its double.
        mirror: corners that have changed sides span a box all the same, as in DEIM; else it has a negative side.
    Source: Zhang et al., DINO, ICLR 2023.
    """

    num_denoising: int = 100
    label: float = 0.5
    box: float = 1.0
    mirror: bool = False

    def most_demanding(self, most_boxes: int) -> int:
        """What a window's most boxes would be, where as many denoising queries are made as in any window of images with
        up to ``most_boxes``: groups come in whole numbers, so that 51 boxes make 102 queries and 50 make 200."""
        return max(most_boxes, self.num_denoising) if most_boxes else 0

    def queries(
        self, targets: Sequence[Targets], generators: Sequence[np.random.Generator], num_classes: int, most_boxes: int
    ) -> DenoisingQueries | None:
        """
        Args:
            targets: B of them, on the host.
            generators: one an image, seeded by its place in the run.
            num_classes: C.
            most_boxes: of an image in the window.
        Returns:
            on the host; None where there is nothing to disturb in the whole window.
        """
        size = DenoisingSize.of(most_boxes, self.num_denoising)
        if size is None:
            return None
        rows = [self._image(t, g, num_classes, size) for t, g in zip(targets, generators, strict=True)]
        labels = torch.from_numpy(np.stack([labels for labels, _ in rows]))
        return DenoisingQueries(labels, torch.from_numpy(np.stack([boxes for _, boxes in rows])), size)

    def _image(
        self, target: Targets, generator: np.random.Generator, num_classes: int, size: DenoisingSize
    ) -> tuple[np.ndarray, np.ndarray]:
        """labels [Dn], boxes_cxcywh [Dn, 4] of one image."""
        num, slots, shape = len(target.labels), size.num_slots, (size.num_groups, 2, size.num_slots)
        boxes = np.zeros((slots, 4), _dtype(target.boxes_cxcywh))
        labels = np.full(slots, num_classes, np.int64)
        boxes[:num], labels[:num] = np.from_dlpack(target.boxes_cxcywh), np.from_dlpack(target.labels)
        wrong = generator.random(shape) < self.label / 2
        other = generator.integers(0, num_classes, shape)
        far = generator.random((*shape, 4)) + np.array([0.0, 1.0])[:, None, None]  # [G, 2, M, 4]
        far *= generator.choice((-1.0, 1.0), (*shape, 4))
        labels = np.where(wrong & (labels < num_classes), other, labels)  # [G, 2, M]
        half = np.tile(boxes[:, 2:] / 2, 2)  # [M, 4]
        corners = np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), -1)
        corners = (corners + far * self.box * half).clip(0, 1)
        low, high = corners[..., :2], corners[..., 2:]
        sides = np.abs(high - low) if self.mirror else high - low
        boxes = np.concatenate(((low + high) / 2, sides), -1).astype(boxes.dtype)
        return labels.reshape(-1), boxes.reshape(-1, 4)


def _dtype(boxes: Tensor) -> type:
    return np.float64 if boxes.dtype == torch.float64 else np.float32


def generators(seed: int, epoch: int, positions: Sequence[int]) -> list[np.random.Generator]:
    """One for each image of a micro-batch, the same however the window is cut."""
    return [np.random.default_rng((_DENOISING, seed, epoch, position)) for position in positions]


_DENOISING = 0x64656E6F  # keeps these numbers apart from those of other uses of the same seed
