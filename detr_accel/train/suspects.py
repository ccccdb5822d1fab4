"""What in a captured window could be to blame: its images, its boxes, the model's tensors, single terms of the loss.

Legend: L decoder layers, B images of a micro-batch, Q queries, T targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detr_accel.boxes import cxcywh_to_xyxy, giou
from detr_accel.models.denoising import DenoisingQueries
from detr_accel.structures import Batch, Targets

ENORMOUS_PIXEL = 100.0  # normalised pixels of any picture lie within -5..5
ENORMOUS_WEIGHT = 1e4  # trained DETRs stay below 100


@dataclass(frozen=True)
class Image:
    """One image of a capture."""

    micro_batch: int  # place among the capture's micro-batches
    index: int  # place in its micro-batch
    image_id: int
    name: str  # file name, "" where the source has none

    def __str__(self) -> str:
        return f"{self.name or 'image'} (id {self.image_id}, image {self.index} of micro-batch {self.micro_batch})"


@dataclass(frozen=True)
class Fault:
    """Something wrong with what reached the model. ``fatal``: no model and no precision survives it."""

    kind: str  # pixels, box, label
    fatal: bool
    image: Image
    words: str
    box: int | None = None  # place among the image's boxes


@dataclass(frozen=True)
class TensorFault:
    """A parameter or buffer that is not finite (``num_bad`` > 0) or enormous."""

    name: str
    num_bad: int
    num: int
    peak: float  # largest finite magnitude

    def __str__(self) -> str:
        if self.num_bad:
            return f"{self.name} ({self.num_bad} of {self.num} entries not finite)"
        return f"{self.name} (up to {self.peak:.3g})"


def images_of(row: dict[str, Any], micro_batch: int) -> list[Image]:
    """The images of one row of ``capture.json``."""
    names = row.get("names") or [""] * len(row["image_ids"])
    pairs = zip(row["image_ids"], names, strict=True)
    return [Image(micro_batch, i, image_id, name) for i, (image_id, name) in enumerate(pairs)]


def check_batch(batch: Batch, images: list[Image], num_classes: int) -> Iterator[Fault]:
    """What is wrong with the pixels, boxes and labels of a micro-batch."""
    for pixels, target, image in zip(batch.images, batch.targets, images, strict=True):
        yield from _check_pixels(pixels, image)
        for number, (box, label) in enumerate(zip(target.boxes_cxcywh, target.labels.tolist(), strict=True)):
            if not 0 <= label < num_classes:
                words = f"label {label}, where the model has 0 to {num_classes - 1}"
                yield Fault("label", True, image, words, number)
            yield from _check_box(box, image, number)


def _check_pixels(pixels: Tensor, image: Image) -> Iterator[Fault]:
    finite = torch.isfinite(pixels)
    bad = int((~finite).any(0).sum())
    peak = torch.where(finite, pixels.abs(), 0).max().item()
    if bad:
        words = f"{bad} of {pixels[0].numel()} pixels are not finite, the others within +-{peak:.3g}"
        yield Fault("pixels", True, image, words)
    elif peak > ENORMOUS_PIXEL:
        yield Fault("pixels", False, image, f"pixels reach {peak:.3g}, where normalised ones stay within +-5")


def _check_box(box: Tensor, image: Image, number: int) -> Iterator[Fault]:
    """box: [4] cxcywh, 0..1."""
    shown = "(" + ", ".join(f"{v:.4g}" for v in box.tolist()) + ")"
    if not torch.isfinite(box).all():
        yield Fault("box", True, image, f"box {number} cxcywh {shown} is not finite", number)
    elif (box[2:] <= 0).any():
        yield Fault("box", False, image, f"box {number} cxcywh {shown} has no area", number)
    else:
        edges = cxcywh_to_xyxy(box)
        if edges.min() < -1e-3 or edges.max() > 1 + 1e-3:
            yield Fault("box", False, image, f"box {number} cxcywh {shown} reaches out of the image", number)


def check_tensors(model: nn.Module) -> list[TensorFault]:
    """Parameters and buffers that are not finite, and parameters that are enormous, in the model's own order."""
    faults = []
    for tensors, limit in ((model.named_parameters(), ENORMOUS_WEIGHT), (model.named_buffers(), float("inf"))):
        for name, t in tensors:
            if not t.is_floating_point() or not t.numel():
                continue
            finite = torch.isfinite(t.detach())
            peak = torch.where(finite, t.detach().abs(), 0).max().item()
            bad = t.numel() - int(finite.sum())
            if bad or peak > limit:
                faults.append(TensorFault(name, bad, t.numel(), peak))
    return faults


@torch.no_grad()
def terms_by_image(
    criterion: nn.Module,
    outputs: dict,
    targets: list[Targets],
    counts: dict,
    denoising: DenoisingQueries | None = None,
) -> list[list[str]]:
    """For each of B images the loss terms, by name and decoder layer, that are not finite for it alone."""
    found = []
    for i, target in enumerate(targets):
        result = criterion(_only(outputs, i), [target], counts, denoising and denoising.only(i))
        found.append([name for name, value in result.losses.items() if not torch.isfinite(value)])
    return found


@torch.no_grad()
def worst_pair(criterion: nn.Module, outputs: dict, targets: list[Targets], image: int) -> tuple[int, float] | None:
    """The target of an image whose matched pairs cost most, and how much: L1 and GIoU with their weights, the worst
    decoder layer counting; one that is not finite comes before any that is. None for an image without boxes."""
    target, own = targets[image], _only(outputs, image)
    if not len(target.labels):
        return None
    layers = [*own["aux_outputs"], own]
    logits = torch.stack([o["pred_logits"] for o in layers]).float()  # [L, 1, Q, C + 1]
    boxes = torch.stack([o["pred_boxes"] for o in layers]).float()  # [L, 1, Q, 4]
    truth = target.boxes_cxcywh.to(boxes.dtype)
    match = criterion.matcher(logits, boxes, target.labels, truth, [len(truth)])
    placed = boxes[:, 0].gather(1, match.query_index[..., None].expand(-1, -1, 4))  # [L, M, 4]
    wanted = truth[match.target_index]
    overlap = giou(cxcywh_to_xyxy(placed), cxcywh_to_xyxy(wanted))
    loss = criterion.weights["bbox"] * (placed - wanted).abs().sum(-1) + criterion.weights["giou"] * (1 - overlap)
    if not loss.numel():
        return None
    worst = int(torch.where(torch.isfinite(loss), loss, float("inf")).argmax())
    return int(match.target_index.flatten()[worst]), loss.flatten()[worst].item()


def _only(outputs: dict, image: int) -> dict:
    """The outputs of one image, as a batch of one."""
    cut = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            cut[name] = value[image : image + 1].detach()
        else:
            cut[name] = _only(value, image) if isinstance(value, dict) else [_only(o, image) for o in value]
    return cut


def blame_by_peak(images: list[Image], peaks: list[float] | None) -> list[Image]:
    """Where every image of a tensor is bad: the one that brought numbers 100 times as large as any other, else none."""
    if peaks is None or len(peaks) < 2:
        return []
    order = sorted(range(len(peaks)), key=peaks.__getitem__)
    return [images[order[-1]]] if peaks[order[-1]] > 100 * peaks[order[-2]] else []


def with_place(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """On the device, pixels in the precision of the run."""
    return replace(batch.to(device), images=batch.images.to(device, dtype))
