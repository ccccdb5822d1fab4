"""From a task to a batch: decode, transform, normalise, pad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from detr_accel.data.compose import compose, mean_levels
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
    targets, positions, lost, fill = [], [], [], mean_levels(mean)
    for position, plan, samples in _samples(source, task, leave_out, lost):
        row, (h, w) = len(targets), plan.size_px
        pieces = [transform(s.image, one) for s, (_, one, _) in zip(samples, plan.images(0), strict=True)]
        normalise_into(images[row, :, :h, :w], compose(pieces, plan, fill), mean, std)
        mask[row, :h, :w] = False
        targets.append(_targets(samples, plan))
        positions.append(position)
    if lost:
        images, mask = images[: len(targets)].clone(), mask[: len(targets)].clone()
    places = _places(task, positions)
    return Batch(images, mask, targets, tuple(positions), task.window, task.epoch, tuple(lost), places=places)


def plan_batch(
    source: Source, task: Task, mean: tuple[float, ...], std: tuple[float, ...], *, leave_out: bool = False
) -> PlannedBatch:
    """As ``make_batch``, decoded only: the pixels are worked on where the batch is moved to."""
    lost: list[Lost] = []
    rows = list(_samples(source, task, leave_out, lost))
    images = [torch.from_numpy(sample.image) for _, _, samples in rows for sample in samples]
    pixels = torch.cat([i.reshape(-1) for i in images]) if images else torch.zeros(0, dtype=torch.uint8)
    return PlannedBatch(
        pixels, tuple(tuple(i.shape[:2]) for i in images), tuple(plan for _, plan, _ in rows), task.canvas_px, mean,
        std, [_targets(sample, plan) for _, plan, sample in rows], tuple(position for position, _, _ in rows),
        task.window, task.epoch, tuple(lost), places=_places(task, [position for position, _, _ in rows]),
    )  # fmt: skip


def _places(task: Task, positions: list[int]) -> tuple[int, ...]:
    """Of what could be read, in the task; empty where that is everything."""
    return () if len(positions) == len(task.positions) else tuple(task.positions.index(p) for p in positions)


def _samples(source: Source, task: Task, leave_out: bool, lost: list[Lost]) -> Iterator[tuple[int, Plan, list[Sample]]]:
    """Position, plan and decoded images of each that can be read; the others are added to ``lost``.

    A further image on a plan's canvas that cannot be read is left out of the plan: it is named where its own turn
    comes, once an epoch.
    """
    for position, index, plan in zip(task.positions, task.indices, task.plans, strict=True):
        samples, layers = [], []
        try:
            samples.append(source.sample(index, None if plan.exact else plan.needs_px))
        except UserError as error:
            if not leave_out:
                raise
            lost.append((source.image_id(index), str(error)))
            continue
        for layer in plan.layers:
            try:
                samples.append(source.sample(layer.index, layer.plan.needs_px))
                layers.append(layer)
            except UserError:
                if not leave_out:
                    raise
        yield position, replace(plan, layers=tuple(layers)) if len(layers) < len(plan.layers) else plan, samples


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
