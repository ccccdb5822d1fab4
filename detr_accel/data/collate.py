"""From a task to a batch: decode, transform, normalise, pad."""

from __future__ import annotations

import numpy as np
import torch

from detr_accel.data.compose import compose, mean_levels
from detr_accel.data.device import PlannedBatch
from detr_accel.data.geometry import Plan, apply_boxes
from detr_accel.data.pixels import normalise_into, transform
from detr_accel.data.sampler import Task
from detr_accel.data.source import Source
from detr_accel.structures import Batch, Sample, Targets


def make_batch(source: Source, task: Task, mean: tuple[float, ...], std: tuple[float, ...]) -> Batch:
    """Decode and lay out one task.

    Returns:
        images float32 [B, 3, H, W], padded right and bottom with 0 after normalisation; mask bool [B, H, W], True where
        padded.
    Raises:
        UserError: an image cannot be decoded, or is not of the size its record says.
    """
    height, width = task.canvas_px
    images = torch.zeros(len(task.indices), 3, height, width)
    mask = torch.ones(len(task.indices), height, width, dtype=torch.bool)
    targets, fill = [], mean_levels(mean)
    for row, (index, plan) in enumerate(zip(task.indices, task.plans, strict=True)):
        samples = _samples(source, index, plan)
        pieces = [transform(s.image, one) for s, (_, one, _) in zip(samples, plan.images(index), strict=True)]
        h, w = plan.size_px
        normalise_into(images[row, :, :h, :w], compose(pieces, plan, fill), mean, std)
        mask[row, :h, :w] = False
        targets.append(_targets(samples, plan))
    return Batch(images, mask, targets, task.positions, task.window, task.epoch)


def plan_batch(source: Source, task: Task, mean: tuple[float, ...], std: tuple[float, ...]) -> PlannedBatch:
    """As ``make_batch``, decoded only: the pixels are worked on where the batch is moved to."""
    samples = [_samples(source, index, plan) for index, plan in zip(task.indices, task.plans, strict=True)]
    images = [torch.from_numpy(s.image) for of_plan in samples for s in of_plan]
    return PlannedBatch(
        torch.cat([i.reshape(-1) for i in images]), tuple(tuple(i.shape[:2]) for i in images), task.plans,
        task.canvas_px, mean, std, [_targets(s, p) for s, p in zip(samples, task.plans, strict=True)], task.positions,
        task.window, task.epoch,
    )  # fmt: skip


def _samples(source: Source, index: int, plan: Plan) -> list[Sample]:
    """Every image that a plan takes."""
    return [source.sample(i, None if one.exact else one.needs_px) for i, one, _ in plan.images(index)]


def _targets(samples: list[Sample], plan: Plan) -> Targets:
    """Of all images on the canvas; the first one gives the id and the file's size."""
    first, found = samples[0], [
        apply_boxes(one, s.boxes_xyxy_px, s.labels)
        for s, (_, one, _) in zip(samples, plan.images(0), strict=True)
    ]  # fmt: skip
    boxes, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Targets(
        first.image_id, torch.from_numpy(labels), torch.from_numpy(boxes), plan.size_px, plan.orig_px,
        num_cut=sum(s.num_cut for s in samples), is_blank=_is_blank(first.image),
    )  # fmt: skip


def _is_blank(image: np.ndarray) -> bool:
    """Whether all pixels of uint8 [H, W, 3] are one colour; a few of them tell for nearly every image."""
    first = image[0, 0]
    return bool((image[::37, ::37] == first).all() and (image == first).all())
