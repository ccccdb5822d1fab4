"""How a query's class is judged. Legend: L layers, N queries of all images, C classes, M matched pairs of a layer.

Each takes logits [L, N, C'], query_index int64 [L, M] into N, labels int64 [L, M] and overlap (IoU, without graph)
[L, M], and gives the sum over queries and classes, [L]; ``divisor`` names the count it belongs to, ``background``
whether there is a class "nothing" (C' = C + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class CrossEntropy:
    """One class a query, "nothing" among them.

    Args:
        eos_coef: weight of "nothing", 0..1.
    Source: Carion et al. 2020.
    """

    name, divisor, background = "ce", "ce", True

    def __init__(self, eos_coef: float):
        self.eos_coef = eos_coef

    def __call__(self, logits: Tensor, query_index: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
        nothing = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], nothing, dtype=torch.int64, device=logits.device)
        wanted.scatter_(1, query_index, labels)
        ce = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)  # [L, N]
        # not F.cross_entropy's own class weights: a float32 0.1 there would not be the 0.1 of the denominator
        return (ce * torch.full_like(ce, self.eos_coef).masked_fill(wanted != nothing, 1.0)).sum(1)


class Varifocal:
    """Independent classes; a matched query is to say how well its box fits, and weighs as much.

    Source: Zhang et al., VarifocalNet, CVPR 2021, as RT-DETR has it.
    """

    name, divisor, background = "vfl", "num_boxes", False

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0):
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, logits: Tensor, query_index: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
        target, matched = _score_targets(logits, query_index, labels, overlap)
        weight = self.alpha * logits.detach().sigmoid().pow(self.gamma) * ~matched + target
        return _weighted_bce(logits, target, weight)


class Matchability:
    """As ``Varifocal``, with more weight on matched queries whose box fits badly: there dense supervision has most.

    Source: Huang et al., DEIM, CVPR 2025.
    """

    name, divisor, background = "mal", "num_boxes", False

    def __init__(self, gamma: float = 1.5):
        self.gamma = gamma

    def __call__(self, logits: Tensor, query_index: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
        target, matched = _score_targets(logits, query_index, labels, overlap.pow(self.gamma))
        weight = torch.where(matched, 1.0, logits.detach().sigmoid().pow(self.gamma))
        return _weighted_bce(logits, target, weight)


def _score_targets(
    logits: Tensor, query_index: Tensor, labels: Tensor, score: Tensor
) -> tuple[Tensor, Tensor]:
    """Targets [L, N, C] with the score where query and class are matched, else 0; and where that is."""
    place = query_index * logits.shape[-1] + labels  # [L, M]
    flat = torch.zeros_like(logits).flatten(1)
    matched = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, place, True)
    return flat.scatter(1, place, score.to(flat.dtype)).view_as(logits), matched.view_as(logits)


def _weighted_bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none").sum((1, 2))
