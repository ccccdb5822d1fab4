"""Bipartite matching of queries to targets. Legend: L decoder layers, B images, Q queries, C classes, T targets of the
micro-batch, M matched pairs (the sum over images of the lesser of queries and targets; the same in every layer)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_accel.boxes import cxcywh_to_xyxy, giou


@dataclass(frozen=True)
class Matching:
    query_index: Tensor  # int64 [L, M], into the B * Q queries
    target_index: Tensor  # int64 [L, M], into the T targets
    bad_image: np.ndarray  # bool [B], on the host: predictions or cost were not finite


class Matcher:
    """The cheapest one-to-one assignment for each image and layer; cost = class + L1 + GIoU, each with its weight.

    The original solves one layer after the other, computes the cost of every query with the targets of every image, and
    waits for the device each time. Here each image meets its own targets only, all layers at once, in one transfer.

    A cost that is not finite never reaches the solver (which would raise, on one process alone) and is never replaced
    by a number (which would hide it): the image takes the assignment query i <- target i in all layers, and is marked
    in ``bad_image``.
    """

    def __init__(
        self,
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        class_cost: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost or softmax_cost

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, boxes_cxcywh: Tensor, sizes: list[int]
    ) -> Matching:
        """
        Args:
            logits: [L, B, Q, C + 1] (or C, without a background class), float32 or float64.
            boxes: [L, B, Q, 4] cxcywh.
            labels: int64 [T]; boxes_cxcywh: [T, 4]: the targets of all images, one after the other.
            sizes: number of targets of each image (B numbers, sum T).
        """
        device, num_images, num_queries = logits.device, logits.shape[1], logits.shape[2]
        image_index = to_device(np.repeat(np.arange(num_images), sizes), device)  # [T]
        cost = self._cost(logits, boxes, labels, boxes_cxcywh, image_index)  # [L, T, Q]
        # 0 where everything an image predicts is finite, else NaN: an image without targets has no cost to show it
        health = (logits.sum((0, 2, 3)) + boxes.sum((0, 2, 3))) * 0  # [B]
        host = torch.cat((cost.flatten(), health)).cpu().numpy()  # the one read of the device in a micro-batch
        cost_host = host[: cost.numel()].reshape(cost.shape)
        bad = ~np.isfinite(host[cost.numel() :])
        pairs = assign(cost_host, sizes, num_queries, bad)
        index = to_device(pairs, device)
        return Matching(index[0], index[1], bad)

    def _cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, image_index: Tensor) -> Tensor:
        class_cost = self.class_cost(logits, image_index, labels)  # [L, T, Q]
        own = boxes.index_select(1, image_index)  # [L, T, Q, 4]
        targets = targets.to(own.dtype)[None, :, None, :]  # [1, T, 1, 4]
        distance = (own - targets).abs().sum(-1)
        overlap = giou(cxcywh_to_xyxy(own), cxcywh_to_xyxy(targets))
        return self.cost_bbox * distance + self.cost_class * class_cost - self.cost_giou * overlap


def softmax_cost(logits: Tensor, image_index: Tensor, labels: Tensor) -> Tensor:
    """Of every query of a target's image to be its class: minus the probability.

    Args:
        logits: [L, B, Q, C + 1].
        image_index, labels: [T].
    Returns:
        [L, T, Q]
    """
    return -logits.softmax(-1)[:, image_index, :, labels].transpose(0, 1)  # [T, L, Q] -> [L, T, Q]


def focal_cost(logits: Tensor, image_index: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """As ``softmax_cost`` for independent classes, [L, B, Q, C]: what the focal loss would change.

    Source: Zhu et al., Deformable DETR, ICLR 2021.
    """
    p = logits[:, image_index, :, labels].transpose(0, 1).sigmoid()  # [L, T, Q]
    found = alpha * (1 - p).pow(gamma) * -(p + 1e-8).log()
    missed = (1 - alpha) * p.pow(gamma) * -(1 - p + 1e-8).log()
    return found - missed


def assign(cost: np.ndarray, sizes: list[int], num_queries: int, bad: np.ndarray) -> np.ndarray:
    """Solve each image's own block.

    Args:
        cost: [L, T, Q].
        bad: bool [B]; True takes the fixed assignment. Set here for images whose cost is not finite.
    Returns:
        int64 [2, L, M]: query among all B * Q, target among all T.
    """
    num_layers = len(cost)
    starts = np.concatenate(([0], np.cumsum(sizes))).astype(int)
    columns = []
    for image, size in enumerate(sizes):
        block = cost[:, starts[image] : starts[image + 1]]
        bad[image] |= not np.isfinite(block).all()
        if bad[image]:
            fixed = np.arange(min(size, num_queries))
            solved = np.broadcast_to(fixed, (num_layers, 2, len(fixed)))
        else:
            solved = np.stack([linear_sum_assignment(layer) for layer in block])  # [L, 2, m]: targets, queries
        columns.append(np.stack((solved[:, 1] + image * num_queries, solved[:, 0] + starts[image])))  # [2, L, m]
    return np.concatenate(columns, axis=2).astype(np.int64)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """One copy to the device that nobody waits for."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
