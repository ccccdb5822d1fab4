"""The set loss of DETR and RT-DETR. Legend: L judged layers, B images, Q queries, C classes, T targets, M matched
pairs, Dn denoising queries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from detr_accel.boxes import cxcywh_to_xyxy, giou, iou
from detr_accel.models.autocast import full_precision, no_autocast
from detr_accel.models.class_losses import CrossEntropy
from detr_accel.models.denoising import DenoisingQueries, DenoisingSize, Noise, generators
from detr_accel.models.matcher import Matcher, Matching, to_device
from detr_accel.structures import Batch, Targets, UserError


@dataclass(frozen=True)
class LossResult:
    """One micro-batch's share of its window: shares add up, over micro-batches and ranks, to the window's value."""

    total: Tensor  # scalar with graph: the weighted sum
    losses: dict[str, Tensor]  # name -> detached scalar on the device, unweighted, already divided
    bad_image: np.ndarray  # bool [B], on the host
    box_sums: Tensor  # float64 [2, Q, 4]: over the images, the last layer's boxes and their squares


class SetCriterion(nn.Module):
    """Match, then classify (all queries) and place (L1 and GIoU over the matched ones), for the last decoder layer,
    with ``aux`` for every earlier one, for the encoder's own prediction and for the denoising queries, where there are
    any.

    Every term is a sum divided by a count over the whole window and all ranks, which the caller adds up beforehand
    (``count``) and hands in (``normalisers``). This differs from the originals, and on purpose: there the cross-entropy
    is divided by the class weights of the local micro-batch on the local GPU, so that an image's share in the gradient
    depends on which images happen to lie beside it; boxes are counted per micro-batch, averaged over ranks and then
    clamped; and the number of denoising groups is each rank's own. With one process and no accumulation the numbers are
    the same; otherwise only sums over one global count give the same gradient on every layout. The denominator of the
    weighted cross-entropy is known without matching: of all queries, sum(min(T, Q)) weigh 1 and the others eos_coef.

    Args:
        num_classes: C.
        num_queries: Q.
        weights: of the class term (by its name), ``bbox`` and ``giou``.
        class_loss: one of ``class_losses``.
        noise: how the denoising queries are made; None where the model has none.
    Source: Carion et al. 2020, section 3.1; Zhao et al. 2024.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int,
        matcher: Matcher,
        weights: dict[str, float],
        class_loss: CrossEntropy,
        aux: bool = True,
        noise: Noise | None = None,
    ):
        super().__init__()
        self.num_classes, self.num_queries, self.matcher = num_classes, num_queries, matcher
        self.weights, self.class_loss, self.aux, self.noise = weights, class_loss, aux, noise

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

    def disturb(self, batch: Batch, most_boxes: int, seed: int) -> DenoisingQueries | None:
        """The denoising queries of a micro-batch, on the host; None where the model has none, or nothing to learn from.

        Args:
            batch: still on the host.
            most_boxes: of an image of the window, over all processes.
        """
        if self.noise is None:
            return None
        dice = generators(seed, batch.epoch, batch.positions)
        return self.noise.queries(batch.targets, dice, self.num_classes, most_boxes)

    def loss_names(self, num_layers: int) -> list[str]:
        """The names in ``LossResult.losses`` of a training step with that many decoder layers, in their order."""
        suffixes = ["", *(f"_{i}" for i in range(num_layers - 1 if self.aux else 0))]
        if self.noise is not None:
            suffixes += ["_enc", *(f"_dn_{i}" for i in range(num_layers if self.noise.num_denoising else 0))]
        terms = (self.class_loss.name, "bbox", "giou")
        return [*(f"loss_{t}{s}" for t in terms for s in suffixes), "class_error", "cardinality_error", "box_spread"]

    def normalisers(self, total: Tensor) -> dict[str, Tensor]:
        """Divisors of a window from its ``count``, summed over micro-batches and ranks; none is below 1 but ``ce``."""
        boxes, matched, images = total.unbind(0)
        at_least_one = {"num_boxes": boxes.clamp(min=1), "matched": matched.clamp(min=1), "images": images.clamp(min=1)}
        if not self.class_loss.background:
            return at_least_one
        ce = matched + self.class_loss.eos_coef * (images * self.num_queries - matched)
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
        by |= {n: self.class_loss.divisor if kind == self.class_loss.name else "num_boxes" for n, kind in kinds.items()}
        values = {name: value / divisors[by[name]] for name, value in sums.items()}
        return values | {"loss": sum(self.weights[kind] * values[name] for name, kind in kinds.items())}

    def forward(
        self,
        outputs: dict,
        targets: list[Targets],
        counts: dict[str, Tensor],
        denoising: DenoisingQueries | None = None,
    ) -> LossResult:
        """
        Args:
            outputs: of the detector; the last layer, ``aux_outputs``, ``enc_outputs`` and ``dn_outputs``.
            targets: B of them, on the outputs' device.
            counts: ``normalisers`` of the whole window.
            denoising: what ``dn_outputs`` belong to.
        """
        judged = {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])} if self.aux else {}
        judged |= {"_enc": outputs["enc_outputs"]} if "enc_outputs" in outputs else {}
        judged[""] = outputs
        with no_autocast(outputs["pred_logits"].device):
            logits, boxes = _stack(judged.values())  # [L, B, Q, C (+ 1)], [L, B, Q, 4]
            truth = _Truth(targets, boxes.dtype)
            match = self.matcher(logits.detach(), boxes.detach(), truth.labels, truth.boxes_cxcywh, truth.sizes)
            counts = {k: v.to(logits.dtype) for k, v in counts.items()}
            pairs = match.query_index, match.target_index
            terms = self._terms(logits.flatten(1, 2), boxes.flatten(1, 2), truth, pairs, counts)
            losses = _by_name(terms, list(judged))
            total = sum(self.weights[name] * values.sum() for name, values in terms.items())
            if denoising is not None:
                more = self._denoising(outputs["dn_outputs"], truth, denoising.size, counts)
                losses |= _by_name(more, [f"_dn_{i}" for i in range(len(outputs["dn_outputs"]))])
                total = total + sum(self.weights[name] * values.sum() for name, values in more.items())
            losses |= self._for_the_log(logits[-1].detach(), boxes[-1].detach(), truth, match, counts)
        return LossResult(total, losses, match.bad_image, _box_sums(boxes[-1].detach()))

    def _terms(
        self, logits: Tensor, boxes: Tensor, truth: _Truth, pairs: tuple[Tensor, Tensor], counts: dict
    ) -> dict[str, Tensor]:
        """logits [L, N, C (+ 1)], boxes [L, N, 4], pairs of indices [L, M] -> each term [L], divided."""
        query_index, target_index = pairs
        placed = boxes.gather(1, query_index[..., None].expand(-1, -1, 4))  # [L, M, 4]
        wanted = truth.boxes_cxcywh[target_index]  # [L, M, 4]
        placed_xyxy, wanted_xyxy = cxcywh_to_xyxy(placed), cxcywh_to_xyxy(wanted)
        overlap = iou(placed_xyxy.detach(), wanted_xyxy)
        class_loss = self.class_loss(logits, query_index, truth.labels[target_index], overlap)
        # M = 0 sums to a zero that still hangs on the graph, so every parameter gets a gradient on every rank
        return {
            self.class_loss.name: class_loss / counts[self.class_loss.divisor],
            "bbox": (placed - wanted).abs().sum((1, 2)) / counts["num_boxes"],
            "giou": (1 - giou(placed_xyxy, wanted_xyxy)).sum(1) / counts["num_boxes"],
        }

    def _denoising(self, layers: list[dict], truth: _Truth, size: DenoisingSize, counts: dict) -> dict[str, Tensor]:
        """The same terms for queries that know which target is theirs; a group each counts all boxes once."""
        logits, boxes = _stack(layers)  # [L, B, Dn, C], [L, B, Dn, 4]
        device = logits.device
        queries, own = to_device(_own_targets(truth.sizes, size), device)[:, None].expand(-1, len(layers), -1)
        counts = counts | {"num_boxes": counts["num_boxes"] * size.num_groups}
        return self._terms(logits.flatten(1, 2), boxes.flatten(1, 2), truth, (queries, own), counts)

    def _for_the_log(
        self, logits: Tensor, boxes: Tensor, truth: _Truth, match: Matching, counts: dict
    ) -> dict[str, Tensor]:
        """Last layer, without weight in the total: class_error, percent of matched queries whose best class is wrong;
        cardinality_error, mean distance between the number of queries that say "object" and of objects;
        box_spread, standard deviation of an image's box coordinates over its queries (0: all queries say one box)."""
        score, best = logits.max(-1)  # [B, Q]
        is_object = best != self.num_classes if self.class_loss.background else score > 0  # a sigmoid above one half
        wrong = best.flatten()[match.query_index[-1]] != truth.labels[match.target_index[-1]]
        present = to_device(np.array(truth.sizes), best.device)
        return {
            "class_error": 100 * wrong.sum() / counts["matched"],
            "cardinality_error": (is_object.sum(1) - present).abs().sum() / counts["images"],
            "box_spread": boxes.std(1, correction=0).mean(-1).sum() / counts["images"],
        }


class _Truth:
    """A micro-batch's targets, one after the other: labels [T], boxes_cxcywh [T, 4], and how many each image has."""

    def __init__(self, targets: list[Targets], dtype: torch.dtype):
        self.labels = torch.cat([t.labels for t in targets])
        self.boxes_cxcywh = torch.cat([t.boxes_cxcywh for t in targets]).to(dtype)
        self.sizes = [len(t.labels) for t in targets]


def _stack(layers: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all layers, float32 at least."""
    layers = list(layers)
    return tuple(full_precision(torch.stack([layer[k] for layer in layers])) for k in ("pred_logits", "pred_boxes"))


def _by_name(terms: dict[str, Tensor], suffixes: list[str]) -> dict[str, Tensor]:
    rows = ((name, values.detach().unbind(0)) for name, values in terms.items())
    return {f"loss_{name}{suffix}": v for name, row in rows for suffix, v in zip(suffixes, row, strict=True)}


def _own_targets(sizes: list[int], size: DenoisingSize) -> np.ndarray:
    """int64 [2, G * T]: the slightly disturbed queries among all B * Dn, and the targets that they came from."""
    starts = np.concatenate(([0], np.cumsum(sizes)))
    group = 2 * size.num_slots * np.arange(size.num_groups)[:, None]
    queries = [(image * size.num_queries + group + np.arange(n)).ravel() for image, n in enumerate(sizes)]
    targets = [np.tile(starts[image] + np.arange(n), size.num_groups) for image, n in enumerate(sizes)]
    return np.stack((np.concatenate(queries), np.concatenate(targets))).astype(np.int64)


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
