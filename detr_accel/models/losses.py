"""DETR's set loss. Legend: L decoder layers, B images, Q queries, C classes, T targets, M matched pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.boxes import cxcywh_to_xyxy, giou
from detr_accel.models.autocast import full_precision, no_autocast
from detr_accel.models.matcher import Matcher, Matching, to_device
from detr_accel.structures import Targets, UserError


@dataclass(frozen=True)
class LossResult:
    """One micro-batch's share of its window: shares add up, over micro-batches and ranks, to the window's value."""

    total: Tensor  # scalar with graph: the weighted sum
    losses: dict[str, Tensor]  # name -> detached scalar on the device, unweighted, already divided
    bad_image: np.ndarray  # bool [B], on the host
    box_sums: Tensor  # float64 [2, Q, 4]: over the images, the last layer's boxes and their squares


class SetCriterion(nn.Module):
    """Match, then classify (cross-entropy over all queries) and place (L1 and GIoU over the matched ones), for the last
    decoder layer and, with ``aux``, for every earlier one.

    Every term is a sum divided by a count over the whole window and all ranks, which the caller adds up beforehand
    (``count``) and hands in (``normalisers``). This differs from the original twice, and on purpose: there the
    cross-entropy is divided by the class weights of the local micro-batch on the local GPU, so that an image's share in
    the gradient depends on which images happen to lie beside it; and boxes are counted per micro-batch, averaged over
    ranks and then clamped. With one process and no accumulation the numbers are the same; otherwise only sums over one
    global count give the same gradient on every layout. The denominator of the weighted cross-entropy is known without
    matching: of all queries, sum(min(T, Q)) weigh 1 and the others eos_coef.

    Args:
        num_classes: C.
        num_queries: Q.
        weights: of the terms ``ce``, ``bbox``, ``giou``.
        eos_coef: weight of the no-object class, 0..1.
    Source: Carion et al. 2020, section 3.1.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int,
        matcher: Matcher,
        weights: dict[str, float],
        eos_coef: float,
        aux: bool = True,
    ):
        super().__init__()
        self.num_classes, self.num_queries, self.matcher = num_classes, num_queries, matcher
        self.weights, self.eos_coef, self.aux = weights, eos_coef, aux

    def count(self, targets: list[Targets]) -> Tensor:
        """What a micro-batch adds to its window: float64 [3] on the CPU: boxes, matched pairs, images.

        Args:
            targets: still on the host, so that looking at them waits for nothing.
        Raises:
            UserError: a label that the model has no class for; on a GPU it would end the process without a word.
        """
        sizes = [len(t.labels) for t in targets]
        for t in targets:
            self._check_labels(t)
        matched = sum(min(size, self.num_queries) for size in sizes)
        return torch.tensor([sum(sizes), matched, len(sizes)], dtype=torch.float64)

    def _check_labels(self, target: Targets) -> None:
        labels = np.from_dlpack(target.labels) if target.labels.device.type == "cpu" else np.empty(0)
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise UserError(
                f"image {target.image_id} has a box with label {wrong[0]}, and the model has the classes 0 to "
                f"{self.num_classes - 1}: the source must map its category ids to contiguous labels"
            )

    def loss_names(self, num_layers: int) -> list[str]:
        """The names in ``LossResult.losses`` for L decoder layers, in their order."""
        aux = range(num_layers - 1 if self.aux else 0)
        named = [n for t in ("ce", "bbox", "giou") for n in (f"loss_{t}", *(f"loss_{t}_{i}" for i in aux))]
        return [*named, "class_error", "cardinality_error", "box_spread"]

    def normalisers(self, total: Tensor) -> dict[str, Tensor]:
        """Divisors of a window from its ``count``, summed over micro-batches and ranks; none is below 1 but ``ce``."""
        boxes, matched, images = total.unbind(0)
        ce = matched + self.eos_coef * (images * self.num_queries - matched)
        at_least_one = {"num_boxes": boxes.clamp(min=1), "matched": matched.clamp(min=1), "images": images.clamp(min=1)}
        return {**at_least_one, "ce": torch.where(images > 0, ce, torch.ones_like(ce))}

    def average(self, sums: dict[str, float], total: Tensor) -> dict[str, float]:
        """Loss over any set of images, from ``LossResult.losses`` that were made with divisors of one and added up.

        Args:
            sums: by name.
            total: ``count`` of the set.
        Returns:
            each of them divided, and ``loss``, their weighted sum.
        """
        divisors = {k: float(v) for k, v in self.normalisers(total).items()}
        by = {"class_error": "matched", "cardinality_error": "images", "box_spread": "images"}
        kinds = {name: name.removeprefix("loss_").partition("_")[0] for name in sums if name not in by}
        by |= {name: "ce" if kind == "ce" else "num_boxes" for name, kind in kinds.items()}
        values = {name: value / divisors[by[name]] for name, value in sums.items()}
        return values | {"loss": sum(self.weights[kind] * values[name] for name, kind in kinds.items())}

    def forward(self, outputs: dict, targets: list[Targets], counts: dict[str, Tensor]) -> LossResult:
        """
        Args:
            outputs: of the detector; the last layer and ``aux_outputs``.
            targets: B of them, on the outputs' device.
            counts: ``normalisers`` of the whole window.
        """
        layers = [*(outputs["aux_outputs"] if self.aux else []), outputs]
        with no_autocast(outputs["pred_logits"].device):
            logits = full_precision(torch.stack([o["pred_logits"] for o in layers]))  # [L, B, Q, C + 1]
            boxes = full_precision(torch.stack([o["pred_boxes"] for o in layers]))  # [L, B, Q, 4]
            labels = torch.cat([t.labels for t in targets])  # [T]
            boxes_cxcywh = torch.cat([t.boxes_cxcywh for t in targets]).to(boxes.dtype)  # [T, 4]
            sizes = [len(t.labels) for t in targets]
            match = self.matcher(logits.detach(), boxes.detach(), labels, boxes_cxcywh, sizes)
            counts = {k: v.to(logits.dtype) for k, v in counts.items()}
            terms = self._terms(logits.flatten(1, 2), boxes.flatten(1, 2), labels, boxes_cxcywh, match, counts)
            total = sum(self.weights[name] * values.sum() for name, values in terms.items())
            losses = self._by_name(terms)
            losses |= self._for_the_log(logits[-1].detach(), boxes[-1].detach(), labels, sizes, match, counts)
        return LossResult(total, losses, match.bad_image, _box_sums(boxes[-1].detach()))

    def _terms(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, boxes_cxcywh: Tensor, match: Matching, counts: dict
    ) -> dict[str, Tensor]:
        """logits [L, B*Q, C + 1], boxes [L, B*Q, 4] -> each term [L], divided."""
        wanted = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        wanted.scatter_(1, match.query_index, labels[match.target_index])
        ce = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)  # [L, B*Q]
        # not F.cross_entropy's own class weights: a float32 0.1 there would not be the 0.1 of the denominator
        ce = ce * torch.full_like(ce, self.eos_coef).masked_fill(wanted != self.num_classes, 1.0)
        placed = boxes.gather(1, match.query_index[..., None].expand(-1, -1, 4))  # [L, M, 4]
        truth = boxes_cxcywh[match.target_index]  # [L, M, 4]
        # M = 0 sums to a zero that still hangs on the graph, so every parameter gets a gradient on every rank
        l1 = (placed - truth).abs().sum((1, 2))
        overlap = giou(cxcywh_to_xyxy(placed), cxcywh_to_xyxy(truth))
        return {
            "ce": ce.sum(1) / counts["ce"],
            "bbox": l1 / counts["num_boxes"],
            "giou": (1 - overlap).sum(1) / counts["num_boxes"],
        }

    def _by_name(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {}
        for name, values in terms.items():
            *aux, last = values.detach().unbind(0)
            named[f"loss_{name}"] = last
            named |= {f"loss_{name}_{i}": value for i, value in enumerate(aux)}
        return named

    def _for_the_log(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, sizes: list[int], match: Matching, counts: dict
    ) -> dict[str, Tensor]:
        """Last layer, without weight in the total: class_error, percent of matched queries whose best class is wrong;
        cardinality_error, mean distance between the number of queries that say "object" and of objects;
        box_spread, standard deviation of an image's box coordinates over its queries (0: all queries say one box)."""
        best = logits.argmax(-1)  # [B, Q]
        wrong = best.flatten()[match.query_index[-1]] != labels[match.target_index[-1]]
        found = (best != self.num_classes).sum(1)  # [B]
        present = to_device(np.array(sizes), found.device)
        return {
            "class_error": 100 * wrong.sum() / counts["matched"],
            "cardinality_error": (found - present).abs().sum() / counts["images"],
            "box_spread": boxes.std(1, correction=0).mean(-1).sum() / counts["images"],
        }


def _box_sums(boxes: Tensor) -> Tensor:
    """boxes [B, Q, 4] -> float64 [2, Q, 4]."""
    boxes = boxes.to(torch.float64)
    return torch.stack((boxes.sum(0), boxes.square().sum(0)))


def image_spread(box_sums: Tensor, num_images: Tensor) -> Tensor:
    """How much a query's box differs from image to image: standard deviation of a coordinate, mean over all.

    Args:
        box_sums: float64 [2, Q, 4], see ``LossResult``, of all images of a window.
        num_images: of the window.
    """
    mean, square = box_sums / num_images.clamp(min=1)
    return (square - mean.square()).clamp(min=0).sqrt().mean()
