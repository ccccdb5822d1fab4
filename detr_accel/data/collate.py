"""From a task to a batch: decode, transform, normalise, pad."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from detr_accel.data.device import PlannedBatch
from detr_accel.data.geometry import Plan, apply_boxes
from detr_accel.data.pixels import normalise_into, transform
from detr_accel.data.sampler import Task
from detr_accel.data.source import Source
from detr_accel.structures import Batch, Lost, Sample, Targets, UserError


def make_batch(
    source: Source, task: Task, mean: tuple[float, ...], std: tuple[float, ...], *, leave_out: bool = False
) -> Batch:
    """Decode and lay out one task.

    Args:
        leave_out: an image that cannot be read is not there, and named in ``lost``; the canvas stays the window's, so
            that it changes nothing for the others.
    Returns:
        images float32 [B, 3, H, W], padded right and bottom with 0 after normalisation; mask bool [B, H, W], True where
        padded. B is 0 where all are lost.
    Raises:
        UserError: an image cannot be decoded, or is not of the size its record says.
    """
    height, width = task.canvas_px
    images = torch.zeros(len(task.indices), 3, height, width)
    mask = torch.ones(len(task.indices), height, width, dtype=torch.bool)
    targets, positions, lost = [], [], []
    for position, plan, sample in _samples(source, task, leave_out, lost):
        row, (h, w) = len(targets), plan.size_px
        normalise_into(images[row, :, :h, :w], transform(sample.image, plan), mean, std)
        mask[row, :h, :w] = False
        targets.append(_targets(sample, plan))
        positions.append(position)
    if lost:
        images, mask = images[: len(targets)].clone(), mask[: len(targets)].clone()
    return Batch(images, mask, targets, tuple(positions), task.window, task.epoch, tuple(lost))


def plan_batch(
    source: Source, task: Task, mean: tuple[float, ...], std: tuple[float, ...], *, leave_out: bool = False
) -> PlannedBatch:
    """As ``make_batch``, decoded only: the pixels are worked on where the batch is moved to."""
    lost: list[Lost] = []
    rows = list(_samples(source, task, leave_out, lost))
    images = [torch.from_numpy(sample.image) for _, _, sample in rows]
    pixels = torch.cat([i.reshape(-1) for i in images]) if images else torch.zeros(0, dtype=torch.uint8)
    return PlannedBatch(
        pixels, tuple(tuple(i.shape[:2]) for i in images), tuple(plan for _, plan, _ in rows), task.canvas_px, mean,
        std, [_targets(sample, plan) for _, plan, sample in rows], tuple(position for position, _, _ in rows),
        task.window, task.epoch, tuple(lost),
    )  # fmt: skip


def _samples(source: Source, task: Task, leave_out: bool, lost: list[Lost]) -> Iterator[tuple[int, Plan, Sample]]:
    """Position, plan and decoded image of each that can be read; the others are added to ``lost``."""
    for position, index, plan in zip(task.positions, task.indices, task.plans, strict=True):
        try:
            sample = source.sample(index, None if plan.exact else plan.needs_px)
        except UserError as error:
            if not leave_out:
                raise
            lost.append((source.image_id(index), str(error)))
            continue
        yield position, plan, sample


def _targets(sample: Sample, plan: Plan) -> Targets:
    boxes, labels = apply_boxes(plan, sample.boxes_xyxy_px, sample.labels)
    return Targets(
        sample.image_id, torch.from_numpy(labels), torch.from_numpy(boxes), plan.size_px, plan.orig_px,
        num_cut=sample.num_cut, is_blank=_is_blank(sample.image),
    )  # fmt: skip


def _is_blank(image: np.ndarray) -> bool:
    """Whether all pixels of uint8 [H, W, 3] are one colour; a few of them tell for nearly every image."""
    first = image[0, 0]
    return bool((image[::37, ::37] == first).all() and (image == first).all())
